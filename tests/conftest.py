"""One thread for tests and for every process they start: bit-identical runs need the same number everywhere."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a script's background

import torch

torch.ones((), requires_grad=True).backward()  # before any export, else processes forked after one cannot train
sys.path.insert(0, str(Path(__file__).parents[1]))  # msad and the scripts, for a bare `pytest` too


@pytest.fixture(autouse=True, scope="session")
def costs_are_counted_once():
    """Hundreds of runs begin with what their model costs, and few models differ; counting outlasts a step."""
    from msad.engine import cost

    count, known = cost.count_cost, {}

    def counted(model, *what):
        key = repr((model.config, *what))
        if key not in known:
            known[key] = count(model, *what)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "count_cost", counted)
        yield


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A folder with a small data set, a teacher, and an uninterrupted run of either script. Not to be written to."""
    import train  # not before the threads are set
    from folders import draw_rectangles
    from scripts import TINY, runs, succeed

    home = tmp_path_factory.mktemp("uninterrupted")
    draw_rectangles(home / "data", {"train": 12, "val": 2})
    succeed(train, *TINY, "--data", home / "data", "--out", home / "teacher")
    for name, (script, flags) in runs(home).items():
        succeed(script, *flags, "--out", home / name)
    return home


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    from scripts import Process

    yield
    while Process.running:
        Process.running.pop().kill()


def pytest_report_header():
    return "all tests take about six minutes on one core; .ci/run runs them in two processes"
