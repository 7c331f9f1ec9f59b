"""COCO-format annotations -> packed arrays, and every rule for what is wrong in them.

A file that cannot be trusted stops the run with one line (InputError); an entry that cannot be used is left out and
counted, and the summary names every count. Packed arrays instead of a list of dictionaries keep a worker process small:
nothing in them has a reference count that would copy shared memory.
"""

import gc
import json
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from urllib.parse import unquote

import numpy as np

from .errors import InputError, input_errors

# What a field may hold: the words for it, and the test. JSON knows no difference between 3 and 3.0.
WHOLE = "a whole number", lambda v: type(v) is int or type(v) is float and v.is_integer()
SIDE = "a number of pixels", lambda v: WHOLE[1](v) and 0 < v < 2**31
NUMBER = "a number", lambda v: type(v) is float or type(v) is int and abs(v) < 2**63
OPTIONAL_NUMBER = "a number", lambda v: v is None or NUMBER[1](v)
BOX = "a list of four numbers", lambda v: isinstance(v, list) and len(v) == 4 and all(map(NUMBER[1], v))
FLAG = "0 or 1", lambda v: v is None or isinstance(v, (int, float, str)) and v in (0, 1, "0", "1")
TEXT = "a text", lambda v: isinstance(v, str)

FOLDERS = {"train": ("train",), "val": ("val", "valid")}  # of a split whose annotations lie beside its pictures


@dataclass
class Annotations:
    """I images and M boxes. The boxes of image i are rows starts[i] to starts[i+1]."""

    folder: Path
    classes: tuple  # of {"id", "name"}; a label is an index into it
    image_ids: list  # (I,) whole numbers
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

    def objects(self, index):
        """The boxes (M,4) and labels (M,) of an image that are no crowds."""
        rows = self.of_image(index)
        single = ~self.crowd[rows]
        return self.boxes[rows][single], self.labels[rows][single]

    def trainable(self):
        """The indices of the images to train on: those that have a box which is not a crowd's."""
        boxes_before = np.append(0, np.cumsum(~self.crowd))  # such boxes before each row
        return np.flatnonzero(np.diff(boxes_before[self.starts]))

    def summary(self):
        """One line: what is there, what was left out, and what looks wrong."""
        empty = int((np.diff(self.starts) == 0).sum())
        line = f"{len(self)} images ({empty} without boxes), {len(self.boxes)} boxes ({int(self.crowd.sum())} crowd)"
        line += f", {len(self.classes)} classes"
        if self.skipped:
            line += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
        again = len(self) - len({os.path.normpath(name) for name in self.names.tolist()})
        if again:
            line += f"; {again} entries name the same file as another: each knows only its own boxes; merge them"
        return line


def check_classes(one, found, other, wanted):
    """Raise InputError, naming the first difference, unless two lists of classes are the same."""
    if tuple(found) != tuple(wanted):
        describe = lambda classes: [f"{c['id']} {c['name']}" for c in classes]
        extra = [c for c in describe(found) if c not in describe(wanted)]
        missing = [c for c in describe(wanted) if c not in describe(found)]
        counts = f"{len(extra)} only here {extra[:3]}, {len(missing)} only there {missing[:3]}"
        raise InputError(f"{one} and {other} have different classes or another order: {counts}")


