"""How fast this is beside its peers at the same work.

    python .github/benchmark/benchmark.py [--json FILE] [--only TEXT] [--runs N]

Every row measures ours and its peer in turn in one process and compares medians; peers of training and inference are
torchvision's detectors. ResNet-50, 256 channels, 80 classes, 512x768, all layers training, batches of 2 in training and
1 in inference, fp32, unless the row says otherwise. "of best" is ours beside the best 3x3 convolution (256 -> 256) of
the same precision, measured in the same turns. Run it on a machine that does nothing else.

--device cuda measures the rows of benchmark_cuda.py instead; --device cpu with a small --size tries these out.
--only export measures those of benchmark_export.py.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import benchmark_cuda as cuda
import benchmark_data as data
import benchmark_export as export
import benchmark_networks as net
import torch

from msad.engine import processes


class Row(NamedTuple):
    """What is measured: two makers of functions to time in turn, or one function that gives two numbers."""

    name: str
    limit: float
    ours: Callable
    peer: Callable | None = None
    precision: str = "fp32"


STEP, PEER_STEP, INFERENCE = net.our_step, net.peer_step, net.our_inference
BF16_STEP = partial(STEP, "teacher", precision="bf16")
ROWS = (
    Row("training step, high, FCOS", 0.80, partial(STEP, "high"), PEER_STEP),
    Row("training step, high, RetinaNet", 0.80, partial(STEP, "high", "retinanet"), partial(PEER_STEP, "retinanet")),
    Row("teacher step / one-resolution step", 1.75, partial(STEP, "teacher"), PEER_STEP),
    Row("distillation step / one-resolution step", 0.70, net.our_distillation, PEER_STEP),
    Row("inference, student at low / high", 0.60, INFERENCE, net.peer_inference),
    Row("inference, slim student at low / high", 0.30, partial(INFERENCE, head_channels=128), net.peer_inference),
    Row("teacher step, bf16 / our fp32", 0.45, BF16_STEP, partial(STEP, "teacher"), "bf16"),
    Row("inference, student, bf16 / our fp32", 0.45, partial(INFERENCE, "bf16"), INFERENCE, "bf16"),
    Row("pixels computed for 800x1333 / its own", 1.05, data.pixels),
    Row("s of assignment, FCOS / training step", 0.03, partial(net.assignment, "fcos")),
    Row("s of assignment, RetinaNet / training step", 0.03, partial(net.assignment, "retinanet")),
    Row("s of post-processing, FCOS / inference", 0.03, partial(net.postprocessing, "fcos")),
    Row("s of post-processing, RetinaNet / inference", 0.03, partial(net.postprocessing, "retinanet")),
    Row("ms from JPEG to 800x1066 / decoding", 4.0, partial(data.jpeg, None)),
    Row("ms from JPEG to 400x533 / decoding", 2.0, partial(data.jpeg, "area")),
    Row("s to read COCO's annotations / json.load", 1.5, data.reading_annotations),
    Row("MB of its own a worker adds / 50", 1.0, data.memory_of_a_worker),
    Row("MB at the peak of a teacher step / one resolution", 1.6, net.peak_memory),
    Row("s of a step of 2 images, halved / of 1", 1.10, partial(net.growth, {"batch": 2}, {"batch": 1}, 1 / 2)),
    Row("s of a step of 4 images, quartered / of 1", 1.10, partial(net.growth, {"batch": 4}, {"batch": 1}, 1 / 4)),
    Row("s of a step of 4 x the pixels, quartered", 1.10, partial(net.growth, {}, {"scale": 0.5}, 1 / 4)),
)
CONVOLUTIONS = ((2, 64, 96), (2, 128, 192), (4, 64, 64))  # batch, height, width


def convolution(precision, batch, height, width):
    """A function that runs one 3x3 convolution of 256 channels, and its GMACs."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(kind, memory_format=torch.channels_last)
    images = torch.randn(batch, 256, height, width, dtype=kind).contiguous(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            layer(images)

    return run, batch * height * width * 256 * 256 * 9 / 1e9


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def alternate(functions, runs):
    """Median seconds of functions called in turn, after one call each that does not count."""
    for function in functions:
        function()
    times = [[seconds(function) for function in functions] for _ in range(runs)]
    return [statistics.median(column) for column in zip(*times)]


def measure(row, runs):
    """One row: {"name", "ours", "peer", "ratio", "limit"}, and for networks "gmacs", "rate" and "of_best"."""
    if row.peer is None:
        ours, peer = row.ours()
        return compared(row.name, ours, peer, row.limit)
    ours, peer = row.ours(), row.peer()
    work = net.gmacs(ours)
    convolutions = [convolution(row.precision, *shape) for shape in CONVOLUTIONS]
    a, b, *others = alternate([ours, peer, *(run for run, _ in convolutions)], runs)
    best = max(work / time for time, (_, work) in zip(others, convolutions))
    return compared(row.name, a, b, row.limit) | {"gmacs": work, "rate": work / a, "best_rate": best}


def compared(name, ours, peer, limit):
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit}


def show(row):
    text = f"{row['name']:50} {row['ours']:9.3f} {row['peer']:9.3f} {row['ratio']:6.2f} {row['limit']:6.2f}"
    if "gmacs" in row:
        text += f" {row['gmacs']:8.1f} {row['rate']:7.1f} {100 * row['rate'] / row['best_rate']:5.0f} %"
    print(text + ("" if row["ratio"] <= row["limit"] else "   over"), flush=True)


def write(path, results):
    if not results:
        sys.exit("no row has that in its name")
    if path:
        Path(path).write_text(json.dumps(results, indent=1))


def measure_all(only, runs):
    """Print all rows whose name contains `only` -> them, as a list of dicts."""
    rows = [Row(*row) for row in export.rows()] if only.startswith("export") else ROWS
    chosen = [row for row in rows if only in row.name]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':50} {'ours':>9} {'peer':>9} {'ratio':>6} {'limit':>6} {'GMACs':>8} {'GMAC/s':>7} {'of best':>7}")
    results = []
    for row in chosen:
        new = [measure(row, runs)]
        if row.name.startswith("teacher step / one"):
            best, rate = new[0]["best_rate"], new[0]["rate"]
            new.append(compared("GMAC/s: best convolution / that teacher step", best, rate, 1 / 0.70))
        for result in new:
            show(result)
        results += new
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the rows to a file")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="turns (default: 5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--device", default="", choices=("cuda", "cpu"), help="measure the other rows, on this device")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[800, 1333], metavar="N", help="of these: height and width"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 16], metavar="N", help="of these: batch sizes")
    args = parser.parse_args()
    if args.device:
        return write(args.json, cuda.main(args.device, args.size, args.batches, args.only, args.runs))
    return write(args.json, measure_all(args.only, args.runs))


if __name__ == "__main__":
    processes.run_script(main)
