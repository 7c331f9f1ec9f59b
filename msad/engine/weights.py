"""What a model starts from: weights that torchvision, the paper's authors or this program trained.

    imagenet   torchvision's backbone
    coco       torchvision's FCOS or RetinaNet, of which everything is taken but the class outputs and P6
    FILE       a backbone's ImageNet weights, torchvision's or slimmable ones, or a checkpoint of this program

The authors' slimmable ResNet-50 holds the networks of four widths. Its convolutions are stored at full width, and a
width w uses their first int(w * C) output and input channels; each BatchNorm is stored once for every width:

    features.0.{0,1}                              the stem: convolution, BatchNorm
    features.{1-16}                               the 3+4+6+3 bottleneck blocks, in each:
        .body.{0,3,6} .body.{1,4,7} .shortcut.{0,1}   convolutions, BatchNorms, and both where the shape changes
    features.*.bn.{0-3}                           of a BatchNorm: widths 0.25, 0.5, 0.75, 1
"""

import re
from pathlib import Path

import torch
import torchvision

from ..backbone import LAYERS, WIDTHS
from ..data.errors import MALFORMED, InputError, input_errors
from ..models import ModelConfig
from . import checkpoint, processes
from .files import read_tensors

# How names begin in torchvision's FCOS and RetinaNet, and here. Class outputs have other classes: they stay unknown.
TORCHVISION = {"backbone.body.": "backbone.", "backbone.fpn.extra_blocks.": "fpn."}
TORCHVISION |= {f"backbone.fpn.inner_blocks.{i}.0.": f"fpn.lateral.{i + 3}." for i in range(3)}
TORCHVISION |= {f"backbone.fpn.layer_blocks.{i}.0.": f"fpn.output.{i + 3}." for i in range(3)}
TORCHVISION |= {f"head.classification_head.conv.{i}.0.": f"head.cls_tower.{2 * i}." for i in range(4)}  # RetinaNet's
TORCHVISION |= {f"head.regression_head.conv.{i}.0.": f"head.box_tower.{2 * i}." for i in range(4)}
TORCHVISION |= {"head.classification_head.conv.": "head.cls_tower.", "head.regression_head.conv.": "head.box_tower."}
TORCHVISION |= {"head.regression_head.bbox_reg.": "head.box_pred."}
TORCHVISION |= {"head.regression_head.bbox_ctrness.": "head.centerness."}

# How names begin in a slimmable bottleneck block, and here.
BLOCK = {"body.0.": "conv1.", "body.1.": "bn1.", "body.3.": "conv2.", "body.4.": "bn2.", "body.6.": "conv3."}
BLOCK |= {"body.7.": "bn3.", "shortcut.0.": "downsample.0.", "shortcut.1.": "downsample.1."}


def load_weights(model, weights):
    """Let a model start from `weights`: "imagenet", "coco" or a file, as above.

    Of a detector everything that fits is taken, class outputs if the classes are equal. Prints how many tensors were
    taken. Raises InputError for weights that do not fit the model's backbone and width.
    """
    config, source = model.config, f"--weights {weights}"
    if weights == "imagenet":
        line = copy_backbone(model, download(config.backbone, "IMAGENET1K_V1"), source)
    elif weights == "coco":
        architecture = ("backbone", "width", "fpn_channels", "head_channels", "head_convs")
        check_architecture(source, config, ModelConfig("high", (), config.head), architecture)
        state = from_torchvision(download(f"{config.head}_resnet50_fpn", "COCO_V1"), config.head)
        line = copy_matching(model, state, "fpn.p6.") + "; P2, which it lacks, starts from P3, and P6 afresh"
    elif checkpoint.is_checkpoint(content := read_tensors(weights)):
        other = checkpoint.load(weights)
        check_architecture(source, config, other.config, ("backbone", "width"))
        line = copy_detector(model, other)
    else:
        line = copy_backbone(model, content, source)
    processes.print_once(f"weights   {source}: taken {line}")


def check_architecture(source, config, other, names):
    """Raise InputError unless the named fields of a model's config are those of what it is to start from."""
    flags = {name: f"--{name.replace('_', '-')}" for name in names if getattr(config, name) != getattr(other, name)}
    if flags:
        wanted = [f"{flag} {getattr(other, name)} (not {getattr(config, name)})" for name, flag in flags.items()]
        raise InputError(f"{source}: does not fit this network, only one of {', '.join(wanted)}")


