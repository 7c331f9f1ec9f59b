"""Made-up files in the authors' formats, and their networks computed from these in the plainest way.

Nothing here uses the package: names and shapes follow from the rule written below, and the networks are slimmable ones
that slice full-width weights at every convolution, on BGR pictures from 0 to 255.
"""

import torch
import torch.nn.functional as F

WIDTHS = (0.25, 0.5, 0.75, 1.0)
MEAN = (103.53, 116.28, 123.675)  # of B, G, R
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # inner channels and blocks
PIXEL_SPREAD = 74.0  # of pixels drawn uniformly from 0 to 255


def blocks():
    """(number, input channels, inner channels, stride, whether it has a shortcut) of the 16 bottleneck blocks."""
    number, channels = 0, 64
    for inner, count in STAGES:
        for i in range(count):
            number += 1
            yield number, channels, inner, 2 if i == 0 and inner > 64 else 1, i == 0
            channels = 4 * inner


def shapes_of_norms(name, channels):
    """One BatchNorm per width."""
    fields = ("weight", "bias", "running_mean", "running_var")
    for i, width in enumerate(WIDTHS):
        yield from ((f"{name}.bn.{i}.{field}", (int(width * channels),)) for field in fields)
        yield f"{name}.bn.{i}.num_batches_tracked", ()


def shapes_of_backbone():
    yield "features.0.0.weight", (64, 3, 7, 7)
    yield from shapes_of_norms("features.0.1", 64)
    for number, channels, inner, _, shortcut in blocks():
        body = f"features.{number}.body"
        for at, out, into, kernel in ((0, inner, channels, 1), (3, inner, inner, 3), (6, 4 * inner, inner, 1)):
            yield f"{body}.{at}.weight", (out, into, kernel, kernel)
            yield from shapes_of_norms(f"{body}.{at + 1}", out)
        if shortcut:
            yield f"features.{number}.shortcut.0.weight", (4 * inner, channels, 1, 1)
            yield from shapes_of_norms(f"features.{number}.shortcut.1", 4 * inner)


def shapes_of_pyramid(width):
    convolutions = {f"fpn_lateral{level}": (int(width * 2 ** (6 + level)), 1) for level in (2, 3, 4, 5)}
    convolutions |= {f"fpn_output{level}": (256, 3) for level in (2, 3, 4, 5)}
    convolutions |= {"top_block.p6": (int(width * 2048), 3), "top_block.p7": (256, 3)}
    for name, (channels, kernel) in convolutions.items():
        yield f"{name}.weight", (256, channels, kernel, kernel)
        yield f"{name}.bias", (256,)


def shapes_of_head():
    for tower in ("cls_tower", "bbox_tower"):
        for conv in (0, 3, 6, 9):
            yield f"{tower}.{conv}.weight", (256, 256, 3, 3)
            for name in (f"{conv}.bias", f"{conv + 1}.weight", f"{conv + 1}.bias"):
                yield f"{tower}.{name}", (256,)
    yield "cls_logits.weight", (80, 256, 3, 3)
    yield "cls_logits.bias", (80,)
    yield "bbox_pred.weight", (4, 256, 3, 3)
    yield "ctrness.weight", (1, 256, 3, 3)
    yield from ((f"scales.{level}.scale", (1,)) for level in range(5))


def shapes(kind, width):
    """{name: shape} of every tensor in a file: a "teacher", a "student" or an "imagenet" backbone."""
    if kind == "imagenet":
        found = {f"module.{name}": shape for name, shape in shapes_of_backbone()}
        return found | {"module.classifier.0.weight": (1000, 2048), "module.classifier.0.bias": (1000,)}
    found = {"SE.fc.0.weight": (32, 512), "SE.fc.2.weight": (2, 32)}
    for letter in "T" if kind == "teacher" else "TS":
        found |= {f"{letter}_backbone.bottom_up.{name}": shape for name, shape in shapes_of_backbone()}
        found |= {f"{letter}_backbone.{name}": shape for name, shape in shapes_of_pyramid(width)}
        found |= {f"{letter}_fcos_head.{name}": shape for name, shape in shapes_of_head()}
    return found


def empty_state(kind, width=0.25):
    """A state dict whose tensors are views of one zero: right names and shapes in a file of a few kilobytes."""
    zero, count = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    return {
        name: (count if name.endswith("num_batches_tracked") else zero).expand(shape)
        for name, shape in shapes(kind, width).items()
    }


def random_state(kind, width, only="", seed=0):
    """A state dict of random tensors that keep the values in a network of this width of order one.

    Those whose names do not start with `only` are zeros, which is faster.
    """
    generator = torch.Generator().manual_seed(seed)
    state = empty_state(kind, width)
    chosen = {name: tensor for name, tensor in state.items() if name.startswith(only)}
    return state | {name: random_tensor(name, tensor.shape, width, generator) for name, tensor in chosen.items()}


