"""Draws pyramids.png, the figure at the top of the README: python .github/figures/pyramids.py

Shapes are those of a real teacher and a real student for one image of 832x1344, which is 800x1333 padded.
"""

import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad import align
from msad.models import ModelConfig, build

HEIGHT, WIDTH = 832, 1344
HIGH, LOW, FUSED, STUDENT, INK = (44, 95, 160), (206, 110, 40), (120, 70, 150), (40, 130, 90), (40, 40, 40)
FINE = 3  # drawn larger, then reduced, which smooths lines and letters
SIZE = (950, 640)
INPUT, CELL = 0.1, 0.58  # pixels of the figure for one of an input, and for one cell of a map
MIDDLE = 84  # of the inputs
COLUMNS = (268, 408, 516, 612, 700)  # the middle of each level
ROWS = {"high": 100, "fused": 245, "low": 390, "student": 565}
COLORS = {"high": HIGH, "fused": FUSED, "low": LOW, "student": STUDENT}
NAMES = {"high": "teacher, ResNet-FPN", "low": "same weights", "student": "student, ResNet-FPN"}
HEADS = {
    "high": "head (training)",
    "fused": "head: boxes of the\nteacher (the same\nhead for all three)",
    "low": "head (training)",
    "student": "head: boxes of the\nstudent, from L only",
}


def shapes():
    """{row: [(h,w) of five maps]} of a teacher and of a student."""
    classes = ({"id": 1, "name": "thing"},)
    image = torch.empty(1, 3, HEIGHT, WIDTH, device="meta")
    teacher = build(ModelConfig("teacher", classes)).to("meta")
    student = build(ModelConfig("low", classes)).to("meta")
    maps = teacher.pyramids(image) | {"student": student.pyramids(align.downsample(image))["low"]}
    return {row: [tuple(level.shape[2:]) for level in maps[row]] for row in ROWS}


class Pen:
    """Pillow's drawing in final pixels."""

    def __init__(self):
        self.canvas = Image.new("RGB", [side * FINE for side in SIZE], (255, 255, 255))
        self.draw = ImageDraw.Draw(self.canvas)

    def text(self, x, y, words, fill=INK, size=15, anchor="mm"):
        font = ImageFont.load_default(size * FINE)
        self.draw.multiline_text((x * FINE, y * FINE), words, fill, font, anchor=anchor, align="center")

    def box(self, x, y, width, height, fill):
        """A rectangle around (x, y), paler inside."""
        corners = [(x - width / 2) * FINE, (y - height / 2) * FINE, (x + width / 2) * FINE, (y + height / 2) * FINE]
        self.draw.rectangle(corners, tuple((c + 3 * 255) // 4 for c in fill), fill, 2 * FINE)

    def line(self, start, end, fill, dash=math.inf):
        """A line, dashed if `dash` is finite, and its direction."""
        (x, y), (a, b) = start, end
        length = math.hypot(a - x, b - y)
        u, v = (a - x) / length, (b - y) / length
        at = 0
        while at < length:
            to = min(at + dash, length)
            self.draw.line([FINE * c for c in (x + u * at, y + v * at, x + u * to, y + v * to)], fill, 2 * FINE)
            at = to + 4
        return u, v

    def arrow(self, start, end, fill):
        (a, b), (u, v) = end, self.line(start, end, fill)
        corners = [(a, b), (a - 9 * u - 4 * v, b - 9 * v + 4 * u), (a - 9 * u + 4 * v, b - 9 * v - 4 * u)]
        self.draw.polygon([(FINE * x, FINE * y) for x, y in corners], fill)

    def path(self, points, fill):
        """A dashed way along points, with a tip at its end."""
        for start, end in zip(points, points[1:]):
            self.line(start, end, fill, 7)
        self.arrow(points[-2], points[-1], fill)


def main():
    pen, found = Pen(), shapes()
    for row, y in ROWS.items():
        fill = COLORS[row]
        if row != "fused":
            name, (height, width) = ("H", (HEIGHT, WIDTH)) if row == "high" else ("L", (HEIGHT // 2, WIDTH // 2))
            half = width * INPUT / 2
            pen.box(MIDDLE, y, width * INPUT, height * INPUT, fill)
            pen.text(MIDDLE, y, name, fill, 18)
            pen.text(MIDDLE, y + height * INPUT / 2 + 13, f"{height} x {width}", fill)
            pen.text(MIDDLE, y - 62, NAMES[row], fill, 16)
            pen.arrow((MIDDLE + half + 6, y), (COLUMNS[0] - 66, y), fill)
        for level, (x, (h, w)) in enumerate(zip(COLUMNS, found[row])):
            pen.box(x, y, max(w * CELL, 9), max(h * CELL, 6), fill)
            if row != "fused":
                levels = align.LEVELS["high" if row == "high" else "low"]
                pen.text(x, y - h * CELL / 2 - 13, f"P{levels[level]}", fill, 16)
                pen.text(x, y + h * CELL / 2 + 13, f"{h} x {w}", fill)
    for x, heights in zip(COLUMNS, zip(*found.values())):
        half = [max(h * CELL, 6) / 2 for h, _ in heights]
        pen.arrow((x, ROWS["high"] + half[0] + 24), (x, ROWS["fused"] - half[1] - 4), HIGH)
        pen.arrow((x, ROWS["low"] - half[2] - 26), (x, ROWS["fused"] + half[1] + 4), LOW)
        pen.text(x + 12, ROWS["fused"] - half[1] - 17, "a", HIGH)
        pen.text(x + 12, ROWS["fused"] + half[1] + 17, "b", LOW)
    gate = "fused = a H + b L\na gate reads both:\na + b = 1, one pair\nper image and level"
    pen.text(MIDDLE, ROWS["fused"], gate, FUSED)
    for row, words in HEADS.items():
        y, start = ROWS[row], COLUMNS[-1] + 42
        pen.arrow((start, y), (start + 38, y), COLORS[row])
        pen.text(start + 46, y, words, COLORS[row], anchor="lm")
    for x, (_, w) in zip(COLUMNS, found["fused"]):
        edge = x + max(w * CELL, 9) / 2 + 2
        bend = max(edge + 10, x + 34)
        above, below = ROWS["fused"], ROWS["student"]
        pen.path([(edge, above), (bend, above), (bend, below), (edge, below)], FUSED)
    middle = (ROWS["low"] + ROWS["student"]) / 2
    pen.text(COLUMNS[-1] + 42, middle, "- - - distillation, by level:\nmean |student - fused|", FUSED, anchor="lm")
    pen.canvas.resize(SIZE, Image.Resampling.LANCZOS).save(ROOT / ".github" / "figures" / "pyramids.png", optimize=True)


if __name__ == "__main__":
    main()
