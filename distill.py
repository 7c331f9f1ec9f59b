"""Distil a teacher's fused pyramid into a student that sees low resolution only.

    python distill.py --teacher runs/teacher/last.pt          the student starts from the teacher's weights
    python distill.py --teacher runs/teacher/last.pt --kd 0   the control: the same, without distillation
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from msad import align, checkpoint, curve, distillation, evaluation, models, official, pictures
from msad import processes, settings as S, training as T
from msad.annotations import InputError
from msad.data import CocoDataset
from msad.distillation import LOSSES, ramp
from msad.log import Progress, introduce, report, show, stopped
from msad.tensors import blamed


@dataclass(frozen=True)
class Settings(S.Recipe):
    teacher: str = S.option("", "the teacher's checkpoint (needed)")
    kd_loss: str = S.option("l1", "distance of the pyramids: the paper's l1, or PKD's correlation", tuple(LOSSES))
    kd: float = S.option(0.6, "its weight: alpha 0.2 times tau 3 in the paper; 0 turns it off")
    kd_ramp: int = S.option(500, "iterations until the distillation has its full weight")
    weights: str = S.option("teacher", "start: teacher, none, or with a backbone from imagenet or a FILE [teacher]")


def student_settings(given):
    """Settings in which the student is like the teacher, as far as nothing else was asked for; and the teacher."""
    if "teacher" not in given:
        raise InputError("--teacher CKPT is needed: train one with train.py")
    teacher = checkpoint.load_teacher(given["teacher"])
    return S.settle(Settings, given, S.architecture(teacher.config) | {"weights": "teacher"}), teacher


def open_run():
    """The settings of this run, its folder, the checkpoint it goes on from, if any, and the teacher."""
    given, go_on = S.parse(Settings, __doc__)
    out = Path(given.get("out") or "runs/student")
    if go_on and (out / "last.pt").exists():
        saved, settings = S.resume(Settings, given, out / "last.pt")
        teacher = checkpoint.load_teacher(settings.teacher)
        check_same(teacher, saved["training"], settings, out)
    else:
        saved, (settings, teacher) = None, student_settings(given)
    if settings.kd and settings.fpn_channels != teacher.config.fpn_channels:
        raise InputError(
            f"--fpn-channels {settings.fpn_channels}: the teacher's pyramid has {teacher.config.fpn_channels}; only "
            "equal ones can be distilled (--kd 0 trains without)"
        )
    if Path(settings.teacher).resolve().parent == out.resolve():
        raise InputError(f"--out {out}: the teacher is in there; choose another folder for the student")
    device, settings = T.start(settings)
    return settings, device, T.open_folder(out, fresh=not go_on), saved, teacher


def check_same(teacher, training, settings, out):
    """Raise InputError unless a run that goes on has the teacher it began with."""
    with blamed(out / "last.pt"):
        evaluation.table(training["teacher"])  # its numbers are shown again
        same = training["teacher_checksum"] == distillation.checksum(teacher)
    if not same:
        raise InputError(
            f"{settings.teacher}: is not the teacher that {out / 'last.pt'} began with; put that one back (a later "
            "train.py renamed it to last.1.pt), or start a new --out"
        )


def open_sets(settings, teacher):
    """For training what the teacher sees, for validation the same, and images read straight at low resolution."""
    train, val = T.open_data(settings.data)
    T.check_classes("the data", train.classes, "the teacher", teacher.config.classes)
    training_set = CocoDataset(train, settings.short_sides, settings.long_side, flip=True)
    high_set = CocoDataset(val, (settings.test_side,), settings.long_side)
    return training_set, high_set, CocoDataset(val, (settings.test_side,), settings.long_side, settings.downsample)


def open_models(settings, saved, teacher, out, device):
    """The student as its run left it, or a new one with the weights it starts from; and the frozen teacher."""
    student = checkpoint.restore(saved, out / "last.pt") if saved else new_student(settings, teacher)
    return student.to(device), distillation.freeze(teacher).to(device)


def new_student(settings, teacher):
    student = models.build(S.model_config(settings, "low", teacher.config.classes))
    line = "from random weights"
    if settings.weights != "none":
        line = distillation.start_from(student, teacher)
    if settings.weights not in ("teacher", "none"):
        official.load_backbone(student.backbone, settings)
        line += f"; then the backbone from {settings.weights}"
    if processes.is_main():
        print(f"student   {line}")
    return student


def run():
    settings, device, out, saved, teacher = open_run()
    training_set, high_set, low_set = open_sets(settings, teacher)
    checksum = distillation.checksum(teacher)
    student, teacher = open_models(settings, saved, teacher, out, device)
    network = processes.parallel(student)
    start, log, update = T.begin(student, saved, settings, device, out)
    autocast = T.autocast_for(device, settings.precision)
    introduce(settings, student, training_set.annotations, low_set.annotations, device, out)

    evaluate = lambda: T.evaluate(student, low_set, settings, autocast)
    teacher_results = saved["training"]["teacher"] if saved else T.evaluate(teacher, high_set, settings, autocast)
    rows = {f"teacher @ {branch}": metrics for branch, metrics in teacher_results.items()}
    show(rows)
    batches = T.batches(training_set, settings.pad, settings, start, device)
    progress = Progress(settings, start)
    interrupt = T.Interrupt(settings, device)
    student.train()

    for iteration in range(start, settings.iters):
        batch = next(batches).to(device)
        high = student.normalize(batch.images, batch.sizes)
        with autocast:
            pyramids, outputs = network(align.downsample(high, settings.downsample))
        losses = student.losses(outputs, batch.boxes, batch.labels)
        if settings.kd:
            with torch.no_grad(), autocast:
                fused = teacher.pyramids(high, ["fused"])["fused"]
            distance = LOSSES[settings.kd_loss](pyramids["low"], fused)
            losses["kd"] = settings.kd * ramp(iteration, settings.kd_ramp) * distance
        loss = sum(losses.values())
        lr = update(iteration, loss, losses)

        progress.show(iteration, loss, losses)
        log.losses(iteration, loss, losses, lr, settings.log_every)
        done, stop = iteration + 1, interrupt.asked(iteration)
        if done % settings.eval_every == 0 and done < settings.iters:
            log.results(done, evaluate())
        if done % settings.save_every == 0 or done == settings.iters or stop:
            T.save(out, student, update, done, log, teacher=teacher_results, teacher_checksum=checksum)
        if stop and done < settings.iters:
            return stopped("distill.py", out, done)
    progress.close()
    interrupt.release()

    results = evaluate()
    log.results(settings.iters, results)
    drawn = curve.draw_run(out, low_set.annotations, pictures.beside(teacher, student, ["low"]), autocast)
    report(rows | {"student @ low": results["low"]}, out, settings, drawn, ["evaluate.py", "--ckpt"])


if __name__ == "__main__":
    T.main(run)
