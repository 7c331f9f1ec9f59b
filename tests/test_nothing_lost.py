"""Accidents that must cost nothing but the time since: an evaluation or a drawing that fails, files that moved, two
runs for one folder, too few descriptors, workers and processes that end, Ctrl-C, memory that runs out."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import distill
import evaluate
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import tiny_model
from PIL import Image
from scripts import ROOT, TINY, assert_same_run, call, complaint, runs, succeed
from test_processes import torchrun

from msad import models
from msad.data import dataset
from msad.data.errors import InputError
from msad.engine import checkpoint, drawing, evaluation, processes, run
from msad.engine.files import open_locked, sync, warn

NAMES = ("trained", "distilled")
LOSSES = models.Detector.losses


def done(out):
    return checkpoint.read(out / "last.pt")["training"]["done"]


def command(script, out):
    return f"python {script.__name__}.py --resume --out {out}"


def entries(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


RUNNING = []


class Process:
    """A script in a fork of this process, which is there at once; what it writes goes to a file.

    It leads a group with its workers. `change` is called in it before the script.
    """

    def __init__(self, folder, script, *flags, change=lambda: None, **environment):
        self.output = Path(folder) / "output"
        self.output.touch()
        self.ended = False
        self.id = os.fork()
        if self.id == 0:
            self.work(script, flags, change, environment)
        RUNNING.append(self)

    def work(self, script, flags, change, environment):
        code = 99
        try:
            os.setsid()
            file = os.open(self.output, os.O_WRONLY | os.O_APPEND)
            for number in (1, 2):
                os.dup2(file, number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ.update(environment)
            sys.argv = [f"{script.__name__}.py", *map(str, flags)]
            change()
            processes.run_script(script.main)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_until(self, happened, patience=60):
        """Until something happened; an error if the process ends before, or after some patience."""
        limit = time.monotonic() + patience
        while not happened():
            assert time.monotonic() < limit, f"it hangs: {self.output.read_text()}"
            assert os.waitid(os.P_PID, self.id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, self.output.read_text()
            time.sleep(0.005)

    def end(self, patience=120):
        """Its exit code and the lines it wrote. A process that hangs is killed after some patience."""
        limit = time.monotonic() + patience
        while not (found := os.waitpid(self.id, os.WNOHANG))[0]:
            assert time.monotonic() < limit, f"it hangs: {self.output.read_text()}"
            time.sleep(0.005)
        self.ended = True
        return os.waitstatus_to_exitcode(found[1]), self.output.read_text().splitlines()

    def kill(self):
        """End it at once, but not its workers, which would notice some seconds later."""
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        self.ended = True

    def clean_up(self):
        """End it and its workers, if any of them still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.id, signal.SIGKILL)
        if not self.ended:
            os.waitpid(self.id, 0)


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while RUNNING:
        RUNNING.pop().clean_up()


def pausing(folder, step=6):
    """Losses that, in a step, wait until the file `go` is in a folder, and say so by a file `waits`."""
    steps = []

    def losses(*arguments):
        steps.append(None)
        if len(steps) == step:
            (folder / "waits").touch()
            while not (folder / "go").exists():
                time.sleep(0.005)
        return LOSSES(*arguments)

    def change():
        models.Detector.losses = losses

    return change


# An evaluation or a drawing that fails.


def raising(error):
    """What takes anything and raises an error."""

    def fail(*_, **__):
        raise error

    return fail


ERRORS = {
    "a bad picture": None,
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "another": ZeroDivisionError("a fault of the program"),
}


