"""Accidents that must cost nothing but the time since: an evaluation or a drawing that fails, files that moved, two
runs for one folder, too few descriptors, workers that end, Ctrl-C, words nobody hears, memory that runs out."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from signal import SIGINT, SIGTERM

import distill
import evaluate
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import tiny_model
from PIL import Image
from scripts import LENGTH, TINY, Process, assert_same_run, call, complaint, pausing, runs, succeed

from msad import models
from msad.data import dataset
from msad.data.errors import InputError
from msad.engine import checkpoint, drawing, evaluation, processes, run
from msad.engine.files import open_locked, sync


def done(out):
    return checkpoint.read(out / "last.pt")["training"]["done"]


def raising(error):
    """What takes anything and raises an error."""

    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("name, number, error, expected", [
    ("trained", 1, InputError("val/0.png: not readable"), "error: val/0.png: not readable\n"),
    ("trained", 2, MemoryError(), "; go on with: python train.py --resume --out {out}\n"),
    ("distilled", 1, ZeroDivisionError(), None),
], ids=["a bad picture", "memory at the end", "a fault of the program"])  # fmt: skip
def test_an_evaluation_that_fails_costs_nothing(uninterrupted, tmp_path, monkeypatch, name, number, error, expected):
    script, flags = runs(uninterrupted)[name]
    out, resume = tmp_path / "out", ["--resume", "--out", tmp_path / "out"]
    evaluate_all, good = run.evaluate_all, number - 1
    for its_flags in ([*flags, "--save-every", 20, "--out", out], resume):  # fails, and once more where the run goes on
        evaluations = iter([evaluate_all] * good + [raising(error)])
        with monkeypatch.context() as patch:
            patch.setattr(run, "evaluate_all", lambda *arguments: next(evaluations)(*arguments))
            if expected:
                assert complaint(script, *its_flags).endswith(expected.format(out=out))
            else:
                with pytest.raises(ZeroDivisionError):
                    call(script, *its_flags)
        assert done(out) == (7, 12)[number - 1]
        good = 0
    succeed(script, *resume)
    assert_same_run(out, uninterrupted / name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a checkpoint, and three photos in a folder of it."""
    home = tmp_path_factory.mktemp("photos")
    checkpoint.save(home / "model.pt", tiny_model("low"))
    (home / "photos").mkdir()
    for name in "abc":
        Image.new("RGB", (80, 60), (200, 90, 30)).save(home / "photos" / f"{name}.png")
    return home


def look(photos, out):
    """Flags of evaluate.py that draw and write everything found in the photos."""
    flags = ["--draw", "--threshold", 0, "--device", "cpu", "--precision", "fp32"]
    return ["--ckpt", photos / "model.pt", "--images", photos / "photos", "--out", out, *flags]


@pytest.mark.parametrize("accident, code", [
    (raising(KeyboardInterrupt()), 130), (lambda *_: os.kill(os.getpid(), SIGTERM), 130), (raising(MemoryError()), 2),
    (raising(ZeroDivisionError()), None),
])  # fmt: skip
def test_whatever_ends_it_what_was_found_until_then_is_written(photos, tmp_path, monkeypatch, accident, code):
    accidents = iter((drawing.detect_all, drawing.detect_all, accident))
    monkeypatch.setattr(drawing, "detect_all", lambda *arguments: next(accidents)(*arguments))
    with contextlib.nullcontext() if code else pytest.raises(ZeroDivisionError):
        assert call(evaluate, *look(photos, tmp_path))[0] == code
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} == {"a.png", "b.png"}


