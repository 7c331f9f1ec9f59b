"""How good a model is: what it finds in a data set, and COCO's twelve numbers of that, by pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ..data.dataset import eval_batches, loader
from . import processes

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(model, dataset, branches, batch, workers=0, autocast=contextlib.nullcontext()):
    """Run a model over a data set -> {branch: (metrics, detections)}; each process takes a part, all get the whole.

    `metrics` is as from `coco_metrics`, `detections` a list of (index of the image, its detections), these as from
    `detect`, but NumPy's: {"boxes": (D,4), "scores": (D,), "labels": (D,)}.
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
            arrays = [{name: tensor.cpu().numpy() for name, tensor in image.items()} for image in detections[branch]]
            found[branch] += zip(data.indices, arrays)
    found = {branch: sorted(processes.gather(pairs), key=lambda pair: pair[0]) for branch, pairs in found.items()}
    return {branch: (coco_metrics(dataset.annotations, pairs), pairs) for branch, pairs in found.items()}


def coco_evaluation(annotations, detections):
    """Annotations and [(index, detections)] in the files' pixels -> pycocotools' evaluation of them, to be run."""
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
    columns = images, annotations.labels, annotations.boxes, annotations.areas, annotations.crowd
    truth = [
        {"image_id": i, "category_id": label, "bbox": to_xywh(box), "area": area, "iscrowd": crowd}
        for i, label, box, area, crowd in zip(*(column.tolist() for column in columns))
    ]
    found = coco_results(detections, range(len(annotations)), range(len(annotations.classes)))
    results = [entry | {"area": entry["bbox"][2] * entry["bbox"][3]} for entry in found]
    return COCOeval(coco_of(annotations, truth), coco_of(annotations, results), "bbox")


def coco_metrics(annotations, detections):
    """Annotations and [(index, detections)] as above -> the twelve {"AP": ...} and "classes", {name: AP}.

    Values are pycocotools' own: from 0 to 1, and -1 where there is nothing to find.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = coco_evaluation(annotations, detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) over all sizes, 100 detections
    names = [c["name"] for c in annotations.classes]
    unique = [n if names.count(n) == 1 else f"{n} (id {c['id']})" for n, c in zip(names, annotations.classes)]
    classes = dict(zip(unique, precision.mean((0, 1)).tolist()))  # -1 throughout where there is nothing to find
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
    coco.dataset = {"annotations": [entry | {"id": n} for n, entry in enumerate(entries, start=1)]}
    coco.dataset["images"] = [{"id": i} for i in range(len(annotations))]
    coco.dataset["categories"] = [{"id": k} for k in range(len(annotations.classes))]
    coco.createIndex()
    return coco


def table(results):
    """{row name: metrics} -> a text table of AP and its most read parts in percent, one row per line."""
    shown = METRICS[:6]
    lines = [f"{'':24}" + "".join(f"{name:>7}" for name in shown)]
    lines += [f"{name:24}" + "".join(f"{percent(found[m]):>7}" for m in shown) for name, found in results.items()]
    return "\n".join(lines)


def percent(value):
    """0.4213 -> "42.1"; -1, nothing to find, -> "-"."""
    return f"{100 * value:.1f}" if value >= 0 else "-"
