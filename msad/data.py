"""Pictures and boxes -> batches. Files are read as 8-bit RGB, resized, flipped and padded; a batch travels as uint8.

Sizes follow the field's rule: the short side is brought to a wanted length unless that makes the long side too long.
Boxes are in pixels of the high-resolution input, always. A low-resolution data set reads images straight
at half that size and still gives boxes in high-resolution pixels.
"""

import multiprocessing.queues
import os
import random
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import annotations, processes, shapes
from .files import InputError, read_image, to_rgb, writing

SHAPES = "data/shapes"  # the drawn set, in the folder a script is called from
SECONDS_MORE = 10  # that a process which reads pictures lives on after SIGTERM
PATIENCE = 900  # seconds without a batch after which a run gives up on the processes that read pictures


class Batch(NamedTuple):
    """N images of one step. Boxes are in high-resolution pixels; they and labels are one tensor, for all images."""

    images: torch.Tensor  # (N,3,H,W) uint8, padded with zeros to a common size
    sizes: list  # [(h,w)] of the images within the batch
    boxes: torch.Tensor  # (M,4) float, M over all images
    labels: torch.Tensor  # (M,) int64
    counts: list  # boxes of each image
    indices: list  # which images of the data set these are
    remarks: list  # what was noticed while each was read, "" mostly

    def to(self, device):
        """The batch on a device; copies from pinned memory do not wait. There boxes and labels are a list by image."""
        images, boxes, labels = (x.to(device, non_blocking=True) for x in (self.images, self.boxes, self.labels))
        return self._replace(images=images, boxes=boxes.split(self.counts), labels=labels.split(self.counts))

    def chunk(self, count):
        """A batch on a device -> `count` batches with as many images each."""
        size = len(self.images) // count
        return [Batch(*(field[first : first + size] for field in self)) for first in range(0, size * count, size)]


