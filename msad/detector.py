"""A detector: backbone, pyramid and head at one resolution, and what every detector can do.

`ModelConfig` is all that is needed to rebuild a model; a checkpoint carries it. `branches` are the inputs a model can
be read from: "high", "low" or "fused". `forward` gives what training needs, `detect` what a user needs; both read
the same pyramids. A student is a detector whose only branch is "low": it holds no teacher and sees no high resolution.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from . import align
from .annotations import InputError
from .data import fitted_size, pad_to_multiple, resize
from .dense import SCORE_THRESHOLD
from .fcos import FCOSHead
from .fpn import FPN
from .resnet import ResNet, fold_batchnorm
from .retinanet import RetinaNetHead

HEADS = {"fcos": FCOSHead, "retinanet": RetinaNetHead}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 32 * 32  # pixels of a batch in training: one of C5, which has no variance
CANDIDATES_PER_LEVEL = 1000
DETECTIONS_PER_IMAGE = 100


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. Sides are in pixels of the high-resolution input, for a low-resolution model too."""

    kind: str  # "teacher", "high", "low" or "conventional"
    classes: tuple  # of {"id": the data set's category id, "name"}; a label is an index into it
    head: str = "fcos"
    backbone: str = "resnet50"
    width: float = 1.0
    fpn_channels: int = 256
    head_channels: int = 256
    head_convs: int = 4
    object_scale: float = 1.0  # sizes of objects, as a multiple of COCO's, that the levels are responsible for
    short_side: int = 800
    long_side: int = 1333
    pad: int = 64
    downsample: str = "area"


