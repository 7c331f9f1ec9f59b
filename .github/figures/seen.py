"""Two pictures from the validation set: python .github/figures/seen.py RUNS/fcos-0 [DATA]

gate.png   the gate's weight on high resolution, for each level and size of object
strip.png  objects that low resolution loses and the distilled student finds. Not chosen by eye: it is the picture in
           which the student is ahead of conventional training at low resolution by most, counting what is drawn: an
           object counts 1 if the best detection on it (IoU of at least 0.5) has its class, and every detection that
           is no object's best, or has another class, counts -1. Of several, the first.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_iou

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad import align
from msad.data import annotations
from msad.engine import checkpoint, drawing, processes
from msad.data.reading import read_image
from msad.data.dataset import CocoDataset, SHAPES, eval_batches, loader

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}  # COCO's, in the file's pixels
INK, PAPER, PALE = (40, 40, 40), (255, 255, 255), (225, 225, 225)


@torch.inference_mode()
def gate(teacher, found):
    """The mean over objects of the weight on high resolution in the object's image: (sizes, levels)."""
    teacher = teacher.folded()
    dataset = CocoDataset(found, (teacher.config.short_side,), teacher.config.long_side)
    weights = torch.zeros(len(found), len(align.STRIDES))
    batches = eval_batches(dataset, 8, teacher.multiple, 0, 1)
    for batch in loader(dataset, batches, teacher.multiple, 0, torch.device("cpu")):
        maps = teacher.pyramids(teacher.normalize(batch.images, batch.sizes), ("high", "low"))
        for level, (h, l) in enumerate(zip(maps["high"], maps["low"])):
            weights[batch.indices, level] = teacher.fusion.weights(h, l)[:, 0]
    image = torch.repeat_interleave(torch.arange(len(found)), torch.from_numpy(found.starts).diff())
    areas = torch.from_numpy(found.areas)
    rows = [weights[image[(areas >= low) & (areas < high)]] for low, high in SIZES.values()]
    return torch.stack([row.mean(0) for row in rows]), weights


def levels_of_objects(model, found):
    """Which levels any object of a set trains: (levels,) bool."""
    dataset = CocoDataset(found, (model.config.short_side,), model.config.long_side)
    seen = torch.zeros(len(align.STRIDES), dtype=torch.bool)
    for index in range(len(dataset)):
        image, boxes, labels = dataset[index, 0][:3]
        height, width = model.padded_size(image.shape[1:])
        sizes = [(-(-height // stride), -(-width // stride)) for stride in align.STRIDES]
        owned = model.head.assign(sizes, [boxes], [labels])["labels"][0]
        owned = (owned >= 0) & (owned < len(model.config.classes))
        cells = [h * w * model.head.anchors for h, w in sizes]
        seen |= torch.stack([level.any() for level in owned.split(cells)])
    return seen


def draw_gate(table, trained, path):
    fine, (width, height) = 3, (820, 230)
    canvas = Image.new("RGB", (width * fine, height * fine), PAPER)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15 * fine)
    say = lambda x, y, words, fill=INK: pen.text((x * fine, y * fine), words, fill, font, anchor="mm")
    say(width / 2 + 75, 20, "the gate's mean weight on H, by aligned level")
    for level in range(table.shape[1]):
        high, low = (align.LEVELS[branch][level] for branch in ("high", "low"))
        say(245 + 122 * level, 52, f"P{high} of H, P{low} of L")
        for row in range(table.shape[0]):
            share = table[row, level].item()
            x, y = 245 + 122 * level, 88 + 46 * row
            fill = tuple(round(255 - (255 - c) * share) for c in (44, 95, 160)) if trained[level] else PALE
            pen.rectangle([fine * v for v in (x - 59, y - 21, x + 59, y + 21)], fill)
            say(x, y, f"{share:.2f}" if trained[level] else "no objects", PAPER if trained[level] else INK)
    for row, name in enumerate(SIZES):
        say(95, 88 + 46 * row, f"of {name} objects")
    canvas.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def right_less_wrong(found, truth, threshold=drawing.THRESHOLD):
    """Objects that are found, less the detections drawn that find none; see the header."""
    drawn = found["scores"] >= threshold
    boxes, labels = found["boxes"][drawn], found["labels"][drawn].long()
    right = set()
    for box, label in zip(torch.as_tensor(truth["boxes"]), truth["labels"]):
        on_it = (box_iou(box[None], boxes)[0] >= 0.5).nonzero().flatten().tolist()
        right |= {on_it[0]} if on_it and labels[on_it[0]] == label else set()  # detections are sorted by score
    return 2 * len(right) - len(labels)


def choose(found, columns, autocast):
    """The image in which the last column is ahead of the first by most, and by how much."""
    best, index = -1, 0
    for i in range(len(found)):
        truth = drawing.truth(found, i)
        seen = drawing.detect_all(read_image(found.path(i)), columns, autocast)
        first, *_, last = (right_less_wrong(detections, truth) for detections in seen.values())
        if last - first > best:
            best, index = last - first, i
    return index, best


def main():
    runs, data = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else SHAPES
    found = annotations.read(data, "val")
    teacher = checkpoint.load(runs / "teacher" / "last.pt")
    table, _ = gate(teacher, found)
    figures = ROOT / ".github" / "figures"
    draw_gate(table, levels_of_objects(teacher, found), figures / "gate.png")

    conventional = checkpoint.load(runs / "conventional" / "last.pt")
    columns = drawing.columns_of("conventional", conventional, ["low"])
    columns |= drawing.columns_of("student", checkpoint.load(runs / "student" / "last.pt"), ["low"])
    autocast = processes.autocast(torch.device("cpu"), "fp32")
    index, gain = choose(found, columns, autocast)
    strip = drawing.compare(found, index, columns, autocast, side=320)
    strip.save(figures / "strip.png", optimize=True)
    print(f"gate {table.tolist()}\nstrip: image {found.image_ids[index]}, student ahead by {gain}")


if __name__ == "__main__":
    main()
