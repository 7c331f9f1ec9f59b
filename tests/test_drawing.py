"""What is drawn: which boxes, where and in what colour, a panel for each branch; and results for any pictures."""

import contextlib
import json

import distill
import evaluate
import numpy as np
import pytest
import torch
import train
from folders import draw_rectangles, noise, random_content, write
from helpers import CLASSES, tiny_model
from PIL import Image, ImageDraw
from scripts import TINY, call, complaint, succeed

from msad.data import annotations
from msad.engine import checkpoint, drawing
from msad.data.reading import read_image

CPU = ["--device", "cpu", "--precision", "fp32"]
GREY = torch.full((3, 64, 48), 128, dtype=torch.uint8)
SIDE = 512  # of a panel: 8 times as large


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
    labels = torch.tensor(labels or [0] * len(boxes), dtype=torch.long)
    content = {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels}
    return content if scores is None else content | {"scores": torch.tensor(scores)}


def panel(content, label="here", threshold=0.4, image=GREY, classes=CLASSES):
    return drawing.panel(image, content, classes, label, threshold, SIDE)


def picture_of(panel, height=SIDE):
    """The pixels of a panel without the line of its label."""
    return np.asarray(panel)[panel.height - height :].astype(int)


@pytest.mark.parametrize(
    "height, width, label", [(64, 48, 0), (64, 48, 1), (1000, 700, 2), (300, 600, 0), (1, 50, 0), (50, 1, 0), (1, 1, 0)]
)
def test_a_box_lands_where_it_was_put_in_the_colour_of_its_class(height, width, label):
    """At whatever size its picture is drawn; its line is two pixels wide."""
    image, box = torch.full((3, height, width), 128, dtype=torch.uint8), [width / 4, height / 4, width / 2, height / 2]
    rows, columns = (max(1, round(side * SIDE / max(height, width))) for side in (height, width))
    pixels = picture_of(panel(found(box, labels=[label]), "", image=image, classes=3 * [{"id": 1, "name": ""}]), rows)
    assert pixels.shape == (rows, columns, 3)
    y, x = (pixels == drawing.color(label)).all(2).nonzero()
    top, left, bottom, right = rows // 4, columns // 4, y.max() + 1, x.max() + 1
    assert (x.min(), y.min()) == (left, top)
    assert 0 < bottom - rows // 2 <= 3 and 0 < right - columns // 2 <= 3
    if min(height, width) > 1:
        box = pixels[top:bottom, left:right]
        assert (box[[0, 1, -2, -1]] == drawing.color(label)).all() and (box[2:-2, -20:-2] == 128).all()
        assert (box[:, [0, 1, -2, -1]] == drawing.color(label)).all()
    pixels[top:bottom, left:right] = 128
    assert (pixels == 128).all()


def test_names_and_scores_are_written_and_what_is_below_the_threshold_is_not(written):
    boxes = [[8, 20, 32, 40], [4, 44, 30, 60]]
    low = panel(found(*boxes, labels=[0, 2], scores=[0.91, 0.29]), threshold=0.3)
    assert sorted(written) == ["disk 0.91", "here"]
    written.clear()
    alone = panel(found(boxes[0], scores=[0.91]), threshold=0.91)
    assert np.array_equal(low, alone), "the threshold itself is drawn"
    written.clear()
    panel(found(*boxes, labels=[0, 2]), threshold=0.99)
    assert sorted(written) == ["disk", "frame", "here"], "the truth has no scores"


def test_the_best_are_drawn_last_on_top_and_nothing_found_is_the_picture_alone(written):
    pixels = picture_of(panel(found(*[[8, 20, 32, 40]] * 3, labels=[2, 0, 1], scores=[0.9, 0.8, 0.7])))
    assert (pixels[240, 64] == drawing.color(2)).all()
    written.clear()
    for content in (found(scores=[]), found(), found([8, 20, 32, 40], scores=[0.1])):
        assert (picture_of(panel(content)) == 128).all()
    assert written == ["here"] * 3


def test_a_strip_is_its_panels_side_by_side_and_others_are_put_below_one_another():
    found_ = {"number 1": found([0, 0, 9, 9]), "number 2": found([8, 20, 32, 40])}
    strip = np.asarray(drawing.strip(GREY, found_, CLASSES, side=SIDE))
    one, other = (np.asarray(panel(content, label)) for label, content in found_.items())
    height, width = one.shape[:2]
    assert strip.shape == (height + 32, 2 * width + 48, 3) and (strip[:, width + 16 : width + 32] == 255).all()
    for start, drawn in ((16, one), (width + 32, other)):
        assert np.array_equal(strip[16:-16, start : start + width], drawn)
    tiles = [Image.new("RGB", size, (10, 20, 30)) for size in ((30, 20), (10, 50))]
    pixels = np.asarray(drawing.join(tiles, down=True, gap=7))
    assert pixels.shape == (91, 44, 3) and (pixels == (10, 20, 30)).all(2).sum() == 30 * 20 + 10 * 50
    assert (pixels[7:27, 7:37] == (10, 20, 30)).all() and (pixels[34:84, 7:17] == (10, 20, 30)).all()


