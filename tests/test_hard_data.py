"""Data sets and folders no one hopes for, through the whole of a script: used by the stated rule, with a word about it,
or refused in one line."""

import contextlib
import io
import json
import math
import shutil
import struct
import zlib

import evaluate
import pytest
import torch
import train
from folders import annotation_path, draw_rectangles, noise
from helpers import tiny_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scripts import TINY, call, complaint, succeed

from msad.engine import checkpoint, evaluation


CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def data(tmp_path):
    """A good data set, to be spoilt. Image number i has the id i + 1."""
    return draw_rectangles(tmp_path / "data", {"train": 4, "val": 2})


def edit(data, change, split="train"):
    """Let `change` do something to the content of an annotation file."""
    content = json.loads(annotation_path(data, split).read_text())
    change(content)
    annotation_path(data, split).write_text(json.dumps(content))


def add_image(data, split, height, width, boxes):
    """One more noisy picture, with boxes [(x, y, w, h)] of the first class."""
    name = f"{height}x{width}.png"
    Image.fromarray(noise(height, width, 0)).save(data / split / name)

    def add(content):
        number = max(image["id"] for image in content["images"]) + 1
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        content["annotations"] += [{"image_id": number, "category_id": 5, "bbox": box} for box in boxes]

    edit(data, add, split)


def trained(data, *flags):
    """What train.py prints about a data set it can use, by the first word of each line; every loss was finite."""
    out = data.parent / "out"
    printed = succeed(train, *TINY, "--data", data, "--out", out, *flags)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 4 and all(math.isfinite(value) for entry in steps for value in entry.values())
    return {line.split(" ")[0]: line for line in printed.splitlines() if line}


def refused(data, *flags):
    """The one line with which train.py stops."""
    return complaint(train, *TINY, "--data", data, "--out", data.parent / "out", *flags)


@pytest.mark.parametrize("flags", [("--res", "multi"), ("--res", "low", "--downsample", "nearest")])
def test_one_pixel_and_very_long_images_are_trained_on_and_evaluated(data, flags):
    for split in ("train", "val"):
        edit(data, lambda content: content["annotations"].clear(), split)
        for height, width in ((1, 1), (1, 50), (50, 1), (2, 100)):
            add_image(data, split, height, width, [(0, 0, width, height)])
    lines = trained(data, *flags)
    assert "8 images (4 without boxes), 4 boxes" in lines["train"] and "6 images (2 without" in lines["val"]


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_thousands_of_boxes_in_one_image(data, head):
    boxes = [(x / 2, y / 2, 4 + x % 7, 4 + y % 5) for x in range(60) for y in range(40)]
    for split in ("train", "val"):
        edit(data, lambda content: content["annotations"].clear(), split)
        add_image(data, split, 60, 70, boxes)
    assert "2400 boxes" in trained(data, "--head", head)["train"]


@pytest.mark.parametrize("workers", [0, 2])
def test_names_in_other_alphabets_and_none_and_in_subfolders(data, workers):
    """Of val they are drawn, too, and a class has half an emoji in its name."""
    for split in ("train", "val"):
        (data / split / "été").mkdir()

        def rename(content):
            content["categories"][0]["name"] = "cut \ud83d"
            for image, letter in zip(content["images"], "雪\udce9яü"):
                name = f"été/{letter} 1.png"
                (data / split / image["file_name"]).rename(data / split / name)
                image["file_name"] = name

        edit(data, rename, split)
    trained(data, "--workers", workers)
    results = data.parent / "numbers.json"
    flags = [*CPU, "--out", data.parent / "drawn", "--draw", "--per-class", "--json", results]
    assert "cut \\ud83d " in succeed(evaluate, "--ckpt", data.parent / "out" / "last.pt", *flags)
    assert len(list((data.parent / "drawn").iterdir())) == 2 and "cut" in results.read_text()


def test_a_folder_as_annotation_tools_export_it(data):
    """_annotations.coco.json beside the pictures, and "valid"."""
    for split, folder in (("train", "train"), ("val", "valid")):
        content = annotation_path(data, split).read_bytes()
        (data / split).rename(data / folder)
        (data / folder / "_annotations.coco.json").write_bytes(content)
    shutil.rmtree(data / "annotations")
    lines = trained(data)
    assert "4 images" in lines["train"] and "2 images" in lines["val"]
    succeed(evaluate, "--ckpt", data.parent / "out" / "last.pt", "--device", "cpu")


