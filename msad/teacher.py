"""Idea 2: crossing feature-level fusion, and the teacher that trains on two resolutions at once.

H and L run through the same backbone, pyramid and head: no parameter knows the resolution. Their aligned pyramids are
mixed level by level with two weights that a small gate reads off both, one pair per image and level. The head trains
on H, L and fused with the same targets, and the teacher predicts from the fused pyramid alone.

`MultiScale` is what the paper compares with: the same network trained on both resolutions without the shift.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import align
from .detector import Detector


class CrossingFusion(nn.Module):
    """The gate of C-FF, shared by all levels: pooled H and L -> softmax over the two."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Linear(2 * channels, 2 * channels // 16, bias=False)
        self.excite = nn.Linear(2 * channels // 16, 2, bias=False)

    def weights(self, high, low):
        """Two maps (N,C,h,w) of a level -> (N,2): the shares of H and L, which add up to 1."""
        pooled = torch.cat([high.mean((2, 3)), low.mean((2, 3))], dim=1)
        return self.excite(F.relu(self.squeeze(pooled))).softmax(dim=1)

    def forward(self, high, low):
        """Two aligned pyramids -> the fused one, of the same shapes."""
        align.check_pyramids(high, low)
        fused = []
        for h, l in zip(high, low):
            a, b = self.weights(h, l).to(h.dtype)[..., None, None, None].unbind(1)
            fused.append(a * h + b * l)
        return fused


class Teacher(Detector):
    """The multi-scale aligned teacher: branches fused (the default), high and low of one image."""

    def __init__(self, config):
        super().__init__(config, branches=("fused", "high", "low"), levels=range(2, 8))
        self.fusion = CrossingFusion(config.fpn_channels)

    def pyramids(self, images, branches=("fused", "high", "low")):
        """Normalised high-resolution images -> {branch: five maps}; only what the wanted branches need is computed."""
        pyramids = {}
        if set(branches) & {"high", "fused"}:
            pyramids["high"] = self.pyramid(images, align.SHIFTS["high"])
        if set(branches) & {"low", "fused"}:
            low = align.downsample(images, self.config.downsample)
            pyramids["low"] = self.pyramid(low, align.SHIFTS["low"])
        if "fused" in branches:
            pyramids["fused"] = self.fusion(pyramids["high"], pyramids["low"])
        return {branch: pyramids[branch] for branch in branches}


class MultiScale(Detector):
    """Conventional multi-scale training: high and low both read at P3..P7, each in its own pixels, no fusion."""

    def __init__(self, config):
        super().__init__(config, branches=("high", "low"), levels=align.levels(shift=0))

    def pyramids(self, images, branches=("high", "low")):
        inputs = {"high": images}
        if "low" in branches:
            inputs["low"] = align.downsample(images, self.config.downsample)
        return {branch: self.pyramid(inputs[branch], shift=0) for branch in branches}

    def predict(self, pyramids):
        """The maps differ in size, so the head is called for each branch."""
        return {branch: self.head(maps) for branch, maps in pyramids.items()}

    def losses(self, outputs, boxes, labels):
        """As in Detector, but each branch has targets of its own: the low one's are in L's pixels."""
        losses = super().losses({"high": outputs["high"]}, boxes, labels)
        return losses | super().losses({"low": outputs["low"]}, [b / 2 for b in boxes], labels)

    def frame_scale(self, branch):
        return 0.5 if branch == "low" else 1
