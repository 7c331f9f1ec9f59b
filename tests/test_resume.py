"""Stopped, killed, crashed while saving, a full disk, damage: a resumed run ends with the same bits as one that never
stopped, or says in one line why it cannot go on."""

import json
import os
import shutil
import signal

import distill
import pytest
import torch
import train
from scripts import TINY, assert_same_run, call, complaint, fork, kill, runs, start, succeed, wait, wait_for_lines

from msad.engine import checkpoint

NAMES = ("trained", "distilled")


def lines(out):
    return (out / "log.jsonl").read_bytes().count(b"\n")


@pytest.mark.parametrize("name, number", [("trained", signal.SIGTERM), ("distilled", signal.SIGINT)])
def test_stopped_then_killed_then_resumed_equals_uninterrupted(uninterrupted, tmp_path, name, number):
    script, flags = runs(uninterrupted)[name]
    out = tmp_path / "out"
    process = start(script.__name__, *flags, "--out", out, cwd=tmp_path)
    wait_for_lines(process, out / "log.jsonl", 3)
    process.send_signal(number)
    printed, complained = process.communicate()
    done = checkpoint.read(out / "last.pt")["training"]["done"]
    assert process.returncode == 130 and complained == "\nstopping after this iteration, then saving ...\n"
    assert 3 <= done < 20
    assert printed.splitlines()[-1] == (
        f"stopped after {done} iterations; go on with: python {script.__name__}.py --resume --out {out}"
    )

    written = lines(out)
    process = fork(script, "--resume", "--out", out)
    wait(process, lambda: lines(out) >= written + 6)
    assert kill(process) != 0 and checkpoint.read(out / "last.pt")["training"]["done"] < 20

    (out / "last.pt.tmp").write_bytes(b"half a checkpoint")
    done = checkpoint.read(out / "last.pt")["training"]["done"]
    printed = succeed(script, "--resume", "--out", out, "--workers", 1).splitlines()
    at = printed.index(f"resumed   after {done} of 20 iterations")
    assert printed[at + 1].startswith(f"{done + 1}/20 loss ")
    assert_same_run(out, uninterrupted / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_crash_while_saving_costs_nothing_but_the_iterations_since(uninterrupted, tmp_path, name, monkeypatch):
    script, flags = runs(uninterrupted)[name]
    replace, replaced = os.replace, []

    def crash(source, target):
        replaced.append(target)
        if len(replaced) == 4:
            raise SystemExit("crashed with the temporary file written")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert call(script, *flags, "--out", tmp_path / "out")[0] == "crashed with the temporary file written"
    assert checkpoint.read(tmp_path / "out" / "last.pt")["training"]["done"] == 12 and lines(tmp_path / "out") > 12
    with open(tmp_path / "out" / "log.jsonl", "ab") as log:  # what a disk may hold after the power failed
        log.write(bytes(50_000))
    succeed(script, "--resume", "--out", tmp_path / "out")
    assert_same_run(tmp_path / "out", uninterrupted / name)


def test_resuming_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "distilled", tmp_path / "out")
    printed = succeed(distill, "--resume", "--out", tmp_path / "out")
    assert_same_run(tmp_path / "out", uninterrupted / "distilled")
    assert "student @ low" in printed


def test_resuming_from_nothing_starts_from_the_beginning(uninterrupted, tmp_path):
    script, flags = runs(uninterrupted)["trained"]
    printed = succeed(script, *flags, "--out", tmp_path / "out", "--resume")
    assert f"{tmp_path}/out holds no checkpoint yet: starting from the beginning" in printed
    assert_same_run(tmp_path / "out", uninterrupted / "trained")


# A full disk: one line, and `--resume` goes on once there is room.


@pytest.fixture(params=NAMES)
def killed(request, uninterrupted, tmp_path):
    """A run that was killed: the script, its folder, and the folder of the same run uninterrupted."""
    script, flags = runs(uninterrupted)[request.param]
    process = fork(script, *flags, "--out", tmp_path / "out", "--save-every", 1)
    wait(process, (tmp_path / "out" / "last.pt").exists)
    assert kill(process) != 0
    return script, tmp_path / "out", uninterrupted / request.param


def complaint_of_a_full_disk(script, *flags, largest_file, report):
    """The one line of a run, with exit code 2, that no file lets grow beyond a number of bytes."""
    process = fork(script, *flags, largest_file=largest_file, report=report)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    _, _, complained = json.loads(report.read_text())
    assert complained.count("\n") == 1 and "Traceback" not in complained, complained
    return complained


