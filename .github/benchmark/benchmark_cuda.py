"""Training steps and single images beside torchvision's on one device: .github/benchmark/benchmark.py --device cuda

ResNet-50, 80 classes, bf16 (fp32 where a device would imitate it), pictures of 800x1333 that lie on the device already,
all layers training. "ms" is the median time of a call until the device has done all of it, "host" the time in which the
host has asked for it: where both are equal, the host is what limits. For "host" a training step leaves out the look at
its numbers. "GiB" is PyTorch's peak of memory allocated, and reserved. "TFLOP/s" counts a multiply-accumulate of
convolutions and matrix products as two. "ratio" is ms to those of torchvision's detector of one high resolution with
the same head and batch. A row that fails, for want of memory say, tells why, and the others go on.
"""

import statistics
import time
from functools import partial
from typing import Callable, NamedTuple

import benchmark_networks as net
import torch

from msad.engine import processes

HEADS = {"FCOS": "fcos", "RetinaNet": "retinanet"}
WARM_UP = 3  # calls that do not count


class Row(NamedTuple):
    """What is measured: a maker of a function, and how many images the function takes."""

    name: str
    images: int
    make: Callable
    group: str  # rows of a group are compared with its peer
    limit: float = 0.0  # of the ratio; 0: none is stated
    peer: bool = False
    reads: bool = False  # a training step of ours, which can leave out the look at its numbers


def rows(batches, precision):
    """All rows; a peer stands before what is compared with it."""
    found = []
    for batch in batches:
        for title, head in HEADS.items():
            group, details = f"{title} x{batch}", {"head": head, "batch": batch, "precision": precision}
            one, teacher = (partial(net.our_step, kind, **details) for kind in ("high", "teacher"))
            student = partial(net.our_distillation, **details)
            found += [
                Row(f"{group}: torchvision's step", batch, partial(net.peer_step, **details), group, peer=True),
                Row(f"{group}: one resolution", batch, one, group, 0.6, reads=True),
                Row(f"{group}: teacher", batch, teacher, group, reads=True),
                Row(f"{group}: student", batch, student, group, reads=True),
            ]
    for title, head in HEADS.items():
        group, ours = f"{title}, an image", partial(net.our_inference, precision, head=head)
        found += [
            Row(f"{group}: torchvision", 1, partial(net.peer_inference, head, precision), group, peer=True),
            Row(f"{group}: student", 1, ours, group, 0.6),
            Row(f"{group}: slim student", 1, partial(ours, head_channels=128), group),
            Row(f"{group}: student, network", 1, partial(ours, network=True), group),
        ]
    return found


def finish():
    """Wait until the device has done all it was asked."""
    if net.DEVICE.type == "cuda":
        torch.cuda.synchronize(net.DEVICE)


def timed(function):
    """Seconds in which a function gives back, and in which the device is done."""
    finish()
    began = time.perf_counter()
    function()
    asked = time.perf_counter()
    finish()
    return asked - began, time.perf_counter() - began


def measure(row, runs):
    """One row: {"name", "images", "ms", "host", "tflops", "allocated", "reserved"}."""
    cuda = net.DEVICE.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(net.DEVICE)
    function = row.make()
    for _ in range(WARM_UP):
        function()
    done = [timed(function)[1] for _ in range(runs)]
    peak = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
    asking = partial(function, read=False) if row.reads else function
    asked = [timed(asking)[0] for _ in range(runs)]
    seconds = statistics.median(done)
    found = {"name": row.name, "images": row.images, "ms": 1000 * seconds, "host": 1000 * statistics.median(asked)}
    found |= dict(zip(("allocated", "reserved"), (size / 2**30 for size in peak)))
    return found | {"tflops": 2 * net.gmacs(function) / seconds / 1000}


def show(row, found, ratio):
    text = f"{row.name:38} {1000 * row.images / found['ms']:8.1f} {found['ms']:8.1f} {found['host']:8.1f}"
    text += f" {found['tflops']:8.2f} {found['allocated']:6.1f} {found['reserved']:6.1f}"
    if ratio:
        text += f" {ratio:6.2f}"
    if ratio and row.limit:
        text += f" {row.limit:6.2f}" + ("" if ratio <= row.limit else "   over")
    print(text, flush=True)


def main(device, size, batches, only, runs):
    """Print all rows whose name contains `only` -> them, as a list of dicts."""
    net.DEVICE, (net.HEIGHT, net.WIDTH) = processes.init_device(device), size
    precision = processes.native_precision(net.DEVICE)
    print(f"torch {torch.__version__}, {processes.describe(net.DEVICE)}, {size[0]}x{size[1]}, {precision}")
    print(f"{'':38} images/s       ms     host  TFLOP/s    GiB   res.  ratio  limit")
    results, peers = [], {}
    for row in rows(batches, precision):
        if only not in row.name:
            continue
        try:
            found = measure(row, runs)
        except RuntimeError as error:  # out of memory, or cuDNN's and cuBLAS's ways to say so: the others go on
            reason = str(error).splitlines()[0]
            print(f"{row.name:38} {reason}", flush=True)
            results.append({"name": row.name, "error": reason})
            continue
        if row.peer:
            peers[row.group] = found["ms"]
        ratio = found["ms"] / peers[row.group] if row.group in peers else None
        show(row, found, ratio)
        results.append(found | {"ratio": ratio, "limit": row.limit})
    return results
