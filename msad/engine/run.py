"""What surrounds the step of both training scripts: the folder of a run, its header and log, evaluation and checkpoints
when due, Ctrl-C, resuming, the last lines. The step itself stands in the scripts.

Whatever depends on the iteration takes it as an argument, so a resumed run needs no more than the weights, the
optimizer's state and a number.
"""

import json
import math
import os
import shlex
import signal
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..data.dataset import TrainBatches, loader
from ..data.errors import InputError, checkpoint_errors, write_errors
from . import checkpoint, drawing, evaluation, processes
from .files import open_locked

INTERRUPTED = 130  # the exit code of a run that was stopped
LESS_MEMORY = (
    "a larger --accumulate, which --resume takes, or, with a new --out, a smaller --batch, smaller --short-sides and "
    "--long-side, or --precision bf16"
)


def find_checkpoint(out, resume):
    """The content of OUT/last.pt if a run goes on from it, else None."""
    path = Path(out) / "last.pt"
    return checkpoint.read(path) if resume and path.exists() else None


def prepare(settings):
    """Join the other processes, seed everything, settle the precision -> this process's device."""
    count, parts = processes.world_size(), settings.accumulate
    if settings.batch < count:
        raise InputError(f"--batch {settings.batch} is smaller than the number of processes, {count}")
    if parts > 1 and settings.batch % (parts * count):
        raise InputError(f"--accumulate {parts}: must divide --batch {settings.batch} over {count} process(es)")
    device = processes.init_device(settings.device)
    torch.manual_seed(settings.seed)
    settings.precision = settings.precision or processes.native_precision(device)
    return device


