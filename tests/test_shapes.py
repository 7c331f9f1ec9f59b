"""The drawn data set: the same bytes from the same seed, and tight boxes."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msad.data import annotations, shapes


def contents(folder):
    """{relative path: digest} of all files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pictures(seed, count):
    return [shapes.draw_picture(f"{seed}/train/{i}") for i in range(count)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(shapes, "TRAIN", 3)
    monkeypatch.setattr(shapes, "VAL", 2)


def test_files_are_the_same_in_another_process_with_other_hashes(tmp_path, few):
    shapes.prepare(tmp_path / "a", seed=3)
    code = "from msad.data import shapes; shapes.TRAIN, shapes.VAL = 3, 2; shapes.prepare('b', seed=3)"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(shapes.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    shapes.prepare(tmp_path / "c", seed=4)
    drawn = contents(tmp_path / "a")
    assert drawn == contents(tmp_path / "b") and len(drawn) == 7
    assert not set(drawn.values()) & set(contents(tmp_path / "c").values())


def test_the_folder_is_in_coco_layout_and_holds_what_was_drawn(tmp_path, few):
    folder = tmp_path / "deep" / "shapes"
    shapes.prepare(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["shapes"]
    for split, count in (("train", 3), ("val", 2)):
        truth = annotations.read(folder, split)
        assert len(truth) == count and truth.skipped == {} and not truth.crowd.any()
        assert [c["name"] for c in truth.classes] == list(shapes.CLASSES)
        for i in range(count):
            _, objects = shapes.draw_picture(f"0/{split}/{i}")
            rows = truth.of_image(i)
            assert truth.labels[rows].tolist() == [label for label, _ in objects]
            np.testing.assert_allclose(truth.boxes[rows], [box for _, box in objects], atol=0.011)
            areas = [(x2 - x1) * (y2 - y1) for _, (x1, y1, x2, y2) in objects]
            np.testing.assert_allclose(truth.areas[rows], areas, rtol=0.01)


@pytest.mark.parametrize("accident", [KeyboardInterrupt, OSError, None])
def test_a_set_is_there_as_a_whole_or_not_at_all_and_then_left_alone(tmp_path, few, monkeypatch, accident):
    draw_split, folder = shapes.draw_split, tmp_path / "shapes"

    def disturbed(unfinished, split, count, seed):
        draw_split(unfinished, split, count, seed)
        if split == "val" and accident:
            raise accident
        if split == "val":
            shutil.copytree(unfinished, folder)  # another run is faster

    monkeypatch.setattr(shapes, "draw_split", disturbed)
    with pytest.raises(accident) if accident else contextlib.nullcontext():
        shapes.prepare(folder)
    assert list(tmp_path.iterdir()) == ([] if accident else [folder])
    monkeypatch.setattr(shapes, "draw_split", draw_split)
    (tmp_path / "empty").mkdir()
    for place in (folder, tmp_path / "empty"):
        shapes.prepare(place)
        there = contents(place)
        shapes.prepare(place, seed=1)
        assert contents(place) == there and len(there) == (7 if place == folder else 0)


def test_boxes_are_tight_around_the_pixels_painted(monkeypatch):
    painted, paint = [], shapes._paint

    def watched(canvas, *how):
        before = canvas.copy()
        paint(canvas, *how)
        painted.append((canvas != before).any(2))

    monkeypatch.setattr(shapes, "_paint", watched)
    drawn = [found for _, objects in pictures(0, 40) for found in objects]
    assert len(drawn) == len(painted) > 100 and {label for label, _ in drawn} == set(range(len(shapes.CLASSES)))
    for (label, box), changed in zip(drawn, painted):
        ys, xs = np.nonzero(changed)
        assert min(box) >= 0 and max(box) <= shapes.SIDE
        np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.01)
        middle = changed[int((box[1] + box[3]) / 2), int((box[0] + box[2]) / 2)]
        assert middle == (shapes.CLASSES[label] not in ("ring", "frame")), "these have holes, all else is filled"
