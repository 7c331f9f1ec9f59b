"""The FCOS head (FCOS, ICCV 2019, with its later improvements). The detector calls four methods on plain tensors:

forward   five maps -> logits, distances, centerness, levels concatenated here and nowhere else
assign    boxes -> one target per location, once per batch, whichever branch is trained
losses    outputs and targets -> named scalars
decode    outputs at some of the locations -> boxes and scores

Constants are those of the authors' code (AdelaiDet's FCOS with centre sampling, GIoU and centerness on the box tower).
Shapes: N images, R locations over all levels, K classes, M boxes, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_area

from . import align, heads

RANGES = (-1, 64, 128, 256, 512, math.inf)  # level i learns boxes whose farthest side is RANGES[i] to [i + 1] away
CENTER_RADIUS = 1.5  # strides around a box's centre in which locations are trained to find it
BOXES_AT_ONCE = 256  # in one step of the assignment, to bound its memory


class FCOSHead(nn.Module):
    """Two towers shared by all levels. `object_scale` multiplies the regression ranges, which are COCO's at 1."""

    anchors = 1
    nms_threshold = 0.6
    channel_multiple = 16  # of head_channels, of which GroupNorm makes 8 groups at least

    def __init__(self, in_channels, classes, channels, convs, object_scale=1.0):
        super().__init__()
        self.classes = classes
        # A buffer, to be on the model's device without a copy.
        self.register_buffer("ranges", object_scale * torch.tensor(RANGES), persistent=False)
        self.cls_tower = heads.tower(in_channels, channels, convs, norm=True)
        self.box_tower = heads.tower(in_channels, channels, convs, norm=True)
        self.cls_logits = nn.Conv2d(channels, classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        self.scales = nn.Parameter(torch.ones(len(align.STRIDES)))
        std = 0.01 * 256 / channels  # the authors' for 256 channels; narrower towers learn sooner from a wider start
        heads.initialize_outputs(self.cls_logits, self.centerness, std=std)
        # Behind the ReLU a side that is off learns nothing. What leaves a tower averages 0.4, so all start near 1.
        nn.init.normal_(self.box_pred.weight, mean=2.5 / (9 * channels), std=std)

    def _load_from_state_dict(self, state, prefix, *details):
        """Make room for the biases of torchvision's box and centerness outputs where they are to be loaded."""
        for name, conv in (("box_pred", self.box_pred), ("centerness", self.centerness)):
            if getattr(state.get(f"{prefix}{name}.bias"), "shape", None) == conv.weight.shape[:1]:
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        super()._load_from_state_dict(state, prefix, *details)

    def forward(self, pyramid):
        """Five maps (N,C,h,w) -> {"logits": (N,R,K), "distances": (N,R,4) from the location to the left, upper, right
        and lower side of its box, in strides, "centerness": (N,R) as logits}."""
        outputs = {"logits": [], "distances": [], "centerness": []}
        for x, scale in zip(pyramid, self.scales):
            cls, box = self.cls_tower(x), self.box_tower(x)
            # Logits are in bf16 where the network is: there may be hundreds of millions.
            outputs["logits"].append(heads.flatten_cells(self.cls_logits(cls), self.classes))
            outputs["distances"].append(F.relu(heads.flatten_cells(self.box_pred(box), 4).float() * scale))
            outputs["centerness"].append(heads.flatten_cells(self.centerness(box), 1).squeeze(-1).float())
        return {name: torch.cat(levels, 1) for name, levels in outputs.items()}

    @torch.no_grad()
    def assign(self, sizes, boxes, labels):
        """The maps' sizes [(h,w)], boxes [(M,4)] in H's pixels and labels [(M,)] of N images -> targets:

        "labels" (N,R): the class that a location learns, K for background
        "distances" (N,R,4): to the sides of its box, in strides; 1 at background, so that losses are finite there until
            they are masked
        "objects" (N,R): 1 where there is an object, else 0
        "centerness" (N,R): from 0 to 1, 0 at background
        "totals" (2,): the sums of the last two, by which losses are divided
        """
        points, strides = self.locations(sizes, boxes[0].device)
        pairs = [self.assign_image(points, strides, b, l) for b, l in zip(boxes, labels)]
        labels, distances = (torch.stack(column) for column in zip(*pairs))
        objects = heads.object_mask(labels, self.classes)
        centerness = centerness_target(distances) * objects
        totals = torch.stack([objects.sum(), centerness.sum()])
        targets = {"labels": labels, "distances": distances, "objects": objects, "centerness": centerness}
        return targets | {"totals": totals}

    def assign_image(self, points, strides, boxes, labels):
        """One image's labels (R,) and distances (R,4)."""
        # Of several candidate boxes a location learns the one of least area.
        smallest = points.new_full((len(points),), math.inf)
        index = torch.zeros_like(smallest, dtype=torch.long)
        for first in range(0, len(boxes), BOXES_AT_ONCE):
            areas = self.candidate_areas(points, strides, boxes[first : first + BOXES_AT_ONCE])
            area, at = areas.min(dim=1)
            index = torch.where(area < smallest, at + first, index)
            smallest = torch.minimum(area, smallest)
        # A location without a candidate is background.
        positive = smallest < math.inf
        if len(boxes) == 0:  # any box will do: nothing is positive
            boxes, labels = points.new_zeros(1, 4), index.new_zeros(1)
        distances = heads.boxes_to_distances(points, boxes[index]) / strides[:, None]
        return torch.where(positive, labels[index], self.classes), torch.where(positive[:, None], distances, 1.0)

    def candidate_areas(self, points, strides, boxes):
        """Points (R,2) and boxes (M,4) -> (R,M): the box's area where it may train the location, else infinity."""
        distances = heads.boxes_to_distances(points[:, None], boxes)  # (R,M,4)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        # Strictly inside the box, and less than 1.5 strides from its centre along x and along y.
        offset = (points[:, None] - centers).abs().amax(-1)
        candidate = (distances.amin(-1) > 0) & (offset < CENTER_RADIUS * strides[:, None])
        # The level is responsible for this size, both ends included.
        level = (strides / align.STRIDES[0]).log2().round().long()[:, None]
        farthest = distances.amax(-1)
        candidate &= (farthest >= self.ranges[level]) & (farthest <= self.ranges[level + 1])
        return torch.where(candidate, box_area(boxes), math.inf)

    def losses(self, outputs, targets):
        """Outputs as from `forward` and targets as from `assign` -> {"cls", "box", "centerness"}: scalars."""
        count, total = targets["totals"]
        count, total = count.clamp(min=1), total.clamp(min=1e-6)
        # The box loss counts a location by how central it is in its box.
        centerness = targets["centerness"]
        box = heads.giou_loss(outputs["distances"], targets["distances"]) * centerness
        center = F.binary_cross_entropy_with_logits(outputs["centerness"], centerness, reduction="none")
        center = (center * targets["objects"]).sum()
        cls = heads.focal_loss(outputs["logits"], targets["labels"])
        return {"cls": cls / count, "box": box.sum() / total, "centerness": center / count}

    def decode(self, outputs, sizes, where):
        """Outputs (...,S,*) at S locations, `where` (indices (S,) or a slice), for maps of `sizes` [(h,w)] -> boxes
        (...,S,4) in H's pixels and scores (...,S,K), zero where the class is below the threshold."""
        points, strides = (x[where] for x in self.locations(sizes, outputs["distances"].device))
        boxes = heads.distances_to_boxes(points, outputs["distances"] * strides[:, None])
        probability = outputs["logits"].float().sigmoid()
        scores = (probability * outputs["centerness"].sigmoid()[..., None]).sqrt()
        return boxes, torch.where(probability > heads.SCORE_THRESHOLD, scores, 0.0)

    def locations(self, sizes, device):
        """The centre of every cell (R,2) in H's pixels, and its stride (R,)."""
        corners, strides = align.cells(sizes, device)
        return corners + (strides // 2)[:, None], strides


def centerness_target(distances):
    """Distances (...,4) -> (...): 1 at a box's centre, 0 at its sides."""
    horizontal, vertical = distances[..., 0::2], distances[..., 1::2]
    ratio = horizontal.amin(-1) / horizontal.amax(-1) * (vertical.amin(-1) / vertical.amax(-1))
    return ratio.sqrt()
