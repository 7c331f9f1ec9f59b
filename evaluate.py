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
import signal
from pathlib import Path

import torch

from msad.data.dataset import CocoDataset, open_data
from msad.data.errors import InputError, checkpoint_errors, write_errors
from msad.engine import checkpoint, drawing, evaluation, export, processes


def parse():
    parser = processes.Parser(__doc__, usage="%(prog)s --ckpt FILE [flags]")
    add = parser.add_argument_group("what is read").add_argument
    add("--ckpt", required=True, metavar="FILE", help="the checkpoint")
    add("--res", choices=("fused", "high", "low"), help="the branch [all; --images, --export: the first]")
    add("--data", metavar="DIR", help="folder in COCO layout [the one the checkpoint was trained on]")
    add("--images", metavar="PATH", help="instead of --data: a picture, or a folder of pictures")
    add = parser.add_argument_group("what is written").add_argument
    add("--per-class", action="store_true", help="also print each class's AP")
    add("--json", metavar="FILE", help="write the numbers, from 0 to 1, and the cost to a file")
    add("--detections", metavar="FILE", help="write what is found to a file, of one branch (see --res)")
    add("--export", metavar="FILE", help="write the network to a .pt2 or .onnx file, and evaluate nothing")
    add("--draw", nargs="?", type=int, const=8, default=0, metavar="N", help="draw N pictures (8), or all of --images")
    add("--teacher", metavar="FILE", help="with --draw: a teacher's checkpoint, to be drawn beside --ckpt")
    add("--threshold", type=float, default=drawing.THRESHOLD, metavar="X", help="lowest score drawn [0.4]")
    add("--out", metavar="DIR", help="folder for what is drawn and found [pictures, beside --ckpt]")
    add = parser.add_argument_group("the run").add_argument
    add("--batch", type=int, default=8, metavar="N", help="images at a time [8]")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images [0]")
    add("--device", metavar="X", help="cuda or cpu [CUDA where there is one]")
    add("--precision", choices=("fp32", "bf16"), help="[bf16 where the device has it; with --export fp32]")
    return parser.parse_args()


def main():
    args = parse()
    check(args)
    device = processes.init_device(args.device)
    precision = args.precision or processes.native_precision(device)
    autocast = processes.autocast(device, precision)

    content = checkpoint.read(args.ckpt)
    model = checkpoint.restore(content, args.ckpt).to(device)
    name = name_of(args, content)
    branches = choose_branches(args, model)
    if args.export:
        if processes.is_main():
            takes = export.save(args.export, model, branches[0], args.precision or "fp32")
            print(f"written to {args.export}: {name} @ {branches[0]}; {takes}")
        return
    columns = choose_columns(args, model, name, branches, device)
    out = make_folder(args)
    if args.images:
        if processes.is_main():
            look_at_images(args, model, columns, out, autocast)
        return

    with processes.main_first():
        (annotations,) = open_data(data_of(args, content), ["val"])
    annotations = annotations.with_classes(model.config.classes, args.ckpt)
    dataset = CocoDataset(annotations, (model.config.short_side,), model.config.long_side, model.downsample)
    results = evaluation.evaluate(model, dataset, branches, args.batch, args.workers, autocast)
    if not processes.is_main():
        return
    print(f"{args.ckpt}: {name}, {model.config.backbone} x{model.config.width:g}; {annotations.summary()}")
    found = {b: results[b][0] | {"cost": evaluation.measure_cost(model, dataset, b, autocast)} for b in branches}
    for branch, numbers in found.items():
        print_numbers(name, branch, numbers, args.per_class)
    print(f"\nmeasured on {device}, {precision}, {torch.get_num_threads()} thread(s)")
    if args.json:
        write_json(args.json, found, indent=1)
    if args.detections:
        category_ids = [c["id"] for c in model.config.classes]
        detections = evaluation.coco_results(results[branches[0]][1], annotations.image_ids, category_ids)
        write_json(args.detections, detections)
    if args.draw:
        draw(args, annotations, columns, out, autocast)


