"""Models to files and back, whoever wrote them: this program, the paper's authors, torchvision; what a run starts from.

A checkpoint is plain tensors, numbers and text, so it loads without running any code:

    {"msad": 1, "config": the ModelConfig's fields, "model": state dict, "training": what a run needs to go on}

The authors' files (detectron2 0.2.1, PyTorch 1.4) are {"model": state dict, ...} or the bare state dict. They are
recognised by the names of their tensors:

    T_backbone.bottom_up.features.0.{0,1}             the teacher's stem: convolution, BatchNorm
    T_backbone.bottom_up.features.{1-16}              the 3+4+6+3 bottleneck blocks of ResNet-50, in each:
        .body.{0,3,6} .body.{1,4,7} .shortcut.{0,1}   convolutions, BatchNorms, and both where the shape changes
    T_backbone.fpn_lateral{2-5} .fpn_output{2-5} .top_block.{p6,p7}
    SE.fc.{0,2}                                       the gate of the fusion
    T_fcos_head.{cls,bbox}_tower .cls_logits .bbox_pred .ctrness .scales.{0-4}.scale
    S_backbone.* S_fcos_head.*                        in a student's file, beside all of the above

The backbone is slimmable: convolutions are stored at full width, and a width w uses their first int(w * C) output and
input channels; BatchNorms are stored once for each of four widths, as bn.{0-3}. The rest was made for one width, which
the laterals' input channels tell. The slimmable ImageNet file has module.features.* alike, and a classifier.

The authors' detectors see BGR from 0 to 255 less the mean, divided by nothing; ours see RGB normalised by mean and std.
The means agree, so the stem's weights take up the difference exactly, zero padding included. The slimmable ImageNet
weights were trained on what ours see, so they are taken as they are.
"""

from collections import Counter
from dataclasses import asdict
from typing import NamedTuple

import torch
import torchvision
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from ..backbone import LAYERS, WIDTHS, ResNet
from ..data.errors import InputError, checkpoint_errors
from ..models import STD, ModelConfig, build
from . import processes
from .files import read_tensors, write_tensors

FORMAT = 1
CATEGORIES = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # at their ids, with words for ids not in use
COCO = tuple({"id": i, "name": name} for i, name in enumerate(CATEGORIES) if name not in ("__background__", "N/A"))

# Names here and the authors': of the layers in a block, and of a detector's parts, where # is T or S.
BLOCK = {"conv1": "body.0", "bn1": "body.1", "conv2": "body.3", "bn2": "body.4", "conv3": "body.6", "bn3": "body.7"}
BLOCK |= {"downsample.0": "shortcut.0", "downsample.1": "shortcut.1"}
PARTS = {
    "fpn.lateral.": "#_backbone.fpn_lateral",
    "fpn.output.": "#_backbone.fpn_output",
    "fpn.p": "#_backbone.top_block.p",
    "fusion.squeeze.": "SE.fc.0.",
    "fusion.excite.": "SE.fc.2.",
    "head.cls_": "#_fcos_head.cls_",
    "head.box_": "#_fcos_head.bbox_",
    "head.centerness.": "#_fcos_head.ctrness.",
}

# How names begin in torchvision's FCOS and RetinaNet, and here. Class outputs have other classes: they stay unknown.
TORCHVISION = {"backbone.body.": "backbone.", "backbone.fpn.extra_blocks.": "fpn."}
TORCHVISION |= {f"backbone.fpn.inner_blocks.{i}.0.": f"fpn.lateral.{i + 3}." for i in range(3)}
TORCHVISION |= {f"backbone.fpn.layer_blocks.{i}.0.": f"fpn.output.{i + 3}." for i in range(3)}
TORCHVISION |= {f"head.classification_head.conv.{i}.0.": f"head.cls_tower.{2 * i}." for i in range(4)}  # RetinaNet's
TORCHVISION |= {f"head.regression_head.conv.{i}.0.": f"head.box_tower.{2 * i}." for i in range(4)}
TORCHVISION |= {"head.classification_head.conv.": "head.cls_tower.", "head.regression_head.conv.": "head.box_tower."}
TORCHVISION |= {"head.regression_head.bbox_reg.": "head.box_pred."}
TORCHVISION |= {"head.regression_head.bbox_ctrness.": "head.centerness."}


def save(path, model, training=None):
    """Write a checkpoint. Raises InputError; what stood there before is then untouched."""
    if model.is_folded:
        fault = "a folded model cannot be saved, its BatchNorm is gone; save the one it was made from"
        raise InputError(f"{path}: {fault}")
    content = {"msad": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "training": training}
    write_tensors(path, content)


