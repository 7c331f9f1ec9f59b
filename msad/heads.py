"""What both heads are made of: towers, first weights, one layout of predictions, the focal loss, boxes.

Boxes are (x1, y1, x2, y2) in pixels, float, without the "+1" of old code bases. FCOS predicts distances (left, top,
right, bottom) from a point to the sides of a box, RetinaNet deltas from an anchor. Conversions are called a_to_b.
Intersection over union, NMS and clipping are torchvision.ops'.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

SCORE_THRESHOLD = 0.05  # of a class's probability, below which a location cannot become a detection
PRIOR = 0.01  # probability of every class at the start, as in RetinaNet's paper
ALPHA = 0.25  # of the focal loss: the weight of what is there; 1 - ALPHA is that of background
LARGEST_LOG_RATIO = math.log(1000 / 16)  # of a decoded side to its anchor's: no exponential overflows


def tower(in_channels, channels, convs, norm):
    """`convs` 3x3 convolutions with ReLU, and GroupNorm between if `norm`: (N,C,h,w) -> (N,channels,h,w)."""
    layers = []
    for number in range(convs):
        conv = nn.Conv2d(channels if number else in_channels, channels, 3, padding=1)
        # The papers' N(0, 0.01) suits 256 channels. A narrower tower starts wider: with normalisation it would learn
        # slowly, and through a deep one without so little would pass that training inflates the features a hundredfold.
        if conv.in_channels < 256 and (norm or convs > 2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        else:
            nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        # 32 groups, and fewer where one would have a single channel, which on a 1x1 map has no variance.
        layers += [conv, GroupNorm(math.gcd(32, channels // 2), channels)] if norm else [conv]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, kept in bf16 on CUDA, and in the memory layout that is fast on a CPU."""

    def forward(self, x):
        if x.is_cuda and x.dtype == torch.bfloat16:
            # CUDA's autocast would compute it in fp32 and keep maps of twice the size.
            with torch.autocast("cuda", enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        # On a CPU its backward pass in channels_last bf16 crawls with small groups.
        small = self.num_channels < 8 * self.num_groups
        if small and torch.is_grad_enabled() and x.dtype == torch.bfloat16 and not x.is_cuda:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def initialize_outputs(logits, *others, std=0.01):
    """Where the last convolutions start: weights small, biases at 0, every class at the prior probability."""
    for conv in (logits, *others):
        nn.init.normal_(conv.weight, std=std)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    nn.init.constant_(logits.bias, -math.log((1 - PRIOR) / PRIOR))


def flatten_cells(x, channels):
    """A level's map (N,A*channels,h,w) -> (N,h*w*A,channels): row by row, anchors of a cell side by side."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)  # len(x) would be a fixed number in an export


def object_mask(labels, classes):
    """Labels (N,R) -> 1.0 where there is an object (N,R), 0.0 where there is background or something to ignore."""
    return ((labels >= 0) & (labels < classes)).float()


def focal_loss(logits, labels):
    """Logits (N,R,K) and labels (N,R), K for background, below 0 for ignored -> the sum over locations and classes.

    The focal loss of RetinaNet's paper (alpha 0.25, gamma 2). First every logit's loss as if nothing were there, then a
    correction at the few logits of an object: the same sum, and no targets as large as the logits are needed.
    """
    classes = logits.shape[-1]
    absent = AbsentLoss.apply(logits) if logits.is_cuda else loss_of_absent(upcast(logits)).sum(-1)
    everywhere = (absent * (labels >= 0)).sum()
    own = upcast(logits.gather(-1, labels.clamp(0, classes - 1)[..., None]).squeeze(-1))
    present = ALPHA * (1 - own.sigmoid()) ** 2 * F.softplus(-own)
    return everywhere + ((present - loss_of_absent(own)) * object_mask(labels, classes)).sum()


def upcast(logits):
    """Logits in float32 if they are in bf16, else as they are."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def loss_of_absent(logits):
    """The focal loss of classes that are not there."""
    return (1 - ALPHA) * logits.sigmoid() ** 2 * F.softplus(logits)


class AbsentLoss(torch.autograd.Function):
    """`loss_of_absent` of logits (N,R,K), summed over the classes: (N,R). For CUDA, where the many steps of autograd
    over logits of this size are slow, and the float32 copies that it keeps fill the memory: here the gradient is in
    closed form, one image after the other, and nothing but the logits is kept."""

    @staticmethod
    def forward(context, logits):
        context.save_for_backward(logits)
        return torch.stack([loss_of_absent(upcast(image)).sum(-1) for image in logits])

    @staticmethod
    def backward(context, gradient):
        (logits,) = context.saved_tensors
        result = torch.empty_like(logits)
        for image, above, out in zip(logits, gradient, result):
            x = upcast(image)
            p = x.sigmoid()
            # The derivatives of p^2 and of softplus are 2 p^2 (1 - p) and p.
            out.copy_((1 - ALPHA) * p**2 * (2 * (1 - p) * F.softplus(x) + p) * above[:, None])
        return result


def distances_to_boxes(points, distances):
    """Points (..., 2) and distances (..., 4), both in pixels -> boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def boxes_to_distances(points, boxes):
    """Points (..., 2) and boxes (..., 4), in pixels -> distances (..., 4), negative where a point lies outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def boxes_to_deltas(anchors, boxes):
    """Anchors and boxes (...,4) -> deltas (...,4): the centre's offset in the anchor's sides, and the log of the ratio
    of the sides."""
    center, sides = box_convert(boxes, "xyxy", "cxcywh").split(2, -1)
    anchor_center, anchor_sides = box_convert(anchors, "xyxy", "cxcywh").split(2, -1)
    return torch.cat([(center - anchor_center) / anchor_sides, (sides / anchor_sides).log()], dim=-1)


def deltas_to_boxes(anchors, deltas):
    """The other way round: anchors and deltas (...,4) -> boxes (...,4)."""
    anchor_center, anchor_sides = box_convert(anchors, "xyxy", "cxcywh").split(2, -1)
    center = anchor_center + deltas[..., :2] * anchor_sides
    sides = anchor_sides * deltas[..., 2:].clamp(max=LARGEST_LOG_RATIO).exp()
    return box_convert(torch.cat([center, sides], dim=-1), "cxcywh", "xyxy")


def giou_loss(predicted, target):
    """1 - GIoU of boxes given as distances (..., 4) from the same point -> (...).

    Intersection and union are smoothed by one unit, as FCOS trains: the unit is the caller's (there, the stride).
    torchvision's loss takes corners and has no such term.
    """
    intersection = area(torch.minimum(predicted, target))
    union = area(predicted) + area(target) - intersection
    hull = area(torch.maximum(predicted, target))
    iou = (intersection + 1) / (union + 1)
    return 1 - iou + (hull - union) / hull


def area(distances):
    """Of the box that distances (..., 4) describe -> (...)."""
    return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])
