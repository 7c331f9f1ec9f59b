"""A disk that is full while a run saves or logs: one line, and `--resume` goes on once there is room."""

import json
import os

import pytest
import train
from scripts import TINY, assert_same_run, complaint, fork, kill, runs, succeed, wait

from msad import checkpoint


@pytest.fixture(params=["trained", "distilled"])
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
    before = (out / "last.pt").read_bytes()
    logged = checkpoint.read(out / "last.pt")["training"]["log"]
    limit = {"last.pt": len(before) // 2, "log.jsonl": logged + 10}[name]
    line = complaint_of_a_full_disk(script, "--resume", "--out", out, largest_file=limit, report=tmp_path / "report")
    assert line.startswith(f"error: {out / name}: cannot be written (")
    assert (out / "last.pt").read_bytes() == before and sorted(os.listdir(out)) == ["last.pt", "log.jsonl"]
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