def open_folder(out, resume):
    """Make the folder of a run, for this run alone -> its log, opened (by the main process).

    A fresh run moves an earlier one's files aside instead of writing over them.
    """
    log = None
    if processes.is_main():
        with write_errors(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
        log = open_locked(out / "log.jsonl")
        if not resume and keep_earlier(out):
            log = open_locked(out / "log.jsonl")
        elif resume and not (out / "last.pt").exists():
            print(f"{out} holds no checkpoint yet: starting from the beginning")
    processes.barrier()
    return log


def keep_earlier(out):
    """Give the files of an earlier run a number of their own -> whether there were any."""
    files = [out / name for name in ("last.pt", "log.jsonl", "curve.png", "sheet.jpg")]
    files = [path for path in files if path.exists() and path.stat().st_size]
    if files:
        number = 1
        while any(path.with_stem(f"{path.stem}.{number}").exists() for path in files):
            number += 1
        for path in files:
            os.replace(path, path.with_stem(f"{path.stem}.{number}"))
        print(f"the earlier run in {out} was kept: {', '.join(f'{p.stem}.{number}{p.suffix}' for p in files)}")
    return bool(files)


def print_header(settings, model, train, val, device, out):
    """The first lines of a run: data, model, schedule, what each level learns, device, folder."""
    config = model.config
    short_side = sorted(settings.short_sides)[len(settings.short_sides) // 2]
    place = device if processes.world_size() > 1 else "cpu"  # a GPU would be waited for at every picture
    lines = evaluation.describe_levels(config, train, short_side, settings.long_side, place)
    if not processes.is_main():
        return
    head = f"{config.head} {config.head_convs}x{config.head_channels}"
    side = -(-config.short_side // config.pad) * config.pad
    cost = evaluation.count_cost(model, model.branches[0], side, side)
    print(f"train     {train.summary()}")
    print(f"val       {val.summary()}")
    print(f"model     {config.kind}: {config.backbone} x{config.width:g}, FPN {config.fpn_channels}, {head}")
    print(f"cost      {evaluation.cost_line(model.branches[0], cost)}")
    print(
        f"schedule  {settings.recipe} recipe: {settings.iters} iterations of {settings.batch} images = "
        f"{settings.iters * settings.batch / len(train):.3g} epochs of {len(train)} images, "
        f"{settings.optimizer}, lr {settings.lr:g}, {settings.schedule} after {settings.warmup} of warm-up, "
        f"seed {settings.seed}"
    )
    print(lines)
    threads = f"{processes.world_size()} process(es) of {torch.get_num_threads()} threads"
    print(f"device    {processes.describe(device)}, {settings.precision}, {threads}")
    print(f"folder    {out}", flush=True)


def build_optimizer(model, settings):
    """SGD or AdamW over all parameters; normalisation layers have no weight decay."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    plain = [p for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)]
    listed = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in listed]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def set_learning_rate(optimizer, settings, iteration):
    """Linear warm-up, then steps at 2/3 and 8/9 of the run, or a cosine to 0."""
    warm = min(1.0, 0.001 + 0.999 * iteration / settings.warmup) if settings.warmup else 1.0
    done = iteration / settings.iters
    if settings.schedule == "cosine":
        decay = (1 + math.cos(math.pi * done)) / 2
    else:
        decay = 0.1 ** ((done >= 2 / 3) + (done >= 8 / 9))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * warm * decay


def check_finite(iteration, numbers):
    """Raise InputError, with every part of the loss, unless all {name: number} of an iteration are finite."""
    if not all(map(math.isfinite, numbers.values())):
        parts = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        mend = "the last checkpoint is good: start again with a lower --lr"
        raise InputError(f"iteration {iteration}: the loss or its gradient is not finite ({parts}); {mend}")


def train_loader(dataset, multiple, settings, first, device):
    """This process's part of every batch from iteration `first` on, without an end."""
    rank, count = processes.rank(), processes.world_size()
    order = TrainBatches(dataset.annotations, settings.batch, settings.seed, first, rank, count)
    return loader(dataset, order, multiple, settings.workers, device)


class Run:
    """A training run in the folder `out`, from iteration `first` on. A context: within it the first Ctrl-C or SIGTERM
    is a request to stop after the iteration, and what ends it names the checkpoint to go on from."""

    def __init__(self, script, out, log, settings, model, optimizer, validation_set, autocast, saved=None, **kept):
        """`saved` is the checkpoint's content that the run goes on from; `kept` is written into each new one."""
        self.script, self.out, self.log, self.settings, self.kept = script, out, log, settings, kept
        self.model, self.optimizer = model, optimizer
        self.validation_set, self.autocast = validation_set, autocast
        self.first, length = restore_optimizer(saved["training"], optimizer, out / "last.pt") if saved else (0, 0)
        if log:  # what was logged after the checkpoint will be logged again; a log that lost lines goes on as it is
            with self.writing_log():
                log.truncate(min(length, log.tell()))
                log.seek(0, os.SEEK_END)
        self.stop_wanted = self.stop_agreed = False
        self.noted, self.waited = [], 0.0  # the step's scalars, by part; seconds without a batch

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.note_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self.began = time.monotonic()
        silent = None if processes.is_main() else True  # None: a bar only on a terminal
        if self.first:
            processes.print_once(f"resumed   after {self.first} of {self.settings.iters} iterations")
        self.bar = tqdm(total=self.settings.iters, initial=self.first, disable=silent, dynamic_ncols=True)
        if self.first and self.is_due(self.first, self.settings.eval_every):
            self.evaluate(self.first)  # once more: the checkpoint was saved before, and the log is cut off there
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.explain(error)

    def explain(self, error):
        """Raise InputError with how to go on for an error that comes from the machine's limits."""
        reason = error and processes.explain(error, LESS_MEMORY)
        if reason:
            raise InputError(f"{reason}; {self.go_on()}") from None

    def note_stop(self, number, frame):
        """The first SIGTERM or Ctrl-C asks to stop, a second one does not wait."""
        when = "without saving" if self.stop_wanted else "after this iteration, then saving ..."
        if processes.is_main():
            os.write(2, f"\nstopping {when}\n".encode())  # print is not safe in the middle of another
        if self.stop_wanted:
            raise KeyboardInterrupt
        self.stop_wanted = True

    def go_on(self):
        """How to go on from the last checkpoint."""
        if not (self.out / "last.pt").exists():
            return "there is no checkpoint yet"
        return "go on with: " + shlex.join(["python", self.script, "--resume", "--out", self.out.as_posix()])

    def is_due(self, done, every):
        """Whether `done` is a multiple of `every`; never at the last iteration, which the end of the script handles."""
        return done % every == 0 and done < self.settings.iters

    def timed(self, batches):
        """Yield batches, and add up the seconds that they had to be waited for."""
        batches = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - began
            yield batch

    def note(self, loss, losses, **more):
        """Keep the scalars of a chunk of the batch, losses as {branch: {part: scalar}}, until they are read."""
        named = {f"{branch}/{part}": value for branch, parts in losses.items() for part, value in parts.items()}
        named = {"loss": loss} | named | more
        self.noted.append({name: value.detach().float() for name, value in named.items()})

    def read(self, gradient):
        """What was noted in a step, and the norm of its gradient -> {name: float}, means over chunks and processes.

        Only here a step waits for the device. The processes also agree here on stopping.
        """
        names = [*self.noted[0], "gradient"]
        chunks = torch.stack([torch.stack(list(noted.values())) for noted in self.noted])
        values = torch.cat([chunks.mean(0), gradient[None], gradient.new_full((1,), self.stop_wanted)])
        *values, stop = processes.mean_over_processes(values).tolist()
        self.stop_agreed = stop > 0 if processes.world_size() > 1 else self.stop_wanted
        self.noted = []
        return dict(zip(names, values))

    def after(self, iteration, numbers):
        """Log, show, evaluate and save when due, after a step with these numbers -> whether the run stops here."""
        settings, done = self.settings, iteration + 1
        shown = {name: value for name, value in numbers.items() if name != "gradient"}
        self.show_progress(done, shown)
        if iteration % settings.log_every == 0:
            self.write(iteration=iteration, lr=self.optimizer.param_groups[0]["lr"], **shown)
        last, stop = done == settings.iters, self.stop_agreed and done < settings.iters
        evaluate = not stop and self.is_due(done, settings.eval_every)
        if stop or last or evaluate or self.is_due(done, settings.save_every):
            self.save(done)  # before an evaluation, which may fail
        if evaluate:
            self.evaluate(done)
        if stop:
            processes.print_once(f"\nstopped after {done} iterations; {self.go_on()}")
        return stop

    def evaluate(self, done):
        """{branch: metrics} of all of the model's branches, by a folded copy of the model; written to the log."""
        began = time.monotonic()
        try:
            results = evaluate_all(self.model, self.validation_set, self.settings, self.autocast)
        except Exception as error:  # also before and after the iterations
            self.explain(error)
            raise
        for branch, metrics in results.items():
            self.write(done=done, branch=branch, **{k: v for k, v in metrics.items() if k != "classes"})
        self.began += time.monotonic() - began  # no time of training
        return results

    def save(self, done):
        """Write OUT/last.pt, with everything a resumed run needs. It counts on the log so far, on the disk."""
        if self.log:
            with self.writing_log():
                os.fsync(self.log.fileno())
            training = {"done": done, "log": self.log.tell(), **self.kept}
            training |= {"optimizer": self.optimizer.state_dict(), "settings": vars(self.settings)}
            checkpoint.save(self.out / "last.pt", self.model, training)

    def write(self, **entry):
        """A line of the log, which holds nothing that differs between two runs of the same seed."""
        if self.log:
            with self.writing_log():
                self.log.write((json.dumps(entry) + "\n").encode())
                self.log.flush()

    def writing_log(self):
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
        print(drawing.draw_run(self.out, self.log, self.validation_set.annotations, columns, self.autocast))
        print(f"next: {shlex.join(['python', *next_command, path.as_posix()])}")


def evaluate_all(model, dataset, settings, autocast):
    """{branch: metrics} of all of a model's branches."""
    images = settings.batch // (processes.world_size() * settings.accumulate)
    found = evaluation.evaluate(model, dataset, model.branches, images, settings.workers, autocast)
    return {branch: metrics for branch, (metrics, _) in found.items()}


def restore_optimizer(training, optimizer, path):
    """Bring an optimizer to its stored state -> iterations done, length of the log. Raises InputError."""
    with checkpoint_errors(path):
        groups = optimizer.state_dict()["param_groups"]  # these follow from the settings
        optimizer.load_state_dict({"state": training["optimizer"]["state"], "param_groups": groups})
        names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
        for p, state in optimizer.state.items():
            shapes = {name: value.shape for name, value in state.items()}
            if shapes != {name: () if name == "step" else p.shape for name in names}:
                raise ValueError(f"the optimizer's state of a parameter {tuple(p.shape)} is {shapes}")
            for name in names - {"step"}:  # in the parameter's memory layout, which fused steps take for granted
                state[name] = torch.empty_like(p).copy_(state[name])
        done, length = training["done"], training["log"]
        if not (type(done) is type(length) is int and min(done, length) >= 0):
            raise ValueError(f"done {done!r}, log {length!r}")
    return done, length
