"""Distil a teacher's fused pyramid into a student that sees low resolution only.

    python distill.py --teacher runs/teacher/last.pt          the student starts from the teacher's weights
    python distill.py --teacher runs/teacher/last.pt --kd 0   the control: the same, without distillation

Data, recipe, sizes and architecture are the teacher's unless something else is typed.
"""

import math
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from msad import align, distillation, models
from msad.data.dataset import CocoDataset, open_data
from msad.data.errors import InputError
from msad.engine import checkpoint, drawing, evaluation, processes
from msad.engine.optimizer import build_optimizer, set_learning_rate
from msad.engine.run import Run, check_finite, evaluate_all, open_folder, print_header, train_loader
from msad.engine.settings import Setting, inherit, model_config, parse_flags, resume_settings, settle
from msad.engine.weights import copy_detector, load_weights

OWN = {  # settings of this script alone
    "teacher": Setting("", "the teacher's checkpoint (needed)"),
    "kd_loss": Setting("l1", "distance of the pyramids: the paper's, or PKD's", tuple(distillation.DISTANCES)),
    "kd": Setting(distillation.WEIGHT, "its weight: alpha 0.2 times tau 3 in the paper; 0 turns it off", least=0),
    "kd_ramp": Setting(distillation.RAMP, "iterations to its full weight (laptop, photos: iters / 20)", least=0),
    "weights": Setting("teacher", "start: teacher, none, or imagenet, coco or a FILE copied over the teacher's"),
}


def main():
    # What to do, and whether an earlier run goes on.
    typed, resume = parse_flags(__doc__, OWN)
    out = Path(typed.get("out") or "runs/student")
    saved = checkpoint.read(out / "last.pt") if resume and (out / "last.pt").exists() else None
    known = resume_settings(typed, OWN, saved, out / "last.pt") if saved else typed
    path = known.get("teacher") or "CKPT"
    if not Path(path).is_file():
        raise InputError(f"--teacher {path}: no such file; say where the teacher is, or make one with train.py")
    teacher_file = checkpoint.read(path, want="teacher")
    known = known if saved else inherit(teacher_file, path) | known
    teacher = checkpoint.restore(teacher_file, path)
    checksum = distillation.checksum(teacher)  # of the weights as they are stored

    # Device and data, which settle what nobody said.
    device = processes.init_device(known.get("device"))
    train, val = open_data(known.get("data"))
    settings = settle(known, OWN, len(train.trainable()), device)
    check_teacher(settings, out, teacher, checksum, saved)
    train, val = (split.with_classes(teacher.config.classes, path) for split in (train, val))
    autocast = processes.autocast(device, settings.precision)

    # Pictures: in training what the teacher sees; in evaluation the student reads them straight at low resolution.
    training_set = CocoDataset(train, settings.short_sides, settings.long_side, flip=True)
    high_set = CocoDataset(val, (settings.test_side,), settings.long_side)
    low_set = CocoDataset(val, (settings.test_side,), settings.long_side, settings.downsample)

    # Models and optimizer.
    torch.manual_seed(settings.seed)
    student = checkpoint.restore(saved, out / "last.pt") if saved else new_student(settings, teacher)
    network = processes.parallel(student, device, settings)
    optimizer = build_optimizer(student, settings)
    teacher = distillation.freeze(teacher, settings.precision).to(device)

    log = open_folder(out, resume)
    print_header(settings, student, train, val, device, out)
    teacher_results = saved["training"]["teacher"] if saved else evaluate_all(teacher, high_set, settings, autocast)
    rows = {f"teacher @ {branch}": metrics for branch, metrics in teacher_results.items()}
    processes.print_once(evaluation.table(rows))
    kept = {"teacher": teacher_results, "teacher_checksum": checksum}
    run = Run("distill.py", out, log, settings, student, optimizer, low_set, autocast, saved, **kept)
    # Padded as H, of which L is made here.
    batches = run.timed(train_loader(training_set, settings.pad, settings, run.first, device))

    with run:
        for iteration in run.iterations():
            optimizer.zero_grad()
            chunks = next(batches).to(device).chunk(settings.accumulate)
            for batch in chunks:
                network.require_backward_grad_sync = batch is chunks[-1]  # DistributedDataParallel averages once
                high = student.normalize(batch.images, batch.sizes)  # for both: MEAN and STD are every model's
                if settings.kd:
                    with torch.no_grad(), autocast:
                        fused = teacher.pyramids(high, ["fused"])["fused"]
                with autocast:
                    pyramids, outputs = network(align.downsample(high, settings.downsample))
                losses = student.losses(pyramids, outputs, batch.boxes, batch.labels, processes.mean_over_processes)
                loss = sum(losses["low"].values())
                distances = {}
                if settings.kd:
                    distance = distillation.DISTANCES[settings.kd_loss](pyramids["low"], fused)
                    distances["kd"] = settings.kd * distillation.ramp(iteration, settings.kd_ramp) * distance
                    loss = loss + distances["kd"]
                (loss / len(chunks)).backward()
                run.collect(loss, losses, **distances)

            gradient = clip_grad_norm_(student.parameters(), settings.clip or math.inf)  # the norm, clipped or not
            numbers = run.averages(gradient)
            check_finite(iteration, numbers)  # raises before the weights change
            set_learning_rate(optimizer, settings, iteration)
            optimizer.step()
            run.end_iteration(iteration, numbers)
        results = run.evaluate(settings.iters)

    rows["student @ low"] = results["low"]
    columns = drawing.columns_of("teacher", teacher, ["fused", "low"])
    columns |= drawing.columns_of("student", student, ["low"])
    run.report(rows, columns, ["evaluate.py", "--ckpt"])


def check_teacher(settings, out, teacher, checksum, saved):
    """Raise InputError for a teacher that this run cannot have."""
    if settings.kd and settings.fpn_channels != teacher.config.fpn_channels:
        wanted = f"the teacher's pyramid has {teacher.config.fpn_channels}, and only equal ones can be distilled"
        raise InputError(f"--fpn-channels {settings.fpn_channels}: {wanted} (--kd 0 trains without)")
    if Path(settings.teacher).resolve() == (out / "last.pt").resolve():
        raise InputError(f"--out {out}: the teacher is in there as last.pt; choose another folder for the student")
    if saved and saved["training"]["teacher_checksum"] != checksum:
        mend = "put that one back (a later train.py renamed it to last.1.pt), or start a new --out"
        raise InputError(f"{settings.teacher}: is not the teacher that {out / 'last.pt'} began with; {mend}")


def new_student(settings, teacher):
    """A student with the weights that it starts from."""
    student = models.build(model_config(settings, "low", teacher.config.classes))
    if settings.weights != "none":
        processes.print_once(f"student   from the teacher {copy_detector(student, teacher)}")
    if settings.weights not in ("teacher", "none"):
        load_weights(student, settings.weights)
    return student


if __name__ == "__main__":
    processes.run_script(main)
