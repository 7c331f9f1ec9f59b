"""Data sets and folders no one hopes for, through the whole of a script: used by the stated rule, with a word about it,
or refused in one line."""

import contextlib
import io
import json
import math
import shutil
import struct
import zlib

import distill
import evaluate
import numpy as np
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
def test_names_in_other_alphabets_and_subfolders(data, workers):
    for split in ("train", "val"):
        (data / split / "été").mkdir()

        def rename(content):
            for image, letter in zip(content["images"], "雪Ωяü"):
                name = f"été/{letter} 1.png"
                (data / split / image["file_name"]).rename(data / split / name)
                image["file_name"] = name

        edit(data, rename, split)
    trained(data, "--workers", workers)


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


def test_what_was_noticed_about_pictures_is_told_once_with_the_count(data):
    """Orientation 3 in all but one of the training pictures, 6 against the annotations and damage in the others."""
    turned, sideways = Image.Exif(), Image.Exif()
    turned[0x0112], sideways[0x0112] = 3, 6
    blocks = {"train/1": turned, "train/2": turned, "train/3": turned, "val/0": sideways, "val/1": b"Exif\0\0no TIFF"}
    for name, block in blocks.items():
        Image.open(data / f"{name}.png").save(data / f"{name}.png", exif=block)
    flags = [*TINY, "--data", data, "--iters", 8, "--eval-every", 3, "--workers", 1]
    out = data.parent / "out"
    code, _, complained = call(train, *flags, "--out", out)
    assert code == 0
    of_student = call(distill, *flags, "--teacher", out / "last.pt", "--out", data.parent / "student")[2]
    stored = "left as they are stored: their annotations have that size, and not the one EXIF says"
    turned = "turned as their EXIF says; their boxes would fit the picture as it is stored, too"
    assert complained.splitlines() == [
        f"training pictures: at least 2 {turned}",  # in the first batch of two
        f"training pictures: 3 {turned}",
        f"validation pictures: 1 {stored}",
        "validation pictures: 1 with damaged EXIF, so not turned (SyntaxError)",
    ]
    assert sorted(of_student.splitlines()) == sorted(complained.splitlines()), "of two models' evaluations, too"


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_cannot_be_used_is_left_out_and_counted_in_one_line(data, split):
    nan, inf = float("nan"), float("inf")
    bad = [{"bbox": box} for box in ([3, 3, 0, 5], [3, 3, 5, -1], [nan, 1, 5, 5], [1, 1, inf, 5], [900, 1, 5, 5])]
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
        "2 of unknown categories, 1 of unknown images"
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


CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.mark.parametrize("kind, res", [("teacher", None), ("conventional", "low")])
def test_results_written_to_a_file_are_what_coco_s_own_tools_read(tmp_path, kind, res):
    """With the ids of the data, hashes among them, and with crowds: the AP that is printed is theirs."""
    data, path = draw_rectangles(tmp_path / "data", {"val": 6}), tmp_path / "found.json"
    flags = [
        "--ckpt",
        give(data, tiny_model(kind)),
        "--data",
        data,
        "--detections",
        path,
        "--json",
        tmp_path / "a.json",
    ]
    flags += ["--device", "cpu", "--precision", "fp32", *(["--res", res] if res else [])]

    def rename(content):
        content["annotations"].clear()
        for number, image in enumerate(content["images"]):
            image["id"] = 2**53 + 7 * (9 - number)

    def annotate(content):  # some of what is found becomes true
        for number, entry in enumerate(json.loads(path.read_text())[::3]):
            x, y, w, h = entry["bbox"]
            box = [x + 0.1 * w, y, w, h]
            found = {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box, "area": w * h}
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
    "decompression bomb": (declare_a_bomb, "decompression bomb"),
    "truncated JPEG": (truncate_a_jpeg, "not readable as an image"),
    "not an image": (lambda path: path.write_text("hello"), "not readable as an image"),
    "empty": (lambda path: path.write_bytes(b""), "not readable as an image"),
    "another size": (lambda path: Image.new("RGB", (33, 44)).save(path), "is 33x44, but its annotations say"),
    "missing": (lambda path: path.unlink(), "missing (4 of 4 images"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_picture_that_cannot_be_used_stops_the_run_by_name(data, case):
    spoil, expected = DAMAGE[case]
    for path in (data / "train").iterdir():
        spoil(path)
    line = refused(data)
    assert line.startswith(f"error: {data}/train/") and ".png: " in line and expected in line


def point_outside(content):
    content["images"][1]["file_name"] = "../annotations/instances_train.json"


def as_fractions(content):
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        entry["bbox"] = [value / side for value, side in zip(entry["bbox"], 2 * sizes[entry["image_id"]])]


SPOILT = {  # the annotation file: a change of its content or new bytes (None: no file), and what the line says
    "no file": (None, "no such file"),
    "empty": (b"", "is empty"),
    "half": (b'{"images": [{"id": 1', "is not valid JSON"),
    "a name outside the folder": (point_outside, "points outside"),
    "an image id twice": (lambda c: c["images"][0].update(id=2), "id 2 stands for two of images"),
    "a category id twice": (lambda c: c["categories"][0].update(id=7), "id 7 stands for two of categories"),
    "fractions": (as_fractions, "boxes lie between 0 and 1, as fractions do"),
    "other classes": (lambda c: c["categories"][2].update(name="violet"), "9 violet"),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_annotation_file_that_cannot_be_trusted_stops_the_run(data, split, case):
    change, expected = SPOILT[case]
    path = annotation_path(data, split)
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        edit(data, change, split)
    line = refused(data)
    assert expected in line and (split if case == "other classes" else f"{path.parent}/instances_{split}") in line


def test_a_training_split_without_boxes_is_refused(data):
    edit(data, lambda content: content["annotations"].clear())
    assert f"{data / 'train'}: no image has a box to learn from" in refused(data)
