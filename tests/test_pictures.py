"""What is drawn: boxes where they belong, readable tags, a panel for each branch; and results for anyone's pictures."""

import contextlib
import io
import json
from dataclasses import replace

import evaluate
import numpy as np
import pytest
import torch
from folders import draw_rectangles, noise
from helpers import CLASSES, tiny_model
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from scripts import call, complaint, succeed

from msad import annotations, checkpoint, pictures
from msad.data import read_image

CPU = ["--device", "cpu", "--precision", "fp32"]
GREY = torch.full((3, 64, 48), 128, dtype=torch.uint8)  # 8 times smaller than its panel


@pytest.fixture
def written(monkeypatch):
    """All text that is drawn."""
    texts, draw = [], ImageDraw.ImageDraw.text

    def note(pen, xy, text, *args, **more):
        texts.append(text)
        draw(pen, xy, text, *args, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


def found(*boxes, labels=None, scores=None):
    content = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels or [0] * len(boxes))}
    return content | ({"scores": torch.tensor(scores)} if scores else {})


def picture_of(panel, height=512):
    """The pixels of a panel without the line of its label."""
    return np.asarray(panel)[panel.height - height :].astype(int)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_box_lands_where_it_was_put_in_the_colour_of_its_class(label):
    pixels = picture_of(pictures.panel(GREY, found([8, 20, 32, 40], labels=[label]), CLASSES, "here"))
    assert pixels.shape == (512, 384, 3)
    # The box is 64 to 256 by 160 to 320; its line is two pixels wide, between dark ones.
    ink = (pixels == pictures.color(label)).all(2)
    y, x = np.nonzero(ink[160:])  # the tag is above
    assert (x.min(), x.max(), y.min(), y.max()) == (64, 255, 0, 159)
    assert ink[240].nonzero()[0].tolist() == [64, 65, 254, 255] and ink[160:162, 64:256].all()
    assert (pixels[240, [63, 66, 253, 256]] < 100).all()
    assert (pixels[166:316, 70:250] == 128).all() and (pixels[:, 300:] == 128).all() and (pixels[330:] == 128).all()


def test_names_and_scores_are_written_and_what_is_below_the_threshold_is_not(written):
    boxes = [[8, 20, 32, 40], [4, 44, 30, 60]]
    low = pictures.panel(GREY, found(*boxes, labels=[0, 2], scores=[0.91, 0.29]), CLASSES, "here", 0.3)
    assert sorted(written) == ["disk 0.91", "here"]
    written.clear()
    alone = pictures.panel(GREY, found(boxes[0], scores=[0.91]), CLASSES, "here", 0.3)
    assert np.array_equal(low, alone)
    pictures.panel(GREY, found(*boxes, labels=[0, 2]), CLASSES, "here", 0.3)
    assert sorted(written)[:2] == ["disk", "disk 0.91"] and "frame" in written, "the truth has no scores"


def test_colours_of_classes_differ():
    colors = np.array([pictures.color(k) for k in range(8)])
    distances = np.abs(colors[:, None] - colors).sum(2) + 999 * np.eye(8)
    assert distances.min() > 60


