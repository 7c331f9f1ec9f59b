"""Weights from elsewhere, recognised by their tensors: the authors' detectors and two kinds of ImageNet backbones.

The authors' files (PyTorch 1.4, detectron2 0.2.1) are {"model": state dict, ...} or the bare state dict:

    T_backbone.bottom_up.features.0.{0,1}              the teacher's stem: convolution, BatchNorm
    T_backbone.bottom_up.features.{1-16}               the 3+4+6+3 bottleneck blocks of ResNet-50, in each:
        .body.{0,3,6} .body.{1,4,7} .shortcut.{0,1}    convolutions, BatchNorms, and both where the shape changes
    T_backbone.fpn_lateral{2-5} .fpn_output{2-5} .top_block.{p6,p7}
    SE.fc.{0,2}                                        the gate that fuses
    T_fcos_head.{cls,bbox}_tower .cls_logits .bbox_pred .ctrness .scales.{0-4}.scale
    S_backbone.* S_fcos_head.*                         in a student's file, beside all of the above

The backbone is slimmable. Convolutions are stored at full width, and width w uses the first int(w * C) output and input
channels; BatchNorms are stored once for each of the four widths, as bn.{0-3}. The pyramid was made for one width, which
the input channels of its laterals tell. The slimmable ImageNet file has the same module.features.* and a classifier.

The authors' networks see BGR from 0 to 255 less the mean, divided by nothing. Ours see RGB normalised by mean and
std, and the means agree, so the stem's weights take up the difference exactly, zero padding included. Their detectors
begin with the slimmable ImageNet weights on that input, so these are read alike.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from . import checkpoint, processes
from .annotations import InputError
from .detector import STD, ModelConfig
from .resnet import LAYERS, WIDTHS, ResNet
from .settings import Parser

COCO = tuple(
    {"id": number, "name": name}
    for number, name in enumerate(FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name not in ("__background__", "N/A")
)
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Parts of a detector other than its backbone and its scales: our name -> the authors'; # is T or S.
PARTS = {
    "fpn.lateral.": "#_backbone.fpn_lateral",
    "fpn.output.": "#_backbone.fpn_output",
    "fpn.p": "#_backbone.top_block.p",
    "fusion.squeeze.": "SE.fc.0.",
    "fusion.excite.": "SE.fc.2.",
    "head.cls_tower.": "#_fcos_head.cls_tower.",
    "head.box_tower.": "#_fcos_head.bbox_tower.",
    "head.cls_logits.": "#_fcos_head.cls_logits.",
    "head.box_pred.": "#_fcos_head.bbox_pred.",
    "head.centerness.": "#_fcos_head.ctrness.",
}


class Expected(NamedTuple):
    """A tensor a file must hold."""

    shape: tuple
    ours: str  # the name it has here
    dropped: str = ""  # why it is not used; empty if it is


def slimmable_layers():
    """Every convolution of a slimmable ResNet-50 with the BatchNorm after it: our two names, the file's two."""
    yield "conv1", "bn1", "0.0", "0.1"
    number = 0
    for stage, blocks in enumerate(LAYERS["resnet50"], start=1):
        for block in range(blocks):
            number += 1
            ours = f"layer{stage}.{block}"
            for i in range(3):
                yield f"{ours}.conv{i + 1}", f"{ours}.bn{i + 1}", f"{number}.body.{3 * i}", f"{number}.body.{3 * i + 1}"
            if block == 0:
                yield f"{ours}.downsample.0", f"{ours}.downsample.1", f"{number}.shortcut.0", f"{number}.shortcut.1"


def expected_backbone(width):
    """{name: Expected} of a slimmable ResNet-50 that is to be used at `width`."""
    with torch.device("meta"):
        full = {name: tuple(tensor.shape) for name, tensor in ResNet("resnet50").state_dict().items()}
    expected = {}
    for conv, norm, their_conv, their_norm in slimmable_layers():
        expected[f"features.{their_conv}.weight"] = Expected(full[f"{conv}.weight"], f"{conv}.weight")
        for index, other in enumerate(WIDTHS):
            why = "" if other == width else "other widths' BatchNorm"
            for name in NORM_TENSORS:
                shape = tuple(int(other * c) for c in full[f"{norm}.{name}"])
                expected[f"features.{their_norm}.bn.{index}.{name}"] = Expected(shape, f"{norm}.{name}", why)
    return expected


def expected_half(letter, width):
    """{name: Expected} of all that a detector of the authors' has; `letter` is T, with the gate, or S, without."""
    backbone = expected_backbone(width).items()
    expected = {f"{letter}_backbone.bottom_up.{name}": e._replace(ours=f"backbone.{e.ours}") for name, e in backbone}
    with torch.device("meta"):
        model = checkpoint.build(config_of("teacher", width)).state_dict()
    for ours, tensor in model.items():
        for part, theirs in PARTS.items():
            if ours.startswith(part) and (letter == "T" or "#" in theirs):
                name = theirs.replace("#", letter) + ours.removeprefix(part)
                expected[name] = Expected(tuple(tensor.shape), ours)
    for level in range(len(model["head.scales"])):
        expected[f"{letter}_fcos_head.scales.{level}.scale"] = Expected((1,), f"head.scales.{level}")
    return expected