def load(path, device="cpu", want=None):
    """The model in a checkpoint or in a file of the authors', ready to `detect`. `want` is as in `read`.

    Of the authors' files it prints how their tensors were used. Raises InputError.
    """
    return restore(read(path, want), path).to(device)


def read(path, want=None):
    """A checkpoint's content, with "config" as a ModelConfig. Raises InputError.

    A file of the authors' gives the same. One of their students holds its teacher too: `want="teacher"` gives that.
    With `want`, a model of another kind is refused.
    """
    content = read_tensors(path)
    if isinstance(content, dict) and content.get("msad") == FORMAT:
        with checkpoint_errors(path):
            content = {"training": None} | content | {"config": ModelConfig(**content["config"])}
    else:
        content = from_authors(content, path, want)
    kind = content["config"].kind
    if want and kind != want:
        raise InputError(f"{path}: holds a model of kind {kind}, not a {want}")
    return content


def restore(content, path):
    """The model of a checkpoint's content, in eval mode. Raises InputError where the tensors do not fit it."""
    with checkpoint_errors(path, "its tensors do not fit its description"):
        model = build(content["config"])
        model.load_state_dict(content["model"])
    return model.eval()


def load_weights(model, weights):
    """Let a model start from `weights`: "imagenet" or "coco", torchvision's backbone or its detector of the same head,
    downloaded by it, or a file. Prints a line that accounts for all tensors. Raises InputError, the model unchanged.

    A file holds a backbone's ImageNet weights, torchvision's or slimmable ones, of which the model's width is used, or
    a checkpoint of a detector, the authors' too: everything that fits is taken, class outputs if the classes are equal.
    """
    config, source = model.config, f"--weights {weights}"
    if weights == "imagenet":
        return load_backbone(model, download(config.backbone, "IMAGENET1K_V1"), source)
    if weights == "coco":
        architecture = ("backbone", "width", "fpn_channels", "head_channels", "head_convs")
        check_architecture(source, config, ModelConfig("high", COCO, config.head), architecture)
        state = from_torchvision(download(f"{config.head}_resnet50_fpn", "COCO_V1"), config.head)
        line = start_from(model, state) + "; P2 and P6, which differ there, start from P3 and P5"
    else:
        content = read_tensors(weights)
        ours = isinstance(content, dict) and "msad" in content
        if not ours and state_of(content, source)[1] != "detector":
            return load_backbone(model, content, source)
        other = load(weights)
        check_architecture(source, config, other.config, ("backbone", "width"))
        same = config.head == other.config.head, config.classes == other.config.classes
        line = start_from(model, other.state_dict(), "" if all(same) else "head.cls_logits." if same[0] else "head.")
    processes.print_once(f"weights   {source}: taken {line}")


def check_architecture(source, config, other, names):
    """Raise InputError unless the named fields of a model's config are those of what it is to start from."""
    flags = {name: f"--{name.replace('_', '-')}" for name in names if getattr(config, name) != getattr(other, name)}
    if flags:
        wanted = [f"{flag} {getattr(other, name)} (not {getattr(config, name)})" for name, flag in flags.items()]
        raise InputError(f"{source}: does not fit this network, only one of {', '.join(wanted)}")


@torch.no_grad()
def start_from(model, state, foreign=""):
    """Copy to a model what a state dict has of its names and shapes, but nothing whose name begins with `foreign`.

    Returns a line that counts by part what was taken, what of the state was not, and what of the model starts afresh.
    """
    own = model.state_dict()
    fits = {n: tensor for n, tensor in state.items() if n not in own or own[n].shape == tensor.shape}
    fits = {n: tensor for n, tensor in fits.items() if not (foreign and n.startswith(foreign))}
    _, unknown = model.load_state_dict(fits, strict=False)
    taken = fits.keys() - set(unknown)
    new = {n for n in own.keys() - taken if not n.endswith(".num_batches_tracked")}
    return f"{count_parts(taken)}; left behind {count_parts(state.keys() - taken)}; new {count_parts(new)}"


def count_parts(names):
    """Names of tensors -> "backbone 320, fpn 12", or "nothing"."""
    parts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} {count}" for part, count in sorted(parts.items())) or "nothing"


