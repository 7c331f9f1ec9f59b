"""Pictures of what a model finds, drawn with Pillow.

A panel is one image with one set of boxes, under its label; a strip is all panels of an image side by side; a sheet is
strips of several images. Everything is drawn after the image was brought to the panel's size, so lines stay thin and
text stays readable however small or large the file is.
"""

import colorsys
import contextlib
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .annotations import InputError
from .data import read_image

THRESHOLD = 0.4  # score below which nothing is drawn
TAGS = 100  # of a panel: of thousands none could be read
SIDE = 512  # pixels of a panel's long side beside others
INK, PAPER, RIM = (40, 40, 40), (255, 255, 255), (0, 0, 0, 110)


def readings(name, model, branches):
    """{label: (copy of the model for inference, branch)}, the columns of a strip; labels as in "teacher @ fused"."""
    model = model.folded()
    labels = [f"{branch} resolution" if name == branch else f"{name} @ {branch}" for branch in branches]
    return {label: (model, branch) for label, branch in zip(labels, branches)}


def beside(teacher, student, branches):
    """The columns that set a student, or another model, against what a teacher makes of both resolutions and of L."""
    name = {"low": "student", "teacher": "checkpoint"}.get(student.config.kind, student.config.kind)
    return readings("teacher", teacher, ["fused", "low"]) | readings(name, student, branches)


def look(image, columns, autocast):
    """What `columns`, {label: (model, branch)}, find in one image (3,h,w) uint8 -> {label: detections}."""
    with autocast:
        pixels = image.float() / 255
        return {label: model.detect([pixels], branch)[0] for label, (model, branch) in columns.items()}


def truth(annotations, index):
    """The annotated objects of an image, as detections without scores; crowd boxes are left out."""
    rows = annotations.of_image(index)
    single = ~annotations.crowd[rows]
    return {"boxes": annotations.boxes[rows][single], "labels": annotations.labels[rows][single]}


def spread(annotations, count):
    """Indices of at most `count` images, evenly spread over those of a set that have boxes, if any has."""
    has = np.diff(annotations.starts) > 0
    full = np.flatnonzero(has | ~has.any())
    return full[np.linspace(0, len(full) - 1, min(count, len(full))).astype(int)].tolist()


def compare(annotations, index, columns, autocast, **style):
    """A strip of an annotated image: ground truth and what `columns` find. `style` is for `strip`."""
    image = read_image(annotations.path(index))
    found = {"ground truth": truth(annotations, index)} | look(image, columns, autocast)
    return strip(image, found, annotations.classes, **style)