@pytest.mark.parametrize("name, save_every, error", [
    ("trained", 13, "a bad picture"), ("trained", 20, "memory"), ("distilled", 4, "another"),
])  # fmt: skip
def test_an_evaluation_that_fails_costs_nothing(uninterrupted, tmp_path, monkeypatch, name, save_every, error):
    script, flags = runs(uninterrupted)[name]
    out, mended = tmp_path / "out", {}
    flags = [*flags, "--save-every", save_every, "--out", out]
    resume = ["--resume", "--out", out]
    if error == "a bad picture":
        shutil.copytree(uninterrupted / "data", tmp_path / "data")
        flags += ["--data", tmp_path / "data"]
        for path in (tmp_path / "data" / "val").iterdir():
            mended[path] = path.read_bytes()
            path.write_bytes(mended[path][:-300])
    with monkeypatch.context() as patch:
        if not mended:
            patch.setattr(run, "evaluate_all", raising(ERRORS[error]))
        for flags in (flags, resume):  # fails once, and once more where the run goes on
            if error == "another":
                with pytest.raises(ZeroDivisionError):
                    call(script, *flags)
            else:
                line = complaint(script, *flags)
                assert ("out of memory" if error == "memory" else "val/0.png: not readable") in line
                assert (error == "memory") == line.endswith(f"; go on with: {command(script, out)}\n")
            assert done(out) == 13 and [e["iteration"] for e in entries(out)] == list(range(13))
    for path, content in mended.items():
        path.write_bytes(content)
    succeed(script, *resume)
    assert_same_run(out, uninterrupted / name)


