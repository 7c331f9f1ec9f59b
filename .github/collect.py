"""Runs of the comparison -> lines of numbers: python .github/collect.py RUNS COMMIT MACHINE >> .github/numbers.jsonl

RUNS holds what .github/comparison.sh made, a folder SET-HEAD-SEED for each set of pictures, head and seed, and in it
one for each row. What has finished and is not in numbers.jsonl yet is printed, a line for each branch of a model:

    {"set", "head", "seed", "row", "branch", "iterations", "commit", "machine": where it comes from,
     "gmacs": of one image of the padded size that most have, all of the network, "AP" ... "ARl": COCO's twelve numbers,
     "gate": of a teacher, the mean weight on H of the five levels over the validation pictures,
     "resampled": 200 values of AP, each over as many validation pictures drawn with replacement, the same for all rows}
"""

import contextlib
import copy
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from msad.data.dataset import CocoDataset, eval_batches, loader, open_data
from msad.engine import checkpoint, cost, evaluation, processes

NUMBERS = ROOT / ".github" / "numbers.jsonl"
RESAMPLINGS = 200


def resampled_ap(annotations, found):
    """AP of what a model found, [(index, detections)], over resamplings of the pictures: a list of floats."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = evaluation.coco_evaluation(annotations, found)
        coco.params.areaRng, coco.params.areaRngLbl, coco.params.maxDets = coco.params.areaRng[:1], ["all"], [100]
        coco.evaluate()
        pictures, draw = len(coco.params.imgIds), np.random.default_rng(0)
        matches = np.array(coco.evalImgs, dtype=object).reshape(-1, pictures)  # of each class in each picture
        return [accumulated_ap(coco, matches[:, draw.integers(pictures, size=pictures)]) for _ in range(RESAMPLINGS)]


def accumulated_ap(coco, matches):
    coco = copy.copy(coco)
    coco.evalImgs = matches.flatten().tolist()
    coco.accumulate()
    precision = coco.eval["precision"]
    return round(float(precision[precision > -1].mean()), 4)


@torch.inference_mode()
def gate(teacher, dataset):
    """The mean weight on high resolution over the pictures of a set, by level."""
    teacher, weights = teacher.folded(), []
    batches = eval_batches(dataset, 8, teacher.multiple, 0, 1)
    for batch in loader(dataset, batches, teacher.multiple, 0, torch.device("cpu")):
        maps = teacher.pyramids(teacher.normalize(batch.images, batch.sizes), ("high", "low"))
        weights.append(torch.stack([teacher.fusion.weights(h, l)[:, 0] for h, l in zip(maps["high"], maps["low"])]))
    return [round(mean, 3) for mean in torch.cat(weights, 1).mean(1).tolist()]


def collect(folder, where):
    """The lines of one finished run, whose folder is RUNS/SET-HEAD-SEED/ROW."""
    name, head, seed = folder.parent.name.rsplit("-", 2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [entry for entry in log if entry.get("done") == log[-1]["done"] and "branch" in entry]
    content = checkpoint.read(folder / "last.pt")
    model = checkpoint.restore(content, folder / "last.pt")
    (annotations,) = open_data(content["training"]["settings"]["data"], ["val"])
    annotations = annotations.with_classes(model.config.classes, folder / "last.pt")
    dataset = CocoDataset(annotations, (model.config.short_side,), model.config.long_side, model.input_downsample)
    autocast = processes.autocast(torch.device("cpu"), content["training"]["settings"]["precision"])
    found = evaluation.evaluate(model, dataset, model.branches, 8, autocast=autocast)
    more = {"gate": gate(model, dataset)} if model.config.kind == "teacher" else {}
    for entry in last:
        branch, iterations = entry.pop("branch"), entry.pop("done")
        ours, detections = found[branch]
        assert abs(ours["AP"] - entry["AP"]) < 2e-3, (folder, branch, ours["AP"], entry["AP"])
        about = {"set": name, "head": head, "seed": int(seed), "row": folder.name, "branch": branch} | where
        about |= {"iterations": iterations, "gmacs": cost.measure_cost(model, dataset, branch)["gmacs"]["total"]}
        rounded = {name: round(value, 4) for name, value in (about | entry).items() if isinstance(value, float)}
        yield about | entry | rounded | more | {"resampled": resampled_ap(annotations, detections)}


def main():
    runs, commit, machine = sys.argv[1:]
    known = {"{set}-{head}-{seed}/{row}".format(**json.loads(line)) for line in NUMBERS.read_text().splitlines()}
    for folder in sorted(finished.parent for finished in Path(runs).glob("*/*/finished")):
        if f"{folder.parent.name}/{folder.name}" not in known:
            entries = list(collect(folder, {"commit": commit, "machine": machine}))
            print("\n".join(map(json.dumps, entries)), flush=True)  # all branches or none


if __name__ == "__main__":
    main()