class Detector(nn.Module):
    """The single-resolution detector: kind "high" reads H at P3..P7, kind "low" reads L at P2..P6."""

    def __init__(self, config, branches=None, levels=None):
        """`branches` and `levels`, all levels of the pyramid that are ever read, are for models of several branches."""
        super().__init__()
        self.config = config
        self.branches = branches or (config.kind,)
        self.scale = 2 if self.branches == ("low",) else 1  # H's pixels per pixel of this model's input
        self.backbone = ResNet(config.backbone, config.width)
        levels = levels or align.levels(align.SHIFTS[config.kind])
        self.fpn = FPN(self.backbone.channels, config.fpn_channels, levels)
        self.head = HEADS[config.head](
            config.fpn_channels, len(config.classes), config.head_channels, config.head_convs, config.object_scale
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    @property
    def low_input(self):
        """How images are made small for a model that sees low resolution only, or "" for one that does not."""
        return self.config.downsample if self.scale == 2 else ""

    def pyramid(self, images, shift):
        """Normalised images (N,3,h,w) -> five maps, at P3..P7 (shift 0) or P2..P6 (shift 1)."""
        if self.training and images[:, 0].numel() <= SMALLEST:
            size = "x".join(map(str, images.shape[2:]))
            raise InputError(f"one image of {size} is too little for BatchNorm; raise --batch or --short-sides")
        return self.fpn(self.backbone(images), align.levels(shift))

    def pyramids(self, images, branches=None):
        """Normalised images, at the only resolution this model sees -> {branch: five maps}."""
        (branch,) = self.branches
        return {branch: self.pyramid(images, align.SHIFTS[branch])}

    def folded(self):
        """A copy for inference, in eval mode, with BatchNorm folded into the convolutions: equal numbers, less work."""
        model = copy.deepcopy(self).eval()
        fold_batchnorm(model.backbone)
        return model.eval().to(memory_format=torch.channels_last)

    def forward(self, images):
        """Normalised images (N,3,h,w) -> ({branch: five maps}, {branch: the head's outputs})."""
        pyramids = self.pyramids(images)
        return pyramids, self.predict(pyramids)

    def predict(self, pyramids):
        """{branch: five maps} -> {branch: outputs}, by one head call over all branches joined along the batch."""
        joined = self.head([torch.cat(maps) for maps in zip(*pyramids.values())])
        parts = {k: v.chunk(len(pyramids)) if torch.is_tensor(v) else [v] * len(pyramids) for k, v in joined.items()}
        return {branch: {k: v[i] for k, v in parts.items()} for i, branch in enumerate(pyramids)}

    def losses(self, outputs, boxes, labels):
        """{branch: outputs}, boxes [(M,4)] in H's pixels, labels [(M,)] -> {"branch/part": scalar}.

        Aligned branches share their targets, so these are made once.
        """
        sizes = next(iter(outputs.values()))["sizes"]
        targets = self.head.assign(sizes, boxes, labels)
        return {
            f"{branch}/{part}": value
            for branch, output in outputs.items()
            for part, value in self.head.losses(output, targets).items()
        }

    def normalize(self, images, sizes):
        """Padded RGB images (N,3,H,W), uint8 or float in 0-1, and their sizes [(h,w)] -> network input.

        The padding becomes 0, the mean colour.
        """
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = (x - self.mean) / self.std
        sizes = torch.as_tensor(sizes, device=x.device)
        rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]
        columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
        x = x * (rows[:, None, :, None] & columns[:, None, None, :])
        return x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def detect(self, images, branch=None, resize=True):
        """Find objects in RGB images [(3,h,w)], float in 0-1, of any sizes.

        `branch` is one of `branches` (default: the first). With `resize` the images are brought to the size the model
        was made for; without, they are the network's input, for a low-resolution model already at low resolution.
        Returns one dict per image: `boxes` (D,4) in that image's own pixels, `scores` (D,), best first, `labels` (D,).
        Images are batched by their padded size, so the company an image is in never changes its result.
        """
        branch = branch or self.branches[0]
        if branch not in self.branches:
            raise ValueError(f"a model of kind {self.config.kind} has no branch {branch!r}, only {self.branches}")
        inputs = [self.resized(image) if resize else image for image in images]
        groups = {}
        for index, image in enumerate(inputs):
            groups.setdefault(self.padded_size(image.shape[-2:]), []).append(index)
        results = [None] * len(images)
        for members in groups.values():
            batch = pad_to_multiple([inputs[i] for i in members], self.multiple)
            sizes = [tuple(inputs[i].shape[-2:]) for i in members]
            originals = [tuple(images[i].shape[-2:]) for i in members]
            device = self.mean.device
            found = self.detect_batch(batch.to(device), sizes, originals, [branch])
            for index, detections in zip(members, found[branch]):
                results[index] = detections
        return results

    @torch.inference_mode()
    def detect_batch(self, images, sizes, originals, branches):
        """A padded batch (N,3,H,W) at the network's size -> {branch: one dict per image}, boxes in `originals`' pixels.

        `sizes` and `originals` are [(height, width)] of the images within the batch and of their files.
        """
        if self.training:
            raise RuntimeError("detect needs the model in eval mode: call model.eval() first")
        outputs = self.predict(self.pyramids(self.normalize(images, sizes), branches))
        return {branch: self.postprocess(outputs[branch], branch, sizes, originals) for branch in branches}

    def postprocess(self, outputs, branch, sizes, originals):
        """One branch's outputs -> one dict per image: per level the best candidates, then NMS, then the best of all."""
        cells = [h * w * self.head.anchors for h, w in outputs["sizes"]]
        results = []
        for i, (size, original) in enumerate(zip(sizes, originals)):
            # Most locations have nothing: the others alone are decoded.
            likely = outputs["logits"][i].amax(-1).sigmoid() > SCORE_THRESHOLD
            own = {name: x[i, likely] if torch.is_tensor(x) else x for name, x in outputs.items()}
            boxes, scores = self.head.decode(own, likely)
            counts = [int(level.sum()) for level in likely.split(cells)]
            found = [best_candidates(b, s) for b, s in zip(boxes.split(counts), scores.split(counts))]
            b, s, l = (torch.cat(part) for part in zip(*found))
            # batched_nms keeps classes apart only where no coordinate is negative.
            lowest = torch.cat([b, b.new_zeros(1, 4)]).min()
            keep = batched_nms(b - lowest, s, l, self.head.nms_threshold)[:DETECTIONS_PER_IMAGE]
            frame = [side * self.frame_scale(branch) for side in size]
            b = clip_boxes_to_image(b[keep], frame)
            y, x = (to / side for to, side in zip(original, frame))
            b, s, l = b * b.new_tensor([x, y, x, y]), s[keep], l[keep]
            visible = (b[:, 2:] > b[:, :2]).all(1)
            results.append({"boxes": b[visible], "scores": s[visible], "labels": l[visible]})
        return results

    def frame_scale(self, branch):
        """Pixels of the frame a branch's boxes are in (H's) per pixel of the network's input."""
        return self.scale

    @property
    def multiple(self):
        """The multiple to which the sides of this model's input are padded."""
        return self.config.pad // self.scale

    def padded_size(self, size):
        return tuple(-(-side // self.multiple) * self.multiple for side in size)

    def resized(self, image):
        """An image (3,h,w) at the size this model tests at."""
        size = fitted_size(*image.shape[-2:], self.config.short_side, self.config.long_side)
        return resize(image, size, self.low_input)


def best_candidates(boxes, scores):
    """A level's boxes (R,4) and scores (R,K), 0 where out of the question -> the best as boxes, scores, labels."""
    location, label = scores.nonzero(as_tuple=True)
    score = scores[location, label]
    if len(score) > CANDIDATES_PER_LEVEL:
        score, best = score.topk(CANDIDATES_PER_LEVEL)
        location, label = location[best], label[best]
    return boxes[location], score, label
