"""Two processes of torchrun do what one does alone: gradients, evaluation, both scripts, stopping; or one fails.

One torchrun starts this file as a script for most of the tests; its processes write what they found into a folder.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import distill
import evaluate
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import randomize, tiny_config, tiny_model
from scripts import LONG, ROOT, TINY, Process, assert_same_run, complaint, pausing
from torch.optim.optimizer import register_optimizer_step_pre_hook

from msad import distillation, models
from msad.data import annotations
from msad.data.dataset import Batch, CocoDataset
from msad.data.errors import InputError
from msad.engine import checkpoint, evaluation, processes
from msad.engine.files import open_locked
from msad.fusion import LOSS_WEIGHTS

SHORT = [*TINY, "--iters", "2"]
# Images of one size, so that no part is padded: GroupNorm would see it.
PARTS = [*SHORT, "--batch", 8, "--accumulate", 2, "--norm", "frozen", "--clip", 0, "--short-sides", 64]
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
    """{parameter: gradient} of a model on its process's part of a batch; BatchNorm is frozen."""
    torch.manual_seed(0)
    model = models.build(tiny_config(kind, head=head))
    randomize(model)
    network = processes.parallel(model, torch.device("cpu"), Namespace(norm="frozen", precision="fp32"))
    images, boxes, labels = random_batch(counts)
    mine = slice(rank * len(counts) // count, (rank + 1) * len(counts) // count)
    if kind == "low":
        images = images[:, :, ::2, ::2]
    pyramids, outputs = network(images[mine])
    losses = model.losses(pyramids, outputs, boxes[mine], labels[mine], processes.mean_over_processes)
    loss = sum(LOSS_WEIGHTS[branch] * value for branch, parts in losses.items() for value in parts.values())
    if kind == "low":
        shapes = [(len(counts), *level.shape[1:]) for level in pyramids["low"]]
        fused = [torch.arange(math.prod(shape)).sin().view(shape)[mine] for shape in shapes]
        loss = loss + distillation.WEIGHT * distillation.pyramid_l1(pyramids["low"], fused)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


CASES = [("teacher", "fcos", "one side"), ("teacher", "retinanet", "unequal"), ("low", "fcos", "unequal")]


def evaluated(data):
    """{branch: [metrics, detections]} of a model on a validation set."""
    dataset = CocoDataset(annotations.read(data, "val"), (64,), 128)
    results = evaluation.evaluate(tiny_model("teacher"), dataset, ["fused", "low"], batch=2)
    plain = lambda found: {k: v.tolist() for k, v in found.items()}
    return {b: [metrics, [[i, plain(found)] for i, found in pairs]] for b, (metrics, pairs) in results.items()}


def outcome(script, *flags):
    """None, or how a script ends before its time: the line, or "stopped"."""
    sys.argv = [f"{script.__name__}.py", *map(str, flags)]
    try:
        return script.main()
    except (InputError, KeyboardInterrupt) as error:
        return str(error) or "stopped"


def outcome_of_an_accident(accident, *flags):
    """The same of train.py when `accident` befalls the second process, in the losses of its second batch."""
    losses, batches = models.Detector.losses, []

    def struck(*arguments):
        batches.append(None)
        found = losses(*arguments)
        return accident(found) if len(batches) == 2 and processes.rank() == 1 else found

    models.Detector.losses = struck
    try:
        return outcome(train, *flags)
    finally:
        models.Detector.losses = losses


def spoil(found):
    found["low"]["box"] = found["low"]["box"] * math.nan
    return found


def interrupt(found):
    os.kill(os.getpid(), signal.SIGTERM)
    return found


def first_step(*flags):
    """The weights with which train.py begins, and the gradients of its first step."""
    found = []

    def note(adamw, *_):
        found.append([[p.detach().clone(), p.grad.clone()] for group in adamw.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(note)
    outcome(train, *flags)
    handle.remove()
    return found[0]


def work(folder):
    """What each of the two processes does."""
    processes.init_device("cpu")
    rank, count = processes.rank(), processes.world_size()
    mine = {case: gradients(*case[:2], COUNTS[case[2]], rank, count) for case in CASES}
    torch.save(mine, folder / f"gradients{rank}.pt")
    found = {name: evaluated(folder / name) for name in ("data", "one")}
    data, evaluate, checksums = ["--data", folder / "data"], evaluation.evaluate, []
    evaluation.evaluate = lambda model, *rest: checksums.append(distillation.checksum(model)) or evaluate(model, *rest)
    teacher = ["--teacher", folder / "teacher" / "last.pt"]
    low = [*TINY, *data, "--res", "low", "--batch", 4]
    found["outcomes"] = {
        "teacher": outcome(train, *SHORT, *data, "--out", folder / "teacher"),
        "student": outcome(distill, *SHORT, *data, "--out", folder / "student", *teacher),
        "too small": outcome(train, *SHORT, *data, "--out", folder / "none", "--batch", 1),
        "not finite": outcome_of_an_accident(spoil, *low, "--out", folder / "spoilt"),
        "stopped": outcome_of_an_accident(interrupt, *low, "--norm", "local", "--out", folder / "stopped"),
        "uneven parts": outcome(train, *SHORT, *data, "--out", folder / "none", "--batch", 6, "--accumulate", 2),
    }
    found["evaluated"] = checksums[0]
    torch.save(first_step(*PARTS, "--data", folder / "square", "--out", folder / "parts"), folder / f"parts{rank}.pt")
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    outcome(train, *LONG, *data, "--res", "low", "--batch", 4, "--out", folder / "whole")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with what two processes found."""
    folder = tmp_path_factory.mktemp("two")
    draw_rectangles(folder / "data", {"train": 8, "val": 5}, sides=(49, 90))
    draw_rectangles(folder / "one", {"val": 1}, sides=(49, 90))
    draw_rectangles(folder / "square", {"train": 8, "val": 1}, sides=(64, 64))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    job = subprocess.run([*torchrun, __file__, folder], cwd=folder, env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[:1500]
    (folder / "printed").write_text(job.stdout)
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


@pytest.mark.parametrize("data, images", [("data", 5), ("one", 1)])
def test_evaluation_by_two_processes_equals_that_by_one(two, data, images):
    alone = evaluated(two / data)
    assert [index for index, _ in alone["fused"][1]] == list(range(images))
    assert sum(len(found["scores"]) for _, found in alone["fused"][1]) > 20 * images
    for found in found_by(two):
        assert found[data] == json.loads(json.dumps(alone))


@pytest.mark.parametrize("name, kind", [("teacher", "teacher"), ("student", "low")])
def test_scripts_run_under_torchrun_and_write_once(two, name, kind):
    teacher = distillation.checksum(checkpoint.load(two / "teacher" / "last.pt"))
    assert [found["evaluated"] for found in found_by(two)] == [teacher] * 2, "BatchNorm's statistics of either process"
    content = checkpoint.read(two / name / "last.pt")
    assert content["config"].kind == kind and content["training"]["done"] == 2
    log = [json.loads(line) for line in (two / name / "log.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in log if "iteration" in entry] == [0, 1]
    results = [entry["branch"] for entry in log if "branch" in entry]
    assert sorted(results) == sorted(checkpoint.restore(content, name).branches)
    assert sorted(path.name for path in (two / name).iterdir()) == ["last.pt", "log.jsonl", "sheet.jpg"]
    printed = (two / "printed").read_text()
    assert printed.count(f"folder    {two / name}\n") == 1 and "2 process(es)" in printed
    assert printed.count(f"pictures {two / name}/sheet.jpg") == 1


def test_both_processes_end_alike_whatever_befalls_one(two):
    ends, other = (found["outcomes"] for found in found_by(two))
    assert ends == other and not (two / "none").exists()
    assert ends["teacher"] is ends["student"] is None
    assert ends["too small"] == "--batch 1 is smaller than the number of processes, 2"
    assert ends["uneven parts"] == "--accumulate 2: must divide --batch 6 over 2 process(es)"
    assert "iteration 1:" in ends["not finite"] and "low/box nan" in ends["not finite"]
    assert not (two / "spoilt" / "last.pt").exists()
    # A signal to one stops both after the same iteration. Here each has its own statistics of BatchNorm.
    assert ends["stopped"] == "stopped" and checkpoint.read(two / "stopped" / "last.pt")["training"]["done"] == 2
    line = f"stopped after 2 iterations; go on with: python train.py --resume --out {two}/stopped\n"
    assert (two / "printed").read_text().count(line) == 1


def test_two_processes_that_take_a_batch_in_parts_have_the_mean_of_their_joint_parts(two, tmp_path, monkeypatch):
    """As one process has whose parts have the same images: the first and the second halves of each process's four."""
    chunk, joint = Batch.chunk, [0, 1, 4, 5, 2, 3, 6, 7]
    pick = lambda field: field[joint] if torch.is_tensor(field) else [field[i] for i in joint]
    monkeypatch.setattr(Batch, "chunk", lambda batch, count: chunk(Batch(*map(pick, batch)), count))
    alone = first_step(*PARTS, "--data", two / "square", "--out", tmp_path)
    both = [torch.load(two / f"parts{rank}.pt") for rank in (0, 1)]
    for (weight, wanted), (first, one), (second, other) in zip(alone, *both, strict=True):
        assert weight.equal(first) and weight.equal(second) and one.equal(other)
        # Other parts, or a sum instead of a mean, differ by far more than the order in which numbers are added up.
        assert (one - wanted).abs().max() <= 1e-3 * wanted.abs().max()


# One of two fails. These are forks, which are there at once.


def pair(folder, *flags, change=lambda: None):
    """train.py in two processes, each in a fork, as if torchrun had started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folders = [folder / "0", folder / "1"]
    for each in folders:
        each.mkdir(parents=True)
    return [Process(each, train, *flags, change=change, RANK=each.name, **environment) for each in folders]


def assert_left_alone(process):
    """It ended with a line that points to the other process."""
    code, lines = process.end()
    assert code == 2 and lines[-1].startswith("error: another process of this run has ended, and says why"), lines
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("failing, fault", [(0, "a picture"), (1, "a picture"), (0, "the folder")])
def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path, failing, fault):
    data, out = draw_rectangles(tmp_path / "data", {"train": 4, "val": 4}, sides=(64, 64)), tmp_path / "out"
    if fault == "a picture":
        path = data / "val" / f"{2 * failing}.png"  # each process has two of the four
        path.write_bytes(path.read_bytes()[:-300])
        expected = f"error: {path}: not readable as an image"
    else:
        out.mkdir()
        log = open_locked(out / "log.jsonl")  # as another run does
        expected = f"error: {out}: in use by another run; choose another --out"

    def change():
        torch.distributed.destroy_process_group = lambda: time.sleep(10_000)  # NCCL's may wait for the others

    both = pair(tmp_path, *TINY, "--data", data, "--res", "low", "--batch", 4, "--out", out, change=change)
    code, lines = both[failing].end()
    assert code == 2 and lines[-1].startswith(expected), lines
    assert_left_alone(both[1 - failing])
    if fault == "a picture":
        assert checkpoint.read(out / "last.pt")["training"]["done"] == 2, "saved before the evaluation"
    else:
        log.close()


@pytest.mark.parametrize("accident", ["one is killed", "torchrun's terminal is closed"])
def test_after_an_accident_both_end_and_the_run_resumes_to_the_same_bits(two, tmp_path, accident):
    out = tmp_path / "out"
    flags = [*LONG, "--data", two / "data", "--res", "low", "--batch", 4, "--workers", 1, "--out", out]
    both = pair(tmp_path / "first", *flags, change=pausing(tmp_path))
    both[0].wait_until((tmp_path / "waits").exists)  # in the sixth iteration
    if accident == "one is killed":
        both[1].kill()
        (tmp_path / "go").touch()
        assert_left_alone(both[0])  # instead of hanging
    else:
        for process in [*both, *both]:  # their workers, too
            os.killpg(process.id, signal.SIGHUP)
        both[0].wait_until(lambda: "stopping after" in both[0].output.read_text())
        (tmp_path / "go").touch()
        (code, lines), (other, _) = (process.end() for process in both)
        assert code == other == 130 and "; go on with: python train.py" in lines[-1], lines
        assert sum("stopping after" in line for line in lines) == 1, "workers have nothing to say"
    assert checkpoint.read(out / "last.pt")["training"]["done"] == (4 if accident == "one is killed" else 6)
    both = pair(tmp_path / "second", "--resume", "--out", out)
    assert [process.end()[0] for process in both] == [0, 0]
    assert_same_run(out, two / "whole")


def test_rank_without_the_rest_of_torchrun_s_environment_is_one_line(two, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    line = complaint(evaluate, "--ckpt", two / "whole" / "last.pt")
    assert line.startswith("error: RANK is set: but the other processes cannot be joined (") and "WORLD_SIZE" in line


if __name__ == "__main__":
    work(Path(sys.argv[1]))
