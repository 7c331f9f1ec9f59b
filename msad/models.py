"""The detectors: who reads which pyramid of which input, and what every detector can do.

    Detector       one resolution: "high" reads H at P3..P7, "low" reads L at P2..P6; a student is a "low" one
    Teacher        both, aligned, and the fused pyramid
    Conventional   both, without the shift and without fusion: what the paper compares with

`branches` are the pyramids that a model can predict from: "high", "low" or "fused". In training a batch passes
`normalize` (pixels -> network input), `forward` (-> five maps and the head's outputs, for each branch) and `losses`
(-> scalars). A user calls `detect`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from . import align
from .backbone import FPN, ResNet, fold_batchnorm
from .fcos import FCOSHead
from .fusion import CrossingFusion
from .images import fitted_size, list_pictures, pad_to_multiple, picture_to_tensor, resize
from .postprocess import DETECTIONS_PER_IMAGE, postprocess
from .retinanet import RetinaNetHead

HEADS = {"fcos": FCOSHead, "retinanet": RetinaNetHead}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB from 0 to 1


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to rebuild a model; a checkpoint carries it. Sides are in pixels of H, also for a model that
    reads L."""

    kind: str  # "teacher", "high", "low" or "conventional"
    classes: tuple  # of {"id": the data set's category id, "name"}; a label is an index into it
    head: str = "fcos"
    backbone: str = "resnet50"
    width: float = 1.0
    fpn_channels: int = 256
    head_channels: int = 256
    head_convs: int = 4
    object_scale: float = 1.0  # factor on the sizes of objects that each level is responsible for; 1 is COCO's
    short_side: int = 800
    long_side: int = 1333
    pad: int = 64
    downsample: str = "area"  # how L is made of H, see align.downsample


