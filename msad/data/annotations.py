"""COCO-format annotations -> packed arrays, and every rule for what is wrong in them.

A file that cannot be trusted stops the run with one line (InputError); an entry that cannot be used is left out and
counted, and the summary names every count. Packed arrays instead of a list of dictionaries keep a worker process small:
nothing in them has a reference count that would copy shared memory.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath

import numpy as np

from .errors import InputError, input_errors

COCO_BOX = "COCO's bbox is [x, y, width, height] in pixels, x and y of the upper left corner"
FOLDERS = {"train": ("train",), "val": ("val", "valid")}  # of a split whose annotations lie beside its pictures


def is_whole(value):
    """Whether a value is a whole number: JSON knows no difference between 3 and 3.0."""
    return type(value) is int or type(value) is float and value.is_integer()


def is_number(value):
    """Whether a value is a number that an array can hold; NaN is one."""
    return type(value) is float or type(value) is int and abs(value) < 2**63


# What a field may hold: the words for it, and the test.
ID = "a whole number", is_whole
SIDE = "a number of pixels", lambda v: is_whole(v) and 0 < v < 2**31
AREA = "a number", lambda v: v is None or is_number(v)
BOX = "a list of four numbers", lambda v: isinstance(v, list) and len(v) == 4 and all(map(is_number, v))
FLAG = "0 or 1", lambda v: v in (None, 0, 1, "0", "1")
TEXT = "a text", lambda v: isinstance(v, str)


@dataclass
class Annotations:
    """I images and M boxes. The boxes of image i are rows starts[i] to starts[i+1]."""

    file: Path  # which they were read from
    folder: Path  # of the pictures
    classes: tuple  # of {"id", "name"}; a label is an index into it
    image_ids: list  # (I,) whole numbers
    sizes: np.ndarray  # (I,2) int64: height, width
    names: np.ndarray  # (I,) bytes: file names
    starts: np.ndarray  # (I+1,) int64
    boxes: np.ndarray  # (M,4) float32: x1, y1, x2, y2 in the file's pixels, as annotated
    labels: np.ndarray  # (M,) int32
    areas: np.ndarray  # (M,) float32, as annotated, which decides between small, medium and large
    crowd: np.ndarray  # (M,) bool
    skipped: Counter  # reason -> number of entries left out
    wrong_areas: int  # annotated areas that cannot be, for which the box's stand

    def __len__(self):
        return len(self.image_ids)

    def path(self, index):
        """The file of an image."""
        return self.folder / os.fsdecode(self.names[index])

    def of_image(self, index):
        """The rows of an image's boxes, as a slice."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def objects(self, index):
        """The boxes (M,4), cut off at the image's border, and labels (M,) of an image that are no crowds."""
        rows = self.of_image(index)
        single = ~self.crowd[rows]
        return self.boxes[rows][single].clip(0, np.tile(self.sizes[index][::-1], 2)), self.labels[rows][single]

    def trainable(self):
        """The indices of the images to train on: those that have a box which is not a crowd's."""
        boxes_before = np.append(0, np.cumsum(~self.crowd))  # such boxes before each row
        return np.flatnonzero(np.diff(boxes_before[self.starts]))

    def summary(self):
        """One line: what is there, what was left out, and what looks wrong."""
        counts = np.diff(self.starts)
        line = f"{len(self)} images ({(counts == 0).sum()} without boxes), {len(self.boxes)} boxes"
        line += f" ({self.crowd.sum()} crowd), {len(self.classes)} classes"
        if self.skipped:
            line += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
        files = {os.path.normpath(name) for name in self.names.tolist()}
        rows = np.column_stack([np.repeat(np.arange(len(self)), counts), self.labels, self.boxes.round()])
        doubts = {
            "entries name the same file as another: each knows only its own boxes; merge them": len(self) - len(files),
            "boxes are there twice: same image, class and pixels": len(rows) - len(np.unique(rows, axis=0)),
            "areas cannot be their boxes': width times height stands for them": self.wrong_areas,
        }
        return line + "".join(f"; {count} {words}" for words, count in doubts.items() if count)

    def with_classes(self, classes, whose):
        """The same with labels that are indices into `classes`, which are those of `whose`: a file's, in words.

        A class without a box may be missing on either side. Raises InputError for boxes of any other.
        """
        place = {(c["id"], c["name"]): number for number, c in enumerate(classes)}
        places = np.array([place.get((c["id"], c["name"]), -1) for c in self.classes], np.int32)
        unknown = np.unique(self.labels[places[self.labels] < 0])
        if len(unknown):
            here, there = ([f"{c['id']} {c['name']}" for c in some] for some in (self.classes, classes))
            found, wanted = [here[label] for label in unknown], [c for c in there if c not in here]
            counts = f"has boxes of {len(found)} classes that {whose} lacks, {found[:3]}; only there are {wanted[:3]}"
            raise InputError(f"{self.file}: {counts}; give both the same categories, id and name")
        return replace(self, classes=tuple(classes), labels=places[self.labels])


