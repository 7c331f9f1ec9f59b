"""The one box convention, and the measures on boxes that torchvision does not have.

Boxes are (x1, y1, x2, y2) in pixels, float, without the "+1" of old code bases. Distances are (left, top, right,
bottom) from a point to the sides of a box. Intersection over union, NMS and clipping are torchvision.ops'.
"""

import torch


def ltrb_to_xyxy(points, distances):
    """Points (..., 2) and distances (..., 4), both in pixels -> boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def xyxy_to_ltrb(points, boxes):
    """Points (..., 2) and boxes (..., 4), in pixels -> distances (..., 4), negative where a point lies outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def giou_loss_ltrb(predicted, target):
    """1 - GIoU of boxes given as distances (..., 4) from the same point -> (...).

    Intersection and union are smoothed by one unit, as FCOS trains: the unit is the caller's (there, the stride).
    torchvision's loss takes corners and has no such term.
    """
    overlap = torch.minimum(predicted, target)
    hull = torch.maximum(predicted, target)
    intersection = _ltrb_area(overlap)
    union = _ltrb_area(predicted) + _ltrb_area(target) - intersection
    enclosing = _ltrb_area(hull)
    iou = (intersection + 1) / (union + 1)
    return 1 - iou + (enclosing - union) / enclosing


def _ltrb_area(distances):
    return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])
