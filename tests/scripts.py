"""Running the three scripts from tests, in this process or in one of their own."""

import contextlib
import io
import subprocess
import sys
import time
from pathlib import Path

from msad import training

ROOT = Path(__file__).parents[1]

# The small recipe, as small as it gets. All runs are repeatable to the bit.
TINY = (
    "--recipe small --iters 4 --batch 2 --short-sides 64 96 --test-side 64 --long-side 128 --fpn-channels 32 "
    "--head-channels 64 --head-convs 1 --warmup 2 --save-every 2 --eval-every 2 --log-every 1 "
    "--precision fp32 --device cpu"
).split()


def call(script, *flags):
    """Run a script's module in this process, as from the command line -> exit code, stdout, stderr."""
    printed, complained, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
            training.main(script.run)
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
