"""Reading pictures and annotations, for benchmark.py: ours and the plain way, as pairs of numbers."""

import gc
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmark_networks import CLASSES, config, median
from PIL import Image

from msad import models
from msad.data import annotations
from msad.data.reading import read_image
from msad.images import fitted_size, resize

THREADS = torch.get_num_threads()


def pixels():
    """Computed for an image of 800x1333, and its own."""
    height, width = models.build(config("high", backbone="resnet18")).padded_size((800, 1333))
    return height * width, 800 * 1333


def jpeg(low):
    """Milliseconds from a 640x480 JPEG to the network's input, and of decoding alone, by one thread."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
    noisy = (np.asarray(smooth) + rng.normal(0, 14, (480, 640, 1))).clip(0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "noisy.jpg"
        Image.fromarray(noisy).save(path, quality=90)
        ours = lambda: resize(read_image(path), fitted_size(480, 640, 800, 1333), low)
        assert tuple(ours().shape) == ((3, 400, 533) if low else (3, 800, 1066)) and ours().dtype == torch.uint8
        times = [median(ours, 40), median(lambda: Image.open(path).load(), 40)]
    torch.set_num_threads(THREADS)
    return [1000 * t for t in times]


def made_up_coco(folder):
    """Annotations of COCO's size: 118 000 images, 860 000 boxes."""
    draw = random.Random(0)
    (folder / "annotations").mkdir()
    (folder / "train").mkdir()
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(118_000)]
    for image in images:
        (folder / "train" / image["file_name"]).touch()
    boxes = []
    for k in range(860_000):
        x, y = draw.uniform(0, 400), draw.uniform(0, 300)
        box = [round(x, 2), round(y, 2), draw.randint(5, 200), draw.randint(5, 150)]
        entry = {"id": k, "image_id": draw.randrange(118_000), "category_id": draw.randint(1, 80), "bbox": box}
        boxes.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    content = {"images": images, "annotations": boxes, "categories": list(CLASSES)}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))


def reading_annotations():
    """Seconds until annotations of COCO's size are ready, and of json.load on their file."""
    with tempfile.TemporaryDirectory() as name:
        made_up_coco(Path(name))
        path = Path(name) / "annotations" / "instances_train.json"
        return median(lambda: annotations.read(name, "train"), 4), median(lambda: json.load(open(path)), 4)


def memory_of_a_worker():
    """Megabytes that a forked process adds that goes through annotations of COCO's size, and what it may."""
    with tempfile.TemporaryDirectory() as name:
        made_up_coco(Path(name))
        found = annotations.read(name, "train")
    gc.collect()
    here, there = os.pipe()
    if os.fork() == 0:
        before = private_megabytes()
        for index in range(len(found)):
            found.path(index), found.boxes[found.of_image(index)].sum()
        os.write(there, str(private_megabytes() - before).encode())
        os._exit(0)
    os.wait()
    return float(os.read(here, 100)), 50.0


def private_megabytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024
