"""Train a teacher: one network on high and low resolution at once, aligned and fused.

    python train.py                         the multi-scale aligned teacher (--res multi)
    python train.py --res multi --no-align  the paper's baseline: conventional multi-scale training
    python train.py --res high | low        one resolution alone
"""

import math
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from msad import models
from msad.data.dataset import CocoDataset, open_data
from msad.data.errors import InputError
from msad.engine import checkpoint, drawing, processes
from msad.engine.optimizer import build_optimizer, set_learning_rate
from msad.engine.run import Run, check_finite, open_folder, print_header, train_loader
from msad.engine.settings import Setting, model_config, parse_flags, resume_settings, settle
from msad.engine.weights import load_weights
from msad.fusion import LOSS_WEIGHTS

OWN = {  # settings of this script alone
    "res": Setting("multi", "resolutions to train on", ("multi", "high", "low")),
    "no_align": Setting(False, "with --res multi: no shift and no fusion, the conventional baseline"),
}


def kind_of(res="multi", no_align=False, **others):
    """The kind of model that --res and --no-align ask for."""
    if res == "multi":
        return "conventional" if no_align else "teacher"
    if no_align:
        raise InputError(f"--no-align: of no use with --res {res}, where nothing is aligned")
    return res


def main():
    # What to do, and whether an earlier run goes on.
    typed, resume = parse_flags(__doc__, OWN)
    out = Path(typed.get("out") or f"runs/{kind_of(**typed)}")
    saved = checkpoint.read(out / "last.pt") if resume and (out / "last.pt").exists() else None
    known = resume_settings(typed, OWN, saved, out / "last.pt") if saved else typed
    kind = kind_of(**known)

    # Device and data, which settle what nobody said.
    device = processes.init_device(known.get("device"))
    train, val = open_data(known.get("data"))
    settings = settle(known, OWN, len(train.trainable()), device)
    autocast = processes.autocast(device, settings.precision)

    # Model and optimizer.
    torch.manual_seed(settings.seed)
    if saved:
        model = checkpoint.restore(saved, out / "last.pt")
        train, val = (split.with_classes(model.config.classes, out / "last.pt") for split in (train, val))
    else:
        model = models.build(model_config(settings, kind, train.classes))
        if settings.weights != "none":
            load_weights(model, settings.weights)
    network = processes.parallel(model, device, settings)
    optimizer = build_optimizer(model, settings)

    # Pictures: a low-resolution model reads them at low resolution.
    training_set = CocoDataset(train, settings.short_sides, settings.long_side, model.input_downsample, flip=True)
    validation_set = CocoDataset(val, (settings.test_side,), settings.long_side, model.input_downsample)

    log = open_folder(out, resume)
    print_header(settings, model, train, val, device, out)
    run = Run("train.py", out, log, settings, model, optimizer, validation_set, autocast, saved)
    batches = run.timed(train_loader(training_set, model.multiple, settings, run.first, device))

    with run:
        for iteration in run.iterations():
            optimizer.zero_grad()
            chunks = next(batches).to(device).chunk(settings.accumulate)
            for batch in chunks:
                network.require_backward_grad_sync = batch is chunks[-1]  # DistributedDataParallel averages once
                with autocast:
                    pyramids, outputs = network(model.normalize(batch.images, batch.sizes))
                losses = model.losses(pyramids, outputs, batch.boxes, batch.labels, processes.mean_over_processes)
                loss = sum(LOSS_WEIGHTS[branch] * value for branch, terms in losses.items() for value in terms.values())
                (loss / len(chunks)).backward()
                run.collect(loss, losses)

            gradient = clip_grad_norm_(model.parameters(), settings.clip or math.inf)  # the norm, clipped or not
            numbers = run.averages(gradient)
            check_finite(iteration, numbers)  # raises before the weights change
            set_learning_rate(optimizer, settings, iteration)
            optimizer.step()
            run.end_iteration(iteration, numbers)
        results = run.evaluate(settings.iters)

    rows = {f"{kind} @ {branch}": metrics for branch, metrics in results.items()}
    columns = drawing.columns_of(kind, model, model.branches)
    run.report(rows, columns, ["distill.py", "--teacher"] if kind == "teacher" else ["evaluate.py", "--ckpt"])


if __name__ == "__main__":
    processes.run_script(main)
