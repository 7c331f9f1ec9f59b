"""A model to a .pt2 file, which runs without this package, by PyTorch alone.

The exported network takes `images`, uint8 RGB (N,3,h,w): any number of pictures of one size, at the size that the model
reads. It gives `boxes` (N,R,4) in their pixels, not clipped to them, and `scores` (N,R,K), 0 where the class is below
the threshold; boxes without any score are 0. Normalisation, padding to the model's multiple and decoding are inside.
What remains for the caller, resizing, NMS and scaling back, is shown in .github/exported.py; what it takes is in the
file as JSON (see `describe`), under NOTES in its extra files. NOTES.md makes an .onnx of it.
"""

import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .. import align
from ..data.errors import InputError
from ..heads import SCORE_THRESHOLD
from ..postprocess import DETECTIONS_PER_IMAGE
from .files import write_whole

NOTES = "msad.json"
SAMPLE = (2, 3, 300, 500)  # to trace with; no two sides alike and no map of one cell, so that none is taken for fixed


class Exported(nn.Module):
    """A model for inference, read from one branch at a precision: pixels to boxes and scores."""

    def __init__(self, model, branch, precision="fp32"):
        super().__init__()
        self.model = model.folded().cpu().requires_grad_(False)
        self.branch = branch
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def forward(self, images):
        model = self.model
        height, width = images.shape[-2:]
        x = F.pad(model.normalize(images, []), (0, -width % model.multiple, 0, -height % model.multiple))
        with self.autocast:
            maps = model.pyramids(x, [self.branch])[self.branch]
            outputs = model.head(maps)
        boxes, scores = model.head.decode(outputs, align.map_sizes(maps), slice(None))
        found = scores.amax(-1, keepdim=True) > 0
        return torch.where(found, boxes / model.box_scales[self.branch], 0.0), scores


def save(path, model, branch, precision="fp32"):
    """Write a model, read from a branch, to a .pt2 file -> one line on what it takes. Raises InputError."""
    if Path(path).suffix != ".pt2":
        raise InputError(f"--export {path}: must end in .pt2")
    notes = {NOTES: json.dumps(describe(model, branch))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights in channels_last, which are saved as they should be
        program = trace(Exported(model, branch, precision).eval())
        write_whole(path, lambda file: torch.export.save(program, file, extra_files=notes))
    return f"images, uint8 (N,3,h,w) -> boxes (N,R,4), scores (N,R,{len(model.config.classes)})"


def describe(model, branch):
    """What a caller of the exported network needs to know. Sides and `scale` are as in ModelConfig and Detector: the
    input is the picture fitted to the sides and divided by the scale."""
    about = {name: getattr(model.config, name) for name in ("kind", "classes", "short_side", "long_side")}
    about |= {"branch": branch, "multiple": model.multiple, "scale": model.scale}
    about |= {"downsample": model.input_downsample or "", "score_threshold": SCORE_THRESHOLD}
    return about | {"nms_iou": model.head.nms_threshold, "detections": DETECTIONS_PER_IMAGE}


@torch.no_grad()
def trace(network):
    """The network as PyTorch's graph, for any number of pictures of any size."""
    free = {dim: torch.export.Dim.DYNAMIC for dim in (0, 2, 3)}
    details = {"dynamic_shapes": (free,), "prefer_deferred_runtime_asserts_over_guards": True}
    program = torch.export.export(network, (torch.zeros(SAMPLE, dtype=torch.uint8),), **details)
    # Its assertions would refuse small pictures, where a map has a single cell. The arithmetic is the same there.
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
