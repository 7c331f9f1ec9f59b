"""Feature pyramid: C2..C5 in, five neighbouring levels out, and no level computed that nobody reads.

P2..P5 are a 1x1 lateral convolution plus the level above doubled in size, then a 3x3 output convolution. P6 is a
stride-2 convolution of C5 and P7 one of ReLU(P6), as in RetinaNet's paper. The high-resolution branch never reads P2,
whose output convolution alone is 41 of its FPN's 65 GMACs at 832x1344, so here it costs nothing.
"""

import torch.nn.functional as F
from torch import nn


class FPN(nn.Module):
    """Builds `levels` (a range within 2..7); `forward` computes any five neighbours of them."""

    def __init__(self, in_channels, channels, levels):
        super().__init__()
        backbone = dict(zip((2, 3, 4, 5), in_channels))
        self.lateral = nn.ModuleDict({str(l): nn.Conv2d(backbone[l], channels, 1) for l in levels if l <= 5})
        self.output = nn.ModuleDict({str(l): nn.Conv2d(channels, channels, 3, padding=1) for l in levels if l <= 5})
        self.p6 = nn.Conv2d(in_channels[-1], channels, 3, stride=2, padding=1)
        if 7 in levels:
            self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, features, levels):
        """[C2, C3, C4, C5] -> one map (N,C,h,w) per level, lowest first. Level l has stride 2**l."""
        pyramid = {}
        above = None
        for level in range(5, levels[0] - 1, -1):
            merged = self.lateral[str(level)](features[level - 2])
            if above is not None:
                # To the size of this level: twice the level above, or one less where a stride-2 convolution rounded up.
                merged = merged + F.interpolate(above, size=merged.shape[-2:], mode="nearest")
            pyramid[level] = self.output[str(level)](merged)
            above = merged
        pyramid[6] = self.p6(features[-1])
        if 7 in levels:
            pyramid[7] = self.p7(F.relu(pyramid[6]))
        return [pyramid[level] for level in levels]