def sheet(annotations, columns, autocast, count=6):
    """A few images of a set, small, each a strip as in `compare`."""
    panels = 1 + len(columns)
    indices = spread(annotations, count)
    strips = [compare(annotations, i, columns, autocast, side=320, per_row=panels) for i in indices]
    return grid(strips, max(1, 4 // panels), gap=0)


def strip(image, found, classes, threshold=THRESHOLD, side=SIDE, per_row=3):
    """An image (3,h,w) uint8 with {label: detections} -> a picture of one panel each, at most `per_row` in a row.

    Detections are as from `detect`, in the image's pixels; without "scores" they are drawn whatever the threshold.
    """
    if len(found) == 1:  # alone there is room for all of it
        side = max(side, min(2 * SIDE, max(image.shape[1:])))
    rows = math.ceil(len(found) / per_row)
    panels = [panel(image, detections, classes, label, threshold, side) for label, detections in found.items()]
    return grid(panels, math.ceil(len(found) / rows))


def grid(pictures, columns, gap=16):
    """Pictures in rows, on white."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
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
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(scale * s)) for s in picture.size], Image.Resampling.LANCZOS)
    font = ImageFont.load_default(min(16, 8 + side // 60))
    scores = found.get("scores")
    drawn = [i for i in range(len(found["boxes"])) if scores is None or scores[i] >= threshold]
    boxes = [[round(scale * float(v)) for v in found["boxes"][i]] for i in drawn]
    labels = [int(found["labels"][i]) for i in drawn]
    names = [classes[k]["name"] + ("" if scores is None else f" {scores[i]:.2f}") for i, k in zip(drawn, labels)]
    _draw_boxes(ImageDraw.Draw(picture, "RGBA"), boxes, names, [color(k) for k in labels], font, picture.size)

    head = round(1.6 * font.size)
    canvas = Image.new("RGB", (picture.width, picture.height + head), PAPER)
    canvas.paste(picture, (0, head))
    ImageDraw.Draw(canvas).text((0, 0.4 * head), label, INK, font, anchor="lm")
    return canvas


def _draw_boxes(pen, boxes, names, colors, font, frame):
    """Thin boxes with a dark rim, then a tag where it hides the least for the first ones, which choose in turn."""
    for (x1, y1, x2, y2), fill in zip(reversed(boxes), reversed(colors)):
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow's last pixel is inside
        pen.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], outline=RIM, width=4)
        pen.rectangle([x1, y1, x2, y2], outline=fill, width=2)
    taken = []
    for box, name, fill in list(zip(boxes, names, colors))[:TAGS]:
        size = math.ceil(font.getlength(name)) + 8, round(1.3 * font.size)
        tag = _place(size, box, taken, boxes, frame)
        if tag:
            taken.append(tag)
            pen.rectangle([tag[0], tag[1], tag[2] - 1, tag[3] - 1], fill)
            bright = 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] > 140
            middle = (tag[0] + 4, (tag[1] + tag[3]) / 2)
            pen.text(middle, name, (0, 0, 0) if bright else PAPER, font, anchor="lm")


def _place(size, box, taken, boxes, frame):
    """A tag's rectangle at the edge of its box, off other tags and as far as can be off boxes; None if no place is."""
    (w, h), (x1, y1, x2, y2) = size, box
    spots = [(x, y) for y in (y1 - h, y2, y1, y2 - h) for x in (x1, x2 - w, (x1 + x2 - w) // 2)]
    spots += [(x, y) for y in (y1, y2 - h, (y1 + y2 - h) // 2) for x in (x2, x1 - w)]
    spots = [(max(0, min(x, frame[0] - w)), max(0, min(y, frame[1] - h))) for x, y in spots]
    tags = [(x, y, x + w, y + h) for x, y in spots]
    best = min(tags, key=lambda tag: (_overlap(tag, taken), _overlap(tag, boxes)))
    return None if _overlap(best, taken) else best


def _overlap(tag, others):
    """The area that a rectangle shares with others, in all."""
    x1, y1, x2, y2 = tag
    return sum(max(0, min(x2, d) - max(x1, b)) * max(0, min(y2, e) - max(y1, c)) for b, c, d, e in others)


def color(index):
    """A colour for a class or a line: steps of the golden angle, so that neighbours differ most."""
    hue = (0.58 + index * 0.381966) % 1
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.8, (0.75, 0.95)[index % 2]))


def read_all(source):
    """Yield (number, path, image) for a picture, or for each in a folder (not below it), numbered by name from 1.

    Files of a folder that cannot be read are left out with a line each, and counted. InputError if nothing is left.
    """
    source, left_out = Path(source), 0
    if not source.exists():
        raise InputError(f"{source}: no such picture or folder")
    kinds = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        files = sorted(f for f in source.iterdir() if f.suffix.lower() in kinds) if source.is_dir() else [source]
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None
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
        print(f"left out: {left_out} of {len(files)} pictures", file=sys.stderr)


def save(picture, out, number, file):
    """Write a picture of `file`, the one of that number in its set, into the folder `out`."""
    path = Path(out) / f"{number:04d}_{file.stem}.jpg"
    with writing("--out", path):
        picture.save(path, quality=92, subsampling=0)


@contextlib.contextmanager
def writing(flag, path):
    """Turn a failure to write what a flag asked for into one line, an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None