def test_a_last_evaluation_that_fails_costs_nothing(uninterrupted, tmp_path, monkeypatch):
    script, flags = runs(uninterrupted)["trained"]
    with monkeypatch.context() as patch:
        evaluations = iter((run.evaluate_all, raising(MemoryError())))
        patch.setattr(run, "evaluate_all", lambda *arguments: next(evaluations)(*arguments))
        line = complaint(script, *flags, "--out", tmp_path)
    assert "out of memory" in line and line.endswith(f"; go on with: {command(script, tmp_path)}\n")
    assert done(tmp_path) == 20
    assert "low @ low" in succeed(script, "--resume", "--out", tmp_path)
    assert_same_run(tmp_path, uninterrupted / "trained")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a checkpoint, and photos whose names are all that a file system allows."""
    home = tmp_path_factory.mktemp("photos")
    checkpoint.save(home / "model.pt", tiny_model("low"))
    names = ["a.png", "雪" * 83 + ".png", "x" * 251 + ".png", "b%20c.png", "new\nline.png", "a.b.png", "c.png"]
    (home / "photos").mkdir()
    for name in names:
        Image.new("RGB", (80, 60), (200, 90, 30)).save(home / "photos" / name)
    return home


LOOK = ["--draw", "--threshold", 0, "--device", "cpu", "--precision", "fp32"]


def test_a_name_as_long_as_a_file_system_allows_is_drawn_too(photos, tmp_path):
    succeed(evaluate, "--ckpt", photos / "model.pt", "--images", photos / "photos", "--out", tmp_path, *LOOK)
    names = {path.name for path in (photos / "photos").iterdir()}
    assert len(list(tmp_path.glob("*.jpg"))) == len(names) == 7
    assert {e["image_id"] for e in json.loads((tmp_path / "detections.json").read_text())} == names


def interrupted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


ENDS = {
    "Ctrl-C": (raising(KeyboardInterrupt()), 130),
    "SIGTERM": (interrupted, 130),
    "memory": (raising(torch.OutOfMemoryError("CUDA out of memory.")), 2),
    "a fault of the program": (raising(ZeroDivisionError()), None),
}


@pytest.mark.parametrize("case", ENDS)
def test_whatever_ends_it_what_was_found_until_then_is_written(photos, tmp_path, monkeypatch, case):
    accident, expected = ENDS[case]
    detect_all, calls = drawing.detect_all, []

    def third_time(*arguments):
        calls.append(None)
        return accident() if len(calls) == 3 else detect_all(*arguments)

    monkeypatch.setattr(drawing, "detect_all", third_time)
    flags = ["--ckpt", photos / "model.pt", "--images", photos / "photos", "--out", tmp_path, *LOOK]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if expected:
            assert call(evaluate, *flags)[0] == expected
        else:
            with pytest.raises(ZeroDivisionError):
                call(evaluate, *flags)
    finally:
        signal.signal(signal.SIGTERM, handler)
    names = sorted(path.name for path in (photos / "photos").iterdir())
    assert {e["image_id"] for e in json.loads((tmp_path / "detections.json").read_text())} == set(names[:2])


def test_names_that_are_no_utf_8_are_drawn_written_and_told(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    names = sorted(map(os.fsdecode, (b"caf\xe9.png", b"\xff\xfe.png", b"\xe9" * 251 + b".png")))
    for name in names:
        shutil.copy(photos / "photos" / "a.png", folder / name)
    (folder / os.fsdecode(b"no \xe9")).write_text("hello")
    code, printed, complained = call(
        evaluate, "--ckpt", photos / "model.pt", "--images", folder, "--out", tmp_path / "out", *LOOK
    )
    assert code == 0 and len(list((tmp_path / "out").glob("*.jpg"))) == 3
    assert complained.startswith(f"left out: {folder}/no ") and "left out: 1 of 4 files" in complained
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert sorted({entry["image_id"] for entry in results}) == names


def test_results_on_a_data_set_are_written_before_anything_is_drawn(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "compare", raising(OSError("no")))
    checkpoint.save(tmp_path / "model.pt", tiny_model("low"))
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["config"]["classes"] = checkpoint.read(uninterrupted / "trained" / "last.pt")["config"].classes
    torch.save(content, tmp_path / "model.pt")
    flags = ["--ckpt", tmp_path / "model.pt", "--data", uninterrupted / "data", *LOOK]
    with contextlib.suppress(OSError):
        call(evaluate, *flags, "--json", tmp_path / "a.json", "--detections", tmp_path / "found.json")
    assert json.loads((tmp_path / "a.json").read_text())["low"] and json.loads((tmp_path / "found.json").read_text())


# Files that moved.


@pytest.fixture(scope="module")
def halted(uninterrupted, tmp_path_factory):
    """A data set, a teacher and its student, which stopped after 12 iterations, in one folder."""
    home = tmp_path_factory.mktemp("halted")
    for name in ("data", "teacher"):
        shutil.copytree(uninterrupted / name, home / name)
    script, flags = runs(home)["distilled"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_all", raising(MemoryError()))
        complaint(script, *flags, "--eval-every", 12, "--out", home / "student")
    content = torch.load(home / "student" / "last.pt", weights_only=True)
    content["training"]["settings"]["eval_every"] = 13  # as in the run that was not interrupted
    torch.save(content, home / "student" / "last.pt")
    assert done(home / "student") == 12
    return home


MOVED = {  # flags, as seen from the folder that all was moved to
    "absolute": "--data {here}/data --teacher {here}/teacher/last.pt --out {here}/student",
    "relative": "--data ./teacher/../data --teacher teacher//last.pt --out student/",
    "through links": "--data {here}/link/data --teacher link/linked.pt --out link/student",
    "a new name for the teacher's file": "--data data --teacher best.pt --out student",
    "the teacher beside the student": "--data data --teacher student/teacher.pt --out student",
    "a new name for the student": "--data data --teacher teacher/last.pt --out elsewhere/student",
}


@pytest.mark.parametrize("case", MOVED)
def test_a_student_goes_on_wherever_it_and_its_teacher_have_moved(halted, uninterrupted, tmp_path, monkeypatch, case):
    here = shutil.copytree(halted, tmp_path / "here")
    (here / "link").symlink_to(here)
    (here / "linked.pt").symlink_to(here / "teacher" / "last.pt")
    if "teacher's file" in case:
        (here / "teacher" / "last.pt").rename(here / "best.pt")
    if "beside" in case:
        (here / "teacher" / "last.pt").rename(here / "student" / "teacher.pt")
    if "new name for the student" in case:
        (here / "elsewhere").mkdir()
        (here / "student").rename(here / "elsewhere" / "student")
    monkeypatch.chdir(here)
    flags = MOVED[case].format(here=here).split()
    succeed(distill, "--resume", *flags, "--workers", 1)
    assert_same_run(Path(flags[-1]), uninterrupted / "distilled")


def test_a_teacher_that_is_gone_is_asked_for(halted, tmp_path):
    here = shutil.copytree(halted, tmp_path / "here")
    content = torch.load(here / "student" / "last.pt", weights_only=True)
    content["training"]["settings"]["teacher"] = str(tmp_path / "gone.pt")
    torch.save(content, here / "student" / "last.pt")
    line = complaint(distill, "--resume", "--out", here / "student")
    assert line == f"error: --teacher {tmp_path}/gone.pt: no such file; say where the teacher is, or make one with train.py\n"
    other = [*TINY, "--data", here / "data", "--seed", 3, "--iters", 1, "--out", here / "other"]
    succeed(train, *other)
    line = complaint(distill, "--resume", "--out", here / "student", "--teacher", here / "other" / "last.pt")
    assert f"{here}/other/last.pt: is not the teacher" in line


def test_weights_from_a_file_are_needed_at_the_start_alone(uninterrupted, tmp_path, monkeypatch):
    weights = tmp_path / "first" / "backbone.pt"
    weights.parent.mkdir()
    torch.save(checkpoint.load(uninterrupted / "trained" / "last.pt").backbone.state_dict(), weights)
    script, flags = runs(uninterrupted)["trained"]
    flags = [*flags, "--weights", weights, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_all", raising(MemoryError()))
        complaint(script, *flags, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    weights.parent.rename(tmp_path / "second")
    assert "--weights none" in complaint(script, "--resume", "--out", tmp_path / "a", "--weights", "none")
    succeed(script, "--resume", "--out", tmp_path / "a")
    succeed(script, "--resume", "--out", tmp_path / "b", "--weights", tmp_path / "second" / "backbone.pt")
    assert_same_run(tmp_path / "a", tmp_path / "b")


# Two runs for one folder.


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_in_use_is_refused_and_its_run_unharmed(uninterrupted, tmp_path):
    script, flags = runs(uninterrupted)["trained"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text("an earlier run's")
    first = Process(tmp_path, script, *flags, "--out", out, change=pausing(tmp_path))
    first.wait_until((tmp_path / "waits").exists)
    before = listing(out)
    others = [runs(uninterrupted)[other] for other in NAMES]
    attempts = [[*others[0], "--seed", 9], [*others[1]], [script, [], "--resume"], [script, flags, "--resume"]]
    for other, its_flags, *more in attempts:
        line = complaint(other, *its_flags, *more, "--out", out)
        assert line == f"error: {out}: in use by another run; choose another --out\n"
    assert listing(out) == before
    (tmp_path / "link").symlink_to(out)
    assert "in use by another run" in complaint(script, *flags, "--out", tmp_path / "link")
    (tmp_path / "go").touch()
    assert first.end()[0] == 0
    assert_same_run(out, uninterrupted / "trained")
    assert sorted(listing(out)) == ["curve.png", "last.pt", "log.1.jsonl", "log.jsonl", "sheet.jpg"]


def test_a_folder_is_in_use_while_its_log_is_drawn(uninterrupted, tmp_path):
    script, flags = runs(uninterrupted)["trained"]
    sheet, out = drawing.sheet, tmp_path / "out"

    def change():
        def draw(*arguments):
            assert (out / "curve.png").exists()
            (tmp_path / "waits").touch()
            while not (tmp_path / "go").exists():
                time.sleep(0.005)
            return sheet(*arguments)

        drawing.sheet = draw

    process = Process(tmp_path, script, *flags, "--out", out, change=change)
    process.wait_until((tmp_path / "waits").exists)
    assert "in use by another run" in complaint(script, *flags, "--out", out)
    (tmp_path / "go").touch()
    assert process.end()[0] == 0 and (out / "sheet.jpg").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_ended_in_any_way_leaves_its_folder_to_the_next_at_once(uninterrupted, tmp_path, number):
    script, flags = runs(uninterrupted)["trained"]
    out = tmp_path / "out"
    flags = [*flags, "--workers", 2, "--out", out]
    first = Process(tmp_path, script, *flags, change=pausing(tmp_path))
    first.wait_until((tmp_path / "waits").exists)
    if number == signal.SIGKILL:
        first.kill()
    else:
        os.kill(first.id, number)
        (tmp_path / "go").touch()
        assert first.end()[0] == 130
    assert done(out) in (4, 6)
    succeed(script, *flags, "--resume", "--workers", 0)
    assert_same_run(out, uninterrupted / "trained")


# Workers.


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return draw_rectangles(tmp_path_factory.mktemp("squares") / "data", {"train": 70, "val": 2}, sides=(64, 64))


def test_a_batch_needs_few_file_descriptors(squares, tmp_path):
    def limit():
        room = len(os.listdir("/proc/self/fd")) + 63
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    flags = [*TINY, "--data", squares, "--res", "low", "--batch", 64, "--workers", 1, "--iters", 3, "--eval-every", 3]
    flags += ["--out", tmp_path / "out"]
    code, lines = Process(tmp_path, train, *flags, change=limit).end()
    assert code == 0 and done(tmp_path / "out") == 3, lines


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_too_few_file_descriptors_are_one_line_at_once(squares, tmp_path, workers):
    """However few, the run ends well or with its line."""
    codes = []
    for room in (2, 14, 64):

        def limit():
            least = len(os.listdir("/proc/self/fd")) - 1 + room
            resource.setrlimit(resource.RLIMIT_NOFILE, (least, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

        (folder := tmp_path / str(room)).mkdir()
        flags = [*TINY, "--data", squares, "--res", "low", "--batch", 16, "--workers", workers, "--iters", 1]
        code, lines = Process(folder, train, *flags, "--out", folder / "out", change=limit).end(60)
        codes.append(code)
        assert not any("Traceback" in line for line in lines), "\n".join(lines)
        expected = "error: too few files may be open at a time: raise the limit (ulimit -n), or try fewer --workers"
        assert code == 0 and "next:" in lines[-1] or code == 2 and lines[-1].startswith(expected), (room, lines)
    assert codes[-1] == 0 and (codes[0] == 2 or workers == 0)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_input_error(path, *_):
    raise InputError(f"{path}: is upside down")


def raise_memory_error(*_):
    raise MemoryError("no memory for a picture")


def sleep_for_ever(*_):
    time.sleep(10_000)


WORKERS = {  # what befalls a worker -> the line, and how long a batch is waited for
    "dies": (die, "error: a worker died: try fewer --workers", 900),
    "raises": (raise_input_error, ".png: is upside down", 900),
    "runs out of memory": (raise_memory_error, "error: out of memory: try a larger --accumulate", 900),
    "hangs": (sleep_for_ever, "error: a worker hangs: try fewer --workers", 1),
}


@pytest.mark.parametrize("case", WORKERS)
def test_whatever_befalls_a_worker_ends_the_run_with_its_line(squares, tmp_path, case):
    accident, expected, patience = WORKERS[case]

    def change():
        dataset.read_image, dataset.PATIENCE = accident, patience

    flags = [*TINY, "--data", squares, "--res", "low", "--workers", 1, "--iters", 3, "--out", tmp_path / "out"]
    code, lines = Process(tmp_path, train, *flags, change=change).end()
    assert code == 2 and expected in lines[-1] and lines[-1].startswith("error: "), lines
    assert not any("Traceback" in line for line in lines)


# One of several processes fails.


def free_port():
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        return open_socket.getsockname()[1]


def wait_for_the_others():
    """What closing a group of processes may do: NCCL's waits for all of them."""
    time.sleep(10_000)