def test_tags_stay_inside_and_never_lie_on_each_other():
    rng = np.random.default_rng(0)
    placed = 0
    for _ in range(50):
        corners = rng.integers(0, 300, (12, 2))
        boxes = np.concatenate([corners, corners + rng.integers(1, 200, (12, 2))], 1).tolist()
        taken, cover = [], np.zeros((300, 300), int)
        for box in boxes:
            tag = pictures._place((70, 20), box, taken, boxes, (300, 300))
            if tag:
                taken.append(tag)
                x1, y1, x2, y2 = tag
                assert 0 <= x1 and x2 <= 300 and 0 <= y1 and y2 <= 300 and (x2 - x1, y2 - y1) == (70, 20)
                cover[y1:y2, x1:x2] += 1
        assert cover.max() == 1
        placed += len(taken)
    assert placed > 0.8 * 50 * 12
    box = [100, 100, 200, 200]
    assert pictures._place((70, 20), box, [], [box], (300, 300)) == (100, 80, 170, 100), "alone: above, flush left"


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (5, 2, 3)])
def test_a_strip_has_a_labelled_panel_for_everything(written, count, rows, columns):
    strip = pictures.strip(GREY, {f"number {i}": found([0, 0, 9, 9]) for i in range(count)}, CLASSES)
    panel = pictures.panel(GREY, found([0, 0, 9, 9]), CLASSES, "")
    assert strip.size == (16 + columns * (panel.width + 16), 16 + rows * (panel.height + 16))
    assert [text for text in written if "number" in text] == [f"number {i}" for i in range(count)]
    pixels = np.asarray(strip)
    for i in range(count):
        y, x = 16 + i // columns * (panel.height + 16), 16 + i % columns * (panel.width + 16)
        assert np.array_equal(pixels[y + 40 : y + panel.height, x : x + panel.width], np.asarray(panel)[40:])
    assert (pixels[:16] == 255).all() and (pixels[:, :16] == 255).all() and (pixels[-16:] == 255).all()


@pytest.fixture
def home(tmp_path):
    """A small set, a teacher and a student that find its classes; photos of several kinds in a folder."""
    draw_rectangles(tmp_path / "data", {"val": 5})
    truth = annotations.read(tmp_path / "data", "val")
    for name, kind in (("teacher", "teacher"), ("student", "low")):
        model = tiny_model(kind)
        model.config = replace(model.config, classes=truth.classes)
        checkpoint.save(tmp_path / f"{name}.pt", model)
    return tmp_path


