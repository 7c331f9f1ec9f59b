"""Runs of the comparison -> lines of .github/numbers.jsonl: python .github/figures/collect.py RUNS COMMIT MACHINE

RUNS holds what .github/comparison.sh made, a folder SET-HEAD-SEED for each set of pictures, head and seed, and in it one
for each row. What has finished and is not in the file yet is added, a line for each branch of a model:

    {"set", "head", "seed", "row", "branch", "iterations", "commit", "machine": where it comes from,
     "gmacs": of one image of the tested size, all of the network, "AP" ... "ARl": COCO's twelve numbers,
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
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad.data.dataset import CocoDataset, open_data
from msad.engine import checkpoint, cost, evaluation, processes

NUMBERS = ROOT / ".github" / "numbers.jsonl"
RESAMPLINGS = 200


def resampled_ap(annotations, found):
    """AP of what a model found, [(index, detections)], over resamplings of the pictures: a list of floats."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations.file)
        results = evaluation.coco_results(found, annotations.image_ids, [c["id"] for c in annotations.classes])
        coco = COCOeval(truth, truth.loadRes(results), "bbox")
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


def collect(folder, where):
    """The lines of one finished run, whose folder is RUNS/SET-HEAD-SEED/ROW."""
    name, head, seed = folder.parent.name.rsplit("-", 2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [entry for entry in log if entry.get("done") == log[-1]["done"] and "branch" in entry]
    content = checkpoint.read(folder / "last.pt")
    model = checkpoint.restore(content, folder / "last.pt")
    (annotations,) = open_data(content["training"]["settings"]["data"], ["val"])
    dataset = CocoDataset(annotations, (model.config.short_side,), model.config.long_side, model.downsample)
    autocast = processes.autocast(torch.device("cpu"), content["training"]["settings"]["precision"])
    found = evaluation.evaluate(model, dataset, model.branches, 8, autocast=autocast)
    side = model.config.short_side
    for entry in last:
        branch, iterations = entry.pop("branch"), entry.pop("done")
        ours, detections = found[branch]
        assert abs(ours["AP"] - entry["AP"]) < 2e-3, (folder, branch, ours["AP"], entry["AP"])
        about = {"set": name, "head": head, "seed": int(seed), "row": folder.name, "branch": branch} | where
        about |= {"iterations": iterations, "gmacs": cost.count_cost(model, branch, side, side)["gmacs"]["total"]}
        rounded = {name: round(value, 4) for name, value in (about | entry).items() if isinstance(value, float)}
        yield about | entry | rounded | {"resampled": resampled_ap(annotations, detections)}


def main():
    runs, commit, machine = sys.argv[1:]
    lines = NUMBERS.read_text().splitlines() if NUMBERS.exists() else []
    known = {"{set}-{head}-{seed}/{row}".format(**json.loads(line)) for line in lines}
    for folder in sorted(finished.parent for finished in Path(runs).glob("*/*/finished")):
        if f"{folder.parent.name}/{folder.name}" not in known:
            added = list(collect(folder, {"commit": commit, "machine": machine}))
            print(f"{folder}: AP " + ", ".join(f"{entry['branch']} {100 * entry['AP']:.1f}" for entry in added), flush=True)
            with open(NUMBERS, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in added)


if __name__ == "__main__":
    main()