@pytest.mark.parametrize("name", ["last.pt", "log.jsonl"])
def test_a_full_disk_costs_nothing_but_the_iterations_since(killed, tmp_path, name):
    script, out, whole = killed
    files, before = sorted(os.listdir(out)), (out / "last.pt").read_bytes()
    logged = checkpoint.read(out / "last.pt")["training"]["log"]
    limit = {"last.pt": len(before) // 2, "log.jsonl": logged + 10}[name]
    line = complaint_of_a_full_disk(script, "--resume", "--out", out, largest_file=limit, report=tmp_path / "report")
    assert line.startswith(f"error: {out / name}: cannot be written (")
    assert (out / "last.pt").read_bytes() == before and sorted(os.listdir(out)) == files
    assert (out / "log.jsonl").read_bytes()[:logged] == (whole / "log.jsonl").read_bytes()[:logged]
    succeed(script, "--resume", "--out", out)
    assert_same_run(out, whole)


@pytest.mark.parametrize("killed", ["distilled"], indirect=True)
def test_a_log_that_was_lost_does_not_keep_a_run_from_going_on(killed):
    script, out, whole = killed
    logged = checkpoint.read(out / "last.pt")["training"]["log"]
    (out / "log.jsonl").unlink()
    succeed(script, "--resume", "--out", out)
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()[logged:]


def test_a_log_that_cannot_be_opened_is_named(uninterrupted, tmp_path):
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    line = complaint(train, *TINY, "--data", uninterrupted / "data", "--out", tmp_path / "out", "--resume")
    assert f"{tmp_path / 'out' / 'log.jsonl'}: cannot be written" in line


# What cannot be gone on with is refused, and nothing is changed.


@pytest.mark.parametrize("flags", ["--res high", "--iters 31", "--seed 5", "--short-sides 64", "--lr 1", "--no-align"])
def test_resuming_with_other_settings_names_them(uninterrupted, flags):
    before = (uninterrupted / "trained" / "log.jsonl").read_bytes()
    line = complaint(train, "--resume", "--out", uninterrupted / "trained", *flags.split())
    path = uninterrupted / "trained" / "last.pt"
    assert flags.split()[0] in line and f"or start from its weights: --weights {path} and a new --out" in line
    assert (uninterrupted / "trained" / "log.jsonl").read_bytes() == before


def test_resuming_with_another_teacher_is_refused(uninterrupted, tmp_path):
    path = shutil.copytree(uninterrupted / "distilled", tmp_path / "out") / "last.pt"
    content = torch.load(path, weights_only=True)
    teacher = torch.load(content["training"]["settings"]["teacher"], weights_only=True)
    teacher["model"]["backbone.layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(teacher, tmp_path / "teacher.pt")
    content["training"]["settings"]["teacher"] = str(tmp_path / "teacher.pt")
    torch.save(content, path)
    assert f"{tmp_path}/teacher.pt: is not the teacher" in complaint(distill, "--resume", "--out", path.parent)


@pytest.mark.parametrize("script, name", [(train, "distilled"), (distill, "trained")])
def test_resuming_the_other_script_s_run_is_refused(uninterrupted, script, name):
    before = (uninterrupted / name / "log.jsonl").read_bytes()
    assert str(uninterrupted / name / "last.pt") in complaint(script, "--resume", "--out", uninterrupted / name)
    assert (uninterrupted / name / "log.jsonl").read_bytes() == before


def test_a_model_without_a_run_cannot_be_resumed(uninterrupted, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, checkpoint.load(uninterrupted / "trained" / "last.pt"))
    assert f"{path}: holds a model only" in complaint(train, "--resume", "--out", tmp_path)
    content = torch.load(path, weights_only=True)
    del content["training"]
    torch.save(content, path)
    assert f"{path}: holds a model only" in complaint(train, "--resume", "--out", tmp_path)


@pytest.mark.parametrize("damage", [b"", b"hello", None])
def test_resuming_from_a_damaged_file(uninterrupted, tmp_path, damage):
    path = shutil.copytree(uninterrupted / "distilled", tmp_path / "out") / "last.pt"
    path.write_bytes(path.read_bytes()[:-5000] if damage is None else damage)
    assert str(path) in complaint(distill, "--resume", "--out", path.parent)
