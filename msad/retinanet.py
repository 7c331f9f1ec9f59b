"""The RetinaNet head: the same four methods as FCOS's, with anchors (RetinaNet, ICCV 2017).

forward   five maps -> logits, deltas, levels concatenated here and nowhere else
assign    boxes -> one target per anchor, once per batch, whichever branch is trained
losses    outputs and targets -> named scalars
decode    outputs at some of the anchors -> boxes and scores

Constants are the field's usual ones. The layout of anchors and channels is torchvision's, but its anchors are rounded
to whole pixels, and these are not.
Shapes: N images, R anchors over all levels (9 side by side per cell), K classes, M boxes, C channels.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou

from . import align, heads

SIZES = tuple(4 * 2 ** (third / 3) for third in range(3))  # sides of a square anchor in strides: 32 pixels at stride 8
RATIOS = (0.5, 1.0, 2.0)  # height / width, at the same area
POSITIVE_IOU, BACKGROUND_IOU = 0.5, 0.4
BETA = 0.1  # of the smooth L1: where it turns from square to linear
BOXES_AT_ONCE = 32  # in one step of the assignment, to bound its memory


class RetinaNetHead(nn.Module):
    """Two towers shared by all levels. `object_scale` multiplies the sizes of anchors, which are COCO's at 1."""

    anchors = len(SIZES) * len(RATIOS)
    nms_threshold = 0.5
    channel_multiple = 1

    def __init__(self, in_channels, classes, channels, convs, object_scale=1.0):
        super().__init__()
        self.classes = classes
        self.cls_tower = heads.tower(in_channels, channels, convs, norm=False)
        self.box_tower = heads.tower(in_channels, channels, convs, norm=False)
        self.cls_logits = nn.Conv2d(channels, self.anchors * classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, self.anchors * 4, 3, padding=1)
        heads.initialize_outputs(self.cls_logits, self.box_pred)
        # Width and height of a cell's anchors in strides. Plain numbers, which no device and no precision changes.
        self.sides = [(object_scale * s / r**0.5, object_scale * s * r**0.5) for r in RATIOS for s in SIZES]

    def forward(self, pyramid):
        """Five maps (N,C,h,w) -> {"logits": (N,R,K), "deltas": (N,R,4) from the anchors, see heads.boxes_to_deltas}."""
        logits = [heads.flatten_cells(self.cls_logits(self.cls_tower(x)), self.classes) for x in pyramid]
        deltas = [heads.flatten_cells(self.box_pred(self.box_tower(x)), 4) for x in pyramid]
        return {"logits": torch.cat(logits, 1), "deltas": torch.cat(deltas, 1).float()}

    @torch.no_grad()
    def assign(self, sizes, boxes, labels):
        """The maps' sizes [(h,w)], boxes [(M,4)] in H's pixels and labels [(M,)] of N images -> targets:

        "labels" (N,R): the class that an anchor learns, K for background, -1 for ignored
        "deltas" (N,R,4): from the anchor to its box, 0 where there is no object so that losses are finite there
        "objects" (N,R): 1 where there is an object, else 0
        "totals" (1,): their sum, by which losses are divided
        """
        anchors = self.anchor_boxes(sizes, boxes[0].device)
        pairs = [self.assign_image(anchors, b, l) for b, l in zip(boxes, labels)]
        labels, deltas = (torch.stack(column) for column in zip(*pairs))
        objects = heads.object_mask(labels, self.classes)
        return {"labels": labels, "deltas": deltas, "objects": objects, "totals": objects.sum()[None]}

    def assign_image(self, anchors, boxes, labels):
        """One image's labels (R,) and deltas (R,4)."""
        if len(boxes) == 0:
            return anchors.new_full((len(anchors),), self.classes, dtype=torch.long), torch.zeros_like(anchors)
        iou, index, best = match(anchors, boxes)
        # Anchors that overlap a box enough, or are some box's best. Each learns the box that it overlaps most.
        positive = (iou >= POSITIVE_IOU) | best
        # Too much overlap for background, too little for an object: ignored.
        other = torch.where(iou < BACKGROUND_IOU, self.classes, -1)
        chosen = torch.where(positive[:, None], boxes[index], anchors)
        return torch.where(positive, labels[index], other), heads.boxes_to_deltas(anchors, chosen)

    def losses(self, outputs, targets):
        """Outputs as from `forward` and targets as from `assign` -> {"cls", "box"}: scalars."""
        count = targets["totals"][0].clamp(min=1)
        box = F.smooth_l1_loss(outputs["deltas"], targets["deltas"], beta=BETA, reduction="none").sum(-1)
        cls = heads.focal_loss(outputs["logits"], targets["labels"])
        return {"cls": cls / count, "box": (box * targets["objects"]).sum() / count}

    def decode(self, outputs, sizes, where):
        """Outputs (...,S,*) at S anchors, `where` (indices (S,) or a slice), for maps of `sizes` [(h,w)] -> boxes
        (...,S,4) in H's pixels and scores (...,S,K), zero where the class is below the threshold."""
        anchors = self.anchor_boxes(sizes, outputs["deltas"].device)[where]
        boxes = heads.deltas_to_boxes(anchors, outputs["deltas"])
        return boxes, F.threshold_(outputs["logits"].float().sigmoid(), heads.SCORE_THRESHOLD, 0.0)

    def anchor_boxes(self, sizes, device):
        """All anchors (R,4) in H's pixels, around the upper left corners of the cells."""
        corners, strides = align.cells(sizes, device)
        halves = [torch.stack([strides * (side / 2) for side in pair], dim=1) for pair in self.sides]
        anchors = [torch.cat([corners - half, corners + half], dim=1) for half in halves]
        return torch.stack(anchors, dim=1).flatten(0, 1)


def match(anchors, boxes):
    """Anchors (R,4) and boxes (M,4) -> each anchor's best IoU (R,), the box it is with (R,), and whether no anchor is
    better for some box (R,), ties included. A box that overlaps no anchor, such as one without area, is nobody's."""
    iou = anchors.new_zeros(len(anchors))
    index = torch.zeros_like(iou, dtype=torch.long)
    best = torch.zeros_like(iou, dtype=torch.bool)
    for first in range(0, len(boxes), BOXES_AT_ONCE):
        overlaps = box_iou(boxes[first : first + BOXES_AT_ONCE], anchors)
        overlap, at = overlaps.max(dim=0)
        index = torch.where(overlap > iou, at + first, index)
        iou = torch.maximum(overlap, iou)
        best |= ((overlaps == overlaps.amax(1, keepdim=True)) & (overlaps > 0)).any(0)
    return iou, index, best