def check(args):
    """Raise InputError for flags that make no sense, alone or together."""
    for name, value, least in (("--batch", args.batch, 1), ("--workers", args.workers, 0), ("--draw", args.draw, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}")
    for name in ("data", "json", "detections", "per_class"):
        if args.images and getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')}: of no use with --images, where nothing is annotated")
    for name in ("data", "images", "json", "detections", "per_class", "draw"):
        if args.export and getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')}: of no use with --export, which looks at no picture")
    if args.teacher and not args.draw:
        raise InputError("--teacher: is drawn beside the checkpoint; add --draw")


def name_of(args, content):
    """What the model is called: "student" if a teacher trained it, else its kind."""
    with checkpoint_errors(args.ckpt):
        distilled = "teacher" in (content["training"] or {}).get("settings", {})
    return "student" if distilled else content["config"].kind


def choose_branches(args, model):
    """The branches that are read: of --images and --export one. Raises InputError where the model lacks it."""
    if args.res and args.res not in model.branches:
        has = ", ".join(model.branches)
        raise InputError(f"--res {args.res}: {args.ckpt} is a model of kind {model.config.kind}, which has {has}")
    if args.res:
        return [args.res]
    return list(model.branches[:1]) if args.images or args.export else sorted(model.branches)


def choose_columns(args, model, name, branches, device):
    """What is drawn, as from `drawing.columns_of`: the checkpoint's branches, after a teacher's if there is one."""
    if not args.teacher:
        return drawing.columns_of(name, model, branches)
    teacher = checkpoint.load(args.teacher, device, want="teacher")
    if tuple(teacher.config.classes) != tuple(model.config.classes):
        raise InputError(f"{args.teacher}: has other classes than {args.ckpt}; choose a teacher of the same data")
    return drawing.compare_columns(teacher, model, branches)


def make_folder(args):
    """The folder for what is drawn and found, made if there will be any."""
    out = Path(args.out or Path(args.ckpt).parent / "pictures")
    if args.images and out.resolve() == Path(args.images).resolve():
        raise InputError(f"--out {out}: the pictures to look at are in there; choose another folder")
    if args.images or args.draw:
        with write_errors(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
    return out


def data_of(args, content):
    """The data to evaluate on: what was typed, else what the checkpoint was trained on; "" stands for drawn shapes."""
    if args.data is not None:
        return args.data
    if content["training"] is None:
        raise InputError(f"{args.ckpt}: does not say what it was trained on; give --data DIR")
    with checkpoint_errors(args.ckpt):
        folder = content["training"]["settings"]["data"]
        if folder and not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder; {args.ckpt} was trained on it: --data says where it is now")
        return folder


def print_numbers(name, branch, numbers, per_class):
    """What was measured of a branch: metrics, and "cost" as from measure_cost."""
    print(f"\n{name} @ {branch}")
    print("  ".join(f"{name} {evaluation.percent(numbers[name])}" for name in evaluation.METRICS))
    print(f"{evaluation.cost_line(branch, numbers['cost'])}, the padded size most images have")
    milliseconds = numbers["cost"]["ms"]
    print("network {network:.1f} ms, post-processing {postprocessing:.1f} ms per single image".format(**milliseconds))
    if per_class:
        for label, value in numbers["classes"].items():
            print(f"  {label:20} {evaluation.percent(value):>6}")


def draw(args, annotations, columns, out, autocast):
    """Draw --draw annotated pictures, evenly spread over the split."""
    indices = drawing.spread_indices(annotations, args.draw)
    for index in indices:
        strip = drawing.compare(annotations, index, columns, autocast, threshold=args.threshold)
        drawing.save(strip, out, index + 1, annotations.path(index))
    print(f"drawn: {len(indices)} pictures, scores from {args.threshold:g}, in {out}")


def write_json(path, content, indent=None):
    with write_errors(path):
        Path(path).write_text(json.dumps(content, indent=indent))
    print(f"written to {path}")


def look_at_images(args, model, columns, out, autocast):
    """Run on pictures without annotations: write what the model finds and, with --draw, what that looks like."""
    found, names, failed = [], [], []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends like Ctrl-C
    try:
        for number, path, image in drawing.read_all(args.images):
            seen = drawing.detect_all(image, columns, autocast)
            found.append((len(names), list(seen.values())[-1]))
            names.append(path.name)
            if args.draw:
                try:
                    drawing.save(drawing.strip(image, seen, model.config.classes, args.threshold), out, number, path)
                except Exception as error:  # whatever it is, the next is drawn
                    failed.append(str(error))
    finally:  # whatever ends it, Ctrl-C too, what was found must not be lost for it
        if names:
            results = evaluation.coco_results(found, names, [c["id"] for c in model.config.classes])
            results = [entry | {"file_name": entry["image_id"]} for entry in results]
            write_json(out / "detections.json", results)
            print(f"{list(columns)[-1]}: {len(results)} detections in {len(names)} picture(s)")
    if args.draw:
        print(f"drawn: {len(names) - len(failed)} pictures, scores from {args.threshold:g}, in {out}")
    if failed:
        raise InputError(f"{len(failed)} pictures could not be drawn, the first because of: {failed[0]}")


if __name__ == "__main__":
    processes.run_script(main)
