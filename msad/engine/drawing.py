"""Pictures of what a model finds, and the curve of a run, drawn with Pillow.

A panel is one image with one set of boxes, under its label; a strip is all panels of an image side by side; a sheet is
strips of several images. Everything is drawn after the image was brought to the panel's size, so lines stay thin and
text stays readable however small or large the file is.
"""

import colorsys
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from ..data.errors import InputError, input_errors, write_errors
from ..data.reading import read_image

THRESHOLD = 0.4  # score below which nothing is drawn
TAGS = 100  # of a panel, for the best
SIDE = 512  # pixels of a panel's long side beside others
INK, PAPER, GREY = (40, 40, 40), (255, 255, 255), (225, 225, 225)


def columns_of(name, model, branches):
    """{label: (copy of the model for inference, branch)}, the columns of a strip; labels as in "teacher @ fused"."""
    model = model.folded()
    return {f"{name} @ {branch}": (model, branch) for branch in branches}


def compare_columns(teacher, student, branches):
    """The columns that set a student, or another model, against what a teacher makes of both resolutions and of L."""
    name = {"low": "student", "teacher": "checkpoint"}.get(student.config.kind, student.config.kind)
    return columns_of("teacher", teacher, ["fused", "low"]) | columns_of(name, student, branches)


def detect_all(image, columns, autocast):
    """What `columns`, {label: (model, branch)}, find in one image (3,h,w) uint8 -> {label: detections}."""
    with autocast:
        return {label: model.detect(image, branch)[0] for label, (model, branch) in columns.items()}


def truth(annotations, index):
    """The annotated objects of an image, as detections without scores; crowd boxes are left out."""
    boxes, labels = annotations.objects(index)
    return {"boxes": boxes, "labels": labels}


def spread_indices(annotations, count):
    """Indices of at most `count` images, evenly spread over those of a set that have boxes, if any has."""
    has = np.diff(annotations.starts) > 0
    full = np.flatnonzero(has | ~has.any())
    return full[np.linspace(0, len(full) - 1, min(count, len(full))).astype(int)].tolist()


def compare(annotations, index, columns, autocast, **style):
    """A strip of an annotated image: ground truth and what `columns` find. `style` is for `strip`."""
    image = read_image(annotations.path(index), tuple(map(int, annotations.sizes[index])))
    found = {"ground truth": truth(annotations, index)} | detect_all(image, columns, autocast)
    return strip(image, found, annotations.classes, **style)


def sheet(annotations, columns, autocast, count=6):
    """A few images of a set, small, each a strip as in `compare`."""
    panels = 1 + len(columns)
    indices = spread_indices(annotations, count)
    strips = [compare(annotations, i, columns, autocast, side=320, per_row=panels) for i in indices]
    return tile(strips, max(1, 4 // panels), gap=0)


def strip(image, found, classes, threshold=THRESHOLD, side=SIDE, per_row=3):
    """An image (3,h,w) uint8 with {label: detections} -> a picture of one panel each, at most `per_row` in a row.

    Detections are as from `detect`, in the image's pixels; without "scores" they are drawn whatever the threshold.
    """
    if len(found) == 1:  # alone there is room for all of it
        side = max(side, min(2 * SIDE, max(image.shape[1:])))
    rows = math.ceil(len(found) / per_row)
    panels = [panel(image, detections, classes, label, threshold, side) for label, detections in found.items()]
    return tile(panels, math.ceil(len(found) / rows))


def tile(pictures, columns, gap=16):
    """Pictures in rows, on white."""
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    width = max(sum(picture.width + gap for picture in row) for row in rows)
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (width + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    y = gap
    for row, height in zip(rows, heights):
        x = gap
        for picture in row:
            canvas.paste(picture, (x, y))
            x += picture.width + gap
        y += height + gap
    return canvas


def panel(image, found, classes, label, threshold=THRESHOLD, side=SIDE):
    """An image (3,h,w) uint8, its long side brought to `side`, with detections, under a label."""
    picture = to_pil_image(image)
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(scale * s)) for s in picture.size], Image.Resampling.LANCZOS)
    scores = found.get("scores")
    backwards = reversed(range(len(found["boxes"])))  # the best come last, on top
    drawn = [i for i in backwards if scores is None or scores[i] >= threshold]
    if drawn:
        boxes = torch.as_tensor(found["boxes"])[drawn].cpu() * scale
        names = [classes[found["labels"][i]]["name"] + ("" if scores is None else f" {scores[i]:.2f}") for i in drawn]
        names[:-TAGS] = [None] * len(names[:-TAGS])  # of thousands none could be read
        hues = [color(int(found["labels"][i])) for i in drawn]
        pixels = draw_bounding_boxes(pil_to_tensor(picture), boxes, names, hues, width=2, fill_labels=True)
        picture = to_pil_image(pixels)

    font = ImageFont.load_default(min(16, 8 + side // 60))
    head = round(1.6 * font.size)
    canvas = ImageOps.expand(picture, (0, head, 0, 0), PAPER)
    ImageDraw.Draw(canvas).text((0, 0.4 * head), label, INK, font, anchor="lm")
    return canvas


def color(index):
    """A colour for a class or a line: steps of the golden angle, so that neighbours differ most."""
    hue = (0.58 + index * 0.381966) % 1
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.8, (0.75, 0.95)[index % 2]))