def copy_detector(model, other):
    """Copy to a model what fits of another: of its head only to the same kind, class outputs only for equal classes.

    Returns a line as from `copy_matching`.
    """
    without = ("head.",) if model.config.head != other.config.head else ()
    without += ("head.cls_logits.",) if model.config.classes != other.config.classes else ()
    return copy_matching(model, other.state_dict(), without)


def copy_matching(model, state, without):
    """Copy to a model the tensors of a state dict that agree in name and shape, `without` names that begin so.

    Returns a line that counts what was taken, what of the state was not, and what of the model starts afresh.
    """
    own = model.state_dict()
    fits = {n: t for n, t in state.items() if not n.startswith(without) and (n not in own or own[n].shape == t.shape)}
    missing, unknown = model.load_state_dict(fits, strict=False)  # FCOS makes room for biases that it lacks
    taken = len(fits) - len(unknown)
    return f"{taken} tensors; left behind {len(state) - taken}; new {len(missing)}"


def copy_backbone(model, content, source):
    """Fill a model's backbone from the content of a file of ImageNet weights, all of whose tensors but the classifier's
    must fit. Returns a line that counts them. Raises InputError."""
    name, width = model.config.backbone, model.config.width
    fault = f"not ImageNet weights for --backbone {name} --width {width:g}"
    with input_errors(source, fault, checkpoint.CONVERT, MALFORMED):
        state = {n.removeprefix("module."): tensor for n, tensor in content.get("model", content).items()}
        layers = {n: tensor for n, tensor in state.items() if not n.startswith(("fc.", "classifier."))}
        if "features.0.0.weight" in layers:
            layers = slimmed(layers, model.backbone, width)
        model.backbone.load_state_dict(layers)
    return f"{len(layers)} tensors of the backbone; left behind {len(state) - len(layers)}"


def slimmed(state, network, width, start=""):
    """The slimmable ResNet-50 in a state dict -> the one of a width in it, under our names, for a network to load.

    `start` is how the names of its tensors begin, both in the state dict and in the network. Others stay as they are.
    """
    blocks = [f"layer{stage}.{i}." for stage, count in enumerate(LAYERS["resnet50"], start=1) for i in range(count)]
    prefixes = {"features.0.0.": "conv1.", "features.0.1.": "bn1."}
    for number, block in enumerate(blocks, start=1):
        prefixes |= {f"features.{number}.{theirs}": block + ours for theirs, ours in BLOCK.items()}
    state = rename(state, {start + theirs: start + ours for theirs, ours in prefixes.items()})
    norm = f".bn.{WIDTHS.index(width)}."
    state = {n.replace(norm, "."): tensor for n, tensor in state.items() if norm in n or ".bn." not in n}
    for name, tensor in network.state_dict().items():
        if name.startswith(start) and tensor.dim() == 4:  # a convolution: its first channels
            state[name] = state[name][tuple(map(slice, tensor.shape))]
    return state


def rename(state, prefixes):
    """A state dict under other names: the first of {their prefix: our prefix} that fits is replaced. Others stay."""
    pattern = re.compile(f"^({'|'.join(map(re.escape, prefixes))})")
    return {pattern.sub(lambda found: prefixes[found[0]], name): tensor for name, tensor in state.items()}


def download(name, weights):
    """The state dict of a model of torchvision's, trained, from PyTorch's cache of downloads. Raises InputError."""
    url = torchvision.models.get_model_weights(name)[weights].url
    file = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    mend = f"delete {file} if it is there, give a file (--weights FILE) or start from nothing (--weights none)"
    with input_errors(f"the weights {weights} of {name}", "cannot be loaded", mend, Exception):
        return torchvision.models.get_model(name, weights=weights).state_dict()


def from_torchvision(state, head):
    """The state dict of torchvision's FCOS or RetinaNet (`head`) -> its tensors under our names, with a P2.

    There P2 does not exist: here it starts as P3 in double size. There P6 reads P5, here C5: it does not fit.
    """
    found = rename(state, TORCHVISION)
    found |= {f"fpn.output.2.{name}": found[f"fpn.output.3.{name}"] for name in ("weight", "bias")}
    found |= {"fpn.lateral.2.weight": torch.zeros(256, 256, 1, 1), "fpn.lateral.2.bias": torch.zeros(256)}
    if head == "fcos":  # its points are the cells' upper left corners, ours their centres, half a stride further
        found["head.box_pred.bias"] = found["head.box_pred.bias"] + torch.tensor([0.5, 0.5, -0.5, -0.5])
    return found
