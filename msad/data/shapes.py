"""The embedded data set: pictures of shapes in COCO format, drawn once from a seed, the same bytes every time.

It is made to be learnt in minutes and still be a fair test of low-resolution detection: six classes, of which disk and
ring, square and frame share an outline, log-uniform sizes, tilts, gradients, blur, noise, low contrast, clutter that is
nothing, and shapes that cover each other in part. As on COCO, where 480 pixels become 800, a picture is smaller than
the network's high-resolution input, here 256x256: low resolution is 0.9 of the picture's own. And as on COCO half of
the objects are the finest level's, the one that L reads at P2; none is as large as the coarsest level is for.
"""

import json
import math
import os
import random
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 144
SIZES = (22, 130)  # of a disk or ring across, in pixels; other shapes are up to 13 % smaller
TRAIN, VAL = 1000, 500
OVERSAMPLING = 3  # shapes are drawn this much larger and averaged down, for smooth edges
CLASSES = ("disk", "ring", "square", "frame", "triangle", "star")


def prepare(folder, seed=0):
    """Draw the data set into `folder` unless it is there already; whole or not at all."""
    folder = Path(folder)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent, ignore_cleanup_errors=True) as place:
        unfinished = Path(place) / folder.name
        (unfinished / "annotations").mkdir(parents=True)
        draw_split(unfinished, "train", TRAIN, seed)
        draw_split(unfinished, "val", VAL, seed)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.exists():  # else another run was faster, with the same pictures
                raise


def draw_split(folder, split, count, seed):
    """Write `count` pictures and their annotation file."""
    (folder / split).mkdir()
    images, annotations = [], []
    for index in range(count):
        picture, objects = draw_picture(f"{seed}/{split}/{index}")
        name = f"{index:06d}.jpg"
        Image.fromarray(picture).save(folder / split / name, quality=92)
        images.append({"id": index + 1, "file_name": name, "width": SIDE, "height": SIDE})
        for label, (x1, y1, x2, y2) in objects:
            box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
            entry = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "bbox": box}
            annotations.append(entry | {"area": round(box[2] * box[3], 2), "iscrowd": 0})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw_picture(seed):
    """One picture: uint8 (144,144,3), and its objects [(label, (x1,y1,x2,y2))]."""
    rng = np.random.default_rng(list(seed.encode()))
    draw = random.Random(seed)
    canvas = _background(rng)
    objects = []
    for _ in range(draw.randint(3, 8)):
        size = math.exp(draw.uniform(*map(math.log, SIZES)))
        label = draw.randrange(len(CLASSES))
        polygons = _polygons(CLASSES[label], size, math.radians(draw.uniform(-25, 25)))
        low, high = polygons[0].min(0), polygons[0].max(0)
        position = [draw.uniform(2 - a, SIDE - 2 - b) for a, b in zip(low, high)]
        box = (*(low + position), *(high + position))
        if any(_covered(box, other) > 0.35 for _, other in objects):
            continue
        _paint(canvas, [polygon + position for polygon in polygons], rng, draw)
        objects.append((label, tuple(map(float, box))))
    blur = ImageFilter.GaussianBlur(draw.uniform(0, 1.5))  # no lens is perfectly in focus
    canvas = np.asarray(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(blur)).astype(np.float64)
    canvas += rng.normal(0, draw.uniform(1, 6), canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8), objects


def _covered(a, b):
    """The part of the smaller of two boxes that lies in the other."""
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return width * height / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def _background(rng):
    """A gradient between two muted colours with bars and blots on it that are no objects: float (144,144,3)."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    angle = rng.uniform(0, 2 * math.pi)
    slope = (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    color = rng.uniform(60, 190, 3)
    canvas = Image.fromarray((color + slope * rng.uniform(-50, 50, 3)).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 10)):
        points = rng.uniform(0, SIDE, (2, 2))
        fill = tuple((color + rng.uniform(-35, 35, 3)).clip(0, 255).astype(int).tolist())
        if rng.random() < 0.6:
            pen.line([tuple(p) for p in points.tolist()], fill, width=int(rng.integers(1, 5)))
        else:
            radius = rng.uniform(2, 6, 2)
            pen.ellipse([*(points[0] - radius).tolist(), *(points[0] + radius).tolist()], fill)
    return np.asarray(canvas).astype(np.float64)


def _paint(canvas, polygons, rng, draw):
    """Blend one shape into the canvas, in a colour that stands out from what is there by a random contrast."""
    mask = Image.new("L", (SIDE * OVERSAMPLING,) * 2)
    pen = ImageDraw.Draw(mask)
    for polygon, fill in zip(polygons, (255, 0)):
        pen.polygon((polygon * OVERSAMPLING).flatten().tolist(), fill)
    alpha = np.asarray(mask.reduce(OVERSAMPLING))[..., None] / 255
    beneath = canvas[alpha[..., 0] > 0.5].mean(0)
    direction = rng.normal(size=3)
    step = direction / np.linalg.norm(direction) * draw.uniform(60, 130)
    # Towards whichever side has room: clipping at black or white must not swallow the contrast.
    color = max(((beneath + s).clip(0, 255) for s in (step, -step)), key=lambda c: np.linalg.norm(c - beneath))
    canvas += alpha * (color - canvas)


def _polygons(name, size, tilt):
    """The outline (P,2) of a shape around the origin, in pixels, and its hole if it has one."""
    circle = _regular(40)
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.9
    triangle = _regular(3, start=-math.pi / 2)
    star = _regular(10, start=-math.pi / 2) * np.tile([1, 0.45], 5)[:, None]
    outlines = {"disk": circle, "ring": circle, "square": square, "frame": square, "triangle": triangle, "star": star}
    rotation = np.array([(math.cos(tilt), math.sin(tilt)), (-math.sin(tilt), math.cos(tilt))]) * size / 2
    outline = outlines[name] @ rotation
    return [outline, 0.5 * outline] if name in ("ring", "frame") else [outline]


def _regular(corners, start=0.0):
    """The corners of a regular polygon on the unit circle: (corners, 2)."""
    angle = start + np.arange(corners) * 2 * math.pi / corners
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)
