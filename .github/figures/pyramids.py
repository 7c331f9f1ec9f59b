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
from msad.models import build
from msad.detector import ModelConfig

HEIGHT, WIDTH = 832, 1344
HIGH, LOW, FUSED, INK, GREY = (44, 95, 160), (206, 110, 40), (120, 70, 150), (40, 40, 40), (130, 130, 130)
FINE = 3  # drawn larger, then reduced, which smooths lines and letters
SIZE = (1180, 640)
COLUMNS = (330, 520, 680, 810, 920)  # the middle of each level
ROWS = {"high": 90, "fused": 235, "low": 380, "student": 540}


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

    def text(self, x, y, words, fill=INK, size=14, anchor="mm"):
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
    scale = 0.72  # pixels of the figure per cell of a map
    colors = {"high": HIGH, "fused": FUSED, "low": LOW, "student": LOW}
    inputs = {"high": (f"H  {HEIGHT} x {WIDTH}", 150), "low": (f"L  {HEIGHT // 2} x {WIDTH // 2}", 75)}
    inputs["student"] = inputs["low"]
    for row, y in ROWS.items():
        fill = colors[row]
        if row in inputs:
            name, width = inputs[row]
            pen.box(100, y, width, width * HEIGHT / WIDTH, fill)
            pen.text(100, y, name if width > 100 else name[0], fill, 15)
            if width < 100:
                pen.text(100, y + 36, name[1:].strip(), fill, 12)
            pen.arrow((100 + width / 2 + 6, y), (COLUMNS[0] - 72, y), fill)
            pen.text((165 + COLUMNS[0] - 60) / 2, y - 12, "ResNet-FPN", fill, 12)
        for level, (x, (h, w)) in enumerate(zip(COLUMNS, found[row])):
            pen.box(x, y, max(w * scale, 9), max(h * scale, 6), fill)
            if row in inputs:
                shift = align.SHIFTS["high" if row == "high" else "low"]
                pen.text(x, y - h * scale / 2 - 11, f"P{align.levels(shift)[level]}", fill, 14)
            if row != "fused":
                pen.text(x, y + h * scale / 2 + 11, f"{h} x {w}", fill, 12)
    for x, heights in zip(COLUMNS, zip(*found.values())):
        half = [max(h * scale, 6) / 2 for h, _ in heights]
        pen.arrow((x, ROWS["high"] + half[0] + 22), (x, ROWS["fused"] - half[1] - 4), HIGH)
        pen.arrow((x, ROWS["low"] - half[2] - 24), (x, ROWS["fused"] + half[1] + 4), LOW)
        pen.text(x + 11, ROWS["fused"] - half[1] - 16, "a", HIGH, 13)
        pen.text(x + 11, ROWS["fused"] + half[1] + 16, "b", LOW, 13)
    gate = "fused = a H + b L\na gate reads both maps:\na + b = 1, one pair\nper image and level"
    pen.text(120, ROWS["fused"], gate, FUSED, 13)
    last = COLUMNS[-1] + 44
    pen.arrow((last, ROWS["fused"]), (last + 50, ROWS["fused"]), FUSED)
    pen.text(last + 58, ROWS["fused"], "head: boxes\nof the teacher", FUSED, 14, "lm")
    pen.arrow((last, ROWS["student"]), (last + 50, ROWS["student"]), LOW)
    pen.text(last + 58, ROWS["student"], "head: boxes\nof the student,\nwhich sees L only", LOW, 14, "lm")
    for x, (_, w) in zip(COLUMNS, found["fused"]):
        edge = x + max(w * scale, 9) / 2 + 2
        bend = max(edge + 12, x + 32)
        above, below = ROWS["fused"], ROWS["student"]
        pen.path([(edge, above), (bend, above), (bend, below), (edge, below)], FUSED)
    pen.text(last + 58, 400, "distillation:\nmean |student - fused|\non every level", FUSED, 13, "lm")
    pen.canvas.resize(SIZE, Image.Resampling.LANCZOS).save(ROOT / ".github" / "figures" / "pyramids.png", optimize=True)


if __name__ == "__main__":
    main()
