"""What a user can get wrong on the command line: exit code 2 and one line that names it, never a traceback."""

import multiprocessing
import shutil
import subprocess
import sys

import distill
import evaluate
import pytest
import train
from folders import annotation_path, draw_rectangles
from scripts import TINY, call, complaint, succeed

DATA_ERRORS = {
    "no such folder": (["--data", "{home}/nothing"], "{home}/nothing/train/_annotations.coco.json; say with --data"),
    "out is a file": (["--out", "{home}/file"], "{home}/file"),
    "out is below a file": (["--out", "{home}/file/out"], "/file/out: cannot be written ("),
    "weights are not there": (["--weights", "{home}/nothing"], "{home}/nothing: no such file"),
    "weights are no tensors": (["--weights", "{home}/file"], "{home}/file"),
    "device is not there": (["--device", "warp"], "--device warp"),
}

FLAG_ERRORS = (
    "--nonsense", "--resu", "--res sideways", "--width 0.3", "--iters many", "--iters 0", "--batch -2", "--seed -1",
    "--seed 12345678901234567890", "--lr nan", "--lr -1", "--pad 100", "--pad 0", "--head-channels 40", "--short-sides",
    "--short-sides 0", "--object-scale 0", "--no-align --res low",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small data set, a teacher, a student, and a file that is none of these."""
    home = tmp_path_factory.mktemp("home")
    draw_rectangles(home / "data", {"train": 6, "val": 2})
    short = [*TINY, "--data", home / "data", "--iters", 1]
    succeed(train, *short, "--out", home / "teacher")
    succeed(distill, *short, "--out", home / "student", "--teacher", home / "teacher" / "last.pt")
    (home / "file").write_text("hello")
    return home


@pytest.mark.parametrize("case", DATA_ERRORS)
def test_things_that_are_not_where_they_should_be(home, case):
    flags, expected = DATA_ERRORS[case]
    flags = [flag.format(home=home) for flag in flags]
    line = complaint(train, *TINY, "--data", home / "data", "--out", home / "out", *flags)
    assert expected.format(home=home) in line


@pytest.mark.parametrize("flags", FLAG_ERRORS)
def test_values_no_run_can_be_made_of(home, flags):
    line = complaint(train, *TINY, "--data", home / "data", "--out", home / "out", *flags.split())
    assert flags.split()[0] in line


def test_a_place_where_the_shapes_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file in the way")
    assert complaint(train, *TINY).startswith("error: data/shapes: cannot be written")


def test_distilling_needs_a_teacher_that_fits(home, tmp_path):
    flags = [*TINY, "--data", home / "data", "--out", tmp_path / "out"]
    teacher = home / "teacher" / "last.pt"
    mistakes = {
        "--teacher CKPT: no such file; say where the teacher is": [],
        f"--teacher {home}/none.pt: no such file": ["--teacher", home / "none.pt"],
        f"{home}/file": ["--teacher", home / "file"],
        "not a teacher": ["--teacher", home / "student" / "last.pt"],
        "--fpn-channels": ["--teacher", teacher, "--fpn-channels", 64],
        "--kd-ramp -5": ["--teacher", teacher, "--kd-ramp", -5],
        "--kd -1.0": ["--teacher", teacher, "--kd", -1],
        "the teacher is in there as last.pt": ["--teacher", teacher, "--out", home / "teacher"],
    }
    before = teacher.read_bytes()
    for expected, mistake in mistakes.items():
        assert expected in complaint(distill, *flags, *mistake)
    assert not list(tmp_path.glob("out/*.pt")) and teacher.read_bytes() == before


def test_evaluation_needs_a_checkpoint_a_branch_and_a_place(home):
    student, data = ["--ckpt", home / "student" / "last.pt"], ["--data", home / "data"]
    for folder in (home / "empty", home / "student" / "found"):
        folder.mkdir()
    mistakes = {
        "--ckpt": data,
        f"{home}/none: no such file": [*data, "--ckpt", home / "none"],
        "--res fused": [*data, *student, "--res", "fused"],
        "--batch": [*data, *student, "--batch", 0],
        "--workers": [*data, *student, "--workers", -1],
        "say with --data where": [*student, "--data", home / "none"],
        "instances_val*.json: no such file": [*student, "--data", home / "empty"],
        "--device warp": [*data, *student, "--device", "warp"],
        "--out": [*student, "--images", home / "student" / "found"],
    }
    for expected, flags in mistakes.items():
        assert expected in complaint(evaluate, *flags)
    assert not list((home / "student" / "found").iterdir())


@pytest.fixture
def other_data(home, tmp_path):
    """A copy of the data set, to be spoilt."""
    return shutil.copytree(home / "data", tmp_path / "data")


def test_classes_must_be_the_same_everywhere(home, other_data, tmp_path):
    flags = ["--data", other_data, "--out", tmp_path / "out"]
    for split in ("val", "train"):
        path = annotation_path(other_data, split)
        path.write_text(path.read_text().replace('"green"', '"violet"'))
        if split == "val":
            assert "7 violet" in complaint(train, *TINY, *flags)
    taught = complaint(distill, *TINY, *flags, "--teacher", home / "teacher" / "last.pt")
    evaluated = complaint(evaluate, "--ckpt", home / "student" / "last.pt", "--data", other_data)
    for line in (taught, evaluated):
        assert "7 violet" in line and "7 green" in line and "last.pt" in line


@pytest.mark.parametrize("workers, split", [(0, "val"), (2, "train"), (2, "val")])
def test_a_picture_that_cannot_be_read_stops_the_run_by_name(other_data, tmp_path, workers, split):
    for path in (other_data / split).iterdir():
        path.write_bytes(path.read_bytes()[:100])
    before = set(multiprocessing.active_children())
    line = complaint(train, *TINY, "--data", other_data, "--out", tmp_path / "out", "--workers", workers)
    assert line.startswith(f"error: {other_data / split}/") and "readable as an image" in line
    assert set(multiprocessing.active_children()) <= before  # else the script would wait for them at its end


def test_a_process_of_its_own_says_the_same_and_help_is_no_error(home, tmp_path):
    command = [sys.executable, distill.__file__, "--teacher", home / "none.pt"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    line = f"error: --teacher {home}/none.pt: no such file; say where the teacher is, or make one with train.py\n"
    assert (process.returncode, process.stdout, process.stderr) == (2, "", line)
    assert list(tmp_path.iterdir()) == []
    for script in (train, distill, evaluate):
        code, printed, complained = call(script, "--help")
        assert code == 0 and complained == "" and "--data" in printed and "--device" in printed
