"""COCO annotations: packed arrays against a plain reading, and each rule for what is wrong in a file."""

import copy
import json
import random
import unicodedata

import numpy as np
import pytest
from folders import annotation_path, random_content, write

from msad.data import annotations
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


def error_of(data, split="train"):
    """The InputError that reading gives: one line."""
    with pytest.raises(InputError) as caught:
        annotations.read(data, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("seed", range(5))
def test_packed_arrays_equal_a_plain_reading(tmp_path, seed):
    content = random_content(seed)
    write(tmp_path, content)
    read = annotations.read(tmp_path, "train")
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
    write(tmp_path, content)
    assert (annotations.read(tmp_path, "train").crowd == crowd).all()


def test_names_may_be_foreign_or_in_subfolders(tmp_path):
    content = random_content(0)
    names = ["été/雪 1.png", "a b.png", "sub/x/ü.png", "Ω.png", "'q\".png", "plain.png"]
    for image, name in zip(content["images"], names):
        image["file_name"] = name
    write(tmp_path, content)
    read = annotations.read(tmp_path, "train")
    assert [read.path(i) for i in range(6)] == [tmp_path / "train" / name for name in names]
    assert all(read.path(i).is_file() for i in range(6))


def test_linked_folders_and_files_are_read_from_where_their_names_lead(tmp_path):
    content = random_content(0)
    names = ["linked/a.png", "linked/deep/b.png", "linked.png", "c.png", "./d.png", "sub/e.png"]
    for image, name in zip(content["images"], names):
        image["file_name"] = name
    elsewhere = tmp_path / "elsewhere"
    for name in ("pictures/a.png", "pictures/deep/b.png", "one.png"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text(name)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "linked").symlink_to(elsewhere / "pictures")
    (tmp_path / "data" / "train" / "linked.png").symlink_to(elsewhere / "one.png")
    write(tmp_path / "data", content)
    read = annotations.read(tmp_path / "data", "train")
    contents = [read.path(i).read_text() for i in range(6)]
    assert contents == ["pictures/a.png", "pictures/deep/b.png", "one.png", "", "", ""]


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
    assert "instances_val*.json: 2 files" in error_of(tmp_path, "val")
    assert f"instances_train*.json: no such file, and no {tmp_path}/train/_annotations.coco.json" in error_of(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text("{}")
    assert f"{tmp_path / 'train'}: no such folder" in error_of(tmp_path)


@pytest.mark.parametrize("first", [2**53 + 1, 2**63 - 3, 2**64 + 1, -(2**60) - 1])
def test_ids_are_whole_numbers_of_any_size(tmp_path, first):
    content = random_content(6)
    images = {image["id"]: first + n for n, image in enumerate(content["images"])}  # neighbours, alike as floats
    classes = {c["id"]: first + 5 * n for n, c in enumerate(content["categories"])}
    for entry in content["images"]:
        entry["id"] = images[entry["id"]]
    for entry in content["categories"]:
        entry["id"] = classes[entry["id"]]
    for entry in content["annotations"]:
        entry |= {"image_id": images[entry["image_id"]], "category_id": classes[entry["category_id"]]}
    write(tmp_path, content)
    read = annotations.read(tmp_path, "train")
    assert packed(read) == plainly(content) and read.skipped == {}
    assert [c["id"] for c in read.classes] == [first, first + 5, first + 10]


@pytest.mark.parametrize("factor", [1, 2**55])
def test_a_whole_number_may_be_written_with_a_point(tmp_path, factor):
    content = random_content(6)
    expected = {number * factor: boxes for number, boxes in plainly(content).items()}
    for entry in content["images"] + content["categories"]:
        entry["id"] = float(entry["id"] * factor)
    for number, entry in enumerate(content["annotations"]):
        kind = (int, float)[number % 2]
        entry |= {key: kind(entry[key] * factor) for key in ("image_id", "category_id")}
    write(tmp_path, content)
    assert packed(annotations.read(tmp_path, "train")) == expected


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"bbox": [5, 5, 0, 7]}, "boxes without area"),
        ({"bbox": [5, 5, 7, -3]}, "boxes without area"),
        ({"bbox": [NAN, 5, 7, 3]}, "boxes not finite"),
        ({"bbox": [5, 5, INF, 3]}, "boxes not finite"),
        ({"bbox": [5, -INF, 4, 3]}, "boxes not finite"),
        ({"bbox": [5, 5, 1e300, 3]}, "boxes not finite"),
        ({"bbox": [500, 5, 7, 3]}, "boxes outside their image"),
        ({"bbox": [5, 500, 7, 3]}, "boxes outside their image"),
        ({"bbox": [-7, 5, 7, 3]}, "boxes outside their image"),
        ({"bbox": [5, -3, 7, 3]}, "boxes outside their image"),
        ({"image_id": 12345}, "of unknown images"),
        ({"category_id": 4}, "of unknown categories"),
        ({"category_id": 91, "image_id": -1, "bbox": [NAN, 0, 0, 0]}, "of unknown images"),
    ],
)
def test_an_unusable_annotation_is_left_out_and_counted(tmp_path, change, reason):
    content = random_content(1)
    rest = copy.deepcopy(content)
    content["annotations"][4].update(change)
    del rest["annotations"][4]
    write(tmp_path, content)
    read = annotations.read(tmp_path, "train")
    assert read.skipped == {reason: 1} and read.summary().endswith(f"left out: 1 {reason}")
    assert packed(read) == plainly(rest)


