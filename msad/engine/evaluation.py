"""How good a model is, COCO's twelve numbers by pycocotools; what it costs, multiply-accumulates and time; and which
boxes of a data set each of its levels learns.

The cost is the whole network's. A student at half the resolution has a backbone of a quarter of the cost, but as many
locations as its teacher, so its head costs the same: a table of backbones alone would hide most of what is left.
"""

import contextlib
import copy
import io
import statistics
import time

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .. import align
from ..data.dataset import eval_batches, loader
from ..images import fitted_size, pad_to_multiple
from ..models import HEADS
from . import processes

PARTS = ("backbone", "fpn", "head")  # of a model, whose cost is told apart
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(model, dataset, branches, batch, workers=0, autocast=contextlib.nullcontext()):
    """Run a model over a data set -> {branch: (metrics, detections)}; each process takes a part, all get the whole.

    `metrics` is as in `coco_metrics`, `detections` a list of (index, dict of arrays) as in `detect`.
    """
    model = model.folded()
    device = model.mean.device
    batches = eval_batches(dataset, batch, model.multiple, processes.rank(), processes.world_size())
    found = {branch: [] for branch in branches}
    silent = None if processes.is_main() else True  # None: a bar only on a terminal
    reader = tqdm(loader(dataset, batches, model.multiple, workers, device), "evaluating", leave=False, disable=silent)
    for data in reader:
        originals = [tuple(map(int, dataset.annotations.sizes[i])) for i in data.indices]
        with autocast:
            detections = model.detect_batch(data.images.to(device, non_blocking=True), data.sizes, originals, branches)
        for branch in branches:
            arrays = [{k: v.cpu().numpy() for k, v in d.items()} for d in detections[branch]]
            found[branch] += zip(data.indices, arrays)
    found = {branch: sorted(processes.gather(pairs), key=lambda pair: pair[0]) for branch, pairs in found.items()}
    return {branch: (coco_metrics(dataset.annotations, pairs), pairs) for branch, pairs in found.items()}


def coco_metrics(annotations, detections):
    """Annotations and [(index, detections)] in the files' pixels -> the twelve {"AP": ...} and "classes", {name: AP}.

    Values are pycocotools' own: from 0 to 1, and -1 where there is nothing to find.
    """
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
    columns = images, annotations.labels, annotations.boxes, annotations.areas, annotations.crowd
    truth = [
        {"image_id": i, "category_id": label, "bbox": to_xywh(box), "area": area, "iscrowd": crowd}
        for i, label, box, area, crowd in zip(*(column.tolist() for column in columns))
    ]
    found = coco_results(detections, range(len(annotations)), range(len(annotations.classes)))
    results = [entry | {"area": entry["bbox"][2] * entry["bbox"][3]} for entry in found]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco_of(annotations, truth), coco_of(annotations, results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) over all sizes, 100 detections
    classes, names = {}, [c["name"] for c in annotations.classes]
    for k, c in enumerate(annotations.classes):
        name = c["name"] if names.count(c["name"]) == 1 else f"{c['name']} (id {c['id']})"
        classes[name] = float(precision[:, :, k].flatten().mean())  # -1 throughout where there is nothing to find
    return dict(zip(METRICS, map(float, evaluation.stats))) | {"classes": classes}


def coco_results(detections, image_ids, category_ids):
    """[(index, detections)] -> COCO's result format, with the ids of the images and of the classes."""
    return [
        {"image_id": image_ids[i], "category_id": category_ids[label], "bbox": to_xywh(box), "score": score}
        for i, found in detections
        for label, box, score in zip(*(found[name].tolist() for name in ("labels", "boxes", "scores")))
    ]


def to_xywh(box):
    """One box (x1,y1,x2,y2) -> [x, y, width, height], COCO's convention."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def coco_of(annotations, entries):
    """A COCO object over the data set's indices and labels."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(annotations))],
        "categories": [{"id": k} for k in range(len(annotations.classes))],
        "annotations": [entry | {"id": n} for n, entry in enumerate(entries, start=1)],
    }
    coco.createIndex()
    return coco


def table(results):
    """{row name: metrics} -> a text table of AP and its most read parts in percent, one row per line."""
    shown = METRICS[:6]
    lines = [f"{'':24}" + "".join(f"{name:>7}" for name in shown)]
    for name, metrics in results.items():
        lines.append(f"{name:24}" + "".join(f"{percent(metrics[m]):>7}" for m in shown))
    return "\n".join(lines)


def percent(value):
    """0.4213 -> "42.1"; -1, nothing to find, -> "-"."""
    return f"{100 * value:.1f}" if value >= 0 else "-"