def find(data, split):
    """The annotation file and image folder of a split ("train" or "val"): in COCO's layout, or in the one of annotation
    tools, _annotations.coco.json beside the pictures."""
    if not Path(data).is_dir():
        raise InputError(f"{data}: no such folder; say with --data where the data is")
    folder = Path(data) / "annotations"
    files = sorted(folder.glob(f"instances_{split}*.json"))
    beside = [Path(data) / name / "_annotations.coco.json" for name in FOLDERS[split]]
    for path in beside:
        if not files and path.is_file():
            return path, path.parent
    if len(files) != 1:
        found = f"{len(files)} files match: keep one of them" if files else f"no such file, and no {beside[-1]}"
        raise InputError(f"{folder}/instances_{split}*.json: {found}")
    images = Path(data) / files[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; the images of {files[0].name} belong there")
    return files[0], images


def count_images(data):
    """How many images the training split names, told at once, without a check of any of them. Raises InputError."""
    return read_bytes(find(data, "train")[0]).count(b'"file_name"')


def read(data, split):
    """Read a split of a COCO-layout folder. Raises InputError; see the module's header."""
    path, folder = find(data, split)
    gc.disable()  # it would walk through a million entries again and again, and none of them is garbage
    try:
        return pack(load_json(path), path, folder)
    finally:
        gc.enable()


def read_bytes(path):
    """What a file holds. Raises InputError."""
    with input_errors(path, "cannot be read"):
        return path.read_bytes()


def load_json(path):
    """The object in a JSON file. Raises InputError."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        reason = "is empty" if path.stat().st_size == 0 else f"is not valid JSON ({error})"
        raise InputError(f"{path}: {reason}; restore the file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not in COCO format (the top level must be an object)")
    return content


def read_column(content, path, key, field, kind):
    """One field of every entry of a list in COCO's content, None where it is missing. Raises InputError where it is not
    of its kind."""
    if not isinstance(content.get(key), list):
        raise InputError(f"{path}: not in COCO format (no list {key!r})")
    words, is_good = kind
    values = [entry.get(field) if isinstance(entry, dict) else None for entry in content[key]]
    if not all(map(is_good, values)):
        number = next(number for number, value in enumerate(values) if not is_good(value))
        found = repr(values[number])
        found = found if len(found) < 60 else found[:60] + "..."
        raise InputError(f"{path}: {key}[{number}]: field {field!r} is {found}, must be {words}")
    return values


def pack(content, path, folder):
    """COCO's lists of entries -> Annotations."""
    column = partial(read_column, content, path)
    classes = zip(map(int, column("categories", "id", WHOLE)), column("categories", "name", TEXT))
    classes = tuple({"id": number, "name": name} for number, name in sorted(classes))
    image_ids = list(map(int, column("images", "id", WHOLE)))
    sizes = np.array([column("images", "height", SIDE), column("images", "width", SIDE)], np.int64).T
    names = column("images", "file_name", TEXT)
    index_of_class = index_by_id([c["id"] for c in classes], "categories", path)
    index_of_image = index_by_id(image_ids, "images", path)
    check_files(names, folder, path)

    # One array per field of the annotations, in the order of the file; -1 stands for an image or class that is unknown.
    xywh = np.array(column("annotations", "bbox", BOX), np.float64).reshape(-1, 4)
    image = np.array([index_of_image.get(v, -1) for v in column("annotations", "image_id", WHOLE)], np.int64)
    label = np.array([index_of_class.get(v, -1) for v in column("annotations", "category_id", WHOLE)], np.int16)
    crowd = np.array([int(v or 0) for v in column("annotations", "iscrowd", FLAG)], bool)
    area = np.array([-1 if v is None else v for v in column("annotations", "area", OPTIONAL_NUMBER)], np.float64)

    skipped, usable = sort_out(xywh, image, label, sizes, path)

    # What is left, sorted by image: the boxes of one image become neighbouring rows, in the order of the file.
    order = usable[np.argsort(image[usable], kind="stable")]
    xywh, area = xywh[order], area[order]
    given = np.isfinite(area) & (area >= 0)
    return Annotations(
        folder=folder,
        classes=classes,
        image_ids=image_ids,
        sizes=sizes,
        names=np.array([name.encode() for name in names]),
        starts=np.searchsorted(image[order], np.arange(len(names) + 1)),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32),
        labels=label[order],
        areas=np.where(given, area, xywh[:, 2] * xywh[:, 3]).astype(np.float32),
        crowd=crowd[order],
        skipped=skipped,
    )


