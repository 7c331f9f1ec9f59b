"""Running the three scripts from tests, in this process or in one of their own."""

import contextlib
import importlib.util
import io
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import distill
import torch
import train
from tqdm import tqdm

from msad import models
from msad.engine import processes

ROOT = Path(__file__).parents[1]

# A short run that is repeatable to the bit, and the small recipe as small as it gets.
SHORT = (
    "--iters 4 --batch 2 --warmup 2 --save-every 2 --eval-every 2 --log-every 1 --precision fp32 --device cpu"
).split()
TINY = (
    "--recipe small --short-sides 64 96 --test-side 64 --long-side 128 --fpn-channels 32 --head-channels 64 "
    "--head-convs 1"
).split() + SHORT
LENGTH = 12
LONG = [*TINY, "--iters", f"{LENGTH}", "--save-every", "4", "--eval-every", "7"]


def in_github(name):
    """The module .github/NAME.py."""
    specification = importlib.util.spec_from_file_location(name, ROOT / ".github" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def call(script, *flags):
    """Run a script's module in this process, as from the command line -> exit code, stdout, stderr."""
    printed, complained, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
            processes.run_script(script.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, printed.getvalue(), complained.getvalue()


def succeed(script, *flags):
    """What a script prints that must end well."""
    code, printed, complained = call(script, *flags)
    assert code == 0, (code, complained)
    return printed


def complaint(script, *flags):
    """The one line a script prints about a mistake of the user's, with exit code 2."""
    code, _, complained = call(script, *flags)
    assert code == 2 and complained.count("\n") == 1 and "Traceback" not in complained, (code, complained)
    return complained


class Process:
    """A script in a fork of this process, which is there at once, where a new process needs seconds to import torch.

    It leads a group with its workers; what it writes goes to the file `output` in a folder; `change` is called in it
    before the script.
    """

    running = []

    def __init__(self, folder, script, *flags, change=lambda: None, **environment):
        self.output = Path(folder) / "output"
        self.output.touch()
        self.code = None
        self.id = os.fork()
        if self.id == 0:
            self.work(script, flags, change, environment)
        Process.running.append(self)

    def work(self, script, flags, change, environment):
        code = 99
        try:
            os.setsid()
            tqdm.set_lock(threading.RLock())  # its own is shared by forks: killed with it, one would lock all others
            file = os.open(self.output, os.O_WRONLY | os.O_APPEND)
            for number in (1, 2):
                os.dup2(file, number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ.update(environment)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a script in this process may have ignored it since
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

    def has_ended(self):
        if self.code is None:
            found, status = os.waitpid(self.id, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is not None

    def wait_until(self, happened):
        """Until something happened; an error if the process ends before, or hangs."""
        limit = time.monotonic() + 120
        while not happened():
            assert not self.has_ended() or happened(), (self.code, self.output.read_text())
            assert time.monotonic() < limit, f"it hangs: {self.output.read_text()}"
            time.sleep(0.001)

    def end(self):
        """Its exit code and the lines it wrote, once it has ended."""
        self.wait_until(self.has_ended)
        return self.code, self.output.read_text().splitlines()

    def kill(self):
        """End it and its workers, which would notice only some seconds later -> its exit code, 0 if it had ended."""
        if not self.has_ended():
            os.kill(self.id, signal.SIGKILL)
        self.end()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.id, signal.SIGKILL)
        return self.code


def pausing(folder, owner=models.Detector, name="losses", step=6):
    """A change of a function: its call number `step` makes a file `waits` in a folder, and waits for a file `go`."""
    function, calls = getattr(owner, name), []

    def paused(*arguments):
        calls.append(None)
        if len(calls) == step:
            (folder / "waits").touch()
            while not (folder / "go").exists():
                time.sleep(0.005)
        return function(*arguments)

    return lambda: setattr(owner, name, paused)


def runs(home):
    """{name: (script, flags)} of what is interrupted."""
    data = ["--data", home / "data"]
    return {
        "trained": (train, [*LONG, *data, "--res", "low"]),
        "distilled": (distill, [*LONG, *data, "--kd-ramp", "9", "--teacher", home / "teacher" / "last.pt"]),
    }


def assert_same_run(one, other):
    """Weights, optimizer, counters and log of two folders are equal to the bit, after all iterations."""
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))

    def same(a, b):
        if torch.is_tensor(a):
            return a.equal(b)
        if isinstance(a, (dict, list, tuple)):
            pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b)
            return len(a) == len(b) and all(same(x, y) for x, y in pairs)
        return a == b

    for content in (first, second):
        assert content["training"]["done"] == LENGTH
        del content["training"]["settings"]  # --out and --workers may differ
    assert same(first, second)
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
