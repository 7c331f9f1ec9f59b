"""What is drawn: which boxes, where and in what colour, a labelled panel for each branch, the curve of a run; and
results for anyone's pictures."""

import contextlib
import io
import json
from dataclasses import replace

import distill
import evaluate
import numpy as np
import pytest
import torch
import train
from folders import draw_rectangles, noise, random_content, write
from helpers import CLASSES, tiny_model
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
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


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_box_lands_where_it_was_put_in_the_colour_of_its_class(label):
    pixels = picture_of(panel(found([8, 20, 32, 40], labels=[label])))
    assert pixels.shape == (512, 384, 3)
    # The box is 64 to 256 by 160 to 320, both ends included; its line is two pixels wide, its name within.
    color = drawing.color(label)
    y, x = np.nonzero((pixels == color).all(2))
    assert (x.min(), x.max(), y.min(), y.max()) == (64, 256, 160, 320)
    border = np.concatenate([pixels[160:321, [64, 65, 255, 256]].ravel(), pixels[[160, 161, 319, 320], 64:257].ravel()])
    assert (border.reshape(-1, 3) == color).all()
    outside = np.ones((512, 384), bool)
    outside[160:321, 64:257] = False
    assert (pixels[outside] == 128).all() and (pixels[200:319, 66:255] == 128).all()


@pytest.mark.parametrize("height, width", [(64, 48), (1000, 700), (300, 600), (1, 50), (50, 1), (1, 1)])
def test_boxes_are_scaled_with_their_picture(height, width):
    image = torch.full((3, height, width), 128, dtype=torch.uint8)
    box = [width / 4, height / 4, width / 2, height / 2]
    scale = 512 / max(height, width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    pixels = picture_of(panel(found(box), "", image=image, classes=[{"id": 1, "name": ""}]), rows)
    assert pixels.shape == (rows, columns, 3)
    y, x = np.nonzero((pixels == drawing.color(0)).all(2))
    assert (x.min(), y.min()) == (columns // 4, rows // 4)
    assert 0 <= x.max() - columns // 2 <= 2 and 0 <= y.max() - rows // 2 <= 2


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


def test_the_best_are_drawn_last_on_top():
    boxes = [[8, 20, 32, 40]] * 3
    pixels = picture_of(panel(found(*boxes, labels=[2, 0, 1], scores=[0.9, 0.8, 0.7])))
    assert (pixels[240, 64] == drawing.color(2)).all()


def test_nothing_found_is_the_picture_alone(written):
    nothing = found(scores=[])
    for content in (nothing, found(), found([8, 20, 32, 40], scores=[0.1])):
        assert (picture_of(panel(content)) == 128).all()
    assert written == ["here"] * 3


def test_class_names_of_any_alphabet_and_boxes_that_reach_outside_are_drawn():
    classes = [{"id": k, "name": name} for k, name in enumerate(("雪 Ω", "cut \ud83d", "two\nlines", "x" * 300, ""))]
    boxes = [[-900, -900, 900, 900], [0, 0, 48, 64], [47.9, 63.9, 48, 64], [5, 5, 5, 5], [1, 2, 9, 8]]
    picture = panel(found(*boxes, labels=[0, 1, 2, 3, 4]), classes=classes)
    assert picture.width == 384 and (picture_of(picture) != 128).any()


def test_colours_of_classes_differ():
    colors = np.array([drawing.color(k) for k in range(8)])
    distances = np.abs(colors[:, None] - colors).sum(2) + 999 * np.eye(8)
    assert distances.min() > 60


def test_a_strip_is_its_panels_side_by_side_and_others_are_put_below_one_another(written):
    labels = [f"number {i}" for i in range(3)]
    strip = np.asarray(drawing.strip(GREY, {label: found([0, 0, 9, 9]) for label in labels}, CLASSES, side=SIDE))
    one = np.asarray(panel(found([0, 0, 9, 9]), labels[0]))
    height, width = one.shape[:2]
    assert strip.shape == (height + 32, 3 * width + 64, 3) and [text for text in written if "number" in text][:3] == labels
    for x in range(16, 3 * (width + 16), width + 16):
        assert np.array_equal(strip[16 + height - SIDE : -16, x : x + width], one[height - SIDE :])
        assert (strip[:, x + width : x + width + 16] == 255).all()
    tiles = [Image.new("RGB", size, (10, 20, 30)) for size in ((30, 20), (10, 50))]
    pixels = np.asarray(drawing.join(tiles, down=True, gap=7))
    assert pixels.shape == (91, 44, 3) and (pixels == (10, 20, 30)).all(2).sum() == 30 * 20 + 10 * 50
    assert (pixels[7:27, 7:37] == (10, 20, 30)).all() and (pixels[34:84, 7:17] == (10, 20, 30)).all()


def test_pictures_to_draw_are_spread_over_those_with_boxes(tmp_path):
    content = random_content(0, images=40, boxes=200)
    empty = {image["id"] for image in content["images"][::2]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in empty]
    write(tmp_path, content)
    full = annotations.read(tmp_path, "train").trainable().tolist()
    indices = drawing.spread_indices(annotations.read(tmp_path, "train"), 5)
    assert indices == sorted(set(indices)) and len(indices) == 5 and set(indices) < set(full)
    assert {indices[0], indices[-1]} == {full[0], full[-1]}
    assert drawing.spread_indices(annotations.read(tmp_path, "train"), 99) == full
    content["annotations"] = []
    write(tmp_path, content)
    assert drawing.spread_indices(annotations.read(tmp_path, "train"), 3) == [0, 19, 39], "without a box any will do"


def test_the_truth_is_what_is_annotated_without_crowds(tmp_path):
    content = random_content(1)
    write(tmp_path, content)
    read, ids = annotations.read(tmp_path, "train"), [3, 17, 90]
    for index, image in enumerate(content["images"]):
        rows = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        truth = drawing.truth(read, index)
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in rows)]
        assert truth["boxes"].tolist() == expected and "scores" not in truth
        assert truth["labels"].tolist() == [ids.index(a["category_id"]) for a in rows]
    assert sum(a["iscrowd"] for a in content["annotations"]) > 0


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
    labels = ["ground truth", "--teacher @ fused", "--teacher @ low", "low @ low"]
    assert [text for text in written if "@" in text or "truth" in text] == 5 * labels
    scores = [float(text.split()[1]) for text in written if text.split()[0] in ("red", "green", "blue") and " " in text]
    assert len(scores) > 10 and min(scores) >= 0.5


