"""Stopped, killed at any moment, crashed while saving, a full disk, damage: a resumed run ends with the same bits as
one that never stopped, or says in one line why it cannot go on."""

import os
import random
import resource
import shutil
import signal
import time

import distill
import pytest
import train
from scripts import LENGTH, TINY, Process, assert_same_run, call, complaint, runs, succeed

from msad.engine import checkpoint


def done(out):
    return checkpoint.read(out / "last.pt")["training"]["done"] if (out / "last.pt").exists() else 0


def lines(out):
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize("name, number", [("trained", signal.SIGTERM), ("distilled", signal.SIGINT)])
def test_stopped_then_killed_then_resumed_equals_uninterrupted(uninterrupted, tmp_path, name, number):
    script, flags = runs(uninterrupted)[name]
    out = tmp_path / "out"
    process = Process(tmp_path, script, *flags, "--resume", "--out", out)
    process.wait_until(lambda: lines(out) >= 3)
    os.kill(process.id, number)
    code, printed = process.end()
    assert code == 130 and f"{out} holds no checkpoint yet: starting from the beginning" in printed
    assert 3 <= done(out) < LENGTH and "stopping after this iteration, then saving ..." in printed
    command = f"python {script.__name__}.py --resume --out {out}"
    assert printed[-1] == f"stopped after {done(out)} iterations; go on with: {command}"

    written = lines(out)
    process = Process(tmp_path, script, "--resume", "--out", out)
    process.wait_until(lambda: lines(out) >= written + 3)
    os.kill(process.id, signal.SIGKILL)  # its workers live on for some seconds; the folder is free at once
    assert process.end()[0] == -signal.SIGKILL and done(out) < LENGTH

    (out / "last.pt.tmp").write_bytes(b"half a checkpoint")
    before = done(out)
    printed = succeed(script, "--resume", "--out", out, "--workers", 1).splitlines()
    at = printed.index(f"resumed   after {before} of {LENGTH} iterations")
    assert printed[at + 1].startswith(f"{before + 1}/{LENGTH} loss ")
    assert_same_run(out, uninterrupted / name)

    printed = succeed(script, "--resume", "--out", out)  # which is finished: nothing changes
    assert_same_run(out, uninterrupted / name)
    assert ("student @ low" if name == "distilled" else "low @ low") in printed


def wait_for_a_random_moment(process, out, rng):
    """While the run starts, or soon after it saved; often in the middle of saving."""
    path = out / "last.pt"
    stamp = lambda: path.stat().st_mtime_ns if path.exists() else 0
    before = stamp()
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 0.6))
    else:
        process.wait_until(lambda: stamp() != before or process.has_ended())
        time.sleep(rng.uniform(0, 0.2))
    if rng.random() < 0.4:
        process.wait_until(lambda: (out / "last.pt.tmp").exists() or process.has_ended())


@pytest.mark.parametrize("name, workers", [("trained", 2), ("distilled", 0)])
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(uninterrupted, tmp_path, name, workers):
    script, flags = runs(uninterrupted)[name]
    out, rng = tmp_path / "out", random.Random(f"{name} {workers}")
    flags += ["--workers", workers, "--out", out, "--resume", "--save-every"]
    places = []
    while len(places) < 3:
        process = Process(tmp_path, script, *flags, rng.choice((1, 1, 3)))
        wait_for_a_random_moment(process, out, rng)
        if process.kill() == -signal.SIGKILL:
            places.append(done(out))
        else:  # it was faster than that: once more, from the beginning
            assert_same_run(out, uninterrupted / name)
            shutil.rmtree(out)
    assert len(set(places)) > 1, places
    succeed(script, *flags, 4)
    assert_same_run(out, uninterrupted / name)