def fitted_size(height, width, short_side, long_side):
    """The size (height, width) to which an image is resized: whole pixels, rounded down, at least 1."""
    short, long = sorted((height, width))
    if long * short_side <= long_side * short:
        short, long = short_side, long * short_side // short
    else:
        short, long = max(1, short * long_side // long), long_side
    return (short, long) if height <= width else (long, short)


def resize(image, size, low=""):
    """An image (3,h,w), uint8 or float, brought to `size` (height, width), or with `low` straight to half of it.

    What a low-resolution branch is trained on is the image at `size`, then downsampled. For "area" one step comes
    closest to that with a Hamming filter where `size` is at most the image's own, and with the usual bilinear one where
    the image would have been enlarged first. It is Pillow's step, so that a program that has a student and not this
    package can make the same pixels. "nearest", the authors' choice, has to be made in two steps.
    """
    fitting = Image.Resampling.BILINEAR if size[0] > image.shape[1] else Image.Resampling.HAMMING
    if low == "nearest":
        return resize(image, size)[:, ::2, ::2]
    if low:
        size = tuple(-(-side // 2) for side in size)
    if size == tuple(image.shape[1:]):
        return image
    if low:
        planes = [Image.fromarray(plane.cpu().numpy()).resize(size[::-1], fitting) for plane in image]
        return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).to(image.device)
    pixels = image.cpu() if image.dtype == torch.uint8 else image  # no other device resizes bytes, and floats are large
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].to(image.device)


def list_pictures(pictures):
    """One picture or several, in the forms that `picture_to_tensor` takes -> a list."""
    single = isinstance(pictures, Image.Image) or isinstance(pictures, (np.ndarray, torch.Tensor)) and pictures.ndim < 4
    return [pictures] if single or not hasattr(pictures, "__iter__") else list(pictures)


def picture_to_tensor(picture):
    """A PIL image, an array (h,w,3) or (h,w), a tensor (3,h,w) or (1,h,w), uint8 or floats in 0-1 -> a tensor (3,h,w),
    uint8 or float32. Raises ValueError, naming what came, for anything else."""
    if isinstance(picture, Image.Image):
        picture = np.array(to_rgb(picture))
    came = f"a {type(picture).__name__}"
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        came += f" {tuple(picture.shape)} of {picture.dtype}"
    if isinstance(picture, np.ndarray) and picture.dtype.str[1:] in ("u1", "f2", "f4", "f8") and picture.ndim in (2, 3):
        planes = picture if picture.ndim == 3 else picture[..., None]
        picture = torch.from_numpy(np.array(planes.transpose(2, 0, 1), picture.dtype.newbyteorder("=")))
    fits = torch.is_tensor(picture) and picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.numel()
    if not fits or not (picture.dtype == torch.uint8 or picture.is_floating_point()):
        wanted = "a PIL image, an array (h,w,3) or (h,w), or a tensor (3,h,w) or (1,h,w)"
        raise ValueError(f"{came} is no picture: wanted is {wanted}, not empty, of uint8 or of floats in 0-1")
    if picture.is_floating_point():
        picture = picture.detach().float()
        low, high = picture.min().item(), picture.max().item()
        if not (low > -0.01 and high < 1.01):
            raise ValueError(f"{came} from {low:g} to {high:g}: a picture's floats are in 0-1 (divide by 255?)")
    return picture.expand(3, -1, -1)


def pad_to_multiple(images, multiple):
    """Images [(3,h,w)] -> one tensor (N,3,H,W), zeros to the right and below, sides multiples of `multiple`."""
    height, width = (-(-max(i.shape[d] for i in images) // multiple) * multiple for d in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def open_data(folder, splits=("train", "val")):
    """The annotations of splits of a COCO-layout folder, or of the drawn shapes if `folder` is empty."""
    if not folder and processes.is_main() and not Path(SHAPES).exists():
        print(f"drawing the embedded data set into {SHAPES} ...", flush=True)
        with writing(SHAPES, "change folder, or give --data"):
            shapes.prepare(SHAPES)
    processes.barrier()
    found = [annotations.read(folder or SHAPES, split) for split in splits]
    for split, other in zip(splits[1:], found[1:]):
        annotations.check_classes(f"split {split}", other.classes, f"split {splits[0]}", found[0].classes)
    return found


class CocoDataset(Dataset):
    """Annotated images at the network's size: item (index, seed) -> image, boxes, labels, index, remark.

    With `low`, "area" or "nearest", images are half that size and boxes are not. `short_sides` are the lengths one is
    drawn from, and `flip` allows mirroring; both draw from the item's own seed, so an item is the same in whichever
    process or order it is read.
    """

    def __init__(self, annotations, short_sides, long_side, low="", flip=False):
        self.annotations = annotations
        self.short_sides, self.long_side = short_sides, long_side
        self.low, self.flip = low, flip

    def __len__(self):
        return len(self.annotations)

    def network_size(self, index):
        """Height and width of the network's input for an image read at the first of the short sides, unpadded."""
        size = fitted_size(*map(int, self.annotations.sizes[index]), self.short_sides[0], self.long_side)
        return tuple(-(-side // 2) for side in size) if self.low else size

    def __getitem__(self, item):
        index, seed = item
        draw = random.Random(seed)
        short_side = draw.choice(self.short_sides)
        mirrored = self.flip and draw.random() < 0.5

        height, width = map(int, self.annotations.sizes[index])
        remarks = []
        image = read_image(self.annotations.path(index), (height, width), remarks)
        size = fitted_size(height, width, short_side, self.long_side)
        image = resize(image, size, self.low)

        boxes, labels = self.annotations.objects(index)
        boxes = boxes.clip(0, [width, height, width, height])
        frame = [side * (2 if self.low else 1) for side in image.shape[1:]]
        boxes = boxes * np.array([frame[1] / width, frame[0] / height] * 2)
        if mirrored:
            image = image.flip(2)
            boxes[:, [0, 2]] = frame[1] - boxes[:, [2, 0]]
        return image, torch.from_numpy(boxes).float(), torch.from_numpy(labels).long(), index, "; ".join(remarks)


def collate(items, multiple):
    """Items of a data set -> a Batch, its images padded to a multiple of `multiple`.

    Three tensors, however many images: a worker process needs a file descriptor to hand over each of them.
    """
    images, boxes, labels, indices, remarks = map(list, zip(*items))
    sizes, counts = [tuple(image.shape[1:]) for image in images], [len(b) for b in boxes]
    padded = pad_to_multiple(images, multiple)
    return Batch(padded, sizes, torch.cat(boxes), torch.cat(labels), counts, indices, remarks)


class TrainBatches:
    """Endless batches of (index, seed), a pure function of seed and position, so a resumed run meets the same ones.

    Every epoch is shuffled anew; images fill a batch with others of their own orientation, so that less is padded. With
    several processes each takes its own part of every batch.
    """

    def __init__(self, annotations, batch, seed, start=0, rank=0, processes=1):
        # Images are trained on if they have a box that is not a crowd's.
        boxes_before = np.append(0, np.cumsum(~annotations.crowd))  # such boxes before each row
        self.trainable = np.flatnonzero(np.diff(boxes_before[annotations.starts]))
        self.wide = annotations.sizes[:, 1] >= annotations.sizes[:, 0]
        self.batch, self.seed, self.start = batch, seed, start
        self.mine = slice(rank * batch // processes, (rank + 1) * batch // processes)
        if len(self.trainable) == 0:
            raise InputError(f"{annotations.folder}: no image has a box to learn from")

    def __iter__(self):
        waiting = {True: [], False: []}  # wide and upright images, until their batch is full
        batches = drawn = epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.trainable)
            for index in order.tolist():
                group = waiting[bool(self.wide[index])]
                group.append((index, f"{self.seed}/{drawn}"))  # the item's own seed: no two draws are alike
                drawn += 1
                if len(group) == self.batch:
                    # A resumed run draws the batches of before once more, and reads none of them.
                    if batches >= self.start:
                        yield group[self.mine]
                    batches += 1
                    group.clear()
            epoch += 1  # what waits goes on into the next epoch


def eval_batches(dataset, batch, multiple, rank, processes):
    """Batches of (index, seed) that cover a data set once; images share a batch only if they are padded alike."""
    groups = {}
    for index in range(len(dataset)):
        padded = tuple(-(-side // multiple) for side in dataset.network_size(index))
        groups.setdefault(padded, []).append((index, 0))
    batches = [group[first : first + batch] for group in groups.values() for first in range(0, len(group), batch)]
    return batches[rank::processes]


def train_loader(dataset, multiple, settings, start, device):
    """This process's part of every batch from iteration `start` on, without an end."""
    rank, count = processes.rank(), processes.world_size()
    order = TrainBatches(dataset.annotations, settings.batch, settings.seed, start, rank, count)
    batches = loader(dataset, order, multiple, settings.workers, device)
    return tell_remarks(batches, dataset.annotations, len(order.trainable))


def loader(dataset, batches, multiple, workers, device):
    """A DataLoader over `batches`; workers stay alive, memory is pinned for CUDA."""
    if workers:  # file descriptors enough for batches on their way, or an OSError now rather than later
        for descriptor in [os.open(os.devnull, os.O_RDONLY) for _ in range(16 + 12 * workers)]:
            os.close(descriptor)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, multiple=multiple),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals,
        timeout=PATIENCE if workers else 0,
    )


def tell_remarks(batches, annotations, images):
    """Yield training batches. Remarks about their pictures are printed at once, their number after so many images."""
    noticed, passed = {}, 0
    for batch in batches:
        new = remarks_of(batch)
        tell(annotations, "training", new, "at least ")
        noticed |= new
        before, passed = passed, passed + len(batch.indices)
        if before < images <= passed and processes.world_size() == 1:  # else no process knows all
            tell(annotations, "training", noticed)
        yield batch


def remarks_of(batch):
    """{index: remark} of the pictures about which there is one."""
    return {index: remark for index, remark in zip(batch.indices, batch.remarks) if remark}


def tell(annotations, name, noticed, about=""):
    """Print, for each remark of {index: remark} once in a run, how many pictures have it."""
    for remark, count in Counter(noticed.values()).items():
        if (remark, about) not in annotations.told and processes.is_main():
            annotations.told.add((remark, about))
            tqdm.write(f"{name} pictures: {about}{count} {remark}", sys.stderr)


def leave_signals(worker):
    """Ctrl-C and a cluster's SIGTERM reach a whole process group: the main process alone decides what they mean.

    When it ends itself it sends SIGTERM to its workers, too. So a worker reads on for some seconds, in which a run can
    save, and then ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_MORE))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    # A batch that cannot be sent, for want of file descriptors, would be waited for without end: the worker ends.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
