"""Evaluate a checkpoint on the validation split, or run it on pictures of your own.

    python evaluate.py --ckpt runs/student/last.pt              COCO's twelve numbers, and what the model costs
    python evaluate.py --ckpt runs/teacher/last.pt --res fused  one branch of a teacher: fused, high or low
    python evaluate.py --ckpt runs/student/last.pt --teacher runs/teacher/last.pt --draw    and pictures of both
    python evaluate.py --ckpt runs/student/last.pt --images FILE_OR_FOLDER --draw           without annotations
    python evaluate.py --ckpt runs/student/last.pt --export student.pt2    a network that runs without this package

--detections FILE and --images write COCO's result format: a list of {"image_id": as in the data's annotations; of
--images the file's name, which is "file_name" too; "category_id": as in the data the checkpoint was trained on; "bbox":
[x, y, width, height] in the picture's pixels, upright; "score": 0 to 1}. --images writes it to OUT/detections.json.
"""

import json
import os
import signal
from pathlib import Path

import torch

from msad.data.dataset import CocoDataset, open_data
from msad.data.errors import InputError, checkpoint_errors, write_errors
from msad.engine import checkpoint, cost, drawing, evaluation, export, processes
from msad.engine.files import write_whole
from msad.engine.run import keep_earlier


def parse():
    parser = processes.Parser(__doc__, usage="%(prog)s --ckpt FILE [flags]")
    group = parser.add_argument_group("what is read")
    group.add_argument("--ckpt", required=True, metavar="FILE", help="the checkpoint")
    group.add_argument("--res", choices=("fused", "high", "low"), help="the branch [all; --images, --export: first]")
    add = group.add_mutually_exclusive_group().add_argument
    add("--data", metavar="DIR", help="folder in COCO layout [the one the checkpoint was trained on]")
    add("--images", metavar="PATH", help="instead of --data: a picture, or a folder of pictures")
    add("--export", metavar="FILE", help="instead: write the network to a .pt2 file, and evaluate nothing")
    add = parser.add_argument_group("what is written").add_argument
    add("--per-class", action="store_true", help="also print each class's AP")
    add("--json", metavar="FILE", help="write the numbers, from 0 to 1, and the cost to a file")
    add("--detections", metavar="FILE", help="write what is found to a file, of one branch (see --res)")
    add("--draw", nargs="?", type=int, const=8, default=0, metavar="N", help="draw N pictures (8), or all of --images")
    add("--teacher", metavar="FILE", help="with --draw: a teacher's checkpoint, to be drawn beside --ckpt")
    add("--threshold", type=float, default=drawing.THRESHOLD, metavar="X", help="lowest score drawn [0.4]")
    add("--out", metavar="DIR", help="folder for what is drawn and found [beside --ckpt: pictures; --images: found]")
    add = parser.add_argument_group("the run").add_argument
    add("--batch", type=int, default=8, metavar="N", help="images at a time [8]")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images [0]")
    add("--device", metavar="X", help="cuda or cpu [CUDA where there is one]")
    add("--precision", choices=("fp32", "bf16"), help="[bf16 where the device has it; with --export fp32]")
    args = parser.parse_args()

    if args.batch < 1 or min(args.workers, args.draw) < 0:
        parser.error("--batch must be at least 1, --workers and --draw at least 0")
    if (args.teacher or args.out and not args.images) and not args.draw:
        parser.error("--teacher, --out: who is drawn beside the checkpoint, and where; add --draw")
    numbers = args.json or args.detections or args.per_class
    if args.images and numbers or args.export and (numbers or args.draw):
        parser.error("--json, --detections, --per-class: of no use with --images or --export, nor --draw with --export")
    return args