def test_a_crash_while_saving_costs_nothing_but_the_iterations_since(uninterrupted, tmp_path, monkeypatch):
    script, flags = runs(uninterrupted)["trained"]
    replace, replaced = os.replace, []

    def crash(source, target):
        replaced.append(target)
        if len(replaced) == 4:
            raise SystemExit("crashed with the temporary file written")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert call(script, *flags, "--out", tmp_path)[0] == "crashed with the temporary file written"
    assert done(tmp_path) == 8 and lines(tmp_path) > 8
    with open(tmp_path / "log.jsonl", "ab") as log:  # what a disk may hold after the power failed
        log.write(bytes(50_000))
    succeed(script, "--resume", "--out", tmp_path)
    assert_same_run(tmp_path, uninterrupted / "trained")


# A full disk, and a log that is not there: `--resume` goes on.


@pytest.fixture
def killed(uninterrupted, tmp_path):
    """The folder of a run of distill.py that was killed, and how much of its log its checkpoint counts on."""
    script, flags = runs(uninterrupted)["distilled"]
    process = Process(tmp_path, script, *flags, "--out", tmp_path / "out", "--save-every", 1)
    process.wait_until((tmp_path / "out" / "last.pt").exists)
    assert process.kill() == -signal.SIGKILL
    return tmp_path / "out", checkpoint.read(tmp_path / "out" / "last.pt")["training"]["log"]


@pytest.mark.parametrize("name", ["last.pt", "log.jsonl"])
def test_a_full_disk_costs_nothing_but_the_iterations_since(killed, uninterrupted, name):
    out, logged = killed
    files, before = sorted(os.listdir(out)), (out / "last.pt").read_bytes()
    whole = (uninterrupted / "distilled" / "log.jsonl").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = {"last.pt": len(before) // 2, "log.jsonl": logged + 10}[name]
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, unlimited[1]))  # of any file
    try:
        line = complaint(distill, "--resume", "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert line.startswith(f"error: {out / name}: cannot be written (")
    assert (out / "last.pt").read_bytes() == before and sorted(os.listdir(out)) == files
    assert (out / "log.jsonl").read_bytes()[:logged] == whole[:logged]
    succeed(distill, "--resume", "--out", out)
    assert_same_run(out, uninterrupted / "distilled")


def test_a_log_that_was_lost_does_not_keep_a_run_from_going_on(killed, uninterrupted):
    out, logged = killed
    (out / "log.jsonl").unlink()
    succeed(distill, "--resume", "--out", out)
    assert (out / "log.jsonl").read_bytes() == (uninterrupted / "distilled" / "log.jsonl").read_bytes()[logged:]


def test_a_log_that_cannot_be_opened_is_named(uninterrupted, tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    line = complaint(train, *TINY, "--data", uninterrupted / "data", "--out", tmp_path)
    assert f"{tmp_path / 'log.jsonl'}: cannot be written" in line


# What cannot be gone on with is refused, and nothing is changed.


@pytest.mark.parametrize("script, name, flags", [
    (train, "trained", "--res high"), (train, "trained", "--iters 31"), (train, "trained", "--short-sides 64"),
    (train, "trained", "--no-align"), (train, "distilled", ""), (distill, "trained", ""),
])  # fmt: skip
def test_other_settings_and_the_other_script_s_run_are_refused(uninterrupted, script, name, flags):
    path = uninterrupted / name / "last.pt"
    before = path.with_name("log.jsonl").read_bytes()
    line = complaint(script, "--resume", "--out", path.parent, *flags.split())
    if flags:
        assert flags.split()[0] in line and f"or start from its weights: --weights {path} and a new --out" in line
    else:
        assert f"{path}: is another script's run" in line
    assert path.with_name("log.jsonl").read_bytes() == before


def test_a_model_without_a_run_cannot_be_resumed(uninterrupted, tmp_path):
    checkpoint.save(tmp_path / "last.pt", checkpoint.load(uninterrupted / "trained" / "last.pt"))
    assert f"{tmp_path}/last.pt: holds a model only" in complaint(train, "--resume", "--out", tmp_path)
