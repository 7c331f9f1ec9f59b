"""Detections -> COCO's twelve numbers, by pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from . import processes
from .data import eval_batches, loader

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(model, dataset, branches, batch, workers=0, autocast=contextlib.nullcontext()):
    """Run a model over a data set -> {branch: (metrics, detections)}; each process takes a part, all get the whole.

    `metrics` is as in `coco_metrics`, `detections` a list of (index, dict of arrays) as in `detect`.
    """
    model = model.folded()
    device = model.mean.device
    batches = eval_batches(dataset, batch, model.multiple, processes.rank(), processes.count())
    found = {branch: [] for branch in branches}
    silent = None if processes.is_main() else True  # None: a bar only on a terminal
    reader = loader(dataset, batches, model.multiple, workers, device)
    for data in tqdm(reader, "evaluating", leave=False, disable=silent):
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
    results = [
        {"image_id": i, "category_id": label, "bbox": to_xywh(box), "score": score}
        for i, d in detections
        for label, box, score in zip(*(d[name].tolist() for name in ("labels", "boxes", "scores")))
    ]
    for entry in results:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(annotations, truth), _index(annotations, results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) over all sizes, 100 detections
    classes = {}
    for k, c in enumerate(annotations.classes):
        known = precision[:, :, k][precision[:, :, k] >= 0]
        classes[c["name"]] = float(known.mean()) if known.size else -1.0
    return dict(zip(METRICS, map(float, evaluation.stats))) | {"classes": classes}


def to_xywh(box):
    """One box (x1,y1,x2,y2) -> [x, y, width, height] as Python floats, COCO's convention."""
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, x2 - x1, y2 - y1]


def _index(annotations, entries):
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