def main():
    args = parse()
    device = processes.init_device(args.device)
    precision = args.precision or processes.native_precision(device)
    autocast = processes.autocast(device, precision)

    # The model, what it is called, and what of it is read.
    content = checkpoint.read(args.ckpt)
    model = checkpoint.restore(content, args.ckpt).to(device)
    with checkpoint_errors(args.ckpt):
        settings = (content["training"] or {}).get("settings", {})
        name = "student" if "teacher" in settings else model.config.kind
        folder = settings.get("data") if args.data is None else args.data  # "" stands for the drawn shapes
    if args.res and args.res not in model.branches:
        raise InputError(f"--res {args.res}: {args.ckpt} is a {name} and has {', '.join(model.branches)}")
    branches = [args.res] if args.res else model.branches[:1] if args.export or args.images else sorted(model.branches)

    if args.export:
        if processes.is_main():
            try_results([args.export], [args.ckpt])
            takes = export.save(args.export, model, branches[0], args.precision or "fp32")
            print(f"written to {args.export}: {name} @ {branches[0]}; {takes}")
        return

    # What is drawn, and where.
    columns = drawing.columns_of(name, model, branches)
    if args.teacher:
        teacher = checkpoint.load(args.teacher, device, want="teacher")
        if tuple(teacher.config.classes) != tuple(model.config.classes):
            raise InputError(f"{args.teacher}: has other classes than {args.ckpt}; choose a teacher of the same data")
        columns = drawing.columns_of("--teacher", teacher, ["fused", "low"]) | columns
    out = Path(args.out or Path(args.ckpt).parent / ("found" if args.images else "pictures"))
    if args.images or args.draw:
        with write_errors(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
    if args.images:
        if processes.is_main():
            look_at_images(args, model.config.classes, columns, out, autocast)
        return

    # Data: what was typed, else what the checkpoint was trained on.
    if folder is None:
        raise InputError(f"{args.ckpt}: does not say what it was trained on; give --data DIR")
    (annotations,) = open_data(folder, ["val"])
    annotations = annotations.with_classes(model.config.classes, args.ckpt)
    dataset = CocoDataset(annotations, (model.config.short_side,), model.config.long_side, model.input_downsample)
    paths = [path for path in (args.json, args.detections) if path]
    if processes.is_main():
        try_results(paths, [args.ckpt, args.teacher or args.ckpt, annotations.file])

    found = evaluation.evaluate(model, dataset, branches, args.batch, args.workers, autocast)
    if not processes.is_main():
        return
    numbers = {b: found[b][0] | {"cost": cost.measure_cost(model, dataset, b, autocast)} for b in branches}
    try:  # files first, words after: neither is lost for the other
        if args.json:
            write_json(args.json, numbers, indent=1)
        if args.detections:
            ids = annotations.image_ids, [c["id"] for c in model.config.classes]
            write_json(args.detections, evaluation.coco_results(found[branches[0]][1], *ids))
    finally:
        print(f"{args.ckpt}: {name}, {model.config.backbone} x{model.config.width:g}; {annotations.summary()}")
        for branch in branches:
            print_numbers(f"{name} @ {branch}", branch, numbers[branch], args.per_class)
        print(f"\nmeasured on {device}, {precision}, {torch.get_num_threads()} thread(s)")
    for path in paths:
        print(f"written to {path}")
    if args.draw:
        indices = drawing.spread_indices(annotations, args.draw)
        for index in indices:
            strip = drawing.compare(annotations, index, columns, autocast, args.threshold)
            drawing.save(strip, out, index + 1, annotations.path(index))
        print(f"drawn: {len(indices)} pictures, scores from {args.threshold:g}, in {out}")


def try_results(results, inputs):
    """Raise InputError for a path of results that cannot be written, or is that of another or of a file that is read.

    This comes before the work, and leaves no trace: what stands there stays until the results are known.
    """
    places = [Path(path).resolve() for path in results]
    for path, place in zip(results, places):
        is_new = not os.path.lexists(path)
        with write_errors(path):
            open(path, "ab").close()
        is_taken = places.count(place) > 1 or any(os.path.samefile(path, other) for other in inputs)
        if is_new:
            os.remove(path)
        if is_taken:
            raise InputError(f"{path}: is read, or written to, by the same command; choose another place")


def write_json(path, content, indent=None):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=indent).encode()))


def print_numbers(title, branch, numbers, per_class):
    """What was measured of a branch: metrics, and "cost" as from measure_cost."""
    print(f"\n{title}")
    print("  ".join(f"{name} {evaluation.percent(numbers[name])}" for name in evaluation.METRICS))
    print(f"{cost.cost_line(branch, numbers['cost'])}, the padded size most images have")
    print("network {network:.1f} ms, post-processing {postprocessing:.1f} ms per image".format(**numbers["cost"]["ms"]))
    if per_class:
        for label, value in numbers["classes"].items():
            print(f"  {label:20} {evaluation.percent(value):>6}")


def look_at_images(args, classes, columns, out, autocast):
    """Run on pictures without annotations: write what the model finds and, with --draw, what that looks like."""
    path = out / "detections.json"
    if out.resolve() == Path(args.images).resolve():
        raise InputError(f"--out {out}: the pictures to look at are in there; choose another folder")
    try_results([path], [])
    found, names = [], []
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C's
    try:
        for number, file, image in drawing.read_all(args.images):
            seen = drawing.detect_all(image, columns, autocast)
            found.append((len(names), list(seen.values())[-1]))
            names.append(file.name)
            if args.draw:
                drawing.save(drawing.strip(image, seen, classes, args.threshold, 2 * drawing.SIDE), out, number, file)
    finally:  # whatever ends it, Ctrl-C too, what was found must not be lost for it
        if names:
            results = evaluation.coco_results(found, names, [c["id"] for c in classes])
            keep_earlier(out, [path.name])
            write_json(path, [entry | {"file_name": entry["image_id"]} for entry in results])
            print(f"{list(columns)[-1]}: {len(results)} detections in {len(names)} picture(s), written to {path}")
            if args.draw:
                print(f"drawn: scores from {args.threshold:g}, in {out}")


if __name__ == "__main__":
    processes.run_script(main)
