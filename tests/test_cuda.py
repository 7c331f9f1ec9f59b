"""On a CUDA device everything is what it is on the CPU, in fp32 up to rounding, and a step waits for the device once.

Skipped without one; test_device_hygiene.py sees what can be seen without. torchrun starts this file as a script.
"""

import json
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import distill
import evaluate
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import tiny_config, tiny_model, total
from scripts import ROOT, TINY, call, succeed
from test_processes import random_batch
from torchvision.ops import box_iou

from msad import models
from msad.data import annotations
from msad.engine import checkpoint, evaluation, processes, run
from msad.data.dataset import CocoDataset
from msad.images import resize

DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(not DEVICES, reason="no CUDA device here")
ON_CUDA = [*TINY, "--device", "cuda"]
SMALL = ["--device", "cuda", "--recipe", "small", "--iters", 60, "--short-sides", 128, "--test-side", 128]
HEADS = ("fcos", "retinanet")
COUNTS = (3, 0, 1, 7)  # boxes of the images of a batch


@pytest.fixture(scope="module")
def device():
    return processes.init_device("cuda")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_rectangles(tmp_path_factory.mktemp("data"), {"train": 12, "val": 4})


def step(kind, head, norm, device, rank=0, count=1):
    """Outputs, losses and gradients, on the CPU, of a training step in fp32 with a process's part of a batch."""
    model = tiny_model(kind, head=head)
    network = processes.parallel(model, torch.device(device), Namespace(norm=norm, precision="fp32"))
    mine = slice(rank * len(COUNTS) // count, (rank + 1) * len(COUNTS) // count)
    images, boxes, labels = ([part.to(device) for part in batch[mine]] for batch in random_batch(COUNTS))
    images = torch.stack(images)
    pyramids, outputs = network(images[:, :, ::2, ::2] if kind == "low" else images)
    losses = model.losses(pyramids, outputs, boxes, labels, processes.mean_over_processes)
    total(losses).backward()
    found = [{f"{b}/{k}": v for b, part in x.items() for k, v in part.items()} for x in (outputs, losses)]
    found.append({name: p.grad for name, p in model.named_parameters()})
    return [{name: v.detach().cpu() for name, v in part.items() if torch.is_tensor(v)} for part in found]


def assert_close(found, wanted, share):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():  # each up to a share of its own largest value
        assert (found[name] - value).abs().max() <= share * value.abs().max(), name


@pytest.mark.parametrize("norm", ["local", "frozen"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_outputs_losses_and_gradients_equal_the_cpu_s(device, kind, head, norm):
    """To four digits; TF32 would have three."""
    for found, wanted, share in zip(step(kind, head, norm, device), step(kind, head, norm, "cpu"), (1e-4, 1e-4, 1e-3)):
        assert_close(found, wanted, share)


@pytest.mark.parametrize("low", [None, "area", "nearest"])
@pytest.mark.parametrize("size", [(90, 120), (400, 520)])
def test_a_picture_on_the_device_is_resized_as_on_the_cpu(device, size, low):
    picture = torch.randint(256, (3, 300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert resize(picture.to(device), size, low).cpu().equal(resize(picture, size, low))
    found, wanted = resize(picture.to(device) / 255, size, low).cpu(), resize(picture / 255, size, low)
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("script", [train, distill], ids=["train", "distill"])
def test_a_step_waits_only_where_it_reads_its_numbers(device, data, tmp_path, monkeypatch, script, head, precision):
    """PyTorch makes an error of any other wait in the second and third step."""
    calls, flags = [], ["--iters", 5, "--precision", precision, "--data", data, "--out", tmp_path / "out"]
    if script is distill:
        config = tiny_config("teacher", annotations.read(data, "train").classes, head=head)
        checkpoint.save(tmp_path / "teacher.pt", models.build(config))
        monkeypatch.setattr(distill, "evaluate_all", lambda *_: {})
        flags += ["--teacher", tmp_path / "teacher.pt", "--kd-loss", "pkd"]

    def may_wait(function):
        def wrapped(*arguments):
            torch.cuda.set_sync_debug_mode("default")
            calls.append(function)
            result = function(*arguments)
            torch.cuda.set_sync_debug_mode("error")
            return result if len(calls) < 6 else arguments[0].stop(3)

        return wrapped

    monkeypatch.setattr(run.Run, "averages", may_wait(run.Run.averages))
    monkeypatch.setattr(run.Run, "end_iteration", may_wait(run.Run.end_iteration))
    monkeypatch.setattr(run.Run, "evaluate", lambda *_: {})
    try:
        code, _, complained = call(script, *ON_CUDA, "--head", head, *flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert code == processes.INTERRUPTED and len(calls) == 6, complained


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_detect_finds_what_it_finds_on_the_cpu_and_waits_at_most_nine_times_an_image(device, kind, head):
    """All but one in twenty: rounding may turn an overlap or a score that is nearly at its threshold."""
    pictures = torch.rand(3, 3, 90, 128, generator=torch.Generator().manual_seed(0))
    here, there = (tiny_model(kind, head=head).to(d).folded() for d in ("cpu", device))
    there.detect(pictures)
    with warnings.catch_warnings(record=True, action="always") as noticed:
        torch.cuda.set_sync_debug_mode("warn")
        found = there.detect(pictures)
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in noticed if "synchronizing CUDA" in str(warning.message)]
    assert len(waits) <= (4 + 5) * len(pictures) + 1, "5 levels of too many candidates; the upload of the batch"
    for one, other in zip(found, here.detect(pictures)):
        one = {name: value.cpu() for name, value in one.items()}
        same = (one["labels"][:, None] == other["labels"]) & (box_iou(one["boxes"], other["boxes"]) > 0.99)
        same &= (one["scores"][:, None] - other["scores"]).abs() < 1e-4
        assert len(other["scores"]) > 20 and all(same.any(dim).float().mean() >= 0.95 for dim in (0, 1))


def test_evaluation_gives_the_cpu_s_numbers(device, data):
    dataset, results = CocoDataset(annotations.read(data, "val"), (64,), 128), []
    for d in (device, "cpu"):
        found = evaluation.evaluate(tiny_model("teacher").to(d), dataset, ["fused", "low"], batch=2)
        results.append({(b, name): metrics[name] for b, (metrics, _) in found.items() for name in evaluation.METRICS})
    assert results[0] == pytest.approx(results[1], abs=2e-3)


def test_a_teacher_and_its_student_are_trained_and_evaluated(device, data, tmp_path):
    """In the device's own precision; evaluate.py finds what the log says."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert torch.cuda.get_device_name() in succeed(train, *SMALL, "--data", data, "--out", teacher)
    succeed(distill, *SMALL, "--teacher", teacher / "last.pt", "--out", student)
    trained, distilled = ([json.loads(line) for line in (out / "log.jsonl").open()] for out in (teacher, student))
    assert trained[-4]["loss"] < 0.8 * trained[0]["loss"], "before the results of three branches"
    succeed(evaluate, "--ckpt", student / "last.pt", "--device", "cuda", "--json", tmp_path / "numbers.json")
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["low"]["AP"] == pytest.approx(distilled[-1]["AP"], abs=0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_processes_of_torchrun_have_the_gradients_of_the_cpu(data, tmp_path, count):
    if DEVICES < count:
        pytest.skip(f"{DEVICES} CUDA device here, {count} needed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    job = subprocess.run([*torchrun, __file__, data, tmp_path], env=environment, capture_output=True, text=True)
    assert job.returncode == 0 and f"{count} process(es)" in job.stdout, job.stderr
    for head in HEADS:
        wanted = step("teacher", head, "frozen", "cpu")[2]
        for rank in range(count):
            assert_close(torch.load(tmp_path / f"{head}{rank}.pt"), wanted, 1e-3)
    assert checkpoint.read(tmp_path / "out" / "last.pt")["training"]["done"] == 4


def work(data, folder):
    """What each process does: gradients over NCCL, then a whole run with synchronised BatchNorm."""
    device, rank, count = processes.init_device("cuda"), processes.rank(), processes.world_size()
    for head in HEADS:
        torch.save(step("teacher", head, "frozen", device, rank, count)[2], folder / f"{head}{rank}.pt")
    sys.argv = ["train.py", *ON_CUDA, "--batch", "4", "--data", str(data), "--out", str(folder / "out")]
    train.main()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