def take(state, expected, source):
    """{our name: tensor} of what is to be used, and a line that accounts for every tensor of the file.

    Raises InputError with the first tensor that is missing, unknown or of a wrong shape. BatchNorm's counters, which
    nothing here reads, may be missing: PyTorch before 0.4.1 did not write them.
    """
    counters = {name for name in expected if name.endswith(".num_batches_tracked")}
    missing = [name for name in expected if name not in state and name not in counters]
    unknown = [name for name in state if name not in expected]
    for what, names in (("is missing", missing), ("is unknown", unknown)):
        if names:
            raise InputError(f"{source}: tensor {names[0]} {what}" + f", and {len(names) - 1} more" * (len(names) > 1))
    for name, tensor in state.items():
        shape = tuple(tensor.shape) if torch.is_tensor(tensor) else f"a {type(tensor).__name__}"
        if shape != expected[name].shape:
            raise InputError(f"{source}: {name} is {shape}, not a tensor of shape {expected[name].shape}")
    used = {expected[name].ours: tensor for name, tensor in state.items() if not expected[name].dropped}
    dropped = Counter(expected[name].dropped for name in state if expected[name].dropped)
    counts = ", ".join(f"{n} ({why})" for why, n in dropped.items()) or "none"
    return used, f"{source}: {len(used)} tensors used, dropped: {counts}"


def cut(tensors, shapes):
    """Tensors of a slimmable backbone, by our names -> a plain backbone's of these shapes, for our kind of input."""
    tensors = {name: tensor[tuple(map(slice, shapes[name]))].clone() for name, tensor in tensors.items()}
    # From BGR to RGB, and from x = 255 * std * ours to ours.
    scale = 255 * torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    tensors["conv1.weight"] = (tensors["conv1.weight"].flip(1) * scale).float()
    return tensors


def config_of(kind, width):
    """The authors' detectors, with all that makes their numbers."""
    return ModelConfig(kind, COCO, width=width, pad=256, downsample="nearest")


def state_of(content, source):
    """The state dict of a file's content, without the "module." that DataParallel puts before every name."""
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{source}: holds no model")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def is_detector(state):
    return any(name.startswith(("T_backbone.", "S_backbone.")) for name in state)


def is_slimmable(state):
    return any(name.startswith("features.0.") for name in state)


def translate(content, source, want=None):
    """An authors' detector as the content of a checkpoint here, and "summary", a line that accounts for its tensors.

    A student's file gives the student, or with `want="teacher"` the teacher in it. Raises InputError.
    """
    state = state_of(content, source)
    if is_slimmable(state):
        raise InputError(f"{source}: holds a backbone only; it is for --weights, with --width")
    if not is_detector(state):
        raise InputError(f"{source}: neither a checkpoint of this program nor a detector of the paper's authors")
    letters = "TS" if any(name.startswith("S_") for name in state) else "T"
    kind = "teacher" if want == "teacher" or letters == "T" else "low"
    width = width_of(state, source)
    config = config_of(kind, width)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.build(config).state_dict().items()}

    role = "teacher" if kind == "teacher" else "student"
    expected = expected_detector(letters, kind, width)
    used, summary = take(state, expected, f"{source}: the authors' {role}, width {width:g}")
    used["head.scales"] = torch.cat([used.pop(f"head.scales.{level}") for level in range(shapes["head.scales"][0])])
    return {"config": config, "model": cut(used, shapes, "backbone."), "training": None, "summary": summary}


def load_backbone(backbone, settings):
    """Fill a ResNet from `settings.weights`: "none", "imagenet" (torchvision's, downloaded by it), or a file.

    A file holds torchvision's weights, or the slimmable ones, cut to `settings.width`. Says in a line what was used of
    it, and returns that line. Raises InputError.
    """
    if settings.weights == "none":
        return None
    source = f"--weights {settings.weights}"
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    state = torchvision_weights(settings) if settings.weights == "imagenet" else state_of(checkpoint.read_tensors(settings.weights), source)
    if is_detector(state):
        raise InputError(f"{source}: holds a whole detector; it is for distill.py --teacher and evaluate.py --ckpt")
    classifier = {
        name: Expected(tuple(getattr(tensor, "shape", ())), "", "the classifier")
        for name, tensor in state.items()
        if name.startswith(("fc.", "classifier."))
    }
    for_what = f"{settings.backbone} of width {settings.width:g}"
    if is_slimmable(state):
        if settings.backbone != "resnet50":
            raise InputError(f"{source}: is a slimmable resnet50, not a {settings.backbone}")
        used, summary = take(state, expected_backbone(settings.width) | classifier, f"{source}: slimmable ImageNet weights for {for_what}")
        used = cut(used, shapes)
    else:
        expected = {name: Expected(shape, name) for name, shape in shapes.items()}
        used, summary = take(state, expected | classifier, f"{source}: torchvision's ImageNet weights for {for_what}")
    backbone.load_state_dict(used)
    if processes.is_main():
        print(f"weights   {summary}", flush=True)
    return summary