def two_processes(folder, failing_rank):
    """Flags of a run of two processes, one of which meets a damaged picture in its part of the validation set."""
    draw_rectangles(folder / "data", {"train": 4, "val": 4}, sides=(64, 64))
    path = folder / "data" / "val" / f"{2 * failing_rank}.png"  # each has two of the four
    path.write_bytes(path.read_bytes()[:-300])
    return [*TINY, "--data", folder / "data", "--res", "low", "--batch", 4, "--out", folder / "out"]


@pytest.mark.parametrize("failing_rank, fault", [(0, "a picture"), (1, "a picture"), (0, "the folder")])
def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path, failing_rank, fault):
    flags = two_processes(tmp_path, failing_rank)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    expected = f"val/{2 * failing_rank}.png: not readable as an image"
    if fault == "the folder":
        (tmp_path / "out").mkdir()
        log = open_locked(tmp_path / "out" / "log.jsonl")  # as another run does
        expected = f"error: {tmp_path}/out: in use by another run; choose another --out"

    def change():
        torch.distributed.destroy_process_group = wait_for_the_others

    both = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        both.append(Process(tmp_path / str(rank), train, *flags, change=change, RANK=str(rank), **environment))
    code, lines = both[failing_rank].end(60)
    assert code == 2 and expected in lines[-1], "\n".join(lines)
    code, lines = both[1 - failing_rank].end(60)
    assert code == 2 and lines[-1].startswith("error: another process of this run has ended, and says why"), lines
    assert not any("Traceback" in line for line in lines)
    if fault == "the folder":
        log.close()