def sort_out(xywh, image, label, sizes, path):
    """Boxes (M,4), each with the index of its image and of its class or -1 (M,), and the images' sizes (I,2) -> how many
    entries cannot be used, {reason: number}, and the rows of the others. Raises InputError for boxes of other units."""
    x, y, w, h = xywh.T
    height, width = sizes[image].T
    with np.errstate(invalid="ignore", over="ignore"):
        faults = {
            "of unknown images": image < 0,
            "of unknown categories": label < 0,
            "boxes not finite": ~(np.abs(xywh) < 1e9).all(1),
            "boxes without area": (w <= 0) | (h <= 0),
            "boxes outside their image": (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0),
        }
    # An entry counts under its first fault only. A last row, of True, stands for none.
    first_fault = np.stack([*faults.values(), np.ones(len(xywh), bool)]).argmax(0)
    counts = np.bincount(first_fault, minlength=len(faults)).tolist()
    known = first_fault >= list(faults).index("boxes without area")  # of known images, with numbers
    check_units(xywh[known], width[known], height[known], path)
    skipped = Counter({reason: count for reason, count in zip(faults, counts) if count})
    return skipped, np.flatnonzero(first_fault == len(faults))


def index_by_id(ids, key, path):
    """{id: its place in the list}. Raises InputError for an empty list, or an id that is there twice."""
    if not ids:
        raise InputError(f"{path}: has no {key}")
    index = {number: place for place, number in enumerate(ids)}
    if len(index) < len(ids):
        number = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{path}: id {number} stands for two of {key}; give each its own")
    return index


def check_files(names, folder, path):
    """Raise InputError unless every name is that of a file in the folder, in one below it, or linked there."""
    with input_errors(folder, "cannot be read"):
        present = set(os.listdir(folder))
    missing = []
    for name in names:
        if name in present:
            continue
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(f"{path}: file_name {name!r} points outside {folder}; name files inside it")
        if not os.path.isfile(os.path.join(folder, name)):
            missing.append(name)
    if missing:
        shown = repr(os.path.join(folder, missing[0]))[1:-1]
        alike = look_alike(missing[0], folder)
        mend = f"{alike!r} is there: correct the names" if alike else "complete the folder or remove their entries"
        raise InputError(f"{shown}: missing ({len(missing)} of {len(names)} images of {path.name} are); {mend}")


def look_alike(name, folder):
    """The name of a file that is there and differs in spelling only: \\ for /, %20, accents, upper case, folders before
    it."""
    key = lambda text: unicodedata.normalize("NFC", unquote(text.replace("\\", "/"))).casefold()
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"), reverse=True) if path.is_file()]
    there = {key(name): name for name in names}  # of several that are alike the first
    parts = PurePath(key(name)).parts
    endings = (os.path.join(*parts[first:]) for first in range(len(parts)))
    return next((there[ending] for ending in endings if ending in there), None)


def check_units(xywh, width, height, path):
    """Raise InputError for boxes (M,4) in images of `width` and `height` (M,) that evidently have other units."""
    x, y, w, h = xywh.T
    right, lower, count = x + w, y + h, len(xywh)
    mend = "COCO's bbox is [x, y, width, height] in pixels, x and y of the upper left corner"
    fractions = (np.abs(xywh) <= 1).all(1)
    if 2 * fractions.sum() > count:
        raise InputError(f"{path}: {fractions.sum()} of {count} boxes lie between 0 and 1, as fractions do; {mend}")
    if count >= 20 and min(width.min(), height.min()) >= 200:
        if 90 < min(right.max(), lower.max()) and max(right.max(), lower.max()) <= 100.5:
            raise InputError(f"{path}: all {count} boxes lie between 0 and 100, as percentages do; {mend}")
    leaving = (right > 1.02 * width + 2) | (lower > 1.02 * height + 2)
    if leaving.sum() < max(3, count / 5):
        return
    larger = (((x >= width) | (y >= height)).sum() >= count / 5) & (np.minimum(x, y) >= -1)
    inside = (x + w / 2 <= width + 1) & (y + h / 2 <= height + 1) & (x - w / 2 >= -1) & (y - h / 2 >= -1)
    likely = {
        "x1, y1, x2, y2": (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1),
        "y1, x1, y2, x2": (w > x) & (h > y) & (w <= height + 1) & (h <= width + 1),
        "centre x, centre y, width, height": inside,
        "y, x, height, width": (lower <= width + 1) & (right <= height + 1),
        "pixels of a picture twice as large": larger & (right <= 2 * width + 2) & (lower <= 2 * height + 2),
    }
    for units, fits in likely.items():
        if fits.sum() >= 0.98 * count:
            raise InputError(f"{path}: {leaving.sum()} of {count} boxes leave their image, as {units} would; {mend}")
