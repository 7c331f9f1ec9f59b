"""Idea 1: alignment by shifting the pyramid one level.

One image is seen twice: H, and L with half its sides. Reading H at P3..P7 and L at P2..P6 gives, level by level, maps
of equal size over the same image regions. From here on everything (locations, anchors, regression ranges, targets,
boxes) is in H's pixels, and the heads do not know which image a pyramid came from. (models.Conventional alone does not
shift: of its low branch read "L's pixels".)

    aligned level            0     1     2     3     4
    H reads (stride in H)   P3 8  P4 16 P5 32 P6 64 P7 128
    L reads (stride in L)   P2 4  P3 8  P4 16 P5 32 P6 64

The condition: H's sides are multiples of 64. Then L's are multiples of 32, every stride-2 layer of either branch
halves exactly down to C5, and beyond it both round up alike. Anything else is an error where L is made of H, never a
crop.

Difference from the authors' code: it pads to multiples of 256 and makes L by taking every second pixel, which aliases.
Here the default is 64 and the mean of each 2x2 square; their choices remain settings, for their checkpoints.
"""

import torch
import torch.nn.functional as F

MULTIPLE = 64
STRIDES = (8, 16, 32, 64, 128)  # of the aligned levels, in H's pixels
LEVELS = {"high": (3, 4, 5, 6, 7), "low": (2, 3, 4, 5, 6)}  # at which the pyramid of each input is read


def downsample(high, mode="area"):
    """H (N,3,h,w) -> L (N,3,h/2,w/2): the mean of 2x2 pixels, or the authors' every second pixel ("nearest"). Raises
    ValueError unless both sides of H meet the condition above."""
    height, width = high.shape[-2:]
    if height % MULTIPLE or width % MULTIPLE:
        raise ValueError(f"the high-resolution input is {height}x{width}: its sides must be multiples of {MULTIPLE}")
    return F.avg_pool2d(high, 2) if mode == "area" else high[:, :, ::2, ::2]


def check_pyramids(one, other):
    """Raise ValueError unless two pyramids have the same shapes, level by level."""
    shapes = [[tuple(level.shape) for level in pyramid] for pyramid in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the pyramids do not align: {shapes[0]} and {shapes[1]}")


def map_sizes(pyramid):
    """Five maps (N,C,h,w) -> [(h,w)]."""
    return [tuple(level.shape[-2:]) for level in pyramid]


def cells(sizes, device=None):
    """The cells of aligned levels of `sizes` [(h,w)], row by row, all levels in one list.

    Returns the cells' upper left corners (R,2) as x, y in H's pixels, and their strides (R,).
    """
    corners, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y = torch.arange(height, device=device) * stride
        x = torch.arange(width, device=device) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        corners.append(torch.stack([x.flatten(), y.flatten()], dim=1))
        strides.append(torch.full((height * width,), stride, device=device))
    return torch.cat(corners).float(), torch.cat(strides).float()
