"""What a run leaves to look at: its curve, its sheet, and never an error."""

import json

import distill
import numpy as np
import pytest
import train
from folders import draw_rectangles
from PIL import Image, ImageDraw
from scripts import TINY, succeed

from msad import curve, processes


@pytest.mark.parametrize("top", [0.001, 0.04, 0.7, 1, 1.08, 3.5, 7, 9.99, 10, 86.4, 100, 90_000])
def test_ticks_are_round_and_reach_as_far_as_they_can(top):
    ticks = curve.ticks(top)
    step = ticks[1]
    assert ticks == pytest.approx([i * step for i in range(len(ticks))]) and 4 <= len(ticks) <= 9
    assert ticks[-1] <= top * 1.0001 < ticks[-1] + step * 1.001
    assert f"{step:e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step)


def test_points_lie_in_proportion_to_their_axes():
    line = [(0, 0), (50, 10), (100, 20), (200, 40)]
    chart = np.asarray(curve.chart({"low": line}, {"low": (255, 0, 0)}, "AP", 200, (1000, 380))).astype(int)
    red = (chart[..., 0] > 200) & (chart[..., 1:] < 90).all(2)
    red[:35] = False  # the legend
    x0, x1 = red.any(0).nonzero()[0][[0, -1]] + [4, -4]  # dots have a radius of 4
    centres = []
    for x, _ in line:
        column = round(x0 + (x1 - x0) * x / 200)
        centres.append(red[:, column - 1 : column + 2].nonzero()[0].mean())
    rise = centres[0] - np.array(centres)
    assert rise / rise[-1] * 40 == pytest.approx([0, 10, 20, 40], abs=0.5) and rise[-1] > 200


def test_a_log_becomes_a_line_for_each_branch(tmp_path, monkeypatch):
    entries = [{"iteration": i, "lr": 1, "loss": 6 + i, "low/cls": 1.0, "low/box": 2 + i, "kd": 3.0} for i in (0, 10)]
    entries += [{"done": 11, "branch": branch, "AP": ap} for branch, ap in (("low", 0.25), ("high", -1))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    charts, chart = {}, curve.chart
    monkeypatch.setattr(curve, "chart", lambda *a: (charts.update({a[2]: (a[0], a[3])}), chart(*a))[1])
    curve.curve(tmp_path / "log.jsonl")
    losses = {"loss": [(0, 6), (10, 16)], "low": [(0, 3), (10, 13)], "kd": [(0, 3), (10, 3)]}
    assert charts == {"loss": (losses, 11), "AP": ({"low": [(11, 25)], "high": [(11, 0)]}, 11)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    draw_rectangles(home / "data", {"train": 6, "val": 8})
    return home


def test_runs_end_with_a_curve_and_a_sheet_of_every_branch(home, monkeypatch):
    labels, text = [], ImageDraw.ImageDraw.text
    keep = lambda pen, xy, t, *a, **k: (labels.append(t) if "@" in t or "tr" in t else None, text(pen, xy, t, *a, **k))
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    teacher = ["--teacher", home / "teacher" / "last.pt"]
    for name, script, flags, branches in (
        ("teacher", train, [], ["teacher @ fused", "teacher @ high", "teacher @ low"]),
        ("student", distill, teacher, ["teacher @ fused", "teacher @ low", "student @ low"]),
    ):
        printed = succeed(script, *TINY, "--data", home / "data", "--out", home / name, *flags)
        assert f"pictures {home}/{name}/curve.png, {home}/{name}/sheet.jpg" in printed.splitlines()[-2]
        assert printed.splitlines()[-1].startswith("next: python")
        assert labels == 6 * ["ground truth", *branches]
        labels.clear()
        assert Image.open(home / name / "curve.png").size == (1032, 808)
        width, height = Image.open(home / name / "sheet.jpg").size
        assert 1000 < width < 1500 and height > 1000


def test_a_picture_that_cannot_be_drawn_costs_nothing(home, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(curve, "sheet", fail)
    printed = succeed(train, *TINY, "--data", home / "data", "--out", tmp_path / "out", "--res", "low")
    assert "pictures could not be drawn (MemoryError: no room)" in printed and "low @ low" in printed
    assert (tmp_path / "out" / "last.pt").exists() and "next: python evaluate.py" in printed


def test_only_the_main_process_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert curve.draw_run(tmp_path, None, {}, None) == "" and not list(tmp_path.iterdir())