def test_torchrun_ends_a_job_at_once_when_one_process_fails(tmp_path):
    job = torchrun(train.__file__, *two_processes(tmp_path, 1), cwd=tmp_path)
    _, complained = job.communicate(timeout=60)
    assert job.returncode != 0 and "val/2.png: not readable as an image" in complained
    assert done(tmp_path / "out") == 2, "saved before the evaluation"


def test_rank_without_the_rest_of_torchrun_s_environment_is_one_line(uninterrupted, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    line = complaint(evaluate, "--ckpt", uninterrupted / "trained" / "last.pt")
    assert line.startswith("error: RANK is set: but the other processes cannot be joined (") and "WORLD_SIZE" in line


# Ctrl-C.

SAVING, NOT_SAVING = "stopping after this iteration, then saving ...", "stopping without saving"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_says_at_once_what_it_will_do(uninterrupted, tmp_path, number):
    script, flags = runs(uninterrupted)["trained"]
    out = tmp_path / "out"
    process = Process(tmp_path, script, *flags, "--workers", 1, "--out", out, change=pausing(tmp_path))
    process.wait_until((tmp_path / "waits").exists)
    os.killpg(process.id, number)  # a terminal's Ctrl-C and a cluster's SIGTERM reach the workers too
    process.wait_until(lambda: SAVING in process.output.read_text())  # in the middle of an iteration
    assert not (tmp_path / "go").exists() and done(out) == 4
    (tmp_path / "go").touch()
    code, lines = process.end()
    command = f"go on with: python train.py --resume --out {out}"
    assert code == 130 and lines[-1] == f"stopped after 6 iterations; {command}" and done(out) == 6


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_ctrl_c_says_that_it_does_not_save_and_ends_the_run(uninterrupted, tmp_path, first, second):
    script, flags = runs(uninterrupted)["trained"]
    out = tmp_path / "out"
    process = Process(tmp_path, script, *flags, "--workers", 1, "--out", out, change=pausing(tmp_path))
    process.wait_until((tmp_path / "waits").exists)
    before = (out / "last.pt").read_bytes()
    for number, line in ((first, SAVING), (second, NOT_SAVING)):
        os.kill(process.id, number)
        process.wait_until(lambda: line in process.output.read_text())
    code, lines = process.end()
    text = "\n".join(lines)
    assert code == 130 and text.index(SAVING) < text.index(NOT_SAVING) and "Traceback" not in text
    assert (out / "last.pt").read_bytes() == before and "stopped after" not in text


def test_another_sigterm_at_once_is_the_same_request(uninterrupted, tmp_path):
    script, flags = runs(uninterrupted)["trained"]
    process = Process(tmp_path, script, *flags, "--out", tmp_path / "out", change=pausing(tmp_path))
    process.wait_until((tmp_path / "waits").exists)
    os.kill(process.id, signal.SIGTERM)
    process.wait_until(lambda: SAVING in process.output.read_text())
    os.kill(process.id, signal.SIGTERM)
    (tmp_path / "go").touch()
    code, lines = process.end()
    assert code == 130 and done(tmp_path / "out") == 6 and NOT_SAVING not in "\n".join(lines)


def test_an_inherited_signal_that_is_ignored_stays_ignored(uninterrupted, tmp_path):
    script, flags = runs(uninterrupted)["trained"]

    def change():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pausing(tmp_path)()

    process = Process(tmp_path, script, *flags, "--out", tmp_path / "out", change=change)
    process.wait_until((tmp_path / "waits").exists)
    os.kill(process.id, signal.SIGINT)
    (tmp_path / "go").touch()
    assert process.end()[0] == 0 and done(tmp_path / "out") == 20


# Words that nobody hears.


@pytest.mark.parametrize("ear", ["a full disk", "a reader that left", "closed from the start", "ascii"])
def test_a_run_goes_on_whoever_hears_it(uninterrupted, tmp_path, ear):
    script, flags = runs(uninterrupted)["trained"]
    out = tmp_path / ("\N{SNOWMAN} \udce9" if ear == "ascii" else "out")

    def change():
        if ear == "ascii":
            sys.stdout = open(1, "w", closefd=False, encoding="ascii")
        elif ear == "closed from the start":
            sys.stdout = sys.stderr = None
        else:
            reader, writer = os.pipe()
            os.close(reader)
            for number in (1, 2):
                os.dup2(writer if ear == "a reader that left" else os.open("/dev/full", os.O_WRONLY), number)

    code, lines = Process(tmp_path, script, *flags, "--out", out, change=change).end()
    assert code == 0 and (out / "sheet.jpg").exists(), lines
    assert_same_run(out, uninterrupted / "trained")
    if ear == "ascii":
        assert "\\u2603 \\udce9" in "\n".join(lines)


# File systems that cannot do everything.


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_works_and_says_so_once(tmp_path, monkeypatch, capsys, number):
    warn.cache_clear()
    monkeypatch.setattr("fcntl.lockf", raising(OSError(number, os.strerror(number))))
    for _ in range(2):
        open_locked(tmp_path / "log.jsonl").close()
    assert capsys.readouterr().err.count(f"warning: {tmp_path}: no locks there ({os.strerror(number)})") == 1


@pytest.mark.parametrize("number, works", [(errno.EINVAL, True), (errno.EIO, False)])
def test_without_fsync_a_run_saves_and_says_so_once(tmp_path, monkeypatch, capsys, number, works):
    warn.cache_clear()
    monkeypatch.setattr(os, "fsync", raising(OSError(number, os.strerror(number))))
    with open(tmp_path / "file", "wb") as file:
        for _ in range(2):
            with contextlib.nullcontext() if works else pytest.raises(OSError):
                sync(file)
    assert capsys.readouterr().err.count(f"warning: {tmp_path}: no fsync there") == works


def test_a_process_that_ends_while_its_readers_live_ends_with_them(tmp_path):
    draw_rectangles(tmp_path / "data", {"train": 8})
    code = """if True:
        import builtins, sys, torch
        from msad.data import annotations, dataset
        dataset.SECONDS_MORE = 1
        read = dataset.CocoDataset(annotations.read(sys.argv[1], "train"), (64,), 128)
        batches = iter(dataset.loader(read, dataset.eval_batches(read, 2, 64, 0, 1), 64, 2, torch.device("cpu")))
        builtins.kept = next(batches), batches  # so that nothing closes it in order
    """
    command = [sys.executable, "-c", code, tmp_path / "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# Memory that runs out.

OUT_OF_MEMORY = {
    "of a device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ..."),
    "of PyTorch's on a CPU": RuntimeError("[alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "of Python's": MemoryError(),
    "of a device, another one's": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    "of a library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "of a convolution": RuntimeError("GET was unable to find an engine to execute this computation"),
}


@pytest.mark.parametrize("name, step, case", [
    ("distilled", 6, "of a device"), ("trained", 2, "of a device"),
    *(("trained", 6, case) for case in list(OUT_OF_MEMORY)[1:]),
])  # fmt: skip
def test_memory_that_runs_out_is_one_line_with_what_helps(uninterrupted, tmp_path, monkeypatch, name, step, case):
    script, flags = runs(uninterrupted)[name]
    out, steps = tmp_path / "out", []

    def losses(*arguments):
        steps.append(None)
        if len(steps) == step:
            raise OUT_OF_MEMORY[case]
        return LOSSES(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(models.Detector, "losses", losses)
        line = complaint(script, *flags, "--out", out)
    assert line.startswith("error: out of memory: ")
    assert "a larger --accumulate, which --resume takes" in line
    new = line.partition("with a new --out")[2]
    assert all(flag in new for flag in ("--batch", "--short-sides", "--long-side", "--precision bf16"))
    if step < 4:
        assert line.endswith("; there is no checkpoint yet\n") and not (out / "last.pt").exists()
    else:
        assert line.endswith(f"; go on with: python {script.__name__}.py --resume --out {out}\n") and done(out) == 4


def test_a_run_that_was_out_of_memory_goes_on_in_more_parts(uninterrupted, tmp_path, monkeypatch):
    script, flags = runs(uninterrupted)["trained"]
    batches, steps = [], []

    def losses(model, pyramids, outputs, boxes, *more):
        batches.append(len(boxes))
        if len(boxes) == 4 and len(batches) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return LOSSES(model, pyramids, outputs, boxes, *more)

    monkeypatch.setattr(models.Detector, "losses", losses)
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: steps.append(arguments[3]) or {})
    monkeypatch.setattr(run.Run, "report", lambda *_: None)
    assert "--accumulate" in complaint(script, *flags, "--batch", 4, "--out", tmp_path)
    batches.clear()
    assert "--accumulate 3: must divide" in complaint(script, "--resume", "--accumulate", 3, "--out", tmp_path)
    code, _, complained = call(script, "--resume", "--accumulate", 2, "--out", tmp_path)
    assert code == 0, complained
    assert batches == 32 * [2] and steps == [2, 2], "16 iterations; evaluation takes no more at a time"
    assert checkpoint.read(tmp_path / "last.pt")["training"]["settings"]["accumulate"] == 2


def test_memory_that_runs_out_in_evaluate_is_one_line(uninterrupted, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", raising(OUT_OF_MEMORY["of a device"]))
    line = complaint(evaluate, "--ckpt", uninterrupted / "trained" / "last.pt", "--device", "cpu")
    assert line.startswith("error: out of memory: ")


def test_another_error_is_no_lack_of_memory(uninterrupted, tmp_path, monkeypatch):
    script, flags = runs(uninterrupted)["trained"]
    monkeypatch.setattr(models.Detector, "losses", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        call(script, *flags, "--out", tmp_path)
