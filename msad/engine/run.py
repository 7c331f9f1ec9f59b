"""What surrounds the step of both training scripts: the folder of a run, its header and log, evaluation and checkpoints
when due, Ctrl-C, resuming, the last lines. The step itself stands in the scripts.

Whatever depends on the iteration takes it as an argument, so a resumed run needs no more than the weights, the
optimizer's state and a number.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import time
from itertools import count, islice

import torch
from tqdm import tqdm

from ..data.dataset import loader, train_batches
from ..data.errors import InputError, checkpoint_errors, write_errors
from . import checkpoint, drawing, evaluation, levels, processes
from .files import open_locked, sync
from .optimizer import restore_state

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_REQUEST = 10  # seconds in which another SIGTERM is the same request: a cluster sends one, and torchrun one more


def open_folder(out, resume):
    """Make the folder of a run, for this run alone -> its log, opened (by the main process).

    A fresh run moves an earlier one's files aside instead of writing over them.
    """
    log = None
    if processes.is_main():
        with write_errors(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
        log = open_locked(out / "log.jsonl")
        goes_on = resume and (out / "last.pt").exists()
        if not goes_on and keep_earlier(out):
            log.close()  # before the file is opened anew: closing it later would release the new lock
            log = open_locked(out / "log.jsonl")
        if resume and not goes_on:
            print(f"{out} holds no checkpoint yet: starting from the beginning")
    return log


def keep_earlier(out, names=("last.pt", "log.jsonl", "sheet.jpg")):
    """Give the files of an earlier run a number of their own -> whether there were any."""
    files = [path for path in map(out.joinpath, names) if path.exists() and path.stat().st_size]
    if files:
        number = next(n for n in count(1) if not any(path.with_stem(f"{path.stem}.{n}").exists() for path in files))
        for path in files:
            os.replace(path, path.with_stem(f"{path.stem}.{number}"))
        print(f"the earlier run in {out} was kept: {', '.join(f'{p.stem}.{number}{p.suffix}' for p in files)}")
    return bool(files)


def print_header(settings, model, train, val, device, out):
    """The first lines of a run: data, model, schedule, what each level learns, device, folder."""
    if not processes.is_main():
        return
    config, photos = model.config, len(train.trainable())
    head = f"{config.head} {config.head_convs}x{config.head_channels}"
    short_side = sorted(settings.short_sides)[len(settings.short_sides) // 2]
    print(f"train     {train.summary()}")
    print(f"val       {val.summary()}")
    print(f"model     {config.kind}: {config.backbone} x{config.width:g}, FPN {config.fpn_channels}, {head}")
    length = f"{settings.iters} iterations of {settings.batch} images"
    length += f" = {settings.iters * settings.batch / photos:.3g} epochs of {photos} images with boxes"
    rate = f"lr {settings.lr:g}, {settings.schedule} after {settings.warmup} of warm-up"
    print(f"schedule  {settings.recipe} recipe: {length}, {settings.optimizer}, {rate}, seed {settings.seed}")
    print(levels.describe_levels(config, train, short_side, settings.long_side))
    threads = f"{processes.world_size()} process(es) of {torch.get_num_threads()} threads"
    print(f"device    {processes.describe(device)}, {settings.precision}, {threads}")
    print(f"folder    {out}", flush=True)


def check_finite(iteration, numbers):
    """Raise InputError, with every part of the loss, unless all {name: number} of an iteration are finite."""
    if not all(map(math.isfinite, numbers.values())):
        parts = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        fault = f"the loss or its gradient is not finite ({parts})"
        raise InputError(f"iteration {iteration}: {fault}; start again with a lower --lr, in a new --out")


def train_loader(dataset, multiple, settings, first, device):
    """This process's part of every batch from iteration `first` on, without an end."""
    order = train_batches(dataset.annotations, settings.batch, settings.seed, processes.rank(), processes.world_size())
    # A resumed run draws the batches of before once more, and reads none of them.
    return loader(dataset, islice(order, first, None), multiple, settings.workers, device)


