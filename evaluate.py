"""Evaluate a checkpoint on the validation split: COCO's twelve numbers.

    python evaluate.py --ckpt runs/student/last.pt              a student is read and run at low resolution only
    python evaluate.py --ckpt runs/teacher/last.pt --res fused  a teacher: fused, high or low (default: all)
"""

import argparse
import json
from pathlib import Path

from msad import checkpoint, evaluation, processes, settings as S, training as T
from msad.annotations import InputError
from msad.data import CocoDataset


def parse():
    usage = "%(prog)s --ckpt FILE [flags]"
    parser = S.Parser(description=__doc__, usage=usage, allow_abbrev=False, formatter_class=S.Help)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument("--data", default="", metavar="DIR", help="folder in COCO layout (default: drawn shapes)")
    parser.add_argument("--res", choices=("fused", "high", "low"), help="the branch to evaluate (default: all it has)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    parser.add_argument("--device", default="", metavar="X", help="cuda or cpu (default: CUDA where there is one)")
    parser.add_argument("--precision", default="", choices=("fp32", "bf16"), help="default: bf16 if native")
    parser.add_argument("--per-class", action="store_true", help="also print each class's AP")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, from 0 to 1, to a file")
    return parser.parse_args()


def run():
    args = parse()
    for name, value, least in (("--batch", args.batch, 1), ("--workers", args.workers, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}")
    device = processes.device_of(args.device)
    processes.start(device)
    autocast = T.autocast_for(device, T.precision_of(device, args.precision))

    model = checkpoint.load(args.ckpt, device)
    if args.res and args.res not in model.branches:
        has = ", ".join(model.branches)
        raise InputError(f"--res {args.res}: {args.ckpt} is a model of kind {model.config.kind}, which has {has}")
    branches = [args.res] if args.res else sorted(model.branches)

    (annotations,) = T.open_data(args.data, ["val"])
    T.check_classes("the data", annotations.classes, "the checkpoint", model.config.classes)
    dataset = CocoDataset(annotations, (model.config.short_side,), model.config.long_side, model.low_input)

    results = evaluation.evaluate(model, dataset, branches, args.batch, args.workers, autocast)
    if processes.is_main():
        report(args, model, annotations, results)


def report(args, model, annotations, results):
    print(f"{args.ckpt}: {model.config.kind}, {model.config.backbone} x{model.config.width:g}; {annotations.summary()}")
    for branch, (metrics, _) in results.items():
        print(f"\n{model.config.kind} @ {branch}")
        print("  ".join(f"{name} {evaluation.percent(metrics[name])}" for name in evaluation.METRICS))
        if args.per_class:
            for name, value in metrics["classes"].items():
                print(f"  {name:20} {evaluation.percent(value):>6}")
    if args.json:
        content = {branch: metrics for branch, (metrics, _) in results.items()}
        try:
            Path(args.json).write_text(json.dumps(content, indent=1))
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written ({error.strerror})") from None
        print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    T.main(run)