def count_cost(model, branch, height, width):
    """What a model read from `branch` takes for one image of height x width in H's pixels.

    Returns {"parameters": their number, "size": [height, width], "gmacs": {"backbone", "fpn", "head", "total"}}, the
    last in 10^9 multiply-accumulates of convolutions and matrix products, by PyTorch's own counter. Sides are padded as
    the model would pad them. The total has a teacher's gate in it, too.
    """
    padded = model.padded_size((-(-height // model.scale), -(-width // model.scale)))
    model = copy.deepcopy(model).to("meta").eval()  # shapes are enough to count
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.predict(model.pyramids(torch.empty(1, 3, *padded, device="meta"), [branch]))
    counts = counter.get_flop_counts()
    names = {part: type(getattr(model, part)).__name__ for part in PARTS} | {"total": "Global"}
    gmacs = {part: sum(counts[name].values()) / 2e9 for part, name in names.items()}
    return {"parameters": sum(p.numel() for p in model.parameters()), "size": [height, width], "gmacs": gmacs}


def cost_line(branch, counted):
    """One line: "0.30 M parameters, low: 0.62 GMACs (backbone 0.08, fpn 0.13, head 0.41) at 256x256 in H's pixels"."""
    found, (height, width) = counted["gmacs"], counted["size"]
    parts = ", ".join(f"{part} {found[part]:.2f}" for part in PARTS)
    total = f"{counted['parameters'] / 1e6:.2f} M parameters, {branch}: {found['total']:.2f} GMACs ({parts})"
    return f"{total} at {height}x{width} in H's pixels"


@torch.inference_mode()
def measure_cost(model, dataset, branch, autocast=contextlib.nullcontext(), images=7):
    """What reading `branch` costs on a data set -> as `count_cost` at the padded size that most images share, and "ms".

    "ms" has the medians over a few single images of that size for "network" (8-bit pixels to the head's outputs) and
    "postprocessing" (these to boxes). Reading files is in neither.
    """
    network = model.folded()
    sizes = [model.padded_size(dataset.network_size(index)) for index in range(len(dataset))]
    size = statistics.mode(sizes)
    indices = [index for index, other in enumerate(sizes) if other == size]
    size = [side * model.scale for side in size]
    device, seconds = model.mean.device, []
    for index in indices[:1] * 2 + indices[:images]:  # the first one twice more, to warm up
        image = dataset[index, 0][0]
        pixels, shape = pad_to_multiple([image], model.multiple).to(device), [tuple(image.shape[1:])]
        original = [tuple(map(int, dataset.annotations.sizes[index]))]
        with autocast:
            began = now(device)
            pyramids = network.pyramids(network.normalize(pixels, shape), [branch])
            outputs = network.predict(pyramids)
            between = now(device)
            network.postprocess(pyramids[branch], outputs[branch], branch, shape, original)
        seconds.append((between - began, now(device) - between))
    medians = [1000 * statistics.median(column) for column in zip(*seconds[2:])]
    return count_cost(model, branch, *size) | {"ms": dict(zip(("network", "postprocessing"), medians))}


def now(device):
    """Seconds, once the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe_levels(config, annotations, short_side, long_side, device):
    """A line on how many boxes each aligned level learns; one more, on what to change, if the finest or most learn few.
    """
    measure = lambda scale, pictures: level_shares(config, annotations, short_side, long_side, device, scale, pictures)
    shares = measure(config.object_scale, 100)
    percent, strides = ", ".join(f"{100 * share:.0f}" for share in shares), ", ".join(map(str, align.STRIDES))
    line = f"levels    {percent} % of the boxes learn at strides {strides} (some at several), short side {short_side}"
    if shares[0] >= 0.1 and sum(share >= 0.01 for share in shares) >= 3:
        return line
    low, high = 1 / 16, 16.0  # factors on the sizes that levels are responsible for: bisection
    for _ in range(6):
        factor = (low * high) ** 0.5
        low, high = (factor, high) if measure(factor * config.object_scale, 30)[0] < 0.5 else (low, factor)
    side = f"{short_side / high:.0f}"
    mend = f"--object-scale {high * config.object_scale:.2g} or with --short-sides {side} --test-side {side}"
    return f"{line}\n          alignment helps at the first stride only; about half of the boxes are there with {mend}"


def level_shares(config, annotations, short_side, long_side, device, object_scale, pictures):
    """The shares of boxes that some location (or anchor) of each aligned level is trained to find, five floats.

    Measured with the head's own assignment, of evenly spread pictures at a short side, in pixels of H.
    """
    head = HEADS[config.head](32, len(config.classes), 32, 1, object_scale).to(device)
    owned = []
    for index in range(0, len(annotations), -(-len(annotations) // pictures)):
        height, width = fitted_size(*map(int, annotations.sizes[index]), short_side, long_side)
        boxes, _ = annotations.objects(index)
        boxes = torch.from_numpy(boxes).to(device) * (height / int(annotations.sizes[index][0]))
        sizes = [(-(-height // stride), -(-width // stride)) for stride in align.STRIDES]
        names = len(config.classes) + 1 + torch.arange(len(boxes), device=device)  # each box has a label of its own
        learned = head.assign(sizes, [boxes], [names])["labels"][0]
        levels = learned.split([height * width * head.anchors for height, width in sizes])
        owned.append(torch.stack([torch.isin(names, level) for level in levels]))
    return torch.cat(owned, dim=1).float().mean(dim=1).tolist()