def from_torchvision(state, head):
    """The state dict of torchvision's FCOS or RetinaNet (`head`) -> its tensors under our names, with P2 and P6.

    There P2 does not exist: here it starts as P3 in double size. There P6 reads P5: here it starts as the convolution
    of C5 that gives the same wherever C5 is constant. What else differs is taken up by the tensors, exactly.
    """
    starts = [next((start for start in TORCHVISION if name.startswith(start)), "") for name in state]
    names = [TORCHVISION.get(start, "") + name.removeprefix(start) for start, name in zip(starts, state)]
    found = dict(zip(names, state.values()))
    lateral, output, p6 = (found[f"fpn.{name}.weight"] for name in ("lateral.5", "output.5", "p6"))
    lateral, output = lateral[:, :, 0, 0], output.sum((2, 3))
    inner = output @ found["fpn.lateral.5.bias"] + found["fpn.output.5.bias"]
    found["fpn.p6.bias"] = found["fpn.p6.bias"] + p6.sum((2, 3)) @ inner
    found["fpn.p6.weight"] = torch.einsum("oiyx,ij,jc->ocyx", p6, output, lateral)
    found |= {f"fpn.output.2.{name}": found[f"fpn.output.3.{name}"] for name in ("weight", "bias")}
    found |= {"fpn.lateral.2.weight": torch.zeros(256, 256, 1, 1), "fpn.lateral.2.bias": torch.zeros(256)}
    if head == "fcos":  # its points are the cells' upper left corners, ours their centres, half a stride further
        found["head.box_pred.bias"] = found["head.box_pred.bias"] + torch.tensor([0.5, 0.5, -0.5, -0.5])
    else:  # its BatchNorm adds nothing to the variance, ours 1e-5
        variances = {n: tensor for n, tensor in found.items() if n.endswith(".running_var")}
        found |= {n: (tensor - 1e-5).clamp(min=0) for n, tensor in variances.items()}
    return found


def load_backbone(model, content, source):
    """Fill a model's backbone from a file's content, all of whose tensors must be accounted for. Raises InputError."""
    name, width = model.config.backbone, model.config.width
    state, origin = state_of(content, source)
    expected = {key: Expected(shape_of(tensor), key) for key, tensor in model.backbone.state_dict().items()}
    if origin == "slimmable":
        if name != "resnet50":
            raise InputError(f"{source}: holds a slimmable resnet50, not a {name}")
        expected = expected_backbone(width)
    classifier = {key: tensor for key, tensor in state.items() if key.startswith(("fc.", "classifier."))}
    expected |= {key: Expected(shape_of(tensor), "", "the classifier") for key, tensor in classifier.items()}
    used = take(state, expected, f"{source}: {origin} ImageNet weights for --backbone {name} --width {width:g}")
    model.backbone.load_state_dict(cut(used, model.backbone))


def download(name, weights):
    """The state dict of a model of torchvision's, trained. Raises InputError."""
    try:
        return torchvision.models.get_model(name, weights=weights).state_dict()
    except (OSError, ValueError) as error:
        mend = "give a file (--weights FILE) or start from nothing (--weights none)"
        raise InputError(f"the weights {weights} of {name} cannot be downloaded ({error}); {mend}") from None


def state_of(content, source):
    """The state dict in a file, without the "module." that DataParallel puts before names, and whose it is."""
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{source}: holds no weights")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for origin, start in {"detector": ("T_backbone.", "S_backbone."), "slimmable": "features.0."}.items():
        if any(name.startswith(start) for name in state):
            return state, origin
    return state, "torchvision"


def from_authors(content, source, want=None):
    """An authors' detector as the content of a checkpoint: a student's file gives the student, or the teacher that is
    wanted. Raises InputError."""
    state, origin = state_of(content, source)
    if origin != "detector":
        hint = "; its backbone is for train.py --weights FILE --width W" if origin == "slimmable" else ""
        raise InputError(f"{source}: neither a checkpoint of this program nor a detector of the paper's authors{hint}")
    lateral = "T_backbone.fpn_lateral2.weight"
    shape = shape_of(state.get(lateral))
    width = next((w for w in WIDTHS if shape == (256, 256 * w, 1, 1)), None)
    if width is None:
        raise InputError(f"{source}: tensor {lateral} is {shape}, must be (256, 256 * width, 1, 1)")
    has_student = any(name.startswith("S_") for name in state)
    role = "student" if has_student and want != "teacher" else "teacher"
    expected = expected_detector("T", width, "" if role == "teacher" else "the teacher in the same file")
    if has_student:
        expected |= expected_detector("S", width, "" if role == "student" else "the student in the same file")
    used = take(state, expected, f"{source}: the authors' {role}, width {width:g}")

    config = authors_config("low" if role == "student" else "teacher", width)
    with torch.device("meta"):
        model = build(config)
    used["head.scales"] = torch.cat([used.pop(f"head.scales.{level}") for level in range(len(model.head.scales))])
    used = cut(used, model)
    scale = 255 * torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)  # their input is this times ours, flipped
    used["backbone.conv1.weight"] = (used["backbone.conv1.weight"].flip(1) * scale).float()
    return {"config": config, "model": used, "training": None}


