"""What both training scripts share: the folder of a run, optimizer, schedule, precision, saving and stopping.

The loops themselves stand in the scripts. Whatever depends on the iteration takes it as an argument, so a resumed run
needs no more than the weights, the optimizer's state and a number.
"""

import math
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from . import annotations, checkpoint, evaluation, processes, shapes
from .annotations import InputError
from .data import TrainBatches, loader
from .log import Log
from .settings import check_settings

SHAPES = "data/shapes"


def start(settings):
    """Check the settings, join the other processes, seed everything -> this process's device, settings to the full."""
    check_settings(settings)
    device = processes.device_of(settings.device)
    processes.start(device)
    torch.manual_seed(settings.seed)
    return device, replace(settings, precision=precision_of(device, settings.precision))


def open_data(data, splits=("train", "val")):
    """The annotations of splits of a COCO-layout folder, or of the drawn shapes if `data` is empty."""
    if not data and processes.is_main() and not Path(SHAPES).exists():
        print(f"drawing the embedded data set into {SHAPES} ...", flush=True)
        try:
            shapes.prepare(SHAPES)
        except OSError as error:
            raise InputError(f"{SHAPES}: cannot be written ({error.strerror}); change folder, or give --data") from None
    processes.barrier()
    found = [annotations.read(data or SHAPES, split) for split in splits]
    for split, other in zip(splits[1:], found[1:]):
        check_classes(f"split {split}", other.classes, f"split {splits[0]}", found[0].classes)
    return found


def check_classes(one, found, other, wanted):
    """Raise InputError, naming the first difference, unless two lists of classes are the same."""
    if tuple(found) != tuple(wanted):
        describe = lambda classes: [f"{c['id']} {c['name']}" for c in classes]
        extra = [c for c in describe(found) if c not in describe(wanted)]
        missing = [c for c in describe(wanted) if c not in describe(found)]
        raise InputError(f"{one} and {other} have different classes: {extra[:5]} only here, {missing[:5]} only there")


def open_folder(out, fresh):
    """Make the folder of a run. A fresh run moves an earlier one's files aside instead of writing over them."""
    if processes.is_main():
        probe = out / ".writable"
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"{out}: cannot be written to ({error.strerror}); choose another --out") from None
        if fresh:
            keep_earlier(out)
        elif not (out / "last.pt").exists():
            print(f"{out} holds no checkpoint yet: starting from the beginning")
    processes.barrier()
    return out


def keep_earlier(out):
    """Give the files of an earlier run a number of their own."""
    files = [out / name for name in ("last.pt", "log.jsonl", "curve.png", "sheet.jpg") if (out / name).exists()]
    if files:
        number = 1
        while any(path.with_stem(f"{path.stem}.{number}").exists() for path in files):
            number += 1
        for path in files:
            os.replace(path, path.with_stem(f"{path.stem}.{number}"))
        print(f"the earlier run in {out} was kept: {', '.join(f'{p.stem}.{number}{p.suffix}' for p in files)}")