class Detector(nn.Module):
    """The detector of one resolution, and the base of the two that read both."""

    def __init__(self, config, branches=None, levels=None):
        """A model of several branches passes them, and all levels of the pyramid that any of them reads."""
        super().__init__()
        self.config = config
        self.branches = branches or (config.kind,)
        self.scale = 2 if config.kind == "low" else 1  # H's pixels per pixel of this model's input
        self.multiple = config.pad // self.scale  # of which the sides of this model's input are multiples
        self.input_downsample = config.downsample if self.scale == 2 else None  # how it is made of H; None: it is H
        self.box_scales = dict.fromkeys(self.branches, self.scale)  # pixels of its boxes per pixel of the model's input
        self.backbone = ResNet(config.backbone, config.width)
        self.fpn = FPN(self.backbone.channels, config.fpn_channels, levels or align.LEVELS[config.kind])
        details = len(config.classes), config.head_channels, config.head_convs, config.object_scale
        self.head = HEADS[config.head](config.fpn_channels, *details)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def normalize(self, images, sizes):
        """Padded RGB images (N,3,h,w), uint8 or float in 0-1, and their sizes [(h,w)] -> network input.

        The padding becomes 0, the mean colour. Where there is none, `sizes` may be empty. The memory layout is that of
        the network's weights.
        """
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = ((x - self.mean) / self.std).to(self.mean.dtype)
        for number, (height, width) in enumerate(sizes):
            x[number, :, height:] = 0
            x[number, :, :, width:] = 0
        channels_last = self.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def forward(self, images):
        """Normalised images (N,3,h,w) -> ({branch: five maps}, {branch: the head's outputs})."""
        pyramids = self.pyramids(images)
        return pyramids, self.predict(pyramids)

    def pyramids(self, images, branches=None):
        """Normalised images, at the only resolution this model sees -> {its branch: five maps}. `branches` is for those
        that have several."""
        (branch,) = self.branches
        return {branch: self.pyramid(images, align.LEVELS[branch])}

    def pyramid(self, images, levels):
        """Normalised images (N,3,h,w) -> the maps of five levels."""
        return self.fpn(self.backbone(images), levels)

    def predict(self, pyramids):
        """{branch: five maps} -> {branch: outputs}, by one head call over all branches joined along the batch."""
        joined = self.head([torch.cat(maps) for maps in zip(*pyramids.values())])
        parts = {name: value.chunk(len(pyramids)) for name, value in joined.items()}
        return {branch: {name: part[i] for name, part in parts.items()} for i, branch in enumerate(pyramids)}

    def losses(self, pyramids, outputs, boxes, labels, average=lambda totals: totals):
        """What `forward` returned, boxes [(M,4)] in H's pixels, labels [(M,)] -> {branch: {part: scalar}}.

        Aligned branches share their targets, so these are made once. Losses are divided by the batch's number of
        objects; with several processes `average` gives the mean of such totals over all of them.
        """
        targets = self.head.assign(align.map_sizes(next(iter(pyramids.values()))), boxes, labels)
        targets["totals"] = average(targets["totals"])
        return {branch: self.head.losses(output, targets) for branch, output in outputs.items()}

    def detect(self, pictures, branch=None, resize=True, threshold=0.0, max_detections=DETECTIONS_PER_IMAGE):
        """Find objects in one picture or several, of any sizes: PIL images, NumPy arrays (h,w,3) or (h,w), tensors
        (3,h,w) or (1,h,w), RGB or grey, uint8 or floats in 0-1. EXIF is not read: a camera's photo may need
        PIL.ImageOps.exif_transpose first.

        `branch` is one of `branches` (default: the first). With `resize` the pictures are brought to the size the model
        was made for; without, they are the network's input, for a low-resolution model already at low resolution.
        Returns a list of one dict per picture: `boxes` (D,4) in that picture's own pixels, `scores` (D,), best first
        and at least `threshold`, `labels` (D,); no class of a probability below 0.05 is found. Pictures are batched by
        their padded size, at most eight together, so the company a picture is in changes its result by rounding at
        most. Raises ValueError for what is no picture.
        """
        branch = branch or self.branches[0]
        if branch not in self.branches:
            raise ValueError(f"a model of kind {self.config.kind} has no branch {branch!r}, only {self.branches}")
        images = [picture_to_tensor(picture) for picture in list_pictures(pictures)]
        inputs = [self.resized(image) if resize else image for image in images]
        groups = {}
        for index, image in enumerate(inputs):
            groups.setdefault((image.dtype, self.padded_size(image.shape[-2:]), index // 8), []).append(index)
        results = {}
        for members in groups.values():
            x = pad_to_multiple([inputs[i] for i in members], self.multiple).to(self.mean.device)
            sizes = [tuple(inputs[i].shape[-2:]) for i in members]
            originals = [tuple(images[i].shape[-2:]) for i in members]
            found = self.detect_batch(x, sizes, originals, [branch], threshold=threshold, max_detections=max_detections)
            results |= zip(members, found[branch])
        return [results[index] for index in range(len(images))]

    @torch.no_grad()
    def detect_batch(self, images, sizes, originals, branches, **limits):
        """A padded batch (N,3,h,w) at the network's size -> {branch: one dict per image}, boxes in `originals`' pixels.

        `sizes` and `originals` are [(height, width)] of the images within the batch and of their files, `limits`
        threshold and max_detections as in `detect`.
        """
        if self.training:
            raise RuntimeError("detect needs the model in eval mode: call model.eval() first")
        pyramids = self.pyramids(self.normalize(images, sizes), branches)
        outputs = self.predict(pyramids)
        return {b: self.postprocess(pyramids[b], outputs[b], b, sizes, originals, **limits) for b in branches}

    def postprocess(self, pyramid, outputs, branch, sizes, originals, **limits):
        """One branch's maps and outputs -> one dict of detections per image, as in `detect_batch`."""
        frames = [tuple(side * self.box_scales[branch] for side in size) for size in sizes]
        return postprocess(self.head, outputs, align.map_sizes(pyramid), frames, originals, **limits)

    def folded(self, precision="fp32"):
        """A copy for inference, in eval mode, with BatchNorm folded into the convolutions: equal numbers, less work.

        With "bf16" it is for use under autocast only: the convolutions' weights are in bf16 once and for all, where
        autocast would cast them anew at every call."""
        model = copy.deepcopy(self).eval()
        fold_batchnorm(model.backbone)
        if precision == "bf16":
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.bfloat16()
        return model.eval().to(memory_format=torch.channels_last)  # eval: for the modules that are new

    def padded_size(self, size):
        return tuple(-(-side // self.multiple) * self.multiple for side in size)

    def resized(self, image):
        """An image (3,h,w) at the size this model tests at."""
        size = fitted_size(*image.shape[-2:], self.config.short_side, self.config.long_side)
        return resize(image, size, self.input_downsample)


class Teacher(Detector):
    """The multi-scale aligned teacher. H and L of one image run through the same backbone, pyramid and head: no
    parameter knows the resolution. It predicts from the fused pyramid, its first branch."""

    def __init__(self, config):
        super().__init__(config, branches=("fused", "high", "low"), levels=range(2, 8))  # P2..P7
        self.fusion = CrossingFusion(config.fpn_channels)

    def pyramids(self, images, branches=("fused", "high", "low")):
        """Normalised high-resolution images -> {branch: five maps}; only what the wanted branches need is computed."""
        pyramids = {}
        if set(branches) & {"high", "fused"}:
            pyramids["high"] = self.pyramid(images, align.LEVELS["high"])
        if set(branches) & {"low", "fused"}:
            low = align.downsample(images, self.config.downsample)
            pyramids["low"] = self.pyramid(low, align.LEVELS["low"])
        if "fused" in branches:
            pyramids["fused"] = self.fusion(pyramids["high"], pyramids["low"])
        return {branch: pyramids[branch] for branch in branches}


class Conventional(Detector):
    """Conventional multi-scale training: high and low both read at P3..P7, each in its own pixels, no fusion."""

    def __init__(self, config):
        super().__init__(config, branches=("high", "low"), levels=align.LEVELS["high"])
        self.box_scales["low"] = 0.5  # L's boxes are in L's pixels, and the model's input is H

    def pyramids(self, images, branches=("high", "low")):
        """As a Teacher's, but L is not shifted."""
        inputs = {"high": images}
        if "low" in branches:
            inputs["low"] = align.downsample(images, self.config.downsample)
        return {branch: self.pyramid(inputs[branch], align.LEVELS["high"]) for branch in branches}

    def predict(self, pyramids):
        """The maps differ in size, so the head is called for each branch."""
        return {branch: self.head(maps) for branch, maps in pyramids.items()}

    def losses(self, pyramids, outputs, boxes, labels, average=lambda totals: totals):
        """As in Detector, but each branch has targets of its own: the low one's are in L's pixels."""
        losses = {}
        for branch, own in {"high": boxes, "low": [b / 2 for b in boxes]}.items():
            losses |= super().losses({branch: pyramids[branch]}, {branch: outputs[branch]}, own, labels, average)
        return losses


KINDS = {"teacher": Teacher, "conventional": Conventional, "high": Detector, "low": Detector}


def build(config):
    """A new model of a ModelConfig's kind, in channels_last layout."""
    return KINDS[config.kind](config).to(memory_format=torch.channels_last)

