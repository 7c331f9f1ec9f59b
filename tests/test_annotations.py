"""COCO annotations: packed arrays against a plain reading, and each rule for what is wrong in a file."""

import copy
import itertools
import json
import os
import shutil

import numpy as np
import pytest
from folders import annotation_path, random_content, write

from msad.data import annotations
from msad.data.dataset import open_data
from msad.data.errors import InputError


def plainly(content):
    """{image id: [(label, xyxy, area, crowd)]} with dictionaries and loops only."""
    ids = sorted(c["id"] for c in content["categories"])
    found = {image["id"]: [] for image in content["images"]}
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        found[a["image_id"]].append((ids.index(a["category_id"]), [x, y, x + w, y + h], a["area"], bool(a["iscrowd"])))
    return found


def packed(read):
    """The same from packed arrays."""
    columns = [getattr(read, name).tolist() for name in ("labels", "boxes", "areas", "crowd")]
    return {int(read.image_ids[i]): list(zip(*(c[read.of_image(i)] for c in columns))) for i in range(len(read))}


def read_back(data, content):
    """What is read of a file with a content."""
    write(data, content)
    return annotations.read(data, "train")


def error_of(data, content=None, split="train"):
    """The InputError that reading gives, of a file with a content if there is one: one line."""
    if content:
        write(data, content, split)
    with pytest.raises(InputError) as caught:
        annotations.read(data, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("seed", range(2))
def test_packed_arrays_equal_a_plain_reading(tmp_path, seed):
    content = random_content(seed)
    content["annotations"][4].update(bbox=[-3, -2.5, 5000, 6], area=30_000)  # partly outside: kept as annotated
    read = read_back(tmp_path, content)
    assert packed(read) == plainly(content)
    assert read.classes == tuple({"id": i, "name": f"class {i}"} for i in (3, 17, 90))
    assert read.sizes.tolist() == [[i["height"], i["width"]] for i in content["images"]]
    assert [read.path(i) for i in range(len(read))] == [tmp_path / "train" / i["file_name"] for i in content["images"]]
    empty = len(content["images"]) - len({a["image_id"] for a in content["annotations"]})
    crowd = sum(a.get("iscrowd", 0) for a in content["annotations"])
    assert read.skipped == {}
    assert read.summary() == f"6 images ({empty} without boxes), 25 boxes ({crowd} crowd), 3 classes"


@pytest.mark.parametrize("written, crowd", [("0", False), (None, False), (True, True), ("1", True), (1.0, True)])
def test_crowd_flags_are_read_however_they_are_written(tmp_path, written, crowd):
    content = random_content(0)
    for a in content["annotations"]:
        a["iscrowd"] = written
    assert (read_back(tmp_path, content).crowd == crowd).all()


def test_names_may_be_foreign_no_utf_8_in_subfolders_or_links(tmp_path):
    """A byte that is no UTF-8 (of an old archive) stands in JSON as half a pair of surrogates, as Python writes it."""
    content = random_content(0)
    names = ["été/雪 1.png", "./a b.png", "linked/x/ü.png", "linked.png", "'q\".png", "sub\udce9/bille\udce9.png"]
    for image, name in zip(content["images"], names):
        image["file_name"] = name
    folder, elsewhere = tmp_path / "data" / "train", tmp_path / "elsewhere"
    (elsewhere / "x").mkdir(parents=True)
    (elsewhere / "x" / "ü.png").write_text("behind a folder")
    (elsewhere / "one.png").write_text("behind a file")
    folder.mkdir(parents=True)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked.png").symlink_to(elsewhere / "one.png")
    write(tmp_path / "data", content)
    read = annotations.read(tmp_path / "data", "train")
    assert [read.path(i) for i in range(6)] == [folder / name for name in names]
    assert [read.path(i).read_text() for i in range(6)] == ["", "", "behind a folder", "behind a file", "", ""]
    assert b"bille\xe9.png" in os.listdir(bytes(folder) + b"/sub\xe9")


@pytest.mark.parametrize("name", ["val", "valid"])
def test_annotations_beside_the_pictures_are_read_too(tmp_path, name):
    content = random_content(0)
    for split, folder in (("train", "train"), ("val", name)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "_annotations.coco.json").write_text(json.dumps(content))
        for image in content["images"]:
            (tmp_path / folder / image["file_name"]).touch()
        read = annotations.read(tmp_path, split)
        assert read.folder == tmp_path / folder and packed(read) == plainly(content)
    write(tmp_path, random_content(1))
    assert packed(annotations.read(tmp_path, "train")) == plainly(random_content(1)), "COCO's own layout comes first"


def test_suffix_of_the_file_names_the_folder(tmp_path):
    write(tmp_path, random_content(0), "val2017")
    assert annotations.read(tmp_path, "val").folder == tmp_path / "val2017"
    write(tmp_path, random_content(0), "val2014")
    assert "instances_val*.json: 2 files" in error_of(tmp_path, split="val")
    assert f"instances_train*.json: no such file, and no {tmp_path}/train/_annotations.coco.json" in error_of(tmp_path)
    write(tmp_path, random_content(0))
    shutil.rmtree(tmp_path / "train")
    assert f"{tmp_path / 'train'}: cannot be read (No such file or directory)" in error_of(tmp_path)


@pytest.mark.parametrize("first, kind", [
    (2**53 + 1, int), (2**64 + 1, int), (-(2**60) - 1, int), (17, float), (2**55, float),
])  # fmt: skip
def test_ids_are_whole_numbers_of_any_size_or_written_with_a_point(tmp_path, first, kind):
    content, step = random_content(6), 1 if kind is int else 2**10  # neighbours, alike as floats
    images = {image["id"]: first + step * n for n, image in enumerate(content["images"])}
    classes = {c["id"]: first + 5 * step * n for n, c in enumerate(content["categories"])}
    for entry in content["images"]:
        entry["id"] = kind(images[entry["id"]])
    for entry in content["categories"]:
        entry["id"] = kind(classes[entry["id"]])
    for number, entry in enumerate(content["annotations"]):
        kinds = (int, kind) if number % 2 else (kind, int)
        entry["image_id"] = kinds[0](images[entry["image_id"]])
        entry["category_id"] = kinds[1](classes[entry["category_id"]])
    read = read_back(tmp_path, content)
    assert packed(read) == plainly(content) and read.skipped == {}
    assert [c["id"] for c in read.classes] == sorted(classes.values())


NAN, INF = float("nan"), float("inf")

UNUSABLE = [  # the fault each of these entries counts under: its first
    ({"bbox": [5, 5, 0, 7]}, "boxes without area"),
    ({"bbox": [5, 5, 7, -3]}, "boxes without area"),
    ({"bbox": [NAN, 5, 7, 3]}, "boxes not finite"),
    ({"bbox": [5, -INF, 4, 3]}, "boxes not finite"),
    ({"bbox": [5, 5, 1e300, 3]}, "boxes not finite"),
    ({"bbox": [500, 5, 7, 3]}, "boxes outside their image"),
    ({"bbox": [5, 500, 7, 3]}, "boxes outside their image"),
    ({"bbox": [-7, 5, 7, 3]}, "boxes outside their image"),
    ({"bbox": [5, -3, 7, 3]}, "boxes outside their image"),
    ({"image_id": 12345}, "of unknown images"),
    ({"category_id": 4}, "of unknown categories"),
    ({"category_id": 91, "image_id": -1, "bbox": [NAN, 0, 0, 0]}, "of unknown images"),
]


def test_an_unusable_annotation_is_left_out_and_counted(tmp_path):
    content = random_content(1, boxes=60)
    rest, good = plainly(content), content["annotations"][4]

    def read_with(*changes):
        bad = [good | change for change in changes]
        read = read_back(tmp_path, content | {"annotations": bad + content["annotations"]})
        assert packed(read) == rest, changes
        return read

    for change, reason in UNUSABLE:
        assert read_with(change).skipped == {reason: 1}, change
    assert read_with(*(change for change, _ in UNUSABLE)).summary().split("; ")[1] == (
        "left out: 3 boxes not finite, 4 boxes outside their image, 2 boxes without area, 1 of unknown categories, "
        "2 of unknown images"
    )


@pytest.mark.parametrize("area", [NAN, None, "absent", -1, INF, 0, 0.39, 1e12, 60 * 40 * 1.02])
def test_an_area_that_cannot_be_is_the_box_s_and_any_other_is_believed(tmp_path, area):
    content = random_content(1, sides=(100, 120))
    for a, possible in zip(content["annotations"], (2410, 2400, 1000, 40, 3, area)):
        a.update(area=possible, bbox=[10, 8, 60, 40])
    if area == "absent":
        del content["annotations"][5]["area"]
    write(tmp_path, content)
    content["annotations"][5]["area"] = 60 * 40
    read = annotations.read(tmp_path, "train")
    assert packed(read) == plainly(content)
    told = "; 1 areas cannot be their boxes': width times height stands for them" in read.summary()
    assert told == read.wrong_areas == (area not in (None, "absent") and area == area), "what is missing is no fault"


def test_boxes_that_are_there_twice_are_counted(tmp_path):
    content = random_content(1, sides=(100, 120))
    boxes = content["annotations"]
    boxes[0].update(bbox=[10, 8, 60, 40], category_id=3)
    other = next(i["id"] for i in content["images"] if i["id"] != boxes[0]["image_id"])
    boxes += [boxes[0] | change for change in ({"category_id": 17}, {"image_id": other}, {"bbox": [12, 8, 60, 40]})]
    assert "twice" not in read_back(tmp_path, content).summary(), "another class, image or place"
    boxes += [boxes[0], boxes[0] | {"bbox": [10.2, 8, 59.9, 40.1]}]
    assert "; 2 boxes are there twice" in read_back(tmp_path, content).summary()


def set_in(key, index, **values):
    return lambda content: content[key][index].update(values)


BROKEN = {
    "empty file": (lambda content: b"", "is empty"),
    "half a file": (lambda content: json.dumps(content).encode()[:-40], "not valid JSON"),
    "Latin 1": (lambda content: '{"images": "été"}'.encode("latin1"), "not valid JSON (UnicodeDecodeError"),
    "Git LFS": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    "endless nesting": (lambda content: b"[" * 200_000, "not valid JSON"),
    "a list": (lambda content: b"[1, 2]", "top level"),
    "no images key": (lambda content: content.pop("images"), "no list 'images'"),
    "no images": (lambda content: content["images"].clear(), "has no images"),
    "an image twice": (lambda content: content["images"].append(content["images"][0]), "stands for two of images"),
    "a class twice": (lambda content: content["categories"].append(content["categories"][0]), "for two of categories"),
    "no width": (lambda content: content["images"][3].pop("width"), "images[3]: field 'width' is None, must be"),
    "zero height": (set_in("images", 2, height=0), "images[2]: field 'height' is 0, must be a number of pixels"),
    "an entry is a text": (lambda content: content["images"].insert(2, "x"), "images[2]: field 'id' is None"),
    "name is a number": (set_in("images", 1, file_name=7), "images[1]: field 'file_name' is 7, must be a text"),
    "a class without a name": (lambda content: content["categories"][0].pop("name"), "categories[0]: field 'name'"),
    "half an id": (set_in("annotations", 9, image_id=1.5), "annotations[9]: field 'image_id' is 1.5, must be"),
    "an id as text": (set_in("annotations", 9, category_id="3"), "annotations[9]: field 'category_id' is '3', must"),
    "no bbox": (lambda content: content["annotations"][9].pop("bbox"), "annotations[9]: field 'bbox' is None"),
    "three numbers": (set_in("annotations", 9, bbox=[1, 2, 3]), "annotations[9]: field 'bbox' is [1, 2, 3], must be"),
    "a thousand numbers": (set_in("annotations", 9, bbox=[1] * 1000), "annotations[9]: field 'bbox' is [1, 1, 1"),
    "a number too large": (set_in("annotations", 9, bbox=[1, 2, 3, 10**400]), "annotations[9]: field 'bbox' is [1, 2"),
    "crowd in words": (set_in("annotations", 9, iscrowd="false"), "annotations[9]: field 'iscrowd' is 'false', must"),
    "crowd is a count": (set_in("annotations", 9, iscrowd=2), "annotations[9]: field 'iscrowd' is 2, must be 0 or 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_trusted_is_refused_by_name(tmp_path, case):
    edit, expected = BROKEN[case]
    content = random_content(2)
    write(tmp_path, content)
    result = edit(content)
    annotation_path(tmp_path).write_bytes(result if isinstance(result, bytes) else json.dumps(content).encode())
    message = error_of(tmp_path)
    assert str(annotation_path(tmp_path)) in message and expected in message
    assert len(message) < len(str(annotation_path(tmp_path))) + 160


@pytest.mark.parametrize("name, there", [
    ("000001", "000001.jpg"), ("IMG_1.JPG", "IMG_1.jpg"), ("train2017/a.png", "a.png"), ("", "a.png"), (".", "a.png"),
    ("cut \ud83d.png", "nothing"),  # half an emoji, which no file name can have
    ("x" * 300, "nothing"), ("a\0b.png", "nothing"),
])  # fmt: skip
def test_a_missing_image_is_named_and_counted_with_what_is_there(tmp_path, name, there):
    content = random_content(3, images=3)
    for image, other in zip(content["images"], (name, name + "2", there)):
        image["file_name"] = other
    write(tmp_path, {"images": content["images"][2 if there != "nothing" else 3 :]})
    annotation_path(tmp_path).write_text(json.dumps(content))
    missing = 2 if there != "nothing" else 3
    expected = f"{missing} of 3 images are missing, such as {name!r}; {tmp_path / 'train'} has {there!r}: correct the"
    assert expected in error_of(tmp_path)


@pytest.mark.parametrize("train, val, fits", [
    (("cat", "dog", "owl"), ("cat", "dog", "owl"), True),
    (("cat", "dog", "owl"), (None, "dog", "owl", "no box has it"), True),
    (("cat", "dog", "owl"), ("no box has it", "dog", "owl"), True),
    (("cat", "dog", "owl"), ("cat", "owl", "dog"), False),
    (("cat", "dog", "owl"), ("dog", "owl"), False),
    (("cat", "dog"), ("cat", "dog", "owl"), False),
])  # fmt: skip
def test_a_split_s_labels_are_the_training_split_s_where_its_boxes_have_these_classes(tmp_path, train, val, fits):
    content = random_content(3)
    train, val = ([{"id": 3 + k, "name": name} for k, name in enumerate(names) if name] for names in (train, val))
    for a in content["annotations"]:
        a["category_id"] = [c["id"] for c in val if c["name"] in ("dog", "owl")][a["id"] % 2]
    named = {c["id"]: c["name"] for c in val}
    expected = {a["id"]: named[a["category_id"]] for a in content["annotations"]}
    one = content["annotations"][0] | {"category_id": train[0]["id"], "iscrowd": 0}
    write(tmp_path, random_content(3) | {"categories": train, "annotations": [one]})
    write(tmp_path, content | {"categories": val}, "val")
    if not fits:
        with pytest.raises(InputError) as caught:
            open_data(tmp_path)
        files = [str(annotation_path(tmp_path, split)) for split in ("val", "train")]
        assert all(file in str(caught.value) for file in files) and "give both the same categories" in str(caught.value)
        return
    first, second = open_data(tmp_path)
    assert second.classes == first.classes == tuple(train)
    boxes = sorted(content["annotations"], key=lambda a: [i["id"] for i in content["images"]].index(a["image_id"]))
    assert [second.classes[label]["name"] for label in second.labels] == [expected[a["id"]] for a in boxes]


def test_a_name_is_judged_as_it_is_written(tmp_path):
    content = random_content(3)
    content["images"][0]["file_name"] = "sub/a.png"
    write(tmp_path, content)
    folder = tmp_path / "train"
    (folder / "a.png").touch()
    (folder / "linked").symlink_to(folder / "sub")
    names = "sub/../a.png", "sub/../../train/a.png", "..", "linked/../a.png", str(folder / "a.png"), "/etc/hostname"
    for name in names:
        content["images"][0]["file_name"] = name
        annotation_path(tmp_path).write_text(json.dumps(content))
        assert f"{annotation_path(tmp_path)}: file_name {name!r} points outside {folder}" in error_of(tmp_path)


def test_entries_of_the_same_file_are_told(tmp_path):
    content = random_content(3)
    for image, name in zip(content["images"], ["a.png", "b.png", "./a.png", "sub/c.png", "sub//c.png", "a.png"]):
        image["file_name"] = name
    assert "; 3 entries name the same file as another" in read_back(tmp_path, content).summary()


def boxes_written(convert, images=20, sides=(200, 300), largest=1.0):
    """Content of three boxes an image, at most `largest` times its size, anywhere in it, each written as
    convert(x1, y1, x2, y2, width, height)."""
    rng = np.random.default_rng(0)
    content = random_content(0, images, 0, sides)
    for number, image in enumerate(content["images"] * 3):
        width, height = image["width"], image["height"]
        w, h = (rng.integers(1, max(2, largest * side)) for side in (width, height))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        box = [float(value) for value in convert(x, y, x + w, y + h, width, height)]
        content["annotations"].append({"id": number, "image_id": image["id"], "category_id": 3, "bbox": box})
    return content


SMALL, LEAVE = "60 of 60 boxes lie between 0 and ", " of 60 boxes leave their image or have negative sides"
WRONG_UNITS = {
    "fractions": (lambda x, y, X, Y, w, h: (x / w, y / h, (X - x) / w, (Y - y) / h), SMALL + "1"),
    "fractions of corners": (lambda x, y, X, Y, w, h: (x / w, y / h, X / w, Y / h), SMALL + "1"),
    "fractions a little outside": (lambda x, y, X, Y, w, h: (x / w - 0.01, y / h, X / w - x / w, 0.3), SMALL + "1"),
    "percentages": (lambda x, y, X, Y, w, h: (99 * x / w, 99 * y / h, 99 - 99 * x / w, 99 - 99 * y / h), SMALL + "100"),
    "thousandths": (lambda x, y, X, Y, w, h: (1000 * x / w, 1000 * y / h, 1000 - 999 * x / w, 900), LEAVE),
    "thousandths of large images": (lambda x, y, X, Y, w, h: (x * 5, y * 5, 999 - x * 5, 999 - y * 5), "0 and 1000"),
    "thousandths, corners": (lambda x, y, X, Y, w, h: (0, y, 1000 * X / w, 1000 - 99 * y / h), "0 and 1000"),
    "corners": (lambda x, y, X, Y, w, h: (x, y, X, Y), LEAVE),
    "corners in two of three images": (lambda *b: b[:4] if b[-1] % 3 else plain(*b), LEAVE),
    "centres": (lambda x, y, X, Y, w, h: ((x + X) / 2, (y + Y) / 2, X - x, Y - y), LEAVE),
}


@pytest.mark.parametrize("case", WRONG_UNITS)
def test_boxes_in_other_units_are_refused_with_their_number_and_an_example(tmp_path, case):
    convert, words = WRONG_UNITS[case]
    content = boxes_written(convert)
    if "1000" in words:
        for image in content["images"]:
            image.update(width=10 * image["width"], height=10 * image["height"])
    message = error_of(tmp_path, content)
    assert f"{annotation_path(tmp_path)}: " in message and words in message
    assert "COCO's bbox is [x, y, width, height] in pixels" in message
    box = json.loads(message[message.index("such as ") + 8 : message.index(" in one of ")])
    assert box in [a["bbox"] for a in content["annotations"]]


def test_most_boxes_below_a_pixel_or_a_fifth_outside_are_too_many_and_fewer_are_not(tmp_path):
    content = boxes_written(WRONG_UNITS["fractions"][0])
    boxes = content["annotations"]
    for number in range(29):  # the rest is right, or unusable
        boxes[number]["bbox"] = [[5, 5, 9, 9], [5, 5, 0, 9]][number % 2]
    assert "31 of 60 boxes lie between 0 and 1" in error_of(tmp_path, content)
    boxes[29]["bbox"] = [5, 5, 9, 9]
    assert len(read_back(tmp_path, content).boxes) == 60 - 14
    for number, a in enumerate(boxes):
        a["bbox"] = [900, 5, 9, 9] if number % 5 == 0 else [5, 5, 9, 9]
    boxes[1].update(image_id=12345)  # of 59 that can be judged
    assert "12 of 59 boxes leave their image" in error_of(tmp_path, content)
    boxes[0]["bbox"] = [5, 5, 9, 9]
    assert read_back(tmp_path, content).skipped == {"boxes outside their image": 11, "of unknown images": 1}


plain = lambda x, y, X, Y, w, h: (x, y, X - x, Y - y)
ONE = boxes_written(plain, images=1)
RIGHT = {
    "anywhere": boxes_written(plain),
    "small": boxes_written(plain, largest=0.01),
    "no box": ONE | {"annotations": []},
    "one box, far outside": ONE | {"annotations": [ONE["annotations"][0] | {"bbox": [1, 1, 999, 999]}]},
    "counted from 1": boxes_written(lambda x, y, X, Y, w, h: (x + 1, y + 1, X - x, Y - y)),
    "the whole image": boxes_written(lambda x, y, X, Y, w, h: (0, 0, w, h)),
    "the upper left corner, larger than its place": boxes_written(lambda x, y, X, Y, w, h: (1, 1, w / 2, h / 2)),
    "a little outside all around": boxes_written(lambda x, y, X, Y, w, h: (x - 3, y - 3, X - x + 6, Y - y + 6)),
    "far outside, now and then": boxes_written(lambda x, y, X, Y, w, h: (x, y, X - x + w * (x % 10 == 0), Y - y)),
    "a corner of the images": boxes_written(lambda x, y, X, Y, w, h: (20, 15, 60, 40)),
    "half of a pixel, some": boxes_written(lambda *box: (0, 0, 0.5, 0.5) if sum(box[:2]) % 3 == 0 else plain(*box)),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_boxes_in_pixels_are_not_taken_for_other_units(tmp_path, case):
    read = read_back(tmp_path, RIGHT[case])
    assert len(read.boxes) + sum(read.skipped.values()) == len(RIGHT[case]["annotations"])
    assert sum(read.skipped.values()) <= 2  # counted from 1, a box may lie outside


STRANGE = (None, "", "x", -1, 0, 0.5, 3, True, NAN, 1e300, 10**400, [], {}, [[1]], {"id": 3}, "é", 2**62)


def test_any_value_in_any_place_gives_a_sound_result_or_one_clear_line(tmp_path):
    content, sound = random_content(4), 0
    write(tmp_path, content)
    places = [(key, field) for key in content for field in content[key][1]]
    for (key, field), value in itertools.product(places, STRANGE):
        changed = copy.deepcopy(content)
        changed[key][1][field] = value
        annotation_path(tmp_path).write_text(json.dumps(changed))
        try:
            read = annotations.read(tmp_path, "train")
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            continue
        sound += 1
        assert len(changed["annotations"]) == len(read.boxes) + sum(read.skipped.values())
        assert len(read.boxes) == len(read.labels) == len(read.areas) == len(read.crowd) == read.starts[-1]
        assert read.starts[0] == 0 and (np.diff(read.starts) >= 0).all() and len(read.starts) == len(read) + 1
        assert np.isfinite(read.boxes).all() and (read.boxes[:, 2:] >= read.boxes[:, :2]).all()
        assert ((read.labels >= 0) & (read.labels < len(read.classes))).all() and (read.sizes > 0).all()
        assert all(read.path(i).exists() for i in range(len(read)))
    assert 40 < sound < 140, "they should neither all pass nor all fail"