def optimizer_for(model, settings):
    """SGD or AdamW over all trained parameters; normalisation layers have no weight decay."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    plain = [p for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)]
    listed = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in listed]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def lr_at(settings, iteration):
    """The learning rate of an iteration: linear warm-up, then steps at 2/3 and 8/9 of the run, or a cosine to 0."""
    warm = min(1.0, 0.001 + 0.999 * iteration / settings.warmup) if settings.warmup else 1.0
    done = iteration / settings.iters
    if settings.schedule == "cosine":
        return settings.lr * warm * (1 + math.cos(math.pi * done)) / 2
    return settings.lr * warm * 0.1 ** ((done >= 2 / 3) + (done >= 8 / 9))


class Update:
    """One step of the optimizer, and the watch over it: a loss or gradient that is not finite stops the run.

    Asking a GPU for a number makes the host wait, so this is asked only where the log reads numbers anyway, and before
    a checkpoint. Until then the fused optimizers, told so on the device, leave the weights as they are.
    """

    def __init__(self, model, optimizer, settings, device):
        self.parameters, self.optimizer, self.settings = list(model.parameters()), optimizer, settings
        self.every = settings.log_every if device.type == "cuda" else 1
        self.seen = None  # iteration, loss, its parts, norm of the gradient: of the last step, or of the first bad one
        optimizer.found_inf = torch.zeros((), device=device)

    def __call__(self, iteration, loss, losses):
        """Backward and one step -> the learning rate. Raises InputError."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        lr = lr_at(self.settings, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = [torch.full_like(norm, iteration), loss, *losses.values(), norm]
        now = torch.stack([part.detach().float() for part in parts])
        self.names = ["loss", *losses, "gradient"]
        stopped = self.optimizer.found_inf
        self.seen = now if self.seen is None else torch.where(stopped > 0, self.seen, now)
        self.optimizer.found_inf = torch.maximum(stopped, (~now.isfinite().all()).float())
        if iteration % self.every == 0:
            self.check()
        self.optimizer.step()
        return lr

    def check(self):
        """Raise InputError if any step so far was not finite."""
        if self.optimizer.found_inf:
            iteration, *values = self.seen.tolist()
            parts = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values))
            raise InputError(
                f"iteration {iteration:.0f}: the loss or its gradient is not finite ({parts}); "
                "the last checkpoint is good: start again with a lower --lr"
            )


def precision_of(device, wanted):
    """What was wanted, or else bf16 where the device computes in it rather than imitating it."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
    return wanted or ("bf16" if native else "fp32")


def autocast_for(device, precision):
    """The context, to be entered as often as wanted, in which the network runs at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def batches(dataset, multiple, settings, start, device):
    """This process's part of every batch from iteration `start` on, without an end."""
    order = TrainBatches(
        dataset.annotations, settings.batch, settings.seed, start, processes.rank(), processes.count()
    )
    return iter(loader(dataset, order, multiple, settings.workers, device))


def evaluate(model, dataset, settings, autocast):
    """{branch: metrics} of all of a model's branches."""
    branches, images = sorted(model.branches), settings.batch // processes.count()
    results = evaluation.evaluate(model, dataset, branches, images, settings.workers, autocast)
    return {branch: metrics for branch, (metrics, _) in results.items()}


def save(out, model, update, done, log, **more):
    """Write OUT/last.pt after `done` iterations, with everything a resumed run needs."""
    update.check()
    if processes.is_main():
        state = {"done": done, "optimizer": update.optimizer.state_dict(), "log": log.length()}
        checkpoint.save(out / "last.pt", model, state | {"settings": asdict(update.settings)} | more)


def begin(model, saved, settings, device, out):
    """The iterations done, the log and the `Update`: as a checkpoint left them, or at the beginning."""
    optimizer = optimizer_for(model, settings)
    done, length = 0, 0
    if saved:
        done, length = checkpoint.restore_run(saved["training"], optimizer, out / "last.pt")
    return done, Log(out / "log.jsonl", length), Update(model, optimizer, settings, device)


class Interrupt:
    """Turns the first SIGTERM or Ctrl-C into a question the loop asks between two iterations."""

    def __init__(self, settings, device):
        self.noted, self.every, self.device = False, settings.log_every, device
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def asked(self, iteration):
        """Whether to stop after this iteration. Several processes agree about it, which takes time: now and then."""
        if processes.count() == 1:
            return self.noted
        noted = torch.tensor(float(self.noted), device=self.device)
        return iteration % self.every == 0 and bool(processes.mean_over_processes(noted) > 0)

    def _note(self, number, frame):
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def main(run):
    """Call a script's `run`, and turn what the user can mend into one line and exit code 2."""
    try:
        code = run()
    except InputError as error:
        # A worker process wraps the message in its traceback; the last line is ours.
        print(f"error: {str(error).split('InputError: ')[-1].strip()}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print("error: a process that reads images died; go on with --resume and fewer --workers", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    processes.stop()
    sys.exit(code)