def find(data, split):
    """The annotation file and image folder of a split ("train" or "val"): in COCO's layout, or in the one of annotation
    tools, _annotations.coco.json beside the pictures."""
    data, pattern = Path(data), f"annotations/instances_{split}*.json"
    beside = [data / name / "_annotations.coco.json" for name in FOLDERS[split]]
    found = [(path, data / path.stem.removeprefix("instances_")) for path in sorted(data.glob(pattern))]
    found = found or [(path, path.parent) for path in beside if path.is_file()][:1]
    if len(found) != 1:
        nothing = f"no such file, and no {beside[-1]}; say with --data where the data is"
        fault = f"{len(found)} files match: keep one of them" if found else nothing
        raise InputError(f"{data / pattern}: {fault}")
    return found[0]


def read(data, split):
    """Read a split of a COCO-layout folder. Raises InputError; see the module's header."""
    path, folder = find(data, split)
    return pack(load_json(path), path, folder)


def load_json(path):
    """The object in a JSON file. Raises InputError."""
    with input_errors(path, "cannot be read"):
        data = path.read_bytes()
    fault = "not valid JSON" if data else "is empty"
    with input_errors(path, fault, "restore it in UTF-8, or run git lfs pull", (ValueError, RecursionError)):
        content = json.loads(data)
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
    for number, value in enumerate(values):
        if not is_good(value):
            raise InputError(f"{path}: {key}[{number}]: field {field!r} is {value!r:.60}, must be {words}")
    return values


def pack(content, path, folder):
    """COCO's lists of entries -> Annotations."""
    column = partial(read_column, content, path)
    classes = zip(map(int, column("categories", "id", ID)), column("categories", "name", TEXT))
    # Half an emoji, left where a name was cut off, becomes text that can be printed, drawn and saved.
    printable = lambda name: name.encode("utf-8", "backslashreplace").decode()
    classes = tuple({"id": number, "name": printable(name)} for number, name in sorted(classes))
    image_ids = list(map(int, column("images", "id", ID)))
    sizes = np.array([column("images", "height", SIDE), column("images", "width", SIDE)], np.int64).T
    names = column("images", "file_name", TEXT)
    index_of_class = index_by_id([c["id"] for c in classes], "categories", path)
    index_of_image = index_by_id(image_ids, "images", path)
    check_files(names, folder, path)

    # One array per field of the annotations, in the order of the file; -1 stands for an image or class that is unknown.
    xywh = np.array(column("annotations", "bbox", BOX), np.float64).reshape(-1, 4)
    image = np.array([index_of_image.get(v, -1) for v in column("annotations", "image_id", ID)], np.int64)
    label = np.array([index_of_class.get(v, -1) for v in column("annotations", "category_id", ID)], np.int32)
    crowd = np.array([int(v or 0) for v in column("annotations", "iscrowd", FLAG)], bool)
    area = np.array([np.nan if v is None else v for v in column("annotations", "area", AREA)], np.float64)

    skipped, usable = sort_out(xywh, image, label, sizes, path)

    # What is left, sorted by image: the boxes of one image become neighbouring rows, in the order of the file.
    order = usable[np.argsort(image[usable], kind="stable")]
    image, labels, crowd, xywh, area = (values[order] for values in (image, label, crowd, xywh, area))
    starts = np.searchsorted(image, np.arange(len(names) + 1))
    names = np.array([os.fsencode(name) for name in names])
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    box_area = xywh[:, 2] * xywh[:, 3]
    believed = (box_area / 1000 <= area) & (area <= 1.01 * box_area + 1)
    areas = np.where(believed, area, box_area).astype(np.float32)
    wrong = int((~believed & ~np.isnan(area)).sum())
    images = image_ids, sizes, names, starts
    return Annotations(path, folder, classes, *images, boxes, labels, areas, crowd, skipped, wrong)


