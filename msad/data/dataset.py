"""Pictures and boxes -> batches. Files are read as 8-bit RGB, resized, flipped and padded; a batch travels as uint8.

Boxes are in pixels of the high-resolution input, always. A low-resolution data set reads images straight at half that
size and still gives boxes in high-resolution pixels.
"""

import os
import random
import signal
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..images import fitted_size, pad_to_multiple, resize
from . import annotations, shapes
from .errors import InputError, write_errors
from .reading import read_image

SHAPES = "data/shapes"  # the drawn set, in the folder a script is called from
SECONDS_MORE = 10  # that a worker lives on after SIGTERM
WORKER_PATIENCE = 900  # seconds without a batch after which a run gives up on its workers


class Batch(NamedTuple):
    """N images of one step. Boxes are in high-resolution pixels; they and labels are one tensor, for all images."""

    images: torch.Tensor  # (N,3,H,W) uint8, padded with zeros to a common size
    sizes: list  # [(h,w)] of the images within the batch
    boxes: torch.Tensor  # (M,4) float, M over all images; on a device one tensor an image
    labels: torch.Tensor  # (M,) int64; the same
    counts: list  # boxes of each image
    indices: list  # which images of the data set these are

    def to(self, device):
        """The batch on a device; copies from pinned memory do not wait. There boxes and labels are a list by image."""
        images, boxes, labels = (x.to(device, non_blocking=True) for x in (self.images, self.boxes, self.labels))
        return self._replace(images=images, boxes=boxes.split(self.counts), labels=labels.split(self.counts))

    def chunk(self, count):
        """A batch on a device -> `count` batches of equal size."""
        size = len(self.images) // count
        return [Batch(*(field[first : first + size] for field in self)) for first in range(0, size * count, size)]


def open_data(folder, splits=("train", "val")):
    """The annotations of splits of a COCO-layout folder, or of the drawn shapes if `folder` is empty; all with the
    classes of the first."""
    if not folder and not Path(SHAPES).exists():
        print(f"drawing the embedded data set into {SHAPES} ...", flush=True)
        with write_errors(SHAPES, "change folder, or give --data"):
            shapes.prepare(SHAPES)
    first, *others = [annotations.read(folder or SHAPES, split) for split in splits]
    if "train" in splits and len(first.trainable()) == 0:
        raise InputError(f"{first.file}: no image has a box to learn from: {first.summary()}")
    return [first, *(other.with_classes(first.classes, first.file) for other in others)]


class CocoDataset(Dataset):
    """Annotated images at the network's size: item (index, seed) -> image, boxes, labels, index.

    With `downsample`, "area" or "nearest", images are half that size and boxes are not. `short_sides` are the lengths
    one is drawn from, and `flip` allows mirroring; both draw from the item's own seed, so an item is the same in
    whichever process or order it is read.
    """

    def __init__(self, annotations, short_sides, long_side, downsample=None, flip=False):
        self.annotations = annotations
        self.short_sides, self.long_side = short_sides, long_side
        self.downsample, self.flip = downsample, flip

    def __len__(self):
        return len(self.annotations)

    def network_size(self, index):
        """Height and width of the network's input for an image read at the first of the short sides, unpadded."""
        size = fitted_size(*map(int, self.annotations.sizes[index]), self.short_sides[0], self.long_side)
        return tuple(-(-side // 2) for side in size) if self.downsample else size

    def __getitem__(self, item):
        index, seed = item
        draw = random.Random(seed)
        short_side = draw.choice(self.short_sides)
        mirrored = self.flip and draw.random() < 0.5

        height, width = map(int, self.annotations.sizes[index])
        image = read_image(self.annotations.path(index), (height, width))
        image = resize(image, fitted_size(height, width, short_side, self.long_side), self.downsample)

        boxes, labels = self.annotations.objects(index)
        frame = [side * (2 if self.downsample else 1) for side in image.shape[1:]]
        boxes = boxes * np.array([frame[1] / width, frame[0] / height] * 2)
        if mirrored:
            image = image.flip(2)
            boxes[:, [0, 2]] = frame[1] - boxes[:, [2, 0]]
        return image, torch.from_numpy(boxes).float(), torch.from_numpy(labels).long(), index


def collate(items, multiple):
    """Items of a data set -> a Batch, its images padded to a multiple of `multiple`.

    Three tensors, however many images: a worker process needs a file descriptor to hand over each of them.
    """
    images, boxes, labels, indices = map(list, zip(*items))
    sizes, counts = [tuple(image.shape[1:]) for image in images], [len(b) for b in boxes]
    return Batch(pad_to_multiple(images, multiple), sizes, torch.cat(boxes), torch.cat(labels), counts, indices)


def train_batches(annotations, batch, seed, rank=0, processes=1):
    """Endless batches of (index, seed), a function of seed and position alone, so a resumed run meets the same ones.

    Every epoch is shuffled anew; images fill a batch with others of their own orientation, so that less is padded. With
    several processes each takes its own part of every batch.
    """
    trainable, wide = annotations.trainable(), annotations.sizes[:, 1] >= annotations.sizes[:, 0]
    mine = slice(rank * batch // processes, (rank + 1) * batch // processes)
    waiting = {True: [], False: []}  # wide and upright images, until their batch is full
    drawn = 0
    for epoch in count():  # what waits at the end of one goes on into the next
        for index in np.random.default_rng([seed, epoch]).permutation(trainable).tolist():
            group = waiting[bool(wide[index])]
            group.append((index, f"{seed}/{drawn}"))  # the item's own seed: no two draws are alike
            drawn += 1
            if len(group) == batch:
                yield group[mine]
                group.clear()


def eval_batches(dataset, batch, multiple, rank, processes):
    """Batches of (index, seed) that cover a data set once; images share a batch only if they are padded alike."""
    groups = {}
    for index in range(len(dataset)):
        padded = tuple(-(-side // multiple) for side in dataset.network_size(index))
        groups.setdefault(padded, []).append((index, 0))
    batches = [group[first : first + batch] for group in groups.values() for first in range(0, len(group), batch)]
    return batches[rank::processes]


def loader(dataset, batches, multiple, workers, device):
    """A DataLoader over `batches`; workers stay alive, memory is pinned for CUDA."""
    details = {"collate_fn": partial(collate, multiple=multiple), "pin_memory": device.type == "cuda"}
    if workers:  # file descriptors enough for batches on their way, or an OSError now: later it would be a hang
        for descriptor in [os.open(os.devnull, os.O_RDONLY) for _ in range(16 + 12 * workers)]:
            os.close(descriptor)
        details |= {"persistent_workers": True, "worker_init_fn": ignore_signals, "timeout": WORKER_PATIENCE}
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, **details)


def ignore_signals(worker):
    """Ctrl-C, a cluster's SIGTERM, torchrun's SIGHUP reach a whole process group: the main process alone decides.

    When it ends itself it sends SIGTERM to its workers, too. So a worker reads on for some seconds, in which a run can
    end its iteration and save, and then ends; unless all of them ignore SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # by PyTorch it would not be
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else lambda *_: signal.alarm(SECONDS_MORE))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
