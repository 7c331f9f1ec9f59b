"""What a detector costs: parameters, and multiply-accumulates by part, counted by PyTorch's own flop counter.

The whole network counts. A student at half the resolution has a backbone and pyramid of a quarter of the cost, but as
many locations as its teacher, so its head costs the same: a table of backbones alone would hide most of what is left.
"""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

PARTS = ("backbone", "fpn", "head")


def gmacs(model, branch, height, width):
    """A model read from `branch` for one image of height x width in H's pixels -> {"backbone", "fpn", "head", "total"}.

    In 10^9 multiply-accumulates of convolutions and matrix products. Sides are padded as the model would pad them.
    """
    scale = 2 if model.sees_low_only else 1
    height, width = model.padded_size((height // scale, width // scale))
    model = copy.deepcopy(model).to("meta").eval()  # shapes are enough to count
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.predict(model.pyramids(torch.empty(1, 3, height, width, device="meta"), [branch]))
    counts = counter.get_flop_counts()
    found = {}
    for part in PARTS:
        name = type(getattr(model, part)).__name__
        found[part] = sum(counts[name].values()) / 2e9
    return found | {"total": sum(counts["Global"].values()) / 2e9}


def describe(model, branch, height, width):
    """One line: "1.09 M parameters, 2.43 GMACs at 256x256 in H's pixels (backbone 0.31, fpn 0.52, head 1.60)"."""
    found = gmacs(model, branch, height, width)
    parts = ", ".join(f"{part} {found[part]:.2f}" for part in PARTS)
    size = f"{height}x{width} in H's pixels"
    return f"{parameters(model):.2f} M parameters, {branch}: {found['total']:.2f} GMACs at {size} ({parts})"


def parameters(model):
    """Millions of parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6
