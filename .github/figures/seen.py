"""Two pictures from the validation set: python .github/figures/seen.py RUNS/fcos-0 [DATA]

gate.png   the gate's weight on high resolution, for each level and size of object
strip.png  objects that low resolution loses and the distilled student finds. Not chosen by eye: it is the picture in
           which the student finds most objects more than conventional training at low resolution, at the same
           threshold; of several, the first.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_iou

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad import align, annotations, checkpoint, pictures, training
from msad.data import CocoDataset, EvalBatches, loader

SIZES = {"small, below 32": (0, 32**2), "medium": (32**2, 96**2), "large, above 96": (96**2, float("inf"))}
INK, PAPER = (40, 40, 40), (255, 255, 255)


@torch.inference_mode()
def gate(teacher, found):
    """The mean over objects of the weight on high resolution in the object's image: (sizes, levels)."""
    teacher = teacher.folded()
    dataset = CocoDataset(found, (teacher.config.short_side,), teacher.config.long_side)
    weights = torch.zeros(len(found), len(align.STRIDES))
    batches = EvalBatches(dataset, 8, teacher.multiple)
    for batch in loader(dataset, batches, teacher.multiple, 0, torch.device("cpu")):
        maps = teacher.pyramids(teacher.normalize(batch.images, batch.sizes), ("high", "low"))
        for level, (h, l) in enumerate(zip(maps["high"], maps["low"])):
            weights[batch.indices, level] = teacher.fusion.weights(h, l)[:, 0]
    image = torch.repeat_interleave(torch.arange(len(found)), torch.from_numpy(found.starts).diff())
    areas = torch.from_numpy(found.areas)
    rows = [weights[image[(areas >= low) & (areas < high)]] for low, high in SIZES.values()]
    return torch.stack([row.mean(0) for row in rows]), weights


def draw_gate(table, path):
    fine, (width, height) = 3, (760, 230)
    canvas = Image.new("RGB", (width * fine, height * fine), PAPER)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15 * fine)
    say = lambda x, y, words, fill=INK: pen.text((x * fine, y * fine), words, fill, font, anchor="mm")
    say(width / 2 + 75, 20, "the gate's weight on high resolution, by aligned level")
    for level in range(table.shape[1]):
        high, low = (align.levels(align.SHIFTS[branch])[level] for branch in ("high", "low"))
        say(245 + 110 * level, 52, f"P{high} of H, P{low} of L")
        for row in range(table.shape[0]):
            share = table[row, level].item()
            x, y = 245 + 110 * level, 88 + 46 * row
            fill = tuple(round(255 - (255 - c) * share) for c in (44, 95, 160))
            pen.rectangle([fine * v for v in (x - 53, y - 21, x + 53, y + 21)], fill)
            say(x, y, f"{share:.2f}", PAPER if share > 0.55 else INK)
    for row, name in enumerate(SIZES):
        say(95, 88 + 46 * row, name)
    canvas.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def hits(found, truth, classes, threshold=pictures.THRESHOLD):
    """Whether each annotated box is found: a detection of its class above the threshold with an IoU of at least 0.5."""
    good = found["scores"] >= threshold
    boxes, labels = found["boxes"][good], found["labels"][good]
    same = torch.as_tensor(truth["labels"]).long()[:, None] == labels[None]
    return ((box_iou(torch.as_tensor(truth["boxes"]), boxes) >= 0.5) & same).any(1)


def choose(found, columns, autocast):
    """The image in which the last column finds most objects that the first one does not."""
    best, index = -1, 0
    for i in range(len(found)):
        truth = pictures.truth(found, i)
        seen = pictures.look(pictures.read_image(found.path(i)), columns, autocast)
        first, *_, last = (hits(detections, truth, found.classes) for detections in seen.values())
        gain = int((last & ~first).sum() - (first & ~last).sum())
        if gain > best:
            best, index = gain, i
    return index, best


def main():
    runs, data = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else training.SHAPES
    found = annotations.read(data, "val")
    table, _ = gate(checkpoint.load(runs / "teacher" / "last.pt"), found)
    figures = ROOT / ".github" / "figures"
    draw_gate(table, figures / "gate.png")

    conventional = checkpoint.load(runs / "conventional" / "last.pt")
    columns = pictures.readings("conventional", conventional, ["low"])
    columns |= pictures.readings("student", checkpoint.load(runs / "student" / "last.pt"), ["low"])
    autocast = training.autocast_for(torch.device("cpu"), "fp32")
    index, gain = choose(found, columns, autocast)
    strip = pictures.compare(found, index, columns, autocast, side=320, per_row=3)
    strip.save(figures / "strip.png", optimize=True)
    print(f"gate {table.tolist()}\nstrip: image {found.image_ids[index]}, {gain} more objects found than lost")


if __name__ == "__main__":
    main()