def test_pictures_to_draw_are_spread_over_those_with_boxes(tmp_path):
    content = random_content(0, images=40, boxes=200)
    empty = {image["id"] for image in content["images"][::2]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in empty]
    for entries, count in ((content["annotations"], 5), ([], 3)):
        write(tmp_path, content | {"annotations": entries})
        read = annotations.read(tmp_path, "train")
        full = read.trainable().tolist() or range(40)  # without a box any will do
        indices = drawing.spread_indices(read, count)
        assert set(indices) <= set(full) and len(set(indices)) == count and indices == sorted(indices)
        assert (indices[0], indices[-1]) == (full[0], full[-1]) and drawing.spread_indices(read, 99) == list(full)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small set, a teacher and a student that find its classes; photos of several kinds in a folder, two bad."""
    home = tmp_path_factory.mktemp("home")
    draw_rectangles(home / "data", {"train": 4, "val": 5})
    classes = annotations.read(home / "data", "val").classes
    for name, kind in (("teacher", "teacher"), ("student", "low")):
        checkpoint.save(home / f"{name}.pt", tiny_model(kind, classes=classes))
    folder = home / "photos"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    Image.fromarray(noise(80, 120, 1)).save(folder / "a.JPG", exif=turned)
    Image.fromarray(noise(60, 90, 0)).save(folder / "b.png")
    Image.fromarray(noise(50, 50, 2)).convert("L").save(folder / "c.png")
    for name in ("bad.jpg", "notes.txt"):
        (folder / name).write_text("no picture")
    return home


def test_evaluate_draws_each_branch_beside_the_truth(home, tmp_path, written):
    """Beside the checkpoint, or where --out says."""
    labels = lambda: [text for text in written if "@" in text or "truth" in text]
    flags = ["--data", home / "data", *CPU, "--threshold", 0.5]
    printed = succeed(evaluate, *flags, "--ckpt", home / "teacher.pt", "--draw", 3)
    assert len(list((home / "pictures").iterdir())) == 3 and f"3 pictures, scores from 0.5, in {home}" in printed
    assert labels() == 3 * ["ground truth", "teacher @ fused", "teacher @ high", "teacher @ low"]

    written.clear()
    flags += ["--ckpt", home / "student.pt", "--teacher", home / "teacher.pt", "--out", tmp_path / "here"]
    succeed(evaluate, *flags, "--draw")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [f"{i + 1:04d}_{i}.jpg" for i in range(5)]
    assert labels() == 5 * ["ground truth", "--teacher @ fused", "--teacher @ low", "low @ low"]
    scores = [float(text.split()[1]) for text in written if text.split()[0] in ("red", "green", "blue") and " " in text]
    assert len(scores) > 10 and min(scores) >= 0.5


@pytest.mark.parametrize("name, branch", [("student", "low"), ("teacher", "fused"), ("teacher", "low")])
def test_results_for_a_folder_are_the_model_s_own_in_coco_format(home, tmp_path, name, branch):
    """Its bad pictures are named, counted and left out."""
    photos, out = home / "photos", tmp_path / "out"
    flags = ["--ckpt", home / f"{name}.pt", "--images", photos, "--draw", "--out", out, "--res", branch]
    code, _, complained = call(evaluate, *flags, *CPU)
    lines = complained.splitlines()
    assert code == 0 and len(lines) == 3 and lines[2] == "left out: 2 of 5 files"
    assert f"left out: {photos}/bad.jpg: " in lines[0] and f"left out: {photos}/notes.txt: " in lines[1]
    assert sorted(p.name for p in out.iterdir()) == ["0001_a.jpg", "0002_b.jpg", "0004_c.jpg", "detections.json"]

    results = json.loads((out / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {"a.JPG", "b.png", "c.png"}
    model = checkpoint.load(home / f"{name}.pt").folded()  # evaluate.py folds it, too: equal to the bit
    for file in ("a.JPG", "b.png", "c.png"):
        mine = [entry for entry in results if entry["image_id"] == entry["file_name"] == file]
        (expected,) = model.detect(read_image(photos / file), branch)
        boxes = expected["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        assert len(mine) == len(boxes) > 5
        assert [e["score"] for e in mine] == expected["scores"].tolist()
        np.testing.assert_allclose([e["bbox"] for e in mine], boxes, atol=1e-4)
        assert [e["category_id"] for e in mine] == [(5, 7, 9)[k] for k in expected["labels"]]
    assert read_image(photos / "c.png").shape == (3, 50, 50) and read_image(photos / "a.JPG").shape == (3, 120, 80)


def test_results_of_other_pictures_are_kept_and_a_data_set_is_drawn_elsewhere(home):
    """Of a single picture, and nothing is drawn."""
    flags, out = ["--ckpt", home / "student.pt", *CPU], home / "found"
    for file, names in (("b.png", ["detections.json"]), ("c.png", ["detections.1.json", "detections.json"])):
        printed = succeed(evaluate, *flags, "--images", home / "photos" / file)
        assert sorted(p.name for p in out.iterdir()) == names and f"{out}/detections.json" in printed
        assert all(name in printed for name in names)
    for name, file in (("detections.1.json", "b.png"), ("detections.json", "c.png")):
        assert {e["file_name"] for e in json.loads((out / name).read_text())} == {file}
    before = sorted(out.iterdir())
    succeed(evaluate, *flags, "--data", home / "data", "--draw", 1)
    assert sorted(out.iterdir()) == before and (home / "pictures" / "0001_0.jpg").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_is_drawn_as_it_is_trained_on(tmp_path, kept):
    """EXIF says to turn it by a quarter; the annotated size says whether its boxes were drawn on it turned or not."""
    stored, box = np.full((60, 100, 3), 128, np.uint8), [30, 10, 30, 10] if kept else [40, 30, 10, 30]
    stored[10:20, 30:60] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    (tmp_path / "val").mkdir()
    Image.fromarray(stored).save(tmp_path / "val" / "a.png", exif=exif)
    width, height = (100, 60) if kept else (60, 100)
    images = [{"id": 1, "file_name": "a.png", "height": height, "width": width}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": box, "iscrowd": 0}]
    write(tmp_path, {"images": images, "annotations": boxes, "categories": CLASSES}, "val")
    pixels = np.asarray(drawing.compare(annotations.read(tmp_path, "val"), 0, {}, contextlib.nullcontext())).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1:] < 90).all(2)
    outline = (np.abs(pixels - drawing.color(0)) < 40).all(2)
    for inside, around in zip(red.nonzero(), outline.nonzero()):  # the same place, but for the line's own width
        assert min(len(inside), len(around)) > 20
        assert abs(inside.min() - around.min()) < 20 and abs(inside.max() - around.max()) < 20


def test_what_cannot_be_looked_at_is_one_line(home, tmp_path):
    photos = home / "photos"
    (tmp_path / "empty").mkdir()
    for said, *flags in (
        (f"{photos}/bad.jpg", "--images", photos / "bad.jpg"),
        (f"{home}/none.jpg", "--images", home / "none.jpg"),
        ("folders in it are not looked into", "--images", tmp_path / "empty"),
        ("--out", "--images", photos, "--out", photos),
        ("--out", "--images", photos, "--out", photos / "bad.jpg"),
        ("--json", "--images", photos, "--json", tmp_path / "a.json"),
        ("--teacher", "--images", photos, "--teacher", home / "teacher.pt"),
        ("--draw", "--images", photos, "--draw", -1),
        ("not a teacher", "--images", photos, "--draw", "--teacher", home / "student.pt"),
    ):
        assert said in complaint(evaluate, "--ckpt", home / "student.pt", *CPU, *flags)


def test_runs_end_with_a_sheet_of_every_branch(home, tmp_path, written):
    teacher = ["--teacher", tmp_path / "teacher" / "last.pt"]
    for name, script, flags, branches in (
        ("teacher", train, [], ["teacher @ fused", "teacher @ high", "teacher @ low"]),
        ("student", distill, teacher, ["teacher @ fused", "teacher @ low", "student @ low"]),
    ):
        written.clear()
        printed = succeed(script, *TINY, "--iters", 1, "--data", home / "data", "--out", tmp_path / name, *flags)
        assert f"pictures {tmp_path}/{name}/sheet.jpg" in printed.splitlines()[-2]
        assert printed.splitlines()[-1].startswith("next: python")
        assert [text for text in written if "@" in text or "truth" in text] == 5 * ["ground truth", *branches]
        width, height = Image.open(tmp_path / name / "sheet.jpg").size
        assert 1500 < width < 1800 and height > 1000


def test_a_picture_that_cannot_be_drawn_costs_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "spread_indices", lambda *_: [][0])
    printed = succeed(train, *TINY, "--iters", 1, "--data", home / "data", "--out", tmp_path / "out", "--res", "low")
    assert "pictures could not be drawn (IndexError: list index out of range)" in printed and "low @ low" in printed
    assert (tmp_path / "out" / "last.pt").exists() and "next: python evaluate.py" in printed