class Run:
    """A training run in the folder `out`, from iteration `first` on. A context: within it the first Ctrl-C or SIGTERM
    is a request to stop after the iteration (at once in an evaluation), and what ends it names the checkpoint to go on
    from."""

    def __init__(self, script, out, log, settings, model, optimizer, validation_set, autocast, saved=None, **kept):
        """`saved` is the checkpoint's content that the run goes on from; `kept` is written into each new one."""
        self.script, self.out, self.log, self.settings, self.kept = script, out, log, settings, kept
        self.model, self.optimizer = model, optimizer
        self.validation_set, self.autocast = validation_set, autocast
        self.first = length = 0
        if saved:
            with checkpoint_errors(out / "last.pt"):
                self.first, length = saved["training"]["done"], saved["training"]["log"]
                restore_state(optimizer, saved["training"]["optimizer"])
        if log:  # what was logged after the checkpoint will be logged again; a log that lost lines goes on as it is
            with self.log_errors():
                log.truncate(min(length, log.tell()))
                log.seek(0, os.SEEK_END)
        self.asked_to_stop = None  # when this process was
        self.stops = self.evaluating = False  # all processes, after this iteration; whether `evaluate` is at work
        self.collected, self.waited = [], 0.0  # the step's scalars, by part; seconds without a batch

    def __enter__(self):
        self.handlers = {n: signal.signal(n, self.ask_to_stop) for n in STOPS if signal.getsignal(n) != signal.SIG_IGN}
        self.began = time.monotonic()
        silent = None if processes.is_main() else True  # None: a bar only on a terminal
        if self.first:
            processes.print_once(f"resumed   after {self.first} of {self.settings.iters} iterations")
        self.bar = tqdm(total=self.settings.iters, initial=self.first, disable=silent, dynamic_ncols=True)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        reason = error and processes.explain(error)
        if reason:
            raise InputError(f"{reason}; {self.resume_command()}") from None

    def ask_to_stop(self, number, frame):
        """The first SIGTERM or Ctrl-C asks to stop, a second one does not wait; nor does one in an evaluation."""
        now = time.monotonic()
        if self.asked_to_stop and number != signal.SIGINT and now < self.asked_to_stop + SAME_REQUEST:
            return
        at_once = self.asked_to_stop or self.evaluating  # a run was saved before it evaluates
        when = f"at once; {self.resume_command()}" if at_once else "after this iteration, then saving ..."
        if processes.is_main():
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"\nstopping {when}\n".encode())  # print is not safe in the middle of another
        self.asked_to_stop = now
        if at_once:
            raise KeyboardInterrupt

    def resume_command(self):
        """How to go on from the last checkpoint."""
        if not (self.out / "last.pt").exists():
            return "there is no checkpoint yet"
        return "go on with: " + shlex.join(["python", self.script, "--resume", "--out", self.out.as_posix()])

    def iterations(self):
        """The numbers of the iterations to do. Where an evaluation is due, it comes before the next one begins: the
        checkpoint is saved by then, and a run that goes on from it evaluates once more."""
        for iteration in range(self.first, self.settings.iters):
            if iteration and iteration % self.settings.eval_every == 0:
                self.evaluate(iteration)
            yield iteration

    def timed(self, batches):
        """Yield batches, and add up the seconds that they had to be waited for."""
        began = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def collect(self, loss, losses, **more):
        """Keep the scalars of a part of the batch, losses as {branch: {part: scalar}}, until the step's end."""
        named = {f"{branch}/{part}": value for branch, parts in losses.items() for part, value in parts.items()}
        named = {"loss": loss} | named | more
        self.collected.append({name: value.detach().float() for name, value in named.items()})

    def averages(self, gradient):
        """What was collected in a step, and the norm of its gradient -> {name: float}, means over parts and processes.

        Only here a step waits for the device. The processes also agree here on stopping.
        """
        names = [*self.collected[0], "gradient"]
        parts = torch.stack([torch.stack(list(scalars.values())) for scalars in self.collected])
        stop = gradient.new_full((1,), self.asked_to_stop is not None)
        values = torch.cat([parts.mean(0), gradient[None], stop])
        *values, stop = processes.mean_over_processes(values).tolist()
        self.stops = stop > 0
        self.collected = []
        return dict(zip(names, values))

    def end_iteration(self, iteration, numbers):
        """Show, log and save when due, after a step with these numbers. Ends the script where it was asked to stop."""
        settings, done = self.settings, iteration + 1
        shown = {name: value for name, value in numbers.items() if name != "gradient"}
        self.show_progress(done, shown)
        if iteration % settings.log_every == 0:
            self.write(iteration=iteration, lr=self.optimizer.param_groups[0]["lr"], **shown)
        if self.stops or done == settings.iters or done % settings.save_every == 0 or done % settings.eval_every == 0:
            self.save(done)
        if self.stops:
            processes.gather([])  # all wait for the main process to save: torchrun ends it once another has left
            self.stop(done)

    def stop(self, done):
        """End the script after a save: `run_script` makes an exit code of KeyboardInterrupt."""
        processes.print_once(f"\nstopped after {done} iterations; {self.resume_command()}")
        raise KeyboardInterrupt

    def evaluate(self, done):
        """{branch: metrics} of all of the model's branches, by a folded copy of the model; written to the log."""
        began, self.evaluating = time.monotonic(), True
        if self.asked_to_stop:  # while it was saved
            self.stop(done)
        processes.share_buffers(self.model)
        results = evaluate_all(self.model, self.validation_set, self.settings, self.autocast)
        for branch, metrics in results.items():
            self.write(done=done, branch=branch, **{k: v for k, v in metrics.items() if k != "classes"})
        self.began, self.evaluating = self.began + time.monotonic() - began, False  # no time of training
        return results

    def save(self, done):
        """Write OUT/last.pt, with everything a resumed run needs. It counts on the log so far, on the disk."""
        if self.log:
            with self.log_errors():
                sync(self.log)
            training = {"done": done, "log": self.log.tell(), **self.kept}
            training |= {"optimizer": self.optimizer.state_dict(), "settings": vars(self.settings)}
            checkpoint.save(self.out / "last.pt", self.model, training)

    def write(self, **entry):
        """A line of the log, which holds nothing that differs between two runs of the same seed."""
        if self.log:
            with self.log_errors():
                self.log.write((json.dumps(entry) + "\n").encode())
                self.log.flush()

    def log_errors(self):
        return write_errors(self.out / "log.jsonl", "--resume goes on from the last checkpoint, if there is one")

    def show_progress(self, done, numbers):
        """On the bar, or, where there is no terminal, as a line now and then."""
        self.bar.update(done - self.bar.n)
        first, every = done == self.first + 1, self.settings.log_every
        if not processes.is_main() or done % every and not first:
            return
        elapsed = time.monotonic() - self.began
        seconds = elapsed / (done - self.first)
        text = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        text += f" {self.settings.batch / seconds:.1f} images/s, {self.waited / elapsed:.0%} of the time reading"
        if self.model.mean.is_cuda:
            text += f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and (first or done % (5 * every) == 0):  # the first tells whether it is worth waiting
            left = tqdm.format_interval(seconds * (self.settings.iters - done))
            print(f"{done}/{self.settings.iters} {text}, {left} left", flush=True)

    def report(self, rows, columns, next_command):
        """The last lines: what was reached, {row: metrics}, where it lies, and what to do with the checkpoint next.

        `columns` are what OUT/sheet.jpg shows beside the ground truth.
        """
        if not processes.is_main():
            return
        path = self.out / "last.pt"
        print(evaluation.table(rows))
        print(f"checkpoint {path}, log {self.out / 'log.jsonl'}")
        print(drawing.draw_run(self.out, self.validation_set.annotations, columns, self.autocast))
        print(f"next: {shlex.join(['python', *next_command, path.as_posix()])}")


def evaluate_all(model, dataset, settings, autocast):
    """{branch: metrics} of all of a model's branches."""
    images = settings.batch // (processes.world_size() * settings.accumulate)
    found = evaluation.evaluate(model, dataset, model.branches, images, settings.workers, autocast)
    return {branch: metrics for branch, (metrics, _) in found.items()}
