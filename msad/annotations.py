"""COCO-format annotations -> packed arrays, and every rule for what is wrong in them.

A file that cannot be trusted stops the run with one line (InputError); an entry that cannot be used is left out and
counted, and the summary names every count. Packed arrays instead of a list of dictionaries keep a worker process small:
nothing in them has a reference count that would copy shared memory.
"""

import gc
import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np

from .files import InputError


@dataclass
class Annotations:
    """I images and M boxes. The boxes of image i are rows starts[i] to starts[i+1]."""

    folder: Path
    classes: tuple  # of {"id", "name"}; a label is an index into it
    image_ids: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I,2) int64: height, width
    names: np.ndarray  # (I,) bytes: file names
    starts: np.ndarray  # (I+1,) int64
    boxes: np.ndarray  # (M,4) float32: x1, y1, x2, y2 in the file's pixels, as annotated
    labels: np.ndarray  # (M,) int16
    areas: np.ndarray  # (M,) float32, as annotated, which decides between small, medium and large
    crowd: np.ndarray  # (M,) bool
    skipped: Counter  # reason -> number of entries left out

    def __len__(self):
        return len(self.image_ids)

    def path(self, index):
        """The file of an image."""
        return self.folder / self.names[index].decode()

    def of_image(self, index):
        """The rows of an image's boxes, as a slice."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def summary(self):
        """One line: what is there, and what was left out."""
        empty = int((np.diff(self.starts) == 0).sum())
        line = f"{len(self)} images ({empty} without boxes), {len(self.boxes)} boxes ({int(self.crowd.sum())} crowd)"
        line += f", {len(self.classes)} classes"
        left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
        return f"{line}; left out: {left_out}" if left_out else line


def check_classes(one, found, other, wanted):
    """Raise InputError, naming the first difference, unless two lists of classes are the same."""
    if tuple(found) != tuple(wanted):
        describe = lambda classes: [f"{c['id']} {c['name']}" for c in classes]
        extra = [c for c in describe(found) if c not in describe(wanted)]
        missing = [c for c in describe(wanted) if c not in describe(found)]
        raise InputError(f"{one} and {other} have different classes: {extra[:5]} only here, {missing[:5]} only there")


def find(data, split):
    """The annotation file and image folder of a split ("train" or "val") in a COCO-layout folder."""
    folder = Path(data) / "annotations"
    files = sorted(folder.glob(f"instances_{split}*.json"))
    if len(files) != 1:
        found = f"{len(files)} files match: keep one of them" if files else "no such file"
        raise InputError(f"{folder}/instances_{split}*.json: {found} (a COCO-layout folder has exactly one)")
    images = Path(data) / files[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; the images of {files[0].name} belong there")
    return files[0], images


def read(data, split):
    """Read a split of a COCO-layout folder. Raises InputError; see the module's header."""
    path, folder = find(data, split)
    enabled = gc.isenabled()
    gc.disable()  # it would walk through a million entries again and again, and none of them is garbage
    try:
        content = _load_json(path)
        try:
            return _pack(content, path, folder)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(f"{path}: {_first_fault(content) or f'not in COCO format ({error!r})'}") from None
    finally:
        if enabled:
            gc.enable()


def _load_json(path):
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = "is empty" if path.stat().st_size == 0 else f"is not valid JSON ({error})"
        raise InputError(f"{path}: {reason}; restore the file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not in COCO format (the top level must be an object)")
    return content