def test_a_box_partly_outside_is_kept_as_annotated(tmp_path):
    content = random_content(1)
    content["annotations"][4]["bbox"] = [-3, -2.5, 5000, 6]
    write(tmp_path, content)
    read = annotations.read(tmp_path, "train")
    assert read.skipped == {} and packed(read) == plainly(content)


@pytest.mark.parametrize("area", [NAN, -1, INF, None, "absent"])
def test_an_area_that_is_no_area_is_the_box_s(tmp_path, area):
    content = random_content(1)
    chosen = content["annotations"][7]
    chosen.update(area=area)
    if area == "absent":
        del chosen["area"]
    write(tmp_path, content)
    chosen["area"] = chosen["bbox"][2] * chosen["bbox"][3]
    assert packed(annotations.read(tmp_path, "train")) == plainly(content)


def set_in(key, index, **values):
    return lambda content: content[key][index].update(values)


BROKEN = {
    "empty file": (lambda content: b"", "is empty"),
    "half a file": (lambda content: json.dumps(content).encode()[:-40], "not valid JSON"),
    "not text": (lambda content: b"\xff\xfe\x00\x01\x80", "not valid JSON"),
    "endless nesting": (lambda content: b"[" * 200_000, "not valid JSON"),
    "a list": (lambda content: b"[1, 2]", "top level"),
    "no images key": (lambda content: content.pop("images"), "no list 'images'"),
    "no annotations key": (lambda content: content.pop("annotations"), "no list 'annotations'"),
    "no images": (lambda content: content["images"].clear(), "has no images"),
    "no categories": (lambda content: content["categories"].clear(), "has no categories"),
    "id is null": (set_in("images", 0, id=None), "images[0]: field 'id' is None, must be a whole number"),
    "no width": (lambda content: content["images"][3].pop("width"), "images[3]: field 'width' is None, must be"),
    "zero height": (set_in("images", 2, height=0), "images[2]: field 'height' is 0, must be a number of pixels"),
    "an entry is a text": (lambda content: content["images"].insert(2, "x"), "images[2]: field 'id' is None"),
    "name is a number": (set_in("images", 1, file_name=7), "images[1]: field 'file_name' is 7, must be a text"),
    "half a category": (set_in("categories", 1, id=1.7), "categories[1]: field 'id' is 1.7, must be a whole"),
    "a class without a name": (lambda content: content["categories"][0].pop("name"), "categories[0]: field 'name'"),
    "half an id": (set_in("annotations", 9, image_id=1.5), "annotations[9]: field 'image_id' is 1.5, must be"),
    "an id as text": (set_in("annotations", 9, category_id="3"), "annotations[9]: field 'category_id' is '3', must"),
    "no bbox": (lambda content: content["annotations"][9].pop("bbox"), "annotations[9]: field 'bbox' is None"),
    "three numbers": (set_in("annotations", 9, bbox=[1, 2, 3]), "annotations[9]: field 'bbox' is [1, 2, 3], must be"),
    "five numbers": (set_in("annotations", 9, bbox=[1, 2, 3, 4, 5]), "field 'bbox' is [1, 2, 3, 4, 5], must be a list"),
    "a decimal comma": (set_in("annotations", 9, bbox=["1,5", 1, 2, 3]), "annotations[9]: field 'bbox' is ['1,5', 1,"),
    "box as text": (set_in("annotations", 9, bbox="1 2 3 4"), "annotations[9]: field 'bbox' is '1 2 3 4', must be"),
    "corners as pairs": (set_in("annotations", 9, bbox=[[1, 2], [3, 4]]), "annotations[9]: field 'bbox' is [[1, 2], ["),
    "a number too large": (set_in("annotations", 9, bbox=[1, 2, 3, 10**400]), "annotations[9]: field 'bbox' is [1, 2"),
    "area as a list": (set_in("annotations", 9, area=[400]), "annotations[9]: field 'area' is [400], must be a number"),
    "area as text": (set_in("annotations", 9, area="400"), "annotations[9]: field 'area' is '400', must be a number"),
    "crowd in words": (set_in("annotations", 9, iscrowd="false"), "annotations[9]: field 'iscrowd' is 'false', must"),
    "crowd is a count": (set_in("annotations", 9, iscrowd=2), "annotations[9]: field 'iscrowd' is 2, must be 0 or 1"),
    "crowd is a list": (set_in("annotations", 9, iscrowd=[]), "annotations[9]: field 'iscrowd' is [], must be 0 or 1"),
    "a very long box": (set_in("annotations", 9, bbox=[1] * 1000), "annotations[9]: field 'bbox' is [1, 1, 1"),
    "outside": (set_in("images", 1, file_name="../annotations/instances_train.json"), "points outside"),
    "absolute": (set_in("images", 1, file_name="/etc/hostname"), "points outside"),
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


def test_ids_must_differ(tmp_path):
    content = random_content(2)
    content["images"][4]["id"] = content["images"][1]["id"]
    write(tmp_path, content)
    assert f"id {content['images'][1]['id']} stands for two of images" in error_of(tmp_path)
    content = random_content(2)
    content["categories"][0]["id"] = 3
    write(tmp_path, content)
    assert "id 3 stands for two of categories" in error_of(tmp_path)


def test_boxes_of_three_and_five_numbers_do_not_make_up_for_each_other(tmp_path):
    content = random_content(2)
    content["annotations"][3]["bbox"] = [1, 2, 3]
    content["annotations"][4]["bbox"] = [1, 2, 3, 4, 5]
    write(tmp_path, content)
    assert "annotations[3]: field 'bbox' is [1, 2, 3]" in error_of(tmp_path)


def test_a_missing_image_is_named_and_missing_ones_counted(tmp_path):
    content = random_content(3)
    write(tmp_path, content)
    for image in content["images"][2:4]:
        (tmp_path / "train" / image["file_name"]).unlink()
    message = error_of(tmp_path)
    assert str(tmp_path / "train" / content["images"][2]["file_name"]) in message and "2 of 6 images" in message


NFC, NFD = (unicodedata.normalize(form, "été Å.png") for form in ("NFC", "NFD"))
LOOK_ALIKES = {  # the name in the file -> the file that is there
    "sub\\deep\\a.png": "sub/deep/a.png",
    "C:\\data\\train\\a.png": "a.png",
    "a%20b%23.png": "a b#.png",
    "%C3%A9t%C3%A9.png": "été.png",
    "sub\\a%20b.png": "sub/a b.png",
    NFC: NFD,
    NFD: NFC,
    "IMG_1.JPG": "IMG_1.jpg",
    "img_1.jpg": "IMG_1.JPG",
    "train2017/a.png": "a.png",
    "data/images/a.png": "a.png",
    f"sub/{NFC}": f"sub/{NFD}",
    f"{NFD}/a.png": f"{NFC}/a.png",
    "sub/A.png": "sub/a.png",
    "SUB/a.png": "sub/a.png",
    "train\\sub\\a.png": "sub/a.png",
    "a b.png": "a%20b.png",
    "..\\train\\a.png": "a.png",
    "..\\train\\sub\\A%20.png": "sub/a .png",
}


@pytest.mark.parametrize("name, present", LOOK_ALIKES.items())
def test_a_file_whose_name_differs_in_spelling_only_is_named(tmp_path, name, present):
    content = random_content(3)
    content["images"][2]["file_name"] = present
    write(tmp_path, content)
    content["images"][2]["file_name"] = name
    annotation_path(tmp_path).write_text(json.dumps(content))
    message = error_of(tmp_path)
    assert f"missing (1 of 6 images of instances_train.json are); {present!r} is there" in message


def test_a_name_like_no_other_has_no_look_alike(tmp_path):
    content = random_content(3)
    write(tmp_path, content)
    content["images"][2]["file_name"] = "1" + content["images"][1]["file_name"]
    annotation_path(tmp_path).write_text(json.dumps(content))
    assert "is there" not in error_of(tmp_path)


@pytest.mark.parametrize("inside", ["sub/../a.png", "sub/../../train/a.png", "..", "linked/../a.png"])
def test_a_name_is_judged_as_it_is_written(tmp_path, inside):
    content = random_content(3)
    content["images"][0]["file_name"] = "sub/a.png"
    write(tmp_path, content)
    (tmp_path / "train" / "a.png").touch()
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "train" / "sub")
    for name in (inside, str(tmp_path / "train" / "a.png")):
        content["images"][0]["file_name"] = name
        annotation_path(tmp_path).write_text(json.dumps(content))
        assert f"file_name {name!r} points outside {tmp_path / 'train'}" in error_of(tmp_path)