def test_a_val_split_that_lacks_a_class_without_boxes_is_measured_by_the_training_split_s(data):
    """In train.py and, from the data alone, in evaluate.py, which gives the same AP to each class."""

    def lack_the_first(content):
        gone = content["categories"].pop(0)
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != gone["id"]]

    edit(data, lack_the_first, "val")
    assert "3 classes" in trained(data, "--res", "low")["val"]
    path = data.parent / "numbers.json"
    succeed(evaluate, "--ckpt", data.parent / "out" / "last.pt", "--json", path, *CPU)
    classes = json.loads(path.read_text())["low"]["classes"]
    assert list(classes) == ["red", "green", "blue"] and classes["red"] == -1 and min(list(classes.values())[1:]) >= 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_cannot_be_used_is_left_out_and_counted_in_one_line(data, split):
    nan, inf = float("nan"), float("inf")
    bad = [{"bbox": box} for box in ([3, 3, 0, 5], [3, 3, 5, 0], [nan, 1, 5, 5], [1, 1, inf, 5], [900, 1, 5, 5])]
    bad += [{"image_id": 99}, {"category_id": 6}, {"category_id": -1}]
    kept = [{"bbox": [-10, -10, 500, 500]}, {}, {}]  # cut off at the border; ids that are not unique do no harm

    def spoil(content):
        content["annotations"] += [content["annotations"][0] | change for change in bad + kept]

    before = json.loads(annotation_path(data, split).read_text())["annotations"]
    edit(data, spoil, split)
    lines = trained(data)
    assert f"images (0 without boxes), {len(before) + len(kept)} boxes (0 crowd), 3 classes" in lines[split]
    assert lines[split].endswith(
        "; left out: 2 boxes not finite, 1 boxes outside their image, 2 boxes without area, "
        "2 of unknown categories, 1 of unknown images; 2 boxes are there twice: same image, class and pixels"
    )
    assert "left out" not in lines["val" if split == "train" else "train"]


def test_validation_pictures_without_any_box_have_no_numbers(data):
    edit(data, lambda content: content["annotations"].clear(), "val")
    lines = trained(data, "--res", "low")
    assert "2 images (2 without boxes), 0 boxes" in lines["val"]
    assert lines["low"].split()[-6:] == ["-"] * 6


def give(data, model):
    """A checkpoint of a model for the classes of a data set."""
    content = json.loads(annotation_path(data, "val").read_text())
    classes = sorted(content["categories"], key=lambda c: c["id"])
    path = data.parent / "model.pt"
    checkpoint.save(path, model)
    stored = torch.load(path, weights_only=True)
    stored["config"]["classes"] = tuple({"id": c["id"], "name": c["name"]} for c in classes)
    torch.save(stored, path)
    return path


@pytest.mark.parametrize("kind, res", [("teacher", None), ("conventional", "low")])
def test_results_written_to_a_file_are_what_coco_s_own_tools_read(tmp_path, kind, res):
    """With the ids of the data, hashes among them, and with crowds: the AP that is printed is theirs."""
    data, path = draw_rectangles(tmp_path / "data", {"val": 6}), tmp_path / "found.json"
    flags = ["--ckpt", give(data, tiny_model(kind)), "--data", data, *(["--res", res] if res else []), *CPU]
    flags += ["--detections", path, "--json", tmp_path / "a.json"]

    def rename(content):
        content["annotations"].clear()
        for number, image in enumerate(content["images"]):
            image["id"] = 2**53 + 7 * (9 - number)

    def annotate(content):  # some of what is found becomes true
        for number, entry in enumerate(json.loads(path.read_text())[::3]):
            x, y, w, h = entry["bbox"]
            box = [x + 0.1 * w, y, 0.77 * w, h]  # no IoU of 0.75 or 0.8, a threshold
            found = {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box, "area": 0.77 * w * h}
            content["annotations"].append(found | {"id": number + 1, "iscrowd": int(number % 5 == 0)})

    for change in (rename, annotate):
        edit(data, change, "val")
        succeed(evaluate, *flags)
    results = json.loads(path.read_text())
    assert len(results) > 60
    assert {tuple(sorted(entry)) for entry in results} == {("bbox", "category_id", "image_id", "score")}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(annotation_path(data, "val"))
        evaluator = COCOeval(coco, coco.loadRes(str(path)), "bbox")
        for step in (evaluator.evaluate, evaluator.accumulate, evaluator.summarize):
            step()
    assert {entry["image_id"] for entry in results} == set(coco.imgs)
    branch = res or "fused"
    printed = json.loads((tmp_path / "a.json").read_text())[branch]
    assert [printed[name] for name in evaluation.METRICS] == pytest.approx(evaluator.stats.tolist(), abs=1e-12)
    assert 0.1 < evaluator.stats[0] < 0.9


