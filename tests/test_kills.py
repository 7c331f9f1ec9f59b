"""`kill -9` at random moments, while saving included: the run that was resumed ends with the same bits."""

import random
import shutil
import time

import pytest
from scripts import assert_same_run, fork, kill, runs, succeed, wait

from msad.engine import checkpoint

KILLS = 4


def wait_for_a_random_moment(process, out, rng):
    """While the run starts, or soon after it saved; often in the middle of saving."""
    path = out / "last.pt"
    stamp = lambda: path.stat().st_mtime_ns if path.exists() else 0
    before = stamp()
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 0.6))
    else:
        wait(process, lambda: stamp() != before)
        time.sleep(rng.uniform(0, 0.2))
    if rng.random() < 0.4:
        wait(process, (out / "last.pt.tmp").exists)


@pytest.mark.parametrize("name, workers", [("trained", 2), ("distilled", 0)])
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(uninterrupted, tmp_path, name, workers):
    script, flags = runs(uninterrupted)[name]
    out, rng = tmp_path / "out", random.Random(f"{name} {workers}")
    flags += ["--workers", workers, "--out", out, "--resume", "--save-every"]
    kills, places = 0, set()
    while kills < KILLS:
        process = fork(script, *flags, rng.choice((1, 1, 3)))
        wait_for_a_random_moment(process, out, rng)
        unfinished = kill(process) != 0
        done = checkpoint.read(out / "last.pt")["training"]["done"] if (out / "last.pt").exists() else 0
        if unfinished:
            kills += 1
            places.add(done)
        else:  # it was faster than that: once more, from the beginning
            assert_same_run(out, uninterrupted / name)
            shutil.rmtree(out)
    assert len(places) > 1, places
    succeed(script, *flags, 4)
    assert_same_run(out, uninterrupted / name)