def test_entries_of_the_same_file_are_told(tmp_path):
    content = random_content(3)
    for image, name in zip(content["images"], ["a.png", "b.png", "./a.png", "sub/c.png", "sub//c.png", "a.png"]):
        image["file_name"] = name
    write(tmp_path, content)
    assert "; 3 entries name the same file as another" in annotations.read(tmp_path, "train").summary()


def boxes_written(convert, images=20, sides=(200, 300), largest=1.0, seed=0, wide=1):
    """Content of three boxes an image, at most `largest` times its size, anywhere in it, each written as
    convert(x1, y1, x2, y2, width, height). `wide` makes images wider."""
    rng = np.random.default_rng(seed)
    content = random_content(seed, images, 0, sides)
    for image in content["images"]:
        image["width"] *= wide
    for number, image in enumerate(content["images"] * 3):
        width, height = image["width"], image["height"]
        w, h = (rng.integers(1, max(2, largest * side)) for side in (width, height))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        box = [float(value) for value in convert(x, y, x + w, y + h, width, height)]
        content["annotations"].append({"id": number, "image_id": image["id"], "category_id": 3, "bbox": box})
    return content


FRACTIONS = "60 of 60 boxes lie between 0 and 1, as fractions do"
CORNERS, CENTRES = "as x1, y1, x2, y2 would", "as centre x, centre y, width, height would"
WRONG_UNITS = {
    "fractions": (lambda x, y, X, Y, w, h: (x / w, y / h, (X - x) / w, (Y - y) / h), FRACTIONS),
    "fractions of corners": (lambda x, y, X, Y, w, h: (x / w, y / h, X / w, Y / h), FRACTIONS),
    "fractions of centres": (
        lambda x, y, X, Y, w, h: ((x + X) / w / 2, (y + Y) / h / 2, X / w - x / w, Y / h - y / h), FRACTIONS,
    ),
    "fractions without extent": (lambda x, y, X, Y, w, h: (x / w, y / h, 0, 0), FRACTIONS),
    "fractions a little outside": (lambda x, y, X, Y, w, h: (x / w - 0.01, y / h, (X - x) / w, (Y - y) / h), FRACTIONS),
    "corners": (lambda x, y, X, Y, w, h: (x, y, X, Y), CORNERS),
    "corners counted from 1": (lambda x, y, X, Y, w, h: (x + 1, y + 1, X, Y), CORNERS),
    "corners counted to the next pixel": (lambda x, y, X, Y, w, h: (x + 1, y + 1, X + 1, Y + 1), CORNERS),
    "centres": (lambda x, y, X, Y, w, h: ((x + X) / 2, (y + Y) / 2, X - x, Y - y), CENTRES),
    "whole centres": (lambda x, y, X, Y, w, h: ((x + X) // 2, (y + Y) // 2, X - x, Y - y), CENTRES),
    "percentages": (
        lambda x, y, X, Y, w, h: (100 * x / w, 100 * y / h, 100 * (X - x) / w, 100 * (Y - y) / h),
        "60 boxes lie between 0 and 100, as",
    ),
    "twice as large": (
        lambda x, y, X, Y, w, h: (2 * x, 2 * y, 2 * (X - x), 2 * (Y - y)), "as pixels of a picture twice as large would"
    ),
    "y first": (lambda x, y, X, Y, w, h: (y, x, Y - y, X - x), "as y, x, height, width would"),
    "y first, corners": (lambda x, y, X, Y, w, h: (y, x, Y, X), "as y1, x1, y2, x2 would"),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", WRONG_UNITS)
def test_boxes_in_other_units_are_refused_with_the_likely_cause(tmp_path, case, seed):
    convert, cause = WRONG_UNITS[case]
    content = boxes_written(convert, seed=seed) if "y first" not in case else boxes_written(convert, seed=seed, wide=2)
    write(tmp_path, content)
    message = error_of(tmp_path)
    assert f"{annotation_path(tmp_path)}: " in message and cause in message
    assert "COCO's bbox is [x, y, width, height] in pixels" in message


def test_a_single_box_and_most_boxes_can_be_fractions(tmp_path):
    content = boxes_written(WRONG_UNITS["fractions"][0])
    for number in range(25):  # the rest is right, or unusable
        content["annotations"][number]["bbox"] = [[5, 5, 9, 9], [5, 5, 0, 9]][number % 2]
    write(tmp_path, content)
    assert "35 of 60 boxes lie between 0 and 1" in error_of(tmp_path)
    content["annotations"] = content["annotations"][-1:]
    write(tmp_path, content)
    assert "1 of 1 boxes lie between 0 and 1" in error_of(tmp_path)


@pytest.mark.parametrize("case", ["corners", "centres"])
def test_three_boxes_that_all_leave_their_image_are_enough(tmp_path, case):
    write(tmp_path, boxes_written(lambda x, y, X, Y, w, h: WRONG_UNITS[case][0](w // 2, h // 2, w, h, w, h), images=1))
    message = error_of(tmp_path)
    assert "3 of 3 boxes leave their image" in message and WRONG_UNITS[case][1] in message


plain = lambda x, y, X, Y, w, h: (x, y, X - x, Y - y)
RIGHT = {
    "anywhere": boxes_written(plain),
    "small": boxes_written(plain, largest=0.01),
    "small images": boxes_written(plain, sides=(1, 9)),
    "one image": boxes_written(plain, images=1),
    "counted from 1": boxes_written(lambda x, y, X, Y, w, h: (x + 1, y + 1, X - x, Y - y)),
    "the whole image": boxes_written(lambda x, y, X, Y, w, h: (0, 0, w, h)),
    "the lower right corner": boxes_written(lambda x, y, X, Y, w, h: (w - X / 5, h - Y / 5, X / 5, Y / 5)),
    "the upper left corner, larger than its place": boxes_written(lambda x, y, X, Y, w, h: (1, 1, w / 2, h / 2)),
    "a little outside all around": boxes_written(lambda x, y, X, Y, w, h: (x - 3, y - 3, X - x + 6, Y - y + 6)),
    "far outside, now and then": boxes_written(lambda x, y, X, Y, w, h: (x, y, X - x + w * ((x + y) % 10 == 0), Y - y)),
    "far outside, mostly": boxes_written(
        lambda x, y, X, Y, w, h: (0.3 * w, 0.3 * h, 0.9 * w, 0.9 * h) if (x + y) % 5 < 3 else (0.8 * w, 0.8 * h, 5, 5)
    ),
    "far outside, mostly, in an image of twice the width": boxes_written(
        lambda x, y, X, Y, w, h: (0.9 * w, 0.3 * h, 0.2 * w, 0.5 * h) if (x + y) % 2 else (x, y, X - x, Y - y), wide=2
    ),
    "a corner of the images": boxes_written(lambda x, y, X, Y, w, h: (20, 15, 60, 40)),
    "another corner of the images": boxes_written(lambda x, y, X, Y, w, h: (15, 10, 60, 85)),
    "of other tiles, a third": boxes_written(
        lambda x, y, X, Y, w, h: (x + w * {0: 1, 1: -1}.get(x % 6, 0), y, X - x, Y - y)
    ),
    "around the whole image": boxes_written(lambda x, y, X, Y, w, h: (-0.2 * w, -0.2 * h, 1.4 * w, 1.4 * h)),
    "half of a pixel, some": boxes_written(lambda *box: (0, 0, 0.5, 0.5) if sum(box[:2]) % 3 == 0 else plain(*box)),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_boxes_in_pixels_are_not_taken_for_other_units(tmp_path, case):
    write(tmp_path, RIGHT[case])
    read = annotations.read(tmp_path, "train")
    assert len(read.boxes) + sum(read.skipped.values()) == len(RIGHT[case]["annotations"])
    assert sum(read.skipped.values()) <= (40 if "tiles" in case else 2)  # counted from 1, a box may lie outside


@pytest.mark.parametrize("box", [[3, 4, 10, 12], [0, 0, 2, 2], [10, 10, 500, 500], [20, 20, 30, 31]])
def test_a_single_box_is_taken_as_it_is(tmp_path, box):
    content = random_content(0, 1, 0, (40, 41))
    content["annotations"] = [{"image_id": content["images"][0]["id"], "category_id": 3, "bbox": box}]
    write(tmp_path, content)
    assert annotations.read(tmp_path, "train").boxes.tolist() == [[box[0], box[1], box[0] + box[2], box[1] + box[3]]]


@pytest.mark.parametrize("name", ["x" * 300, "a\nb.png", "a\0b.png", "\ud800.png", "", "."])
def test_names_no_file_can_have_are_refused_in_one_line(tmp_path, name):
    content = random_content(3)
    write(tmp_path, content)
    content["images"][0]["file_name"] = name
    annotation_path(tmp_path).write_text(json.dumps(content))
    assert str(tmp_path) in error_of(tmp_path)


STRANGE = (None, "", "x", -1, 0, 0.5, 3, True, NAN, INF, 1e300, 10**400, [], {}, [[1]], {"id": 3}, "é", 2**62)


def edited(content, rng):
    """The content as text, with one to three values replaced, removed or doubled, and now and then a byte changed."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.85:
                at = at[key]
                continue
            action = rng.random()
            if action < 0.7:
                at[key] = copy.deepcopy(rng.choice(STRANGE))
            elif action < 0.85:
                del at[key]
            elif isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
            break
    text = bytearray(json.dumps(content).encode())
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def test_random_edits_give_a_sound_result_or_one_clear_line(tmp_path):
    content, rng = random_content(4), random.Random(0)
    write(tmp_path, content)
    sound = 0
    with np.errstate(all="ignore"):
        for _ in range(600):
            text = edited(content, rng)
            write(tmp_path, text)
            try:
                read = annotations.read(tmp_path, "train")
            except InputError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                continue
            sound += 1
            assert len(json.loads(text)["annotations"]) == len(read.boxes) + sum(read.skipped.values())
            assert len(read.boxes) == len(read.labels) == len(read.areas) == len(read.crowd) == read.starts[-1]
            assert read.starts[0] == 0 and (np.diff(read.starts) >= 0).all() and len(read.starts) == len(read) + 1
            assert np.isfinite(read.boxes).all() and (read.boxes[:, 2:] >= read.boxes[:, :2]).all()
            assert ((read.labels >= 0) & (read.labels < len(read.classes))).all() and (read.sizes > 0).all()
            assert all(read.path(i).exists() for i in range(len(read)))
    assert 50 < sound < 550, "the edits should neither all pass nor all fail"