def test_every_file_that_can_be_seen_in_a_folder_is_looked_at_or_named(tmp_path):
    """Whatever it is called: without an ending, in capitals, a picture called a text, a text called a picture."""
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    folder.mkdir()
    Image.fromarray(noise(40, 50, 0)).save(outside)
    kinds = {"IMG_0001": "PNG", "b.JPG": "JPEG", "c.png.bak": "PNG", "d.txt": "PNG", "e.webp": "WEBP", "f.tif": "TIFF"}
    kinds |= {"g.gif": "GIF", "h.": "BMP", "i.j2k": "JPEG2000", "雪.jfif": "JPEG", "line\nbreak.png": "PNG"}
    for name, kind in kinds.items():
        Image.fromarray(noise(40, 50, 1)).save(folder / name, kind)
    (folder / "link.png").symlink_to(outside)
    heic = b"\0\0\0\x18ftypheic" + bytes(300)
    contents = {
        "photo.heic": heic,
        "note.txt": b"hello",
        "empty.png": b"",
        "Thumbs.db": bytes(99),
        "raw.CR2": b"II*\0" + bytes(99),
    }
    links = {"dangling.png": tmp_path / "nothing.png", "round.png": folder / "round.png"}
    for name, to in links.items():
        (folder / name).symlink_to(to)
    others = [*contents, *links]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / ".hidden.png").write_bytes(outside.read_bytes())
    (folder / "below").mkdir()
    (folder / "below" / "k.png").write_bytes(outside.read_bytes())
    checkpoint.save(tmp_path / "model.pt", tiny_model("low"))
    flags = ["--ckpt", tmp_path / "model.pt", "--images", folder, "--out", tmp_path / "out", *CPU]
    code, printed, complained = call(evaluate, *flags)
    lines = complained.splitlines()
    assert code == 0 and lines[-1] == f"left out: {len(others)} of {len(kinds) + 1 + len(others)} files"
    named = [line.removeprefix(f"left out: {folder}/").split(": not readable")[0] for line in lines[:-1]]
    assert named == sorted(others)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {*kinds, "link.png"}
    assert f"{len(results)} detections in {len(kinds) + 1} picture(s)" in printed


def declare_a_bomb(path):
    """A PNG file of some bytes that says it has 20 000 x 20 000 pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def truncate_a_jpeg(path):
    Image.open(path).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE = {  # to the picture files, all of them: what becomes of each, and what the line says
    "decompression bomb": (declare_a_bomb, "decompression bomb DOS attack.); save it anew, smaller if it is too large"),
    "truncated JPEG": (truncate_a_jpeg, "not readable as an image"),
    "empty": (lambda path: path.write_bytes(b""), "not readable as an image"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "run git lfs pull"),
    "another size": (lambda path: Image.new("RGB", (33, 44)).save(path), "is 33x44, but its annotations say"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_picture_that_cannot_be_used_stops_the_run_by_name(data, case):
    spoil, expected = DAMAGE[case]
    for path in (data / "train").iterdir():
        spoil(path)
    line = refused(data)
    assert line.startswith(f"error: {data}/train/") and ".png: " in line and expected in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_annotation_file_that_cannot_be_trusted_stops_the_run(data, split):
    """The rules have tests of their own; here is one of each kind: the file, its content, the two files together."""
    path = annotation_path(data, split)
    whole = path.read_bytes()
    edit(data, lambda content: content["categories"][2].update(name="violet"), split)
    line = refused(data)
    assert "9 violet" in line and "9 blue" in line and str(annotation_path(data, "val")) in line
    for content, expected in ((b'{"images": [{"id": 1', "not valid JSON"), (whole.replace(b"5", b"x"), "not valid JSON")):
        path.write_bytes(content)
        assert f"{path}: {expected}" in refused(data)
    path.unlink()
    assert f"{path.parent}/instances_{split}*.json: no such file" in refused(data)


def test_boxes_that_would_all_be_left_out_stop_the_run_with_the_reason(data):
    for change, why in (
        ({"iscrowd": 1}, "no image has a box to learn from: 4 images (0 without boxes)"),
        ({"bbox": [9, 9, 5, 0]}, "no image has a box to learn from: 4 images (4 without boxes)"),
        ({"bbox": [900, 1, 5, 5]}, "boxes leave their image"),
    ):
        edit(data, lambda content: [a.update(change) for a in content["annotations"]])
        line = refused(data)
        assert line.startswith(f"error: {annotation_path(data)}: ") and why in line
