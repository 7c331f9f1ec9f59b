"""The smallest models that still have every part, for tests of any file."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msad import ModelConfig
from msad.models import build

CLASSES = ({"id": 3, "name": "disk"}, {"id": 7, "name": "star"}, {"id": 20, "name": "frame"})


def tiny_config(kind, classes=CLASSES, **changes):
    """A ModelConfig with the narrowest backbone, pyramid and head, tested at 128 pixels."""
    values = {
        "backbone": "resnet18", "width": 0.25, "fpn_channels": 32, "head_channels": 64, "head_convs": 1,
        "object_scale": 0.25, "short_side": 128, "long_side": 256,
    }  # fmt: skip
    return ModelConfig(kind, classes, **values | changes)


def tiny_model(kind, seed=0, **changes):
    """An untrained model in eval mode whose every tensor is random, and that finds things in any picture."""
    torch.manual_seed(seed)
    model = build(tiny_config(kind, **changes))
    randomize(model)
    with torch.no_grad():
        for tower in (model.head.cls_tower, model.head.box_tower):
            tower[0].weight.normal_(std=0.01)  # small maps, so that RetinaNet's scores are not all 0 or 1
        model.head.cls_logits.weight.normal_(std=0.5)
        model.head.cls_logits.bias.fill_(-2)
        model.head.box_pred.weight.normal_(std=0.3)
        if hasattr(model.head, "centerness"):
            model.head.centerness.weight.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def randomize(model):
    """Give normalisation layers and biases values that leave a trace when one of them is left out or swapped."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.weight.uniform_(0.5, 1.0)
            module.bias.normal_(std=0.2)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.normal_(std=0.2)


def total(losses):
    """The sum of all parts of {branch: {part: scalar}}."""
    return sum(value for parts in losses.values() for value in parts.values())


class LargestFloats(TorchDispatchMode):
    """Notes the number of elements of the largest tensor of floats that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        sizes = [x.numel() for x in tree_leaves(made) if torch.is_tensor(x) and x.is_floating_point()]
        self.largest = max([self.largest, *sizes])
        return made
