"""What a user can get wrong on the command line: exit code 2 and one line that names it, never a traceback."""

import json
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

from msad.data.errors import InputError

DATA_ERRORS = {
    "no such folder": (["--data", "{home}/nothing"], "{home}/nothing/train/_annotations.coco.json; say with --data"),
    "out is a file": (["--out", "{home}/file"], "{home}/file"),
    "out is below a file": (["--out", "{home}/file/out"], "/file/out: cannot be written ("),
    "weights are not there": (["--weights", "{home}/nothing"], "{home}/nothing: no such file"),
    "weights are no tensors": (["--weights", "{home}/file"], "{home}/file"),
    "device is not there": (["--device", "warp"], "--device warp"),
}

FLAG_ERRORS = (
    "--nonsense", "--resu", "--res sideways", "--head ssd", "--backbone vgg", "--width 0.3", "--precision fp16",
    "--recipe huge", "--iters many", "--iters 0", "--batch 0", "--batch -2", "--seed -1", "--workers -1", "--lr nan",
    "--lr -1", "--pad 100", "--pad 0", "--head-channels 40", "--head-convs 0", "--fpn-channels 0", "--short-sides",
    "--short-sides 0", "--long-side 0", "--test-side 0", "--save-every 0", "--eval-every 0", "--log-every 0",
    "--object-scale 0", "--no-align --res low",
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


def test_a_batch_too_small_for_batchnorm(tmp_path):
    squares = draw_rectangles(tmp_path / "data", {"train": 2, "val": 1}, sides=(64, 64))
    flags = [*TINY, "--data", squares, "--out", tmp_path / "out", "--short-sides", 64, "--batch", 1]
    assert "one image of one cell is too little" in complaint(train, *flags)
    succeed(train, *flags, "--res", "high")


def test_a_place_where_the_shapes_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file in the way")
    assert complaint(train, *TINY).startswith("error: data/shapes: cannot be written")


def test_distilling_needs_a_teacher_that_fits(home, tmp_path):
    flags = [*TINY, "--data", home / "data", "--out", tmp_path / "out"]
    teacher = home / "teacher" / "last.pt"
    assert "--teacher" in complaint(distill, *flags)
    assert f"--teacher {home}/none.pt: no such file" in complaint(distill, *flags, "--teacher", home / "none.pt")
    assert f"{home}/file" in complaint(distill, *flags, "--teacher", home / "file")
    assert "not a teacher" in complaint(distill, *flags, "--teacher", home / "student" / "last.pt")
    assert "--fpn-channels" in complaint(distill, *flags, "--teacher", teacher, "--fpn-channels", 64)
    assert "--kd-ramp -5" in complaint(distill, *flags, "--teacher", teacher, "--kd-ramp", -5)
    assert "--kd -1.0" in complaint(distill, *flags, "--teacher", teacher, "--kd", -1)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pt"))
    before = teacher.read_bytes()
    assert "the teacher is in there as last.pt" in complaint(
        distill, *flags, "--teacher", teacher, "--out", home / "teacher"
    )
    assert teacher.read_bytes() == before


def test_a_student_s_padding_is_its_own(home, tmp_path, monkeypatch):
    def stop(dataset, multiple, *_):
        raise InputError(f"padded to {multiple}")

    monkeypatch.setattr(distill, "train_loader", stop)
    flags = [*TINY, "--data", home / "data", "--out", tmp_path, "--teacher", home / "teacher" / "last.pt", "--pad", 128]
    assert "padded to 128" in complaint(distill, *flags)


def test_evaluation_needs_a_checkpoint_a_branch_and_a_place(home):
    student, data_flags = ["--ckpt", home / "student" / "last.pt"], ["--data", home / "data"]
    assert "--ckpt" in complaint(evaluate, *data_flags)
    assert f"{home}/none: no such file" in complaint(evaluate, *data_flags, "--ckpt", home / "none")
    assert "--res fused" in complaint(evaluate, *data_flags, *student, "--res", "fused")
    assert "--batch" in complaint(evaluate, *data_flags, *student, "--batch", 0)
    assert "--workers" in complaint(evaluate, *data_flags, *student, "--workers", -1)
    for flag in ("--json", "--detections"):
        line = complaint(evaluate, *data_flags, *student, flag, home / "none" / "a.json")
        assert f"{home}/none/a.json: cannot be written" in line
    assert "say with --data where" in complaint(evaluate, *student, "--data", home / "none")
    (home / "empty").mkdir()
    assert "instances_val*.json: no such file" in complaint(evaluate, *student, "--data", home / "empty")
    assert "--device warp" in complaint(evaluate, *data_flags, *student, "--device", "warp")
    (home / "student" / "found").mkdir()
    looked_at = complaint(evaluate, *student, "--images", home / "student" / "found")
    assert "--out" in looked_at and not list((home / "student" / "found").iterdir())


@pytest.fixture
def other_data(home, tmp_path):
    """A copy of the data set, to be spoilt."""
    return shutil.copytree(home / "data", tmp_path / "data")


def rename_class(data, split):
    content = json.loads(annotation_path(data, split).read_text())
    content["categories"][1]["name"] = "violet"
    annotation_path(data, split).write_text(json.dumps(content))


def test_classes_must_be_the_same_everywhere(home, other_data, tmp_path):
    flags = ["--data", other_data, "--out", tmp_path / "out"]
    rename_class(other_data, "val")
    assert "7 violet" in complaint(train, *TINY, *flags)
    rename_class(other_data, "train")
    line = complaint(distill, *TINY, *flags, "--teacher", home / "teacher" / "last.pt")
    assert "7 violet" in line and "7 green" in line and "teacher" in line
    line = complaint(evaluate, "--ckpt", home / "student" / "last.pt", "--data", other_data)
    assert "7 violet" in line and "7 green" in line


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
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