def authors_config(kind, width):
    """The authors' detectors, with all that their numbers depend on."""
    return ModelConfig(kind, COCO, width=width, pad=256, downsample="nearest")


class Expected(NamedTuple):
    """A tensor that a file should hold."""

    shape: tuple
    ours: str  # its name here
    dropped: str = ""  # why it is not used, or empty


def expected_backbone(width):
    """{name: Expected} of a slimmable ResNet-50 that is wanted at `width`."""
    with torch.device("meta"):
        full = ResNet("resnet50").state_dict()
    blocks = [f"layer{stage}.{i}" for stage, count in enumerate(LAYERS["resnet50"], start=1) for i in range(count)]
    layers = {f"{block}.{ours}": f"{n}.{name}" for n, block in enumerate(blocks, 1) for ours, name in BLOCK.items()}
    layers |= {"conv1": "0.0", "bn1": "0.1"}
    expected = {}
    for ours, tensor in full.items():
        layer, name = ours.rsplit(".", 1)
        if tensor.dim() == 4:
            expected[f"features.{layers[layer]}.{name}"] = Expected(tuple(tensor.shape), ours)
            continue
        for index, other in enumerate(WIDTHS):
            shape = tuple(int(other * channels) for channels in tensor.shape)
            why = "" if other == width else "other widths' BatchNorm"
            expected[f"features.{layers[layer]}.bn.{index}.{name}"] = Expected(shape, ours, why)
    return expected


def expected_detector(letter, width, unwanted):
    """{name: Expected} of the detector `letter`: T, with the gate, or S. `unwanted` says why it is not used, if so."""
    with torch.device("meta"):
        full = build(authors_config("teacher", width)).state_dict()
    backbone = expected_backbone(width).items()
    expected = {f"{letter}_backbone.bottom_up.{name}": e._replace(ours=f"backbone.{e.ours}") for name, e in backbone}
    for ours, tensor in full.items():
        for part, theirs in PARTS.items():
            if ours.startswith(part) and (letter == "T" or "#" in theirs):
                why = "P7, which a student never reads" if letter == "S" and ours.startswith("fpn.p7.") else ""
                name = theirs.replace("#", letter) + ours.removeprefix(part)
                expected[name] = Expected(tuple(tensor.shape), ours, why)
    for level in range(len(full["head.scales"])):
        expected[f"{letter}_fcos_head.scales.{level}.scale"] = Expected((1,), f"head.scales.{level}")
    return {name: e._replace(dropped=unwanted or e.dropped) for name, e in expected.items()}


def take(state, expected, what):
    """{our name: tensor} of what is used of a file; prints a line that accounts for every tensor of `state`.

    Raises InputError with the first tensor that is missing, unknown or of a wrong shape. Only BatchNorm's counters,
    which nothing reads, may be missing: PyTorch did not always write them.
    """
    faults = [f"{n} is missing" for n in expected if n not in state and not n.endswith(".num_batches_tracked")]
    faults += [f"{n} is unknown" for n in state if n not in expected]
    shapes = {n: (shape_of(tensor), expected[n].shape) for n, tensor in state.items() if n in expected}
    faults += [f"{n} is {shape}, must be {wanted}" for n, (shape, wanted) in shapes.items() if shape != wanted]
    if faults:
        more = f" ({len(faults) - 1} more do not fit)" if faults[1:] else ""
        raise InputError(f"{what}: tensor {faults[0]}{more}")
    used = {expected[n].ours: tensor for n, tensor in state.items() if not expected[n].dropped}
    dropped = Counter(expected[n].dropped for n in state if expected[n].dropped)
    counts = ", ".join(f"{count} ({why})" for why, count in dropped.items()) or "none"
    processes.print_once(f"weights   {what}: {len(used)} tensors used; dropped: {counts}")
    return used


def shape_of(value):
    return tuple(value.shape) if torch.is_tensor(value) else type(value).__name__


def cut(tensors, model):
    """The used tensors of a network, at full width where it is slimmable -> those of `model`."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {name: tensor[tuple(map(slice, shapes[name]))].clone() for name, tensor in tensors.items()}
