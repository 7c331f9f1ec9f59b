"""Two processes of torchrun do what one does alone: gradients, evaluation, and both training scripts.

One torchrun starts this file as a script for all the tests; its processes write what they found into a folder.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import distill
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import randomize, tiny_config, tiny_model

from msad import annotations, checkpoint, distillation, evaluation, models, processes
from msad.annotations import InputError
from msad.data import CocoDataset

TINY = (
    "--recipe small --iters 2 --batch 2 --short-sides 64 --test-side 64 --long-side 128 --fpn-channels 32 "
    "--head-channels 64 --head-convs 1 --precision fp32 --device cpu --log-every 1"
).split()
# Boxes per image: unequal over the two processes, and all of them in the first.
COUNTS = {"unequal": (3, 0, 1, 7), "one side": (2, 4, 0, 0)}


def random_batch(counts):
    generator = torch.Generator().manual_seed(sum(counts))
    images = torch.randn(len(counts), 3, 128, 64, generator=generator)
    boxes, labels = [], []
    for count in counts:
        corner, side = torch.rand(count, 2, generator=generator), torch.rand(count, 2, generator=generator)
        corner = corner * torch.tensor([40.0, 90.0])
        boxes.append(torch.cat([corner, corner + 10 + side * torch.tensor([14.0, 28.0])], 1))
        labels.append(torch.randint(0, 3, (count,), generator=generator))
    return images, boxes, labels


def gradients(kind, head, counts, rank=0, count=1):
    """{parameter: gradient} of a model on its process's part of a batch; BatchNorm uses its running statistics."""
    torch.manual_seed(0)
    model = models.build(tiny_config(kind, head=head))
    randomize(model)
    network = processes.parallel(model).eval()
    images, boxes, labels = random_batch(counts)
    mine = slice(rank * len(counts) // count, (rank + 1) * len(counts) // count)
    if kind == "low":
        images = images[:, :, ::2, ::2]
    pyramids, outputs = network(images[mine])
    losses = model.losses(outputs, boxes[mine], labels[mine])
    loss = sum(train.WEIGHT[name.split("/")[0]] * value for name, value in losses.items())
    if kind == "low":
        shapes = [(len(counts), *level.shape[1:]) for level in pyramids["low"]]
        fused = [torch.arange(math.prod(shape)).sin().view(shape)[mine] for shape in shapes]
        loss = loss + 0.6 * distillation.pyramid_l1(pyramids["low"], fused)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


CASES = [("teacher", "fcos", counts) for counts in COUNTS]
CASES += [("teacher", "retinanet", "unequal"), ("low", "fcos", "unequal")]


def evaluated(data):
    """{branch: [metrics, detections]} of a model on a validation set."""
    dataset = CocoDataset(annotations.read(data, "val"), (64,), 128)
    results = evaluation.evaluate(tiny_model("teacher"), dataset, ["fused", "low"], batch=2)
    plain = lambda found: {k: v.tolist() for k, v in found.items()}
    return {b: [metrics, [[i, plain(found)] for i, found in pairs]] for b, (metrics, pairs) in results.items()}


def run_script(script, *flags):
    sys.argv = [f"{script.__name__}.py", *TINY, *map(str, flags)]
    try:
        return script.run()
    except InputError as error:
        return str(error)


def work(folder):
    """What each of the two processes does."""
    processes.start(torch.device("cpu"))
    rank, count = processes.rank(), processes.count()
    mine = {case: gradients(*case[:2], COUNTS[case[2]], rank, count) for case in CASES}
    torch.save(mine, folder / f"gradients{rank}.pt")
    found = {name: evaluated(folder / name) for name in ("data", "one")}
    found["mean"] = processes.mean_over_processes(torch.tensor(10.0 * rank)).item()
    found["gathered"] = processes.gather([rank] * (2 - rank))
    data = ["--data", folder / "data"]
    teacher = folder / "teacher" / "last.pt"
    found["codes"] = [
        run_script(train, *data, "--out", folder / "teacher"),
        run_script(train, *data, "--out", folder / "conventional", "--no-align"),
        run_script(distill, *data, "--out", folder / "student", "--teacher", teacher),
        run_script(train, *data, "--out", folder / "none", "--batch", 1),
    ]
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    processes.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with what two processes found."""
    folder = tmp_path_factory.mktemp("two")
    draw_rectangles(folder / "data", {"train": 8, "val": 5}, sides=(49, 90))
    draw_rectangles(folder / "one", {"val": 1}, sides=(49, 90))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder)}
    done = subprocess.run([*torchrun, __file__, folder], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:1500]
    (folder / "printed").write_text(done.stdout)
    return folder


def found_by(two):
    return [json.loads((two / f"found{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_processes_equal_those_of_one_with_the_whole_batch(two, case):
    alone = gradients(*case[:2], COUNTS[case[2]])
    parts = [torch.load(two / f"gradients{rank}.pt")[case] for rank in (0, 1)]
    assert parts[0].keys() == parts[1].keys() == alone.keys()
    for name, wanted in alone.items():
        assert parts[0][name].equal(parts[1][name])
        assert wanted.abs().max() > 0, name
        assert (parts[0][name] - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


def test_the_mean_and_the_gathered_list_are_over_both_processes(two):
    assert [found["mean"] for found in found_by(two)] == [5, 5]
    assert [found["gathered"] for found in found_by(two)] == [[0, 0, 1], [0, 0, 1]]
    assert processes.mean_over_processes(torch.tensor(7.0)) == 7 and processes.gather([1, 2]) == [1, 2]


@pytest.mark.parametrize("data, images", [("data", 5), ("one", 1)])
def test_evaluation_by_two_processes_equals_that_by_one(two, data, images):
    alone = evaluated(two / data)
    assert [index for index, _ in alone["fused"][1]] == list(range(images))
    assert sum(len(found["scores"]) for _, found in alone["fused"][1]) > 20 * images
    for found in found_by(two):
        assert found[data] == json.loads(json.dumps(alone))


@pytest.mark.parametrize("name, kind", [("teacher", "teacher"), ("conventional", "conventional"), ("student", "low")])
def test_scripts_run_under_torchrun_and_write_once(two, name, kind):
    content = checkpoint.read(two / name / "last.pt")
    assert content["config"].kind == kind and content["training"]["done"] == 2
    log = [json.loads(line) for line in (two / name / "log.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in log if "iteration" in entry] == [0, 1]
    results = [entry["branch"] for entry in log if "branch" in entry]
    assert sorted(results) == sorted(checkpoint.restore(content, name).branches)
    files = ["curve.png", "last.pt", "log.jsonl", "sheet.jpg"]
    assert sorted(path.name for path in (two / name).iterdir()) == files
    printed = (two / "printed").read_text()
    assert printed.count(f"folder    {two / name}\n") == 1 and "2 process(es)" in printed


def test_codes_and_a_batch_smaller_than_the_processes(two):
    for found in found_by(two):
        assert found["codes"][:3] == [None] * 3
        assert found["codes"][3] == "--batch 1 is smaller than the number of processes, 2"
    assert not (two / "none").exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
