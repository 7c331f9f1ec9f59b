"""What every dense head is made of: towers, the first weights of outputs, one layout of predictions, the focal loss."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .processes import mean_over_processes

SCORE_THRESHOLD = 0.05  # of a class's probability, below which a location cannot become a detection


def tower(in_channels, channels, convs, norm):
    """`convs` 3x3 convolutions with ReLU, and GroupNorm between if `norm`: (N,C,h,w) -> (N,channels,h,w)."""
    layers = []
    for number in range(convs):
        conv = nn.Conv2d(channels if number else in_channels, channels, 3, padding=1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        # 32 groups, and fewer where one would have a single channel, which on a 1x1 map has no variance.
        layers += [conv, GroupNorm(math.gcd(32, channels // 2), channels)] if norm else [conv]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, in the layout in which it is fast: on a CPU its backward pass in channels_last bf16 crawls with small
    groups."""

    def forward(self, x):
        if torch.is_grad_enabled() and x.dtype == torch.bfloat16 and self.num_channels < 8 * self.num_groups:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def initialize_outputs(logits, *others):
    """Where the last convolutions start: weights small, biases at 0, every class at a probability of 0.01."""
    for conv in (logits, *others):
        nn.init.normal_(conv.weight, std=0.01)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    nn.init.constant_(logits.bias, -math.log(0.99 / 0.01))  # the prior of RetinaNet's paper


def flatten_cells(x, channels):
    """A level's map (N,A*channels,h,w) -> (N,h*w*A,channels): row by row, anchors of a cell side by side."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, channels)


def positives(labels, classes):
    """Labels (N,R) -> 1 where there is an object (N,R), and what sums are divided by: their number, but at least 1."""
    positive = ((labels >= 0) & (labels < classes)).float()
    return positive, mean_over_processes(positive.sum()).clamp(min=1)


def focal_loss(logits, labels):
    """Logits (N,R,K) and labels (N,R), K for background, below 0 for ignored -> the sum over locations and classes.

    The focal loss of RetinaNet's paper (alpha 0.25, gamma 2): every logit's as if there were nothing, corrected at the
    few that belong to an object. That is the same sum, without targets as large as the logits.
    """
    classes = logits.shape[-1]
    background = (_absent(logits).sum(-1) * (labels >= 0)).sum()
    own = logits.gather(-1, labels.clamp(0, classes - 1)[..., None]).squeeze(-1)
    present = 0.25 * (1 - own.sigmoid()) ** 2 * F.softplus(-own)
    return background + ((present - _absent(own)) * ((labels >= 0) & (labels < classes))).sum()


def _absent(logits):
    """The loss of classes that are not there."""
    return 0.75 * logits.sigmoid() ** 2 * F.softplus(logits)