def random_tensor(name, shape, width, generator):
    if len(shape) > 1:
        inputs = torch.Size(shape[1:]).numel()
        if "features." in name:
            inputs *= PIXEL_SPREAD**2 if "features.0." in name else width
        gain = 0.4 if "backbone.fpn" in name or "top_block" in name else 1
        return torch.randn(shape, generator=generator) * gain * (2 / inputs) ** 0.5
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("num_batches_tracked"):
        return (1000 * uniform).long()
    if name.endswith(("running_var", ".scale")):
        return 0.5 + uniform
    if name.endswith("weight"):
        return (0.5 + uniform) * (0.2 if ".body.7." in name else 1)  # blocks add up: their sums should not grow
    return 0.4 * uniform - 0.2


class Network:
    """The authors' detector `letter` of a state dict: every tensor looked up by its name where it is used."""

    def __init__(self, state, letter, width):
        self.state, self.width, self.bn = state, width, WIDTHS.index(width)
        self.backbone, self.head = f"{letter}_backbone", f"{letter}_fcos_head"

    def slim(self, x, name, stride=1):
        """A slimmable convolution: the first output channels of a width, over as many input channels as there are."""
        weight = self.state[f"{name}.weight"]
        weight = weight[: int(self.width * len(weight)), : x.shape[1]]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, x, name):
        mean, var, weight, bias = (
            self.state[f"{name}.bn.{self.bn}.{field}"] for field in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def features(self, x, prefix):
        """BGR less the mean (N,3,H,W) -> [C2, C3, C4, C5]."""
        x = F.relu(self.norm(self.slim(x, f"{prefix}.0.0", 2), f"{prefix}.0.1"))
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for number, _, _, stride, shortcut in blocks():
            here = f"{prefix}.{number}"
            y = F.relu(self.norm(self.slim(x, f"{here}.body.0"), f"{here}.body.1"))
            y = F.relu(self.norm(self.slim(y, f"{here}.body.3", stride), f"{here}.body.4"))
            y = self.norm(self.slim(y, f"{here}.body.6"), f"{here}.body.7")
            if shortcut:
                x = self.norm(self.slim(x, f"{here}.shortcut.0", stride), f"{here}.shortcut.1")
            x = F.relu(x + y)
            if number in (3, 7, 13, 16):
                maps.append(x)
        return maps

    def pyramid(self, x):
        """BGR less the mean (N,3,H,W) -> {2: P2, ... 7: P7}."""
        maps = dict(zip((2, 3, 4, 5), self.features(x, f"{self.backbone}.bottom_up.features")))
        found, above = {}, None
        for level in (5, 4, 3, 2):
            inner = self.conv(maps[level], f"{self.backbone}.fpn_lateral{level}")
            if above is not None:
                inner = inner + F.interpolate(above, scale_factor=2, mode="nearest")
            found[level], above = self.conv(inner, f"{self.backbone}.fpn_output{level}"), inner
        found[6] = self.conv(maps[5], f"{self.backbone}.top_block.p6", 2)
        found[7] = self.conv(F.relu(found[6]), f"{self.backbone}.top_block.p7", 2)
        return found

    def gate(self, high, low):
        """Two maps (N,256,h,w) -> the weights (N,2) of both."""
        pooled = F.adaptive_avg_pool2d(torch.cat([high, low], 1), 1).flatten(1)
        hidden = F.relu(F.linear(pooled, self.state["SE.fc.0.weight"]))
        return F.softmax(F.linear(hidden, self.state["SE.fc.2.weight"]), dim=1)

    def tower(self, x, name):
        for at in (0, 3, 6, 9):
            x = self.conv(x, f"{self.head}.{name}.{at}")
            norm = f"{self.head}.{name}.{at + 1}"
            x = F.relu(F.group_norm(x, 32, self.state[f"{norm}.weight"], self.state[f"{norm}.bias"]))
        return x

    def predict(self, maps):
        """Five maps -> per level logits (N,80,h,w), distances (N,4,h,w) and centerness (N,1,h,w)."""
        found = {"logits": [], "distances": [], "centerness": []}
        for level, x in enumerate(maps):
            box = self.tower(x, "bbox_tower")
            found["logits"].append(self.conv(self.tower(x, "cls_tower"), f"{self.head}.cls_logits"))
            scale = self.state[f"{self.head}.scales.{level}.scale"]
            found["distances"].append(F.relu(scale * self.conv(box, f"{self.head}.bbox_pred")))
            found["centerness"].append(self.conv(box, f"{self.head}.ctrness"))
        return found


def authors_input(images, sizes):
    """Padded RGB images (N,3,H,W) uint8 of sizes [(h,w)] -> BGR less the mean, with zeros for padding."""
    x = torch.zeros(images.shape)
    for row, image, (height, width) in zip(x, images, sizes):
        for channel in range(3):
            row[channel, :height, :width] = image[2 - channel, :height, :width].float() - MEAN[channel]
    return x
