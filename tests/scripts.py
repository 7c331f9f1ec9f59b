"""Running the three scripts from tests, in this process or in one of their own."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distill
import torch
import train
from tqdm import tqdm

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
LONG = [*TINY, "--iters", "20", "--save-every", "4", "--eval-every", "13"]


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


def start(name, *flags, cwd):
    """Start a script in a process of its own."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, log, count):
    """Wait until a running script has written so many lines of its log."""
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"the process ended early: {process.communicate()}")


def fork(script, *flags, report=os.devnull, largest_file=resource.RLIM_INFINITY):
    """Run a script in a fork of this process -> its process id, which is that of a process group too.

    A fork is there at once, where a new process needs seconds to import torch. It leaves what `call` gives in the file
    `report`, as JSON. No file can grow beyond `largest_file` bytes in it: to the script that is a full disk.
    """
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.setsid()
        tqdm.set_lock(threading.RLock())  # its own is shared by forks: killed with it, one would lock all others
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
        outcome = call(script, *flags)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        Path(report).write_text(json.dumps(outcome))
        code = outcome[0]
    finally:
        os._exit(code)


def wait(process, happened):
    """Until something happened, or the fork ended."""
    while not happened() and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)


def kill(process):
    """Kill a fork and its workers, which would notice only some seconds later -> its exit code, 0 if it had ended."""
    os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    assert code in (0, -signal.SIGKILL)
    return code


def runs(home):
    """{name: (script, flags)} of what is interrupted."""
    data = ["--data", home / "data"]
    return {
        "trained": (train, [*LONG, *data, "--res", "low"]),
        "distilled": (distill, [*LONG, *data, "--kd-ramp", "20", "--teacher", home / "teacher" / "last.pt"]),
    }


def assert_same_run(one, other):
    """Weights, optimizer, counters and log of two folders are equal to the bit, after all 20 iterations."""
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))

    def same(a, b):
        if torch.is_tensor(a):
            return a.equal(b)
        if isinstance(a, (dict, list, tuple)):
            pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b)
            return len(a) == len(b) and all(same(x, y) for x, y in pairs)
        return a == b

    for content in (first, second):
        assert content["training"]["done"] == 20
        del content["training"]["settings"]  # --out and --workers may differ
    assert same(first, second)
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
