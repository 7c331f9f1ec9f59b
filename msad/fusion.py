"""Idea 2: crossing feature-level fusion (C-FF). Two aligned pyramids become one, by weights that a gate reads off both.

On each level the maps of H and L are pooled to one vector each; a two-layer gate, the same for all levels, turns these
into two weights that add up to 1; the fused map is the weighted sum. There is one pair of weights per image and level.

The teacher's head runs on all three pyramids of an image with the same targets, and the teacher predicts from the
fused one alone (models.Teacher):

    L_teacher = 1.0 L_det(H) + 1.0 L_det(L) + 0.4 L_det(fused)

As in the authors' code the gate's layers start uniform within +-sqrt(3 / inputs).
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import align

LOSS_WEIGHTS = {"high": 1.0, "low": 1.0, "fused": 0.4}  # of the branches in L_teacher
REDUCTION = 16  # of the gate's hidden layer


class CrossingFusion(nn.Module):
    """The gate, shared by all levels, and the weighted sum."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Linear(2 * channels, 2 * channels // REDUCTION, bias=False)
        self.excite = nn.Linear(2 * channels // REDUCTION, 2, bias=False)
        for layer in (self.squeeze, self.excite):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # sqrt(3) times as wide as PyTorch's default

    def weights(self, high, low):
        """Two maps (N,C,h,w) of a level -> (N,2): the shares of H and L, which add up to 1."""
        pooled = torch.cat([high.mean((2, 3)), low.mean((2, 3))], dim=1)
        return self.excite(F.relu(self.squeeze(pooled))).softmax(dim=1)

    def forward(self, high, low):
        """Two aligned pyramids -> the fused one, of the same shapes."""
        align.check_pyramids(high, low)
        fused = []
        for high_map, low_map in zip(high, low):
            shares = self.weights(high_map, low_map).to(high_map.dtype)  # CUDA's autocast makes it fp32
            high_share, low_share = shares.view(-1, 2, 1, 1, 1).unbind(1)  # (N,1,1,1) each
            fused.append(high_share * high_map + low_share * low_map)
        return fused
