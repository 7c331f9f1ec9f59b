"""Pictures of what a model finds, drawn with Pillow.

A panel is one image with one set of boxes, under its label; a strip is all panels of an image side by side; a sheet is
strips of several images. Everything is drawn after the image was brought to the panel's size, so lines stay thin and
text stays readable however small or large the file is.
"""

import os
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from ..data.errors import InputError, write_errors
from ..data.reading import read_image

THRESHOLD = 0.4  # score below which nothing is drawn
SIDE = 512  # pixels of a panel's long side
INK, PAPER = (40, 40, 40), (255, 255, 255)


def columns_of(name, model, branches):
    """What is drawn beside the ground truth, {"NAME @ BRANCH": (a copy of the model for inference, branch)}."""
    model = model.folded()
    return {f"{name} @ {branch}": (model, branch) for branch in branches}


def detect_all(image, columns, autocast):
    """What the columns, {label: (model, branch)}, find in one image (3,h,w) uint8 -> {label: detections}."""
    with autocast:
        return {label: model.detect(image, branch)[0] for label, (model, branch) in columns.items()}


def spread_indices(annotations, count):
    """Indices of at most `count` images, evenly spread over those of a set that have objects, if any has."""
    full = annotations.trainable().tolist() or range(len(annotations))
    return [full[i] for i in np.linspace(0, len(full) - 1, min(count, len(full))).astype(int)]


def compare(annotations, index, columns, autocast, threshold=THRESHOLD, side=SIDE):
    """A strip of an annotated image, read as it is in training: ground truth and what the columns find."""
    image = read_image(annotations.path(index), tuple(map(int, annotations.sizes[index])))
    truth = dict(zip(("boxes", "labels"), annotations.objects(index)))
    found = {"ground truth": truth} | detect_all(image, columns, autocast)
    return strip(image, found, annotations.classes, threshold, side)


def strip(image, found, classes, threshold=THRESHOLD, side=SIDE):
    """An image (3,h,w) uint8 with {label: detections} -> a picture of one panel each, side by side.

    Detections are as from `detect`, in the image's pixels; without "scores" they are drawn whatever the threshold.
    """
    return join([panel(image, detections, classes, label, threshold, side) for label, detections in found.items()])


def join(pictures, down=False, gap=16):
    """Pictures side by side, or one below the other (`down`), on white."""
    starts = list(accumulate((picture.size[down] + gap for picture in pictures), initial=gap))
    across = max(picture.size[not down] for picture in pictures) + 2 * gap
    canvas = Image.new("RGB", (across, starts[-1]) if down else (starts[-1], across), PAPER)
    for picture, start in zip(pictures, starts):
        canvas.paste(picture, (gap, start) if down else (start, gap))
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
        hues = [color(int(found["labels"][i])) for i in drawn]
        pixels = draw_bounding_boxes(pil_to_tensor(picture), boxes, names, hues, width=2, fill_labels=True)
        picture = to_pil_image(pixels)

    font = ImageFont.load_default(min(16, 8 + side // 60))
    head = round(1.6 * font.size)
    canvas = ImageOps.expand(picture, (0, head, 0, 0), PAPER)
    ImageDraw.Draw(canvas).text((0, 0.4 * head), label, INK, font, anchor="lm")
    return canvas


def color(index):
    """A colour for a class: steps of the golden angle, so that neighbours differ most."""
    return ImageColor.getrgb(f"hsv({(209 + 137.508 * index) % 360:.0f},80%,{(75, 95)[index % 2]}%)")


def read_all(source):
    """Yield (number, path, image) for a picture, or for each in a folder (not below it), numbered by name from 1.

    Files of a folder that cannot be read are left out with a line each, and counted, links to nothing too; only hidden
    ones are passed over. InputError if nothing is left.
    """
    source, left_out = Path(source), 0
    visible = sorted(file for file in source.glob("[!.]*") if file.is_file() or file.is_symlink())
    files = visible if source.is_dir() else [source]
    for number, path in enumerate(tqdm(files, "looking", leave=False, disable=None), start=1):
        try:
            yield number, path, read_image(path)
        except InputError as error:
            if path == source:
                raise
            left_out += 1
            tqdm.write(f"left out: {error}", file=sys.stderr)
    if left_out == len(files):
        raise InputError(f"{source}: no readable picture in this folder; folders in it are not looked into")
    if left_out:
        print(f"left out: {left_out} of {len(files)} files", file=sys.stderr)


def save(picture, out, number, file):
    """Write a picture of `file`, the one of that number in its set, into the folder `out`."""
    stem = os.fsencode(file.stem)[:200].decode(errors="ignore")  # a name may have 255 bytes, which may be no UTF-8
    path = Path(out) / f"{number:04d}_{stem}.jpg"
    with write_errors(path, "choose another --out"):
        picture.save(path, quality=92, subsampling=0)


def draw_run(out, annotations, columns, autocast):
    """Write OUT/sheet.jpg, in which `columns` (as from `columns_of`) are beside the ground truth -> a line that names
    it. No run fails for a picture's sake."""
    try:
        strips = [compare(annotations, i, columns, autocast, side=400) for i in spread_indices(annotations, 6)]
        join(strips, down=True, gap=0).save(out / "sheet.jpg", quality=92, subsampling=0)
    except Exception as error:  # whatever it is, the checkpoint is written and the results are known
        return f"pictures could not be drawn ({type(error).__name__}: {error})"
    return f"pictures {out / 'sheet.jpg'}"
