"""Stopped, killed, crashed while saving: a resumed run ends with the same bits as one that never stopped."""

import os
import shutil
import signal

import distill
import pytest
import torch
import train
from scripts import assert_same_run, call, complaint, runs, start, succeed, wait_for_lines

from msad import checkpoint, training


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
    assert process.returncode == 130 and complained == "" and 3 <= done < 20
    assert printed.splitlines()[-1] == (
        f"stopped after {done} iterations; go on with: python {script.__name__}.py --resume --out {out}"
    )

    process = start(script.__name__, "--resume", "--out", out, cwd=tmp_path)
    wait_for_lines(process, out / "log.jsonl", lines(out) + 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and checkpoint.read(out / "last.pt")["training"]["done"] < 20

    (out / "last.pt.tmp").write_bytes(b"half a checkpoint")
    succeed(script, "--resume", "--out", out, "--workers", 1)
    assert_same_run(out, uninterrupted / name)


@pytest.mark.parametrize("name", ["trained", "distilled"])
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
    succeed(script, *flags, "--out", tmp_path / "out", "--resume")
    assert_same_run(tmp_path / "out", uninterrupted / "trained")


@pytest.mark.parametrize("flags", ["--res high", "--iters 31", "--seed 5", "--short-sides 64", "--lr 1", "--no-align"])
def test_resuming_with_other_settings_names_them(uninterrupted, flags):
    before = (uninterrupted / "trained" / "log.jsonl").read_bytes()
    line = complaint(train, "--resume", "--out", uninterrupted / "trained", *flags.split())
    assert flags.split()[0] in line and str(uninterrupted / "trained" / "last.pt") in line
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


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(uninterrupted, tmp_path, monkeypatch, name):
    script, flags = runs(uninterrupted)[name]
    step, steps = training.Update.__call__, []

    def poisoned(update, iteration, loss, losses):
        steps.append(loss)
        if len(steps) == 10:
            losses["low/box"] = losses["low/box"] * float("nan")
            loss = sum(losses.values())
        return step(update, iteration, loss, losses)

    with monkeypatch.context() as patch:
        patch.setattr(training.Update, "__call__", poisoned)
        line = complaint(script, *flags, "--out", tmp_path / "out")
    assert "iteration 9:" in line and "low/box nan" in line and "low/cls " in line and "low/centerness " in line
    assert len(steps) == 10 and checkpoint.read(tmp_path / "out" / "last.pt")["training"]["done"] == 8
    succeed(script, "--resume", "--out", tmp_path / "out")
    assert_same_run(tmp_path / "out", uninterrupted / name)