def read_all(source):
    """Yield (number, path, image) for a picture, or for each in a folder (not below it), numbered by name from 1.

    Files of a folder that cannot be read are left out with a line each, and counted; only hidden ones are passed over.
    InputError if nothing is left.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source}: no such picture or folder")
    files, left_out = [source], 0
    if source.is_dir():
        with input_errors(source, "cannot be read"):
            visible = [file for file in source.iterdir() if not file.name.startswith(".")]
            # What does not exist is a link to nothing, which counts as a file that cannot be read.
            files = sorted(file for file in visible if file.is_file() or not file.exists())
    for number, path in enumerate(tqdm(files, "looking", leave=False, disable=None), start=1):
        try:
            image = read_image(path)
        except InputError as error:
            if path == source:
                raise
            left_out += 1
            tqdm.write(f"left out: {error}", file=sys.stderr)
        else:
            yield number, path, image
    if left_out == len(files):
        raise InputError(f"{source}: no readable picture in this folder")
    if left_out:
        print(f"left out: {left_out} of {len(files)} files", file=sys.stderr)


def save(picture, out, number, file):
    """Write a picture of `file`, the one of that number in its set, into the folder `out`."""
    stem = os.fsencode(file.stem)[:200].decode(errors="ignore")  # a name may have 255 bytes, which may be no UTF-8
    path = Path(out) / f"{number:04d}_{stem}.jpg"
    with write_errors(path, "choose another --out"):
        picture.save(path, quality=92, subsampling=0)


def draw_run(out, log, annotations, columns, autocast):
    """Write OUT/curve.png and OUT/sheet.jpg -> a line that names them. No run fails for a picture's sake.

    `log` is the run's, open; `columns` are what is drawn beside the ground truth, as from `columns_of`.
    """
    try:
        log.seek(0)
        curve(log.read().decode()).save(out / "curve.png")
        sheet(annotations, columns, autocast).save(out / "sheet.jpg", quality=92, subsampling=0)
    except Exception as error:  # whatever it is, the checkpoint is written and the results are known
        return f"pictures could not be drawn ({type(error).__name__}: {error})"
    return f"pictures {out / 'curve.png'}, {out / 'sheet.jpg'}"


def curve(log):
    """The text of a run's log.jsonl -> a picture: its losses, and AP where it was evaluated, over the iterations."""
    losses, scores = {}, {}
    for line in log.splitlines():
        entry = json.loads(line)
        if "branch" in entry:
            scores.setdefault(entry["branch"], []).append((entry["done"], 100 * max(0, entry["AP"])))
            continue
        parts = Counter()  # the parts of a branch's loss, "high/cls" and others, are summed up
        for name, value in entry.items():
            if name not in ("iteration", "lr"):
                parts[name.split("/")[0]] += value
        for name, value in parts.items():
            losses.setdefault(name, []).append((entry["iteration"], value))
    right = max([1] + [x for line in (losses | scores).values() for x, _ in line])
    order = list(dict.fromkeys(["fused", "high", "low", *losses, *scores]))
    hues = {name: INK if name == "loss" else color(order.index(name)) for name in order}
    charts = [chart(losses, hues, "loss over iterations", right), chart(scores, hues, "AP over iterations", right)]
    return tile(charts, 1)


def chart(lines, hues, title, right, size=(1000, 380)):
    """Lines {name: [(x, y)]} from 0 to `right` and from 0 up, with axes and names."""
    fine = 3  # drawn larger, then reduced, which smooths the lines
    font, (width, height) = ImageFont.load_default(15 * fine), (side * fine for side in size)
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    x0, y0, x1, y1 = 60 * fine, 40 * fine, width - 24 * fine, height - 30 * fine
    values = sorted(y for line in lines.values() for _, y in line)
    top = 1.08 * values[-1 - len(values) // 100] if values and values[-1] > 0 else 1  # a few outliers are cut off
    at = lambda x, y: (x0 + (x1 - x0) * x / right, max(y0, y1 - (y1 - y0) * y / top))
    for y in ticks(top):
        pen.line([at(0, y), at(right, y)], GREY, fine)
        pen.text((x0 - 8 * fine, at(0, y)[1]), f"{y:g}", INK, font, anchor="rm")
    for x in ticks(right):
        pen.text((at(x, 0)[0], y1 + 9 * fine), f"{x:g}", INK, font, anchor="mt")
    pen.text((x0, y0 / 2), title, INK, font, anchor="lm")
    x = x1
    for name, line in reversed(lines.items()):
        pen.line([at(*point) for point in line], hues[name], 2 * fine, joint="curve")
        if len(line) == 1:
            x2, y2 = at(*line[0])
            pen.ellipse([x2 - 4 * fine, y2 - 4 * fine, x2 + 4 * fine, y2 + 4 * fine], hues[name])
        text = f"{name} {line[-1][1]:.1f}"
        x -= font.getlength(text)
        pen.text((x, y0 / 2), text, hues[name], font, anchor="lm")
        x -= 24 * fine
    return canvas.resize(size, Image.Resampling.LANCZOS)


def ticks(top):
    """0 and up to ten round numbers more, the last at most `top`."""
    step = 10 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= 8)
    return [round(i * step, 10) for i in range(math.floor(top / step) + 1)]
