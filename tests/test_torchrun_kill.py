"""One of two processes of torchrun is killed: the job ends with an error, and resumes to the same result.

torchrun starts this file as a script: it trains once undisturbed, and then once more, to be killed from outside.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import train
from folders import draw_rectangles
from scripts import LONG, ROOT, assert_same_run, wait_for_lines

from msad import checkpoint, processes


def torchrun(script, *arguments, cwd):
    """Start a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(cwd)}
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def work(folder):
    """What each of the two processes does."""
    processes.start(torch.device("cpu"))
    (folder / f"pid{processes.rank()}").write_text(str(os.getpid()))
    for name in ("whole", "killed"):
        flags = ["--res", "low", "--batch", 4, "--data", folder / "data", "--out", folder / name]
        sys.argv = ["train.py", *LONG, *map(str, flags)]
        train.run()


def test_a_killed_process_ends_the_job_and_the_run_resumes_to_the_same_bits(tmp_path):
    draw_rectangles(tmp_path / "data", {"train": 12, "val": 3})
    out = tmp_path / "killed"
    job = torchrun(__file__, tmp_path, cwd=tmp_path)
    wait_for_lines(job, out / "log.jsonl", 9)
    first, second = (int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1))
    os.kill(second, signal.SIGKILL)
    _, complained = job.communicate(timeout=120)  # instead of hanging
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in complained
    assert not Path(f"/proc/{first}").exists()
    assert 8 <= checkpoint.read(out / "last.pt")["training"]["done"] < 20

    job = torchrun(ROOT / "train.py", "--resume", "--out", out, cwd=tmp_path)
    printed, complained = job.communicate()
    assert job.returncode == 0 and "2 process(es)" in printed, complained
    assert_same_run(out, tmp_path / "whole")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
