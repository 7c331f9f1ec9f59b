"""Stopped, killed, crashed while saving: a resumed run ends with the same bits as one that never stopped."""

import os
import shutil
import signal

import distill
import pytest
import train
from scripts import assert_same_run, call, complaint, runs, start, succeed, uninterrupted_runs, wait_for_lines

from msad import checkpoint, training


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small data set, a teacher, and an uninterrupted run of either script."""
    return uninterrupted_runs(tmp_path_factory.mktemp("home"))


def lines(out):
    return (out / "log.jsonl").read_bytes().count(b"\n")


@pytest.mark.parametrize("name, number", [("trained", signal.SIGTERM), ("distilled", signal.SIGINT)])
def test_stopped_then_killed_then_resumed_equals_uninterrupted(home, tmp_path, name, number):
    script, flags = runs(home)[name]
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
    assert_same_run(out, home / name)


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_a_crash_while_saving_costs_nothing_but_the_iterations_since(home, tmp_path, name, monkeypatch):
    script, flags = runs(home)[name]
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
    assert_same_run(tmp_path / "out", home / name)


def test_resuming_a_finished_run_changes_nothing(home, tmp_path):
    shutil.copytree(home / "distilled", tmp_path / "out")
    printed = succeed(distill, "--resume", "--out", tmp_path / "out")
    assert_same_run(tmp_path / "out", home / "distilled")
    assert "student @ low" in printed


def test_resuming_from_nothing_starts_from_the_beginning(home, tmp_path):
    script, flags = runs(home)["trained"]
    succeed(script, *flags, "--out", tmp_path / "out", "--resume")
    assert_same_run(tmp_path / "out", home / "trained")


@pytest.mark.parametrize("flags", ["--res high", "--iters 31", "--seed 5", "--short-sides 64", "--lr 1", "--no-align"])
def test_resuming_with_other_settings_names_them(home, flags):
    before = (home / "trained" / "log.jsonl").read_bytes()
    line = complaint(train, "--resume", "--out", home / "trained", *flags.split())
    assert flags.split()[0] in line and str(home / "trained" / "last.pt") in line
    assert (home / "trained" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("script, name", [(train, "distilled"), (distill, "trained")])
def test_resuming_the_other_script_s_run_is_refused(home, script, name):
    before = (home / name / "log.jsonl").read_bytes()
    assert str(home / name / "last.pt") in complaint(script, "--resume", "--out", home / name)
    assert (home / name / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(home, tmp_path, monkeypatch, name):
    script, flags = runs(home)[name]
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
    assert_same_run(tmp_path / "out", home / name)
