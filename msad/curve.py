"""What a run leaves to look at: the curve of its losses and AP, and a sheet of what its model finds."""

import json
import math
from collections import Counter

from PIL import Image, ImageDraw, ImageFont

from . import processes
from .pictures import INK, PAPER, color, grid, sheet

GREY = (225, 225, 225)


def draw_run(out, annotations, columns, autocast):
    """Write OUT/curve.png and OUT/sheet.jpg -> a line that names them. No run fails for a picture's sake.

    `columns` are what is drawn beside the ground truth, as from pictures.readings.
    """
    if not processes.is_main():
        return ""
    try:
        curve(out / "log.jsonl").save(out / "curve.png")
        sheet(annotations, columns, autocast).save(out / "sheet.jpg", quality=92, subsampling=0)
    except Exception as error:  # whatever it is, the checkpoint is written and the results are known
        return f"pictures could not be drawn ({type(error).__name__}: {error})"
    return f"pictures {out / 'curve.png'}, {out / 'sheet.jpg'}"


def curve(log, size=(1000, 380)):
    """A run's log.jsonl -> a picture: its losses, and AP where it was evaluated, over the iterations."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses, scores = {}, {}
    for entry in entries:
        if "branch" in entry:
            scores.setdefault(entry["branch"], []).append((entry["done"], 100 * max(0, entry["AP"])))
            continue
        parts = Counter()
        for name, value in entry.items():
            if name not in ("iteration", "lr"):
                parts[name.split("/")[0]] += value
        for name, value in parts.items():
            losses.setdefault(name, []).append((entry["iteration"], value))
    right = max([1] + [x for line in (losses | scores).values() for x, _ in line])
    order = list(dict.fromkeys(["fused", "high", "low", *losses, *scores]))
    hues = {name: INK if name == "loss" else color(order.index(name)) for name in order}
    return grid([chart(losses, hues, "loss", right, size), chart(scores, hues, "AP", right, size)], 1)


def chart(lines, hues, title, right, size):
    """Lines {name: [(x, y)]} from 0 to `right` and from 0 up, with axes, a grid and names."""
    fine = 3  # drawn larger, then reduced, which smooths the lines
    font, (width, height) = ImageFont.load_default(15 * fine), (side * fine for side in size)
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    x0, y0, x1, y1 = 60 * fine, 40 * fine, width - 24 * fine, height - 50 * fine
    values = sorted(y for line in lines.values() for _, y in line)
    top = 1.08 * values[-1 - len(values) // 100] if values and values[-1] > 0 else 1  # a few outliers are cut off
    at = lambda x, y: (x0 + (x1 - x0) * x / right, max(y0, y1 - (y1 - y0) * y / top))
    for y in ticks(top):
        pen.line([at(0, y), at(right, y)], GREY, fine)
        pen.text((x0 - 8 * fine, at(0, y)[1]), f"{y:g}", INK, font, anchor="rm")
    for x in ticks(right):
        pen.line([at(x, 0), (at(x, 0)[0], y1 + 5 * fine)], INK, fine)
        pen.text((at(x, 0)[0], y1 + 9 * fine), f"{x:g}", INK, font, anchor="mt")
    pen.line([at(0, 0), at(right, 0)], INK, fine)
    pen.text(((x0 + x1) / 2, height - 4 * fine), "iteration", INK, font, anchor="mb")
    pen.text((x0, y0 / 2), title, INK, font, anchor="lm")
    x = x1
    for name, line in reversed(lines.items()):
        pen.line([at(*point) for point in line], hues[name], 2 * fine, joint="curve")
        if len(line) < 40:
            for a, b in (at(*point) for point in line):
                pen.ellipse([a - 4 * fine, b - 4 * fine, a + 4 * fine, b + 4 * fine], hues[name])
        text = name if len(line) >= 40 else f"{name} {line[-1][1]:.1f}"
        x -= font.getlength(text)
        pen.text((x, y0 / 2), text, INK, font, anchor="lm")
        pen.line([x - 26 * fine, y0 / 2, x - 6 * fine, y0 / 2], hues[name], 4 * fine)
        x -= 48 * fine
    return canvas.resize(size, Image.Resampling.LANCZOS)


def ticks(top):
    """0 and up to ten round numbers more, the last at most `top`."""
    step = 10 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= 8)
    return [round(i * step, 10) for i in range(math.floor(top / step) + 1)]
