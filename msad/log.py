"""What a run tells: first lines, last lines, a bar in between, and a log that another run of the same seed repeats."""

import contextlib
import json
import os
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import cost, evaluation, processes
from .annotations import InputError


def introduce(settings, model, train, val, device, out):
    """The first lines of a run: data, model, schedule, device, folder."""
    if not processes.is_main():
        return
    c = model.config
    print(f"train     {train.summary()}")
    print(f"val       {val.summary()}")
    head = f"{c.head} {c.head_convs}x{c.head_channels}"
    print(f"model     {c.kind}: {c.backbone} x{c.width:g}, FPN {c.fpn_channels}, {head}")
    size = [-(-c.short_side // c.pad) * c.pad] * 2
    print(f"cost      {cost.text(model.branches[0], cost.count(model, model.branches[0], *size))}")
    print(
        f"schedule  {settings.iters} iterations of {settings.batch} images, {settings.optimizer}, lr {settings.lr:g}, "
        f"{settings.schedule} after {settings.warmup} of warm-up, seed {settings.seed}"
    )
    threads = f"{processes.count()} process(es) of {torch.get_num_threads()} threads"
    print(f"device    {device}, {settings.precision}, {threads}")
    print(f"folder    {out}", flush=True)


def stopped(script, out, done):
    """Say how to go on -> the exit code."""
    if processes.is_main():
        command = shlex.join(["python", script, "--resume", "--out", out.as_posix()])
        print(f"\nstopped after {done} iterations; go on with: {command}")
    return 130


def show(results):
    """Print the table of {row: metrics}."""
    if processes.is_main():
        print(evaluation.table(results), flush=True)


def report(results, out, settings, drawn, next_command):
    """The last lines: what was reached, {row: metrics}, where it lies, and what to do with the checkpoint next."""
    show(results)
    if processes.is_main():
        data = ["--data", Path(settings.data).as_posix()] if settings.data else []  # which Windows takes unquoted
        if data and next_command[0] == "distill.py":
            data += ["--recipe", settings.recipe]
        print(f"checkpoint {out / 'last.pt'}, log {out / 'log.jsonl'}\n{drawn}")
        print(f"next: {shlex.join(['python', *next_command, (out / 'last.pt').as_posix(), *data])}")


class Log:
    """OUT/log.jsonl, written by the main process. It holds nothing that differs between two runs of the same seed."""

    def __init__(self, path, length=0):
        self.path, self.file = path, None
        if processes.is_main():
            with self._mendable():
                self.file = open(path, "ab")
                # What came after the checkpoint will come again. Of a log that was lost, what is left goes on.
                self.file.truncate(min(length, self.file.tell()))
                self.file.seek(0, os.SEEK_END)

    @contextlib.contextmanager
    def _mendable(self):
        try:
            yield
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); --resume goes on from the last checkpoint, if there is one"
            raise InputError(f"{self.path}: {reason}") from None

    def write(self, **entry):
        if self.file:
            with self._mendable():
                self.file.write((json.dumps(entry) + "\n").encode())
                self.file.flush()

    def losses(self, iteration, loss, losses, lr, every):
        """Every so many iterations, so that the device is not asked for a number in between."""
        if self.file and iteration % every == 0:
            parts = {name: value.item() for name, value in losses.items()}
            self.write(iteration=iteration, lr=lr, loss=loss.item(), **parts)

    def results(self, done, results):
        for branch, metrics in results.items():
            self.write(done=done, branch=branch, **{k: v for k, v in metrics.items() if k != "classes"})

    def length(self):
        """Bytes so far, all of them on the disk: a checkpoint counts on them."""
        if not self.file:
            return 0
        with self._mendable():
            os.fsync(self.file.fileno())
        return self.file.tell()


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, settings, start):
        self.settings, self.start, self.began = settings, start, time.monotonic()
        silent = None if processes.is_main() else True
        self.bar = tqdm(total=settings.iters, initial=start, disable=silent, dynamic_ncols=True)

    def show(self, iteration, loss, losses):
        """After iteration number `iteration`, with its loss and the parts of it."""
        self.bar.update(iteration + 1 - self.bar.n)
        if not processes.is_main() or (iteration + 1) % self.settings.log_every:
            return
        seconds = (time.monotonic() - self.began) / (iteration + 1 - self.start)
        text = " ".join([f"loss {loss.item():.3f}"] + [f"{name} {value.item():.3f}" for name, value in losses.items()])
        text += f" {self.settings.batch / seconds:.1f} images/s"
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and (iteration + 1) % (5 * self.settings.log_every) == 0:
            left = tqdm.format_interval(seconds * (self.settings.iters - iteration - 1))
            print(f"{iteration + 1}/{self.settings.iters} {text}, {left} left", flush=True)

    def close(self):
        self.bar.close()
