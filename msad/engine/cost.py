"""What a detector costs: multiply-accumulates and time.

The cost is the whole network's. A student at half the resolution has a backbone of a quarter of the cost, but as many
locations as its teacher, so its head costs the same: a table of backbones alone would hide most of what is left.
"""

import contextlib
import copy
import statistics

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ..images import pad_to_multiple

PARTS = ("backbone", "fpn", "head")  # of a model, whose cost is told apart


def count_cost(model, branch, height, width):
    """What a model read from `branch` takes for one image of height x width in H's pixels.

    Returns {"parameters": their number, "size": [height, width], "gmacs": {"backbone", "fpn", "head", "total"}}, the
    last in 10^9 multiply-accumulates of convolutions and matrix products, by PyTorch's own counter. Sides are padded as
    the model would pad them. The total has a teacher's gate in it, too.
    """
    padded = model.padded_size((-(-height // model.scale), -(-width // model.scale)))
    model = copy.deepcopy(model).to("meta").eval()  # shapes are enough to count
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.predict(model.pyramids(torch.empty(1, 3, *padded, device="meta"), [branch]))
    counts = counter.get_flop_counts()
    names = {part: type(getattr(model, part)).__name__ for part in PARTS} | {"total": "Global"}
    gmacs = {part: sum(counts[name].values()) / 2e9 for part, name in names.items()}
    return {"parameters": sum(p.numel() for p in model.parameters()), "size": [height, width], "gmacs": gmacs}


def cost_line(branch, counted):
    """One line: "0.30 M parameters, low: 0.62 GMACs (backbone 0.08, fpn 0.13, head 0.41) at 256x256 in H's pixels"."""
    found, (height, width) = counted["gmacs"], counted["size"]
    parts = ", ".join(f"{part} {found[part]:.2f}" for part in PARTS)
    total = f"{counted['parameters'] / 1e6:.2f} M parameters, {branch}: {found['total']:.2f} GMACs ({parts})"
    return f"{total} at {height}x{width} in H's pixels"


@torch.inference_mode()
def measure_cost(model, dataset, branch, autocast=contextlib.nullcontext()):
    """What reading `branch` costs on a data set -> as `count_cost` at the padded size that most images share, and "ms".

    "ms" has the medians, by PyTorch's timer, for "network" (8-bit pixels to the head's outputs) and "postprocessing"
    (these to boxes) of the first image of that size. Reading its file is in neither.
    """
    network = model.folded()
    sizes = [model.padded_size(dataset.network_size(index)) for index in range(len(dataset))]
    size = statistics.mode(sizes)
    index = sizes.index(size)
    image = dataset[index, 0][0]
    pixels, shape = pad_to_multiple([image], model.multiple).to(model.mean.device), [tuple(image.shape[1:])]
    original = [tuple(map(int, dataset.annotations.sizes[index]))]

    def compute():
        pyramids = network.pyramids(network.normalize(pixels, shape), [branch])
        return pyramids, network.predict(pyramids)

    with autocast:
        pyramids, outputs = compute()
        finish = lambda: network.postprocess(pyramids[branch], outputs[branch], branch, shape, original)
        ms = {name: milliseconds(part) for name, part in (("network", compute), ("postprocessing", finish))}
    return count_cost(model, branch, *(side * model.scale for side in size)) | {"ms": ms}


def milliseconds(function):
    """The median time of a call, its work on the device done, with the threads that PyTorch has now."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange().median