def test_a_full_disk_costs_neither_earlier_results_nor_the_numbers(uninterrupted, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    flags = ["--ckpt", uninterrupted / "trained" / "last.pt", "--device", "cpu", "--json"]
    assert call(evaluate, *flags, tmp_path / "pipe")[0] == 0 and json.loads(os.read(pipe, 2**16))["low"]
    os.close(pipe)
    whole, before = succeed(evaluate, *flags, tmp_path / "link"), (tmp_path / "a.json").read_bytes()
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    code, printed, complained = call(evaluate, *flags, tmp_path / "link")
    assert code == 2 and "/link: cannot be written (No space left on device); what stood there" in complained
    numbers = [[line for line in text.splitlines() if line.startswith("AP ")] for text in (whole, printed)]
    assert numbers[0] == numbers[1] != [] and (tmp_path / "a.json").read_bytes() == before
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def halted(uninterrupted, tmp_path_factory):
    """A data set, a teacher and its student, which stopped after 7 iterations, in one folder."""
    home = tmp_path_factory.mktemp("halted")
    for name in ("data", "teacher"):
        shutil.copytree(uninterrupted / name, home / name)
    script, flags = runs(home)["distilled"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_all", raising(MemoryError()))
        complaint(script, *flags, "--out", home / "student")
    assert done(home / "student") == 7
    return home


MOVED = {  # flags, as seen from the folder that all was moved to, and where the teacher and the student are there
    "absolute": ("--data {here}/data --teacher {here}/best.pt --out {here}/student", "best.pt", "student"),
    "through links": ("--data ./link/data --teacher link//linked.pt --out link/student/", "linked.pt", "student"),
    "elsewhere": ("--data data --teacher new/pupil/teacher.pt --out new/pupil", "new/pupil/teacher.pt", "new/pupil"),
}


@pytest.mark.parametrize("case", MOVED)
def test_a_student_goes_on_wherever_it_and_its_teacher_have_moved(halted, uninterrupted, tmp_path, monkeypatch, case):
    flags, teacher, student = MOVED[case]
    here = shutil.copytree(halted, tmp_path / "here")
    (here / "link").symlink_to(here)
    (here / "new").mkdir()
    (here / "student").rename(here / student)
    if teacher == "linked.pt":
        (here / teacher).symlink_to(here / "teacher" / "last.pt")
    else:
        (here / "teacher" / "last.pt").rename(here / teacher)
    monkeypatch.chdir(here)
    succeed(distill, "--resume", *flags.format(here=here).split(), "--workers", 1)
    assert_same_run(here / student, uninterrupted / "distilled")


def test_a_teacher_that_is_gone_is_asked_for(halted, tmp_path):
    here = shutil.copytree(halted, tmp_path / "here")
    content = torch.load(here / "student" / "last.pt", weights_only=True)
    content["training"]["settings"]["teacher"] = str(tmp_path / "gone.pt")
    torch.save(content, here / "student" / "last.pt")
    line = complaint(distill, "--resume", "--out", here / "student")
    assert line.startswith(f"error: --teacher {tmp_path}/gone.pt: no such file; say where the teacher is, or make one")
    other = torch.load(here / "teacher" / "last.pt", weights_only=True)
    other["model"]["backbone.layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(other, here / "other.pt")
    line = complaint(distill, "--resume", "--out", here / "student", "--teacher", here / "other.pt")
    assert f"{here}/other.pt: is not the teacher" in line


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_in_use_is_refused_and_its_run_unharmed(uninterrupted, tmp_path):
    (script, flags), (other, other_flags) = runs(uninterrupted).values()
    out, again = tmp_path / "out", tmp_path / "again"
    for folder in (out, again):
        folder.mkdir()
    (out / "last.pt").write_text("an earlier run's")
    (tmp_path / "link").symlink_to(out)
    refusal = "error: {}: in use by another run; choose another --out\n"

    def change():
        pausing(tmp_path)()
        pausing(again, drawing, "spread_indices", 1)()

    first = Process(tmp_path, script, *flags, "--out", out, change=change)
    first.wait_until((tmp_path / "waits").exists)
    before = listing(out)
    for attempt in ([*flags, "--seed", 9], ["--resume"], [*flags, "--resume"]):
        assert complaint(script, *attempt, "--out", out) == refusal.format(out)
    assert complaint(other, *other_flags, "--out", tmp_path / "link") == refusal.format(tmp_path / "link")
    assert listing(out) == before
    (tmp_path / "go").touch()
    first.wait_until((again / "waits").exists)  # in the middle of its drawings
    assert complaint(script, *flags, "--out", out) == refusal.format(out)
    (again / "go").touch()
    assert first.end()[0] == 0
    assert_same_run(out, uninterrupted / "trained")
    assert sorted(listing(out)) == ["last.1.pt", "last.pt", "log.jsonl", "sheet.jpg"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return draw_rectangles(tmp_path_factory.mktemp("squares") / "data", {"train": 70, "val": 2}, sides=(64, 64))


@pytest.mark.parametrize("workers, room, batch, codes", [
    (0, 2, 16, (0, 2)), (1, 2, 16, (2,)), (2, 14, 16, (0, 2)), (2, 64, 16, (0,)), (1, 64, 64, (0,)),
])  # fmt: skip
def test_too_few_descriptors_are_one_line_and_a_large_batch_needs_few(squares, tmp_path, workers, room, batch, codes):
    def limit():
        least = len(os.listdir("/proc/self/fd")) - 1 + room
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    flags = [*TINY, "--data", squares, "--res", "low", "--batch", batch, "--workers", workers, "--iters", 1]
    code, lines = Process(tmp_path, train, *flags, "--out", tmp_path / "out", change=limit).end()
    expected = "error: too few files may be open at a time: raise the limit (ulimit -n), or try fewer --workers"
    assert code in codes and lines[-1].startswith(expected if code else "next: "), lines
    assert not any("Traceback" in line for line in lines)


WORKERS = {  # what befalls a worker -> the line, and how long a batch is waited for
    "dies": (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "error: a worker died: try fewer --workers", 900),
    "raises": (raising(InputError("7.png: is upside down")), "error: 7.png: is upside down", 900),
    "runs out of memory": (raising(MemoryError()), "error: out of memory: evaluate.py takes", 900),
    "hangs": (lambda *_: time.sleep(10_000), "error: a worker hangs: try fewer --workers", 1),
}


@pytest.mark.parametrize("case", WORKERS)
def test_whatever_befalls_a_worker_ends_the_run_with_its_line(squares, tmp_path, case):
    accident, expected, patience = WORKERS[case]

    def change():
        dataset.read_image, dataset.WORKER_PATIENCE, dataset.SECONDS_MORE = accident, patience, 1

    flags = [*TINY, "--data", squares, "--res", "low", "--workers", 1, "--iters", 3, "--out", tmp_path / "out"]
    code, lines = Process(tmp_path, train, *flags, change=change).end()
    assert code == 2 and lines[-1].startswith(expected) and not any("Traceback" in line for line in lines), lines


SAVING, NOT_SAVING = "stopping after this iteration, then saving ...", "stopping at once; go"


@pytest.mark.parametrize("first, second, step", [
    (SIGINT, None, 6), (SIGINT, None, LENGTH), (SIGTERM, SIGTERM, 6), (SIGINT, SIGINT, 6), (SIGTERM, SIGINT, 6),
])  # fmt: skip
def test_ctrl_c_says_at_once_what_it_will_do_and_does_it(uninterrupted, tmp_path, first, second, step):
    """Another SIGTERM at once, which torchrun sends, is the same request."""
    script, flags = runs(uninterrupted)["trained"]
    out = tmp_path / "out"
    process = Process(tmp_path, script, *flags, "--workers", 1, "--out", out, change=pausing(tmp_path, step=step))
    process.wait_until((tmp_path / "waits").exists)
    before = (out / "last.pt").read_bytes()
    os.killpg(process.id, first)  # a terminal's Ctrl-C and a cluster's SIGTERM reach the workers too
    process.wait_until(lambda: SAVING in process.output.read_text())  # in the middle of an iteration
    assert not (tmp_path / "go").exists() and done(out) == (step - 1) // 4 * 4
    if second:
        os.kill(process.id, second)
    if second == SIGINT:
        code, lines = process.end()
        text = "\n".join(lines)
        assert text.index(SAVING) < text.index(NOT_SAVING) and "Traceback" not in text and "stopped after" not in text
        assert (out / "last.pt").read_bytes() == before
    else:
        (tmp_path / "go").touch()
        code, lines = process.end()
        assert lines[-1] == f"stopped after {step} iterations; go on with: python train.py --resume --out {out}"
        assert done(out) == step and NOT_SAVING not in "\n".join(lines)
    assert code == 130


@pytest.mark.parametrize("place, step, words", [
    ((evaluation, "coco_metrics"), 1, NOT_SAVING), ((checkpoint, "save"), 2, "stopped after 7 iterations; go"),
])  # fmt: skip
def test_sigterm_in_an_evaluation_or_the_save_before_does_not_wait_for_it(uninterrupted, tmp_path, place, step, words):
    script, flags = runs(uninterrupted)["trained"]
    change = pausing(tmp_path, *place, step)
    process = Process(tmp_path, script, *flags, "--workers", 1, "--out", tmp_path / "out", change=change)
    process.wait_until((tmp_path / "waits").exists)
    os.killpg(process.id, SIGTERM)
    process.wait_until(lambda: "stopping" in process.output.read_text())
    (tmp_path / "go").touch()
    code, lines = process.end()
    assert code == 130 and lines[-1] == f"{words} on with: python train.py --resume --out {tmp_path / 'out'}"


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_an_inherited_signal_that_is_ignored_stays_ignored(uninterrupted, tmp_path, number):
    def change():
        dataset.SECONDS_MORE = 1
        signal.signal(number, signal.SIG_IGN)
        pausing(tmp_path, step=2)()

    flags = [*TINY, "--data", uninterrupted / "data", "--res", "low", "--workers", 1, "--out", tmp_path / "out"]
    process = Process(tmp_path, train, *flags, change=change)
    process.wait_until((tmp_path / "waits").exists)
    os.killpg(process.id, number)
    time.sleep(1.5)  # in which a worker that did not ignore it would end
    (tmp_path / "go").touch()
    assert process.end()[0] == 0 and done(tmp_path / "out") == 4


@pytest.mark.parametrize("ear", ["a terminal that closes", "a full disk", "a reader that left", "closed", "ascii"])
def test_a_run_goes_on_whoever_hears_it(uninterrupted, tmp_path, ear):
    out = tmp_path / ("\N{SNOWMAN} \udce9" if ear == "ascii" else "out")

    def change():
        pausing(tmp_path, step=2)()
        if ear == "ascii":
            sys.stdout = open(1, "w", closefd=False, encoding="ascii")
        elif ear == "closed":  # from the start
            sys.stdout = sys.stderr = None
        else:
            reader, writer = os.pipe()
            os.close(reader)
            for number in (1, 2):
                os.dup2(writer if ear == "a reader that left" else os.open("/dev/full", os.O_WRONLY), number)

    flags = [*TINY, "--data", uninterrupted / "data", "--res", "low", "--workers", 1, "--out", out]
    process = Process(tmp_path, train, *flags, change=change)
    if ear == "a terminal that closes":
        process.wait_until((tmp_path / "waits").exists)
        os.killpg(process.id, signal.SIGHUP)
    (tmp_path / "go").touch()
    code, lines = process.end()
    assert code == 0 and done(out) == 4 and (out / "sheet.jpg").exists(), lines
    assert ("\\u2603 \\udce9" in "\n".join(lines)) == (ear == "ascii")


@pytest.mark.parametrize("name, number, works", [
    ("lockf", errno.ENOLCK, True), ("lockf", errno.ENOSYS, True), ("lockf", errno.EOPNOTSUPP, True),
    ("fsync", errno.EINVAL, True), ("fsync", errno.EIO, False),
])  # fmt: skip
def test_without_locks_or_fsync_a_run_works(tmp_path, monkeypatch, capsys, name, number, works):
    monkeypatch.setattr({"lockf": "fcntl.lockf", "fsync": "os.fsync"}[name], raising(OSError(number, "no such thing")))
    with contextlib.nullcontext() if works else pytest.raises(OSError), open_locked(tmp_path / "file") as file:
        sync(file)
    warned = f"warning: {tmp_path}: no locks there (no such thing)" in capsys.readouterr().err
    assert warned == (name == "lockf")


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ..."),
    RuntimeError("[alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),  # another device's
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),  # a convolution
)


def test_memory_that_runs_out_is_known_by_its_words():
    for error in OUT_OF_MEMORY:
        line = processes.explain(error)
        assert "out of memory: evaluate.py takes a smaller --batch, training a larger --accumulate, or, " in line
        assert all(flag in line for flag in ("--out", "--batch", "--short-sides", "--long-side", "--precision bf16"))
    assert processes.explain(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize("name, step", [("trained", 2), ("distilled", 6)])
def test_memory_that_runs_out_is_one_line_with_what_to_do(uninterrupted, tmp_path, monkeypatch, name, step):
    script, flags = runs(uninterrupted)[name]
    losses = iter((step - 1) * [models.Detector.losses] + [raising(OUT_OF_MEMORY[0])])
    monkeypatch.setattr(models.Detector, "losses", lambda *arguments: next(losses)(*arguments))
    line = complaint(script, *flags, "--out", tmp_path)
    assert line.startswith("error: out of memory: ")
    if step < 4:
        assert line.endswith("; there is no checkpoint yet\n") and not (tmp_path / "last.pt").exists()
    else:
        assert line.endswith(f"; go on with: python {script.__name__}.py --resume --out {tmp_path}\n")
        assert done(tmp_path) == 4


def test_a_run_that_was_out_of_memory_goes_on_in_more_parts(uninterrupted, tmp_path, monkeypatch):
    script, flags = runs(uninterrupted)["trained"]
    losses, batches, steps = models.Detector.losses, [], []

    def limited(model, pyramids, outputs, boxes, *more):
        batches.append(len(boxes))
        if len(boxes) == 4 and len(batches) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses(model, pyramids, outputs, boxes, *more)

    monkeypatch.setattr(models.Detector, "losses", limited)
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: steps.append(arguments[3]) or {})
    monkeypatch.setattr(run.Run, "report", lambda *_: None)
    assert "--accumulate" in complaint(script, *flags, "--batch", 4, "--out", tmp_path)
    batches.clear()
    assert "--accumulate 3: must divide" in complaint(script, "--resume", "--accumulate", 3, "--out", tmp_path)
    succeed(script, "--resume", "--accumulate", 2, "--out", tmp_path)
    assert batches == 16 * [2] and steps == [2, 2], "8 iterations; evaluation takes no more at a time"
    assert checkpoint.read(tmp_path / "last.pt")["training"]["settings"]["accumulate"] == 2
