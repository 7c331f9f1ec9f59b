"""Data sets and folders no one hopes for, through the whole of a script: used by the stated rule, with a word about
it. What is refused has its tests where it is read."""

import contextlib
import io
import json
import math
import os

import evaluate
import pytest
import train
from folders import annotation_path, draw_rectangles, noise
from helpers import CLASSES, tiny_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scripts import TINY, call, succeed

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


@pytest.mark.parametrize("flags", [("--res", "multi"), ("--res", "low")])
def test_one_pixel_and_very_long_images_are_trained_on_and_evaluated(data, flags):
    for split in ("train", "val"):
        edit(data, lambda content: content["annotations"].clear(), split)
        for height, width in ((1, 1), (1, 50), (50, 1), (2, 100)):
            add_image(data, split, height, width, [(0, 0, width, height)])
    lines = trained(data, *flags)
    assert "8 images (4 without boxes), 4 boxes" in lines["train"] and "6 images (2 without" in lines["val"]


def test_foreign_names_in_subfolders_and_a_class_that_val_lacks(data):
    """Pictures of val are drawn, too; each class, one with half an emoji in its name, has the AP of its own boxes."""
    for split in ("train", "val"):
        (data / split / "été").mkdir()

        def rename(content):
            content["categories"][0]["name"] = "cut \ud83d"
            for image, letter in zip(content["images"], "雪\udce9яü"):
                name = f"été/{letter} 1.png"
                (data / split / image["file_name"]).rename(data / split / name)
                image["file_name"] = name

        edit(data, rename, split)

    def lack_the_second(content):
        gone = content["categories"].pop(1)
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != gone["id"]]

    edit(data, lack_the_second, "val")
    assert "3 classes" in trained(data, "--res", "low", "--workers", 2)["val"]
    results = data.parent / "numbers.json"
    flags = [*CPU, "--out", data.parent / "drawn", "--draw", "--per-class", "--json", results]
    assert "cut \\ud83d " in succeed(evaluate, "--ckpt", data.parent / "out" / "last.pt", *flags)
    assert len(list((data.parent / "drawn").iterdir())) == 2
    classes = json.loads(results.read_text())["low"]["classes"]
    assert list(classes) == ["cut \\ud83d", "green", "blue"]
    assert classes["green"] == -1 and min(classes["cut \\ud83d"], classes["blue"]) >= 0


def test_results_written_to_a_file_are_what_coco_s_own_tools_read(tmp_path):
    """With the ids of the data, hashes among them, and with crowds: the AP that is printed is theirs."""
    data, path = draw_rectangles(tmp_path / "data", {"val": 6}), tmp_path / "found.json"
    checkpoint.save(tmp_path / "model.pt", tiny_model("conventional"))
    flags = ["--ckpt", tmp_path / "model.pt", "--data", data, "--res", "low", *CPU]
    flags += ["--detections", path, "--json", tmp_path / "a.json"]

    def rename(content):
        content["annotations"].clear()
        content["categories"] = list(CLASSES)
        for number, image in enumerate(content["images"]):
            image["id"] = 2**53 + 7 * (9 - number)

    def annotate(content):  # some of what is found becomes true
        for number, entry in enumerate(json.loads(path.read_text())[::3]):
            x, y, w, h = entry["bbox"]
            box = [x + 0.1 * w, y, 0.77 * w, h]  # no IoU of 0.75 or 0.8, a threshold
            found = entry | {"bbox": box, "area": 0.77 * w * h}
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
    printed = json.loads((tmp_path / "a.json").read_text())["low"]
    assert [printed[name] for name in evaluation.METRICS] == pytest.approx(evaluator.stats.tolist(), abs=1e-12)
    assert 0.1 < evaluator.stats[0] < 0.9


def test_every_file_that_can_be_seen_in_a_folder_is_looked_at_or_named(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    folder.mkdir()
    Image.fromarray(noise(40, 50, 0)).save(outside)
    kinds = {"IMG_0001": "PNG", "b.JPG": "JPEG", "c.png.bak": "PNG", "d.txt": "PNG", "e.webp": "WEBP", "f.tif": "TIFF"}
    kinds |= {"g.gif": "GIF", "h.": "BMP", "i.j2k": "JPEG2000", "雪.jfif": "JPEG", "line\nbreak.png": "PNG"}
    longest = ["雪" * 83 + ".png", "x" * 251 + ".png", *map(os.fsdecode, (b"\xff\xfe.png", b"\xe9" * 251 + b".png"))]
    kinds |= dict.fromkeys([*longest, "k%20.png", "l.m.png"], "PNG")
    for name, kind in kinds.items():
        Image.fromarray(noise(40, 50, 1)).save(folder / name, kind)
    (folder / "link.png").symlink_to(outside)
    others = {"photo.heic": b"\0\0\0\x18ftypheic" + bytes(300), "note.txt": b"hello", "empty.png": b""}
    others |= {"Thumbs.db": bytes(99), "raw.CR2": b"II*\0" + bytes(99), os.fsdecode(b"no \xe9"): b"hello"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    for name, to in {"dangling.png": tmp_path / "nothing.png", "round.png": folder / "round.png"}.items():
        (folder / name).symlink_to(to)
        others[name] = to
    (folder / ".hidden.png").write_bytes(outside.read_bytes())
    (folder / "below").mkdir()
    (folder / "below" / "k.png").write_bytes(outside.read_bytes())
    checkpoint.save(tmp_path / "model.pt", tiny_model("low"))
    flags = ["--ckpt", tmp_path / "model.pt", "--images", folder, "--out", tmp_path / "out", "--draw", *CPU]
    code, printed, complained = call(evaluate, *flags)
    lines = complained.splitlines()
    assert code == 0 and lines[-1] == f"left out: {len(others)} of {len(kinds) + 1 + len(others)} files"
    named = [line.removeprefix(f"left out: {folder}/").split(": not readable")[0] for line in lines[:-1]]
    assert named == sorted(others)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {*kinds, "link.png"}
    assert f"{len(results)} detections in {len(kinds) + 1} picture(s)" in printed
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(kinds) + 1
