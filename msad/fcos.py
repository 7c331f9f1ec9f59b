"""The FCOS head: four methods on plain tensors, shared by every branch (FCOS, ICCV 2019, with its later improvements).

forward   five maps -> logits, boxes, centerness, levels concatenated here and nowhere else
assign    boxes -> one target per location, once per batch, whichever branch is trained
losses    outputs and targets -> named scalars
decode    outputs at some of the locations -> boxes and scores in H's pixels

Constants are those of the authors' code (AdelaiDet's FCOS with centre sampling, GIoU and centerness on the box tower).
Shapes: N images, R locations over all levels, K classes, M boxes, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_area

from . import align, boxes as box_ops
from .dense import SCORE_THRESHOLD, flatten_cells, focal_loss, initialize_outputs, positives, tower
from .processes import mean_over_processes

RANGES = (-1, 64, 128, 256, 512, math.inf)
CENTER_RADIUS = 1.5
BOXES_AT_ONCE = 256  # in one step of the assignment, to bound its memory


class FCOSHead(nn.Module):
    """Two towers shared by all levels. `object_scale` multiplies the regression ranges, which are COCO's at 1."""

    anchors = 1
    nms_threshold = 0.6
    channel_multiple = 16  # of which GroupNorm makes 8 groups at least

    def __init__(self, in_channels, classes, channels, convs, object_scale=1.0):
        super().__init__()
        self.classes = classes
        # A buffer, to be on the model's device without a copy.
        self.register_buffer("ranges", object_scale * torch.tensor(RANGES), persistent=False)
        self.cls_tower = tower(in_channels, channels, convs, norm=True)
        self.box_tower = tower(in_channels, channels, convs, norm=True)
        self.cls_logits = nn.Conv2d(channels, classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        self.scales = nn.Parameter(torch.ones(len(align.STRIDES)))
        initialize_outputs(self.cls_logits, self.box_pred, self.centerness)

    def forward(self, pyramid):
        """Five (N,C,h,w) -> logits (N,R,K), boxes (N,R,4) as distances in strides, centerness (N,R) logits, sizes."""
        logits, boxes, centerness = [], [], []
        for level, x in enumerate(pyramid):
            cls, box = self.cls_tower(x), self.box_tower(x)
            logits.append(flatten_cells(self.cls_logits(cls), self.classes))
            boxes.append(F.relu(flatten_cells(self.box_pred(box), 4).float() * self.scales[level]))
            centerness.append(flatten_cells(self.centerness(box), 1))
        return {
            "logits": torch.cat(logits, 1).float(),
            "boxes": torch.cat(boxes, 1),
            "centerness": torch.cat(centerness, 1).float().squeeze(-1),
            "sizes": [tuple(x.shape[-2:]) for x in pyramid],
        }

    @torch.no_grad()
    def assign(self, sizes, boxes, labels):
        """Boxes [(M,4)] in H's pixels and labels [(M,)] -> labels (N,R), K for background, and boxes (N,R,4) as
        distances in strides (1 at background, so that every loss there stays finite before it is masked out)."""
        points, strides = self.locations(sizes, boxes[0].device)
        pairs = [self._assign_image(points, strides, b, l) for b, l in zip(boxes, labels)]
        return {"labels": torch.stack([l for l, _ in pairs]), "boxes": torch.stack([b for _, b in pairs])}

    def _assign_image(self, points, strides, boxes, labels):
        smallest = points.new_full((len(points),), math.inf)
        index = torch.zeros_like(smallest, dtype=torch.long)
        for first in range(0, len(boxes), BOXES_AT_ONCE):
            areas = self._candidate_areas(points, strides, boxes[first : first + BOXES_AT_ONCE])
            area, at = areas.min(dim=1)
            index = torch.where(area < smallest, at + first, index)
            smallest = torch.minimum(area, smallest)
        positive = smallest < math.inf
        if len(boxes) == 0:  # any box will do: nothing is positive
            boxes, labels = points.new_zeros(1, 4), index.new_zeros(1)
        distances = box_ops.xyxy_to_ltrb(points, boxes[index]) / strides[:, None]
        return torch.where(positive, labels[index], self.classes), torch.where(positive[:, None], distances, 1.0)

    def _candidate_areas(self, points, strides, boxes):
        """Points (R,2) and boxes (M,4) -> (R,M): the box's area where it may train the location, else infinity."""
        distances = box_ops.xyxy_to_ltrb(points[:, None], boxes)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        # Strictly inside the box and strictly inside a square of 1.5 strides around its centre.
        offset = (points[:, None] - centers).abs().amax(-1)
        candidate = (distances.amin(-1) > 0) & (offset < CENTER_RADIUS * strides[:, None])
        # The level is responsible for this size, both ends included.
        level = (strides / align.STRIDES[0]).log2().long()[:, None]
        farthest = distances.amax(-1)
        candidate &= (farthest >= self.ranges[level]) & (farthest <= self.ranges[level + 1])
        return torch.where(candidate, box_area(boxes), math.inf)

    def losses(self, outputs, targets):
        """-> {"cls", "box", "centerness"}: scalars; the normalisers are means over processes."""
        labels = targets["labels"]
        positive, count = positives(labels, self.classes)
        centerness = centerness_target(targets["boxes"]) * positive
        weight = mean_over_processes(centerness.sum()).clamp(min=1e-6)

        box = box_ops.giou_loss_ltrb(outputs["boxes"], targets["boxes"]) * centerness
        ctr = F.binary_cross_entropy_with_logits(outputs["centerness"], centerness, reduction="none") * positive
        return {
            "cls": focal_loss(outputs["logits"], labels) / count,
            "box": box.sum() / weight,
            "centerness": ctr.sum() / count,
        }

    def decode(self, outputs, where):
        """Outputs (...,S,*) at the S locations that the mask `where` (R,) marks -> boxes (...,S,4) in H's pixels and
        scores (...,S,K), zero where the class is below the threshold."""
        points, strides = (x[where] for x in self.locations(outputs["sizes"], outputs["boxes"].device))
        boxes = box_ops.ltrb_to_xyxy(points, outputs["boxes"] * strides[:, None])
        probability = outputs["logits"].sigmoid()
        scores = (probability * outputs["centerness"].sigmoid()[..., None]).sqrt()
        return boxes, torch.where(probability > SCORE_THRESHOLD, scores, 0.0)

    def locations(self, sizes, device):
        """The centre of every cell (R,2) in H's pixels, and its stride (R,)."""
        corners, strides = align.grid(sizes, device)
        return corners + (strides // 2)[:, None], strides


def centerness_target(distances):
    """Distances (...,4) -> (...): 1 at a box's centre, 0 at its sides."""
    horizontal, vertical = distances[..., 0::2], distances[..., 1::2]
    ratio = horizontal.amin(-1) / horizontal.amax(-1) * (vertical.amin(-1) / vertical.amax(-1))
    return ratio.sqrt()