def sort_out(xywh, image, label, sizes, path):
    """Boxes (M,4), each with the index of its image and of its class or -1 (M,), and the images' sizes (I,2) -> how
    many entries cannot be used, {reason: number}, and the rows of the others. Raises InputError for other units."""
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
    known = ~np.logical_or.reduce(list(faults.values())[:3])
    check_units(xywh[known], width[known], height[known], path)
    skipped, usable = Counter(), np.ones(len(xywh), bool)
    for reason, faulty in faults.items():  # an entry counts under its first fault only
        if (usable & faulty).any():
            skipped[reason] = int((usable & faulty).sum())
        usable &= ~faulty
    return skipped, np.flatnonzero(usable)


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
    others = [name for name in names if name not in present]
    for name in others:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(f"{path}: file_name {name!r} points outside {folder}; name files inside it")
    missing = [name for name in others if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        # The next name in order shows what is different: an ending that is missing, capitals, a folder before it.
        beside = min((n for n in present if n >= PurePath(missing[0]).name), default=max(present, default="nothing"))
        counts = f"{len(missing)} of {len(names)} images are missing, such as {missing[0]!r}"
        raise InputError(f"{path}: {counts}; {folder} has {beside!r}: correct the names, or bring the files")


def check_units(xywh, width, height, path):
    """Raise InputError for boxes (M,4) in images of `width` and `height` (M,), most of which are below a pixel, or a
    fifth of which leave their image. What by chance remains within it would be learnt from in silence."""
    x, y, w, h = xywh.T
    right, lower, count = x + w, y + h, len(xywh)
    fractions = (np.abs(xywh) <= 1).all(1)
    leaving = (right > 1.02 * width + 2) | (lower > 1.02 * height + 2) | (w < 0) | (h < 0)
    leaving |= (x < -0.02 * width - 2) | (y < -0.02 * height - 2)
    # In large images many boxes that come close to 100 (or 1000) both ways, and never pass it, are shares of the sides;
    # so are corners, whose last two numbers are never below the first two.
    corners = (w >= x).all() and (h >= y).all()
    edges = [far.max(initial=0) for far in ((w, h) if corners else (right, lower))]
    side = min(width.min(), height.min()) if count >= 20 else 0
    shares = lambda top: np.full(count, side >= 2 * top and 0.9 * top < min(edges) <= max(edges) <= 1.005 * top)
    for wrong, least, how in (
        (fractions, (count + 1) / 2, "lie between 0 and 1"),
        (shares(100), 1, "lie between 0 and 100"),
        (shares(1000), 1, "lie between 0 and 1000"),
        (leaving, max(3, count / 5), "leave their image or have negative sides"),
    ):
        if wrong.sum() >= least:
            first = wrong.argmax()
            example = f"such as {xywh[first].tolist()} in one of {width[first]}x{height[first]}"
            raise InputError(f"{path}: {wrong.sum()} of {count} boxes {how}, {example}; {COCO_BOX}")