@pytest.mark.parametrize("name, branch", [("student", "low"), ("teacher", "fused"), ("teacher", "low")])
def test_results_for_a_folder_are_the_model_s_own_in_coco_format(home, photos, name, branch):
    res = ["--res", "low"] if branch == "low" else []
    succeed(evaluate, "--ckpt", home / f"{name}.pt", "--images", photos, "--draw", *CPU, *res)
    out = home / "found"
    assert sorted(p.name for p in out.iterdir()) == ["0001_a.jpg", "0002_b.jpg", "0003_c.jpg", "detections.json"]
    names = ["a.JPG", "b.png", "c.png"]
    coco = COCO()
    coco.dataset = {"images": [{"id": name} for name in names], "annotations": []}
    coco.dataset["categories"] = [{"id": k} for k in (5, 7, 9)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = coco.loadRes(str(out / "detections.json"))
    model = checkpoint.load(home / f"{name}.pt").folded()  # evaluate.py folds it, too: equal to the bit
    for file in names:
        mine = [entry for entry in results.anns.values() if entry["image_id"] == entry["file_name"] == file]
        image = read_image(photos / file)
        (expected,) = model.detect(image, branch)
        boxes = expected["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        assert len(mine) == len(boxes) > 5
        assert [e["score"] for e in mine] == expected["scores"].tolist()
        np.testing.assert_allclose([e["bbox"] for e in mine], boxes, atol=1e-4)
        assert [e["category_id"] for e in mine] == [(5, 7, 9)[k] for k in expected["labels"]]
    assert image.shape == (3, 50, 50) and read_image(photos / "a.JPG").shape == (3, 120, 80)


def test_a_single_picture_and_no_drawing(home, photos):
    out = home / "out"
    printed = succeed(evaluate, "--ckpt", home / "student.pt", "--images", photos / "b.png", "--out", out, *CPU)
    assert [p.name for p in out.iterdir()] == ["detections.json"] and f"{out}/detections.json" in printed
    assert {e["file_name"] for e in json.loads((out / "detections.json").read_text())} == {"b.png"}


def test_results_of_other_pictures_are_kept_and_a_data_set_is_drawn_elsewhere(home, photos):
    flags, out = ["--ckpt", home / "student.pt", *CPU], home / "found"
    for file, said in (("b.png", False), ("c.png", True)):
        printed = succeed(evaluate, *flags, "--images", photos / file)
        assert ("detections.1.json" in printed) == said
    for name, file in (("detections.1.json", "b.png"), ("detections.json", "c.png")):
        assert {e["file_name"] for e in json.loads((out / name).read_text())} == {file}
    before = sorted(out.iterdir())
    succeed(evaluate, *flags, "--data", home / "data", "--draw", 1)
    assert sorted(out.iterdir()) == before and len(list((home / "pictures").iterdir())) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_is_drawn_as_it_is_trained_on(tmp_path, kept):
    """EXIF says to turn it by a quarter; the annotated size says whether its boxes were drawn on it turned or not."""
    picture = np.full((60, 100, 3), 128, np.uint8)
    picture[10:20, 30:60] = (255, 0, 0)
    picture, box = (picture, [30, 10, 30, 10]) if kept else (np.rot90(picture), [10, 40, 10, 30])
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "val").mkdir()
    stored = picture if kept else np.rot90(picture)  # to be shown turned to the right
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "val" / "a.png", exif=exif)
    height, width = picture.shape[:2]
    images = [{"id": 1, "file_name": "a.png", "height": height, "width": width}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": box, "iscrowd": 0}]
    write(tmp_path, {"images": images, "annotations": boxes, "categories": CLASSES}, "val")
    read = annotations.read(tmp_path, "val")
    columns = drawing.columns_of("student", tiny_model("low"), ["low"])
    for make in (drawing.compare, lambda *a, **k: drawing.sheet(a[0], *a[2:])):
        panels = make(read, 0, columns, contextlib.nullcontext(), threshold=1.1)
        pixels = np.asarray(panels).astype(int)[:, : panels.width // 2]
        red = (pixels[..., 0] > 150) & (pixels[..., 1:] < 90).all(2)
        outline = (np.abs(pixels - drawing.color(0)) < 40).all(2)
        for where in (red.nonzero(), outline.nonzero()):
            assert len(where[0]) > 20
        for y, x in zip(red.nonzero(), outline.nonzero()):  # the same place, but for the line's own width
            assert abs(y.min() - x.min()) < 20 and abs(y.max() - x.max()) < 20


def test_bad_pictures_of_a_folder_are_named_counted_and_left_out(home, photos):
    (photos / "bad.jpg").write_text("hello")
    code, _, complained = call(evaluate, "--ckpt", home / "student.pt", "--images", photos, *CPU)
    lines = complained.strip().splitlines()
    assert code == 0 and len(lines) == 3, complained
    assert f"left out: {photos}/bad.jpg: " in lines[0] and f"left out: {photos}/notes.txt: " in lines[1]
    assert lines[2] == "left out: 2 of 5 files"
    results = json.loads((home / "found" / "detections.json").read_text())
    assert {e["image_id"] for e in results} == {"a.JPG", "b.png", "c.png"}


def test_what_cannot_be_looked_at_is_one_line(home, photos):
    flags = ["--ckpt", home / "student.pt", *CPU]
    (home / "bad.jpg").write_text("hello")
    (home / "empty").mkdir()
    assert f"{home}/bad.jpg" in complaint(evaluate, *flags, "--images", home / "bad.jpg")
    assert f"{home}/none.jpg" in complaint(evaluate, *flags, "--images", home / "none.jpg")
    assert "folders in it are not looked into" in complaint(evaluate, *flags, "--images", home / "empty")
    assert "--out" in complaint(evaluate, *flags, "--images", photos, "--out", photos)
    assert "--out" in complaint(evaluate, *flags, "--images", photos, "--out", home / "bad.jpg")
    assert "--json" in complaint(evaluate, *flags, "--images", photos, "--json", home / "a.json")
    assert "--teacher" in complaint(evaluate, *flags, "--images", photos, "--teacher", home / "teacher.pt")
    assert "--draw" in complaint(evaluate, *flags, "--images", photos, "--draw", -1)
    line = complaint(evaluate, *flags, "--images", photos, "--draw", "--teacher", home / "student.pt")
    assert "not a teacher" in line


def line_of(picture):
    """Where a chart has its line of the loss, without names and axes: (h,w) bool."""
    where = (np.asarray(picture) < 90).all(2)
    where[:38] = where[352:] = False
    where[:, :58] = False
    return where


def test_points_lie_in_proportion_to_their_axes():
    line = [(0, 0), (50, 10), (100, 20), (200, 40)]
    where = line_of(drawing.chart({"loss": line}, "AP", 200))
    x0, x1 = where.any(0).nonzero()[0][[0, -1]]
    assert x1 - x0 > 800
    centres = []
    for x, _ in line:
        column = round(x0 + (x1 - x0) * x / 200)
        centres.append(where[:, column - 1 : column + 2].nonzero()[0].mean())
    rise = centres[0] - np.array(centres)
    assert rise / rise[-1] * 40 == pytest.approx([0, 10, 20, 40], abs=0.5) and rise[-1] > 200


def test_a_single_point_is_a_dot_and_nothing_at_all_is_no_error():
    where = line_of(drawing.chart({"loss": [(100, 40)]}, "AP", 200))
    y, x = where.nonzero()
    assert 5 <= np.ptp(x) <= 9 and 5 <= np.ptp(y) <= 9 and 450 < x.mean() < 570
    assert drawing.chart({}, "AP", 1).size == (1000, 380)


def test_a_log_becomes_a_line_for_each_branch(tmp_path, monkeypatch):
    entries = [{"iteration": i, "lr": 1, "loss": 6 + i, "low/cls": 1.0, "low/box": 2 + i, "kd": 3.0} for i in (0, 10)]
    entries += [{"done": 11, "branch": branch, "AP": ap} for branch, ap in (("low", 0.25), ("high", -1))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    charts, chart = [], drawing.chart

    def note(lines, title, right):
        charts.append((lines, title.split()[0], right))
        return chart(lines, title, right)

    monkeypatch.setattr(drawing, "chart", note)
    drawing.curve((tmp_path / "log.jsonl").read_text())
    losses = {"loss": [(0, 6), (10, 16)], "low": [(0, 3), (10, 13)], "kd": [(0, 3), (10, 3)]}
    assert charts == [(losses, "loss", 11), ({"low": [(11, 25)], "high": [(11, 0)]}, "AP", 11)]
    assert list(charts[0][0]) == ["loss", "low", "kd"] and len(set(drawing.HUES.values())) == 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_rectangles(tmp_path_factory.mktemp("data"), {"train": 6, "val": 8})


def test_runs_end_with_a_curve_and_a_sheet_of_every_branch(data, tmp_path, monkeypatch):
    labels, text = [], ImageDraw.ImageDraw.text
    keep = lambda pen, xy, t, *a, **k: (labels.append(t) if "@" in t or "tr" in t else None, text(pen, xy, t, *a, **k))
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    teacher = ["--teacher", tmp_path / "teacher" / "last.pt"]
    for name, script, flags, branches in (
        ("teacher", train, [], ["teacher @ fused", "teacher @ high", "teacher @ low"]),
        ("student", distill, teacher, ["teacher @ fused", "teacher @ low", "student @ low"]),
    ):
        printed = succeed(script, *TINY, "--data", data, "--out", tmp_path / name, *flags)
        assert f"pictures {tmp_path}/{name}/curve.png, {tmp_path}/{name}/sheet.jpg" in printed.splitlines()[-2]
        assert printed.splitlines()[-1].startswith("next: python")
        assert labels == 6 * ["ground truth", *branches]
        labels.clear()
        assert Image.open(tmp_path / name / "curve.png").size == (1032, 808)
        width, height = Image.open(tmp_path / name / "sheet.jpg").size
        assert 1500 < width < 1800 and height > 1200


def test_a_picture_that_cannot_be_drawn_costs_nothing(data, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(drawing, "sheet", fail)
    printed = succeed(train, *TINY, "--data", data, "--out", tmp_path / "out", "--res", "low")
    assert "pictures could not be drawn (MemoryError: no room)" in printed and "low @ low" in printed
    assert (tmp_path / "out" / "last.pt").exists() and "next: python evaluate.py" in printed