@pytest.fixture
def photos(home):
    folder = home / "photos"
    folder.mkdir()
    Image.fromarray(noise(60, 90, 0)).save(folder / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    Image.fromarray(noise(80, 120, 1)).save(folder / "a.JPG", exif=turned)
    Image.fromarray(noise(50, 50, 2)).convert("L").save(folder / "c.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_evaluate_draws_each_branch_beside_the_truth(home, written):
    flags = ["--data", home / "data", *CPU, "--threshold", 0.5]
    printed = succeed(evaluate, *flags, "--ckpt", home / "teacher.pt", "--draw", 3)
    assert len(list((home / "pictures").iterdir())) == 3 and f"3 pictures, scores from 0.5, in {home}" in printed
    labels = ["ground truth", "teacher @ fused", "teacher @ high", "teacher @ low"]
    assert [text for text in written if "@" in text or "truth" in text] == 3 * labels

    written.clear()
    flags += ["--ckpt", home / "student.pt", "--teacher", home / "teacher.pt", "--out", home / "here"]
    succeed(evaluate, *flags, "--draw")
    assert sorted(p.name for p in (home / "here").iterdir()) == [f"{i + 1:04d}_{i}.jpg" for i in range(5)]
    labels = ["ground truth", "teacher @ fused", "teacher @ low", "student @ low"]
    assert [text for text in written if "@" in text or "truth" in text] == 5 * labels
    scores = [float(text.split()[1]) for text in written if text.split()[0] in ("red", "green", "blue") and " " in text]
    assert len(scores) > 10 and min(scores) >= 0.5


NAMES = {"low": ["student @ low"], "high": ["high resolution"]}
NAMES["conventional"] = ["conventional @ high", "conventional @ low"]
NAMES["teacher"] = ["checkpoint @ fused", "checkpoint @ high", "checkpoint @ low"]


@pytest.mark.parametrize("kind, labels", NAMES.items())
def test_beside_a_teacher_a_model_is_called_what_it_is(kind, labels):
    model = tiny_model(kind)
    columns = pictures.beside(tiny_model("teacher"), model, sorted(model.branches))
    assert list(columns) == ["teacher @ fused", "teacher @ low", *labels]


@pytest.mark.parametrize("name, branch", [("student", "low"), ("teacher", "fused"), ("teacher", "low")])
def test_results_for_a_folder_are_the_model_s_own_in_coco_format(home, photos, name, branch):
    res = ["--res", "low"] if branch == "low" else []
    succeed(evaluate, "--ckpt", home / f"{name}.pt", "--images", photos, "--draw", *CPU, *res)
    out = home / "pictures"
    assert sorted(p.name for p in out.iterdir()) == ["0001_a.jpg", "0002_b.jpg", "0003_c.jpg", "detections.json"]
    names = ["a.JPG", "b.png", "c.png"]
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in (1, 2, 3)], "annotations": []}
    coco.dataset["categories"] = [{"id": k} for k in (5, 7, 9)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = coco.loadRes(str(out / "detections.json"))
    model = checkpoint.load(home / f"{name}.pt")
    for number, file in enumerate(names, start=1):
        mine = results.loadAnns(results.getAnnIds(imgIds=[number]))
        assert {entry["file_name"] for entry in mine} == {file}
        image = read_image(photos / file)
        (expected,) = model.detect([image / 255], branch)
        boxes = expected["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        assert len(mine) == len(boxes) > 5
        np.testing.assert_allclose([e["score"] for e in mine], expected["scores"], atol=1e-4)
        np.testing.assert_allclose([e["bbox"] for e in mine], boxes, atol=0.02)
        assert [e["category_id"] for e in mine] == [(5, 7, 9)[k] for k in expected["labels"]]
    assert image.shape == (3, 50, 50) and read_image(photos / "a.JPG").shape == (3, 120, 80)


def test_a_single_picture_and_no_drawing(home, photos):
    out = home / "out"
    printed = succeed(evaluate, "--ckpt", home / "student.pt", "--images", photos / "b.png", "--out", out, *CPU)
    assert [p.name for p in out.iterdir()] == ["detections.json"] and f"{out}/detections.json" in printed
    assert {e["file_name"] for e in json.loads((out / "detections.json").read_text())} == {"b.png"}


def test_bad_pictures_of_a_folder_are_named_counted_and_left_out(home, photos):
    (photos / "bad.jpg").write_text("hello")
    code, _, complained = call(evaluate, "--ckpt", home / "student.pt", "--images", photos, *CPU)
    lines = complained.strip().splitlines()
    assert code == 0 and len(lines) == 2, complained
    assert f"left out: {photos}/bad.jpg: " in lines[0] and lines[1] == "left out: 1 of 4 pictures"
    results = json.loads((home / "pictures" / "detections.json").read_text())
    assert {(e["image_id"], e["file_name"]) for e in results} == {(1, "a.JPG"), (2, "b.png"), (4, "c.png")}


def test_what_cannot_be_looked_at_is_one_line(home, photos):
    flags = ["--ckpt", home / "student.pt", *CPU]
    (home / "bad.jpg").write_text("hello")
    (home / "empty").mkdir()
    assert f"{home}/bad.jpg" in complaint(evaluate, *flags, "--images", home / "bad.jpg")
    assert f"{home}/none.jpg" in complaint(evaluate, *flags, "--images", home / "none.jpg")
    assert "no readable picture" in complaint(evaluate, *flags, "--images", home / "empty")
    assert "--out" in complaint(evaluate, *flags, "--images", photos, "--out", photos)
    assert "--out" in complaint(evaluate, *flags, "--images", photos, "--out", home / "bad.jpg")
    assert "--json" in complaint(evaluate, *flags, "--images", photos, "--json", home / "a.json")
    assert "--teacher" in complaint(evaluate, *flags, "--images", photos, "--teacher", home / "teacher.pt")
    assert "--draw" in complaint(evaluate, *flags, "--images", photos, "--draw", 0)
    line = complaint(evaluate, *flags, "--images", photos, "--draw", "--teacher", home / "student.pt")
    assert "not a teacher" in line
