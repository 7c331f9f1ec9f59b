"""Train a teacher: one network on high and low resolution at once, aligned and fused.

    python train.py                         the multi-scale aligned teacher (--res multi)
    python train.py --res multi --no-align  the paper's baseline: conventional multi-scale training
    python train.py --res high | low        one resolution alone
"""

from dataclasses import dataclass
from pathlib import Path

from msad import checkpoint, curve, models, official, pictures, processes, settings as S, training as T
from msad.annotations import InputError
from msad.data import CocoDataset
from msad.log import Progress, introduce, report, stopped

# L_teacher = L_det(H) + L_det(L) + 0.4 L_det(fused); a single resolution counts fully.
WEIGHT = {"high": 1.0, "low": 1.0, "fused": 0.4}


@dataclass(frozen=True)
class Settings(S.Recipe):
    res: str = S.option("multi", "resolutions to train on", ("multi", "high", "low"))
    no_align: bool = S.option(False, "with --res multi: no shift and no fusion, the conventional baseline")


def kind_of(settings):
    if settings.res == "multi":
        return "conventional" if settings.no_align else "teacher"
    if settings.no_align:
        raise InputError(f"--no-align: of no use with --res {settings.res}, where nothing is aligned")
    return settings.res


def open_run():
    """The settings of this run, its folder, and the checkpoint it goes on from, if any."""
    given, go_on = S.parse(Settings, __doc__)
    saved, settings = None, S.settle(Settings, given)
    kind = kind_of(settings)  # refuses what makes no sense, before an earlier run is moved aside
    out = Path(settings.out or f"runs/{kind}")
    if go_on and (out / "last.pt").exists():
        saved, settings = S.resume(Settings, given, out / "last.pt")
    device, settings = T.start(settings)
    return settings, device, T.open_folder(out, fresh=not go_on), saved


def open_sets(settings, kind, train, val):
    """Both splits at the network's size; a low-resolution model reads them at low resolution."""
    low = settings.downsample if kind == "low" else ""
    training_set = CocoDataset(train, settings.short_sides, settings.long_side, low, flip=True)
    return training_set, CocoDataset(val, (settings.test_side,), settings.long_side, low)


def run():
    settings, device, out, saved = open_run()
    kind = kind_of(settings)
    train, val = T.open_data(settings.data)
    training_set, validation_set = open_sets(settings, kind, train, val)
    if saved:
        model = checkpoint.restore(saved, out / "last.pt").to(device)
        T.check_classes("the data", train.classes, "the checkpoint", model.config.classes)
    else:
        model = models.build(S.model_config(settings, kind, train.classes)).to(device)
        official.load_backbone(model.backbone, settings)
    network = processes.parallel(model)
    start, log, update = T.begin(model, saved, settings, device, out)
    autocast = T.autocast_for(device, settings.precision)
    introduce(settings, model, train, val, device, out)

    evaluate = lambda: T.evaluate(model, validation_set, settings, autocast)
    batches = T.batches(training_set, model.multiple, settings, start, device)
    progress = Progress(settings, start)
    interrupt = T.Interrupt(settings, device)
    model.train()

    for iteration in range(start, settings.iters):
        batch = next(batches).to(device)
        with autocast:
            _, outputs = network(model.normalize(batch.images, batch.sizes))
        losses = model.losses(outputs, batch.boxes, batch.labels)
        loss = sum(WEIGHT[name.split("/")[0]] * value for name, value in losses.items())
        lr = update(iteration, loss, losses)

        progress.show(iteration, loss, losses)
        log.losses(iteration, loss, losses, lr, settings.log_every)
        done, stop = iteration + 1, interrupt.asked(iteration)
        if done % settings.eval_every == 0 and done < settings.iters:
            log.results(done, evaluate())
        if done % settings.save_every == 0 or done == settings.iters or stop:
            T.save(out, model, update, done, log)
        if stop and done < settings.iters:
            return stopped("train.py", out, done)
    progress.close()
    interrupt.release()

    results = evaluate()
    log.results(settings.iters, results)
    drawn = curve.draw_run(out, val, pictures.readings(kind, model, sorted(model.branches)), autocast)
    rows = {f"{kind} @ {branch}": metrics for branch, metrics in results.items()}
    report(rows, out, settings, drawn, ["distill.py", "--teacher"] if kind == "teacher" else ["evaluate.py", "--ckpt"])


if __name__ == "__main__":
    T.main(run)