def _pack(content, path, folder):
    images, annotations = content["images"], content["annotations"]
    classes = _classes(content["categories"], path)
    image_ids = _column(images, "id")
    sizes = np.stack([_column(images, "height"), _column(images, "width")], axis=1)
    names = [image["file_name"] for image in images]
    _check_images(names, image_ids, sizes, path, folder)

    # One array per field, in the order of the file.
    if any(len(entry["bbox"]) != 4 for entry in annotations):
        raise ValueError("a bbox does not have four numbers")
    numbers = chain.from_iterable(map(itemgetter("bbox"), annotations))
    xywh = np.fromiter(numbers, np.float64, 4 * len(annotations)).reshape(-1, 4)
    crowd = np.fromiter((int(entry.get("iscrowd") or 0) for entry in annotations), bool, len(annotations))
    area = np.fromiter((entry.get("area", -1) for entry in annotations), np.float64, len(annotations))
    image, known_image = _positions(_column(annotations, "image_id"), image_ids)
    class_ids = np.array([c["id"] for c in classes], np.int64)
    label, known_class = _positions(_column(annotations, "category_id"), class_ids)

    # An entry with faults counts under its first one only: the first row that is true, the last of which always is.
    faults = _box_faults(xywh, sizes, image, known_image, known_class)
    first_fault = np.stack([*faults.values(), np.ones(len(xywh), bool)]).argmax(0)
    counts = np.bincount(first_fault, minlength=len(faults)).tolist()
    skipped = Counter({reason: count for reason, count in zip(faults, counts) if count})

    # What is left, sorted by image: the boxes of one image become neighbouring rows, in the order of the file.
    good = np.flatnonzero(first_fault == len(faults))
    order = good[np.argsort(image[good], kind="stable")]
    xywh, area = xywh[order], area[order]
    given = np.isfinite(area) & (area >= 0)
    return Annotations(
        folder=folder,
        classes=classes,
        image_ids=image_ids,
        sizes=sizes,
        names=np.array([name.encode() for name in names]),
        starts=np.searchsorted(image[order], np.arange(len(images) + 1)),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32),
        labels=label[order].astype(np.int16),
        areas=np.where(given, area, xywh[:, 2] * xywh[:, 3]).astype(np.float32),
        crowd=crowd[order],
        skipped=skipped,
    )


def _box_faults(xywh, sizes, image, known_image, known_class):
    """Reason -> mask (M,) of the annotations it keeps out."""
    x, y, w, h = xywh.T
    height, width = sizes[np.where(known_image, image, 0)].T
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            "of unknown images": ~known_image,
            "of unknown categories": ~known_class,
            "boxes not finite": ~(np.abs(xywh) < 1e9).all(1),
            "boxes without area": (w <= 0) | (h <= 0),
            "boxes outside their image": (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0),
        }


def _positions(values, table):
    """For each value its index in `table`, and whether it is there."""
    order = np.argsort(table, kind="stable")
    at = np.searchsorted(table, values, sorter=order).clip(max=len(table) - 1)
    return order[at], table[order[at]] == values


def _column(entries, key):
    """One whole number of every entry. Raises TypeError or ValueError where it is something else."""
    values = np.fromiter(map(itemgetter(key), entries), np.float64, len(entries))
    if not (np.abs(values) < 2**53).all() or (values % 1).any():
        raise ValueError(f"{key} is not a whole number")
    return values.astype(np.int64)


def _classes(categories, path):
    if not categories:
        raise InputError(f"{path}: has no categories")
    ids = _column(categories, "id")
    classes = tuple({"id": int(ids[i]), "name": str(categories[i]["name"])} for i in np.argsort(ids, kind="stable"))
    if len({c["id"] for c in classes}) < len(classes):
        raise InputError(f"{path}: two categories have the same id; give each its own")
    return classes


def _check_images(names, image_ids, sizes, path, folder):
    """Stop for images whose entry or file is not there to be used."""
    if not names:
        raise InputError(f"{path}: has no images")
    values, counts = np.unique(image_ids, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path}: image id {values[counts > 1][0]} stands for two images; give each its own")
    if (sizes <= 0).any():
        raise InputError(f"{path}: image id {image_ids[(sizes <= 0).any(1)][0]} has no height or width")
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    missing = [name for name in names if name not in present and not _is_inside(folder, name, path)]
    if missing:
        shown = repr(str(folder / missing[0]))[1:-1]
        raise InputError(
            f"{shown}: missing ({len(missing)} of {len(names)} images of {path.name} are); "
            "complete the folder or remove their entries"
        )


def _is_inside(folder, name, path):
    """Whether a name that leads through subfolders is a file's. Raises InputError if it leads out of the folder."""
    try:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: file_name {name!r} points outside {folder}; name files inside it")
        return (folder / name).is_file()
    except OSError as error:
        raise InputError(f"{path}: file_name {name[:50]!r} cannot be a file's ({error.strerror})") from None


def _first_fault(content):
    """What is wrong with the first entry that does not have COCO's fields, or None. Slow: only after a failure."""
    fields = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "annotations": {"image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    for key, wanted in fields.items():
        if not isinstance(content.get(key), list):
            return f"not in COCO format (no list {key!r})"
        for number, entry in enumerate(content[key]):
            for field, kind in wanted.items():
                value = entry.get(field) if isinstance(entry, dict) else None
                if not (isinstance(value, kind) or kind is int and isinstance(value, float) and value.is_integer()):
                    return f"{key}[{number}] needs a field {field!r} of type {kind.__name__}"
            if key == "annotations" and len(entry["bbox"]) != 4:
                return f"annotations[{number}] needs a bbox of four numbers"
    return None
