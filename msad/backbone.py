"""ResNet-FPN: a backbone of four maps, C2..C5, and the pyramid that five neighbouring levels are read from.

ResNet-18/34/50/101 come with a width multiplier. Parameter names are torchvision's, so that its ImageNet weights load
as they are at width 1. A width w uses the first floor(w * C) channels of every layer, which is also how the paper's
slimmable backbones are cut.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of any stride, right where PyTorch's is not: in bf16 on a CPU with AMX, with stride 2 and a map
    of one or two columns, oneDNN reads memory that nobody wrote (.github/NOTES.md, "Lessons learned"). There two
    columns of zeros are added, as the padding would, and the columns that come of them are cut off. An export, whose
    width is open, always has them."""

    def __init__(self, in_channels, channels, stride=1, bias=False):
        super().__init__(in_channels, channels, 3, stride, padding=1, bias=bias)

    def forward(self, x):
        width = x.shape[-1]
        if x.dtype == torch.bfloat16 and not x.is_cuda and (torch.compiler.is_exporting() or width <= 2):
            return super().forward(F.pad(x, (0, 2)))[..., : (width - 1) // self.stride[1] + 1]
        return super().forward(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: (N,C,h,w) -> (N,channels,h/stride,w/stride)."""

    expansion = 1

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = Conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries the stride), 1x1: (N,C,h,w) -> (N,4*channels,h/stride,w/stride)."""

    expansion = 4

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


def shortcut(in_channels, out_channels, stride):
    """The identity where the shape stays, a 1x1 convolution where it changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Images (N,3,H,W) -> [C2, C3, C4, C5], strides 4, 8, 16, 32. `channels` holds their channel counts."""

    def __init__(self, name, width=1.0):
        super().__init__()
        block = BasicBlock if name in ("resnet18", "resnet34") else Bottleneck
        stages = [int(width * c) for c in (64, 128, 256, 512)]
        self.channels = [c * block.expansion for c in stages]
        self.conv1 = nn.Conv2d(3, stages[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = stages[0]
        for number, (channels, blocks) in enumerate(zip(stages, LAYERS[name]), start=1):
            stride = 1 if number == 1 else 2
            layer = [block(in_channels, channels, stride)]
            in_channels = channels * block.expansion
            layer += [block(in_channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class FPN(nn.Module):
    """The feature pyramid. Builds `levels` (neighbours within 2..7); `forward` computes any five neighbours of them.

    P2..P5 are a 1x1 lateral convolution plus the level above doubled in size, then a 3x3 output convolution. P6 is a
    stride-2 convolution of C5 and P7 one of ReLU(P6), as in RetinaNet's paper. No level is computed that nobody reads:
    the high-resolution branch never reads P2, whose output convolution alone is 41 of its FPN's 65 GMACs at 832x1344.
    """

    def __init__(self, in_channels, channels, levels):
        super().__init__()
        self.lateral = nn.ModuleDict({str(l): nn.Conv2d(in_channels[l - 2], channels, 1) for l in levels if l <= 5})
        self.output = nn.ModuleDict({str(l): nn.Conv2d(channels, channels, 3, padding=1) for l in levels if l <= 5})
        self.p6 = Conv3x3(in_channels[-1], channels, stride=2, bias=True)
        if 7 in levels:
            self.p7 = Conv3x3(channels, channels, stride=2, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, features, levels):
        """[C2, C3, C4, C5] -> one map (N,C,h,w) per level, lowest first. Level l has stride 2**l."""
        pyramid, merged = {}, None
        for level in range(5, levels[0] - 1, -1):
            lateral = self.lateral[str(level)](features[level - 2])
            # The level above in twice its size, or one less where the input's sides do not meet align's condition.
            merged = lateral if level == 5 else lateral + F.interpolate(merged, lateral.shape[-2:], mode="nearest")
            pyramid[level] = self.output[str(level)](merged)
        pyramid[6] = self.p6(features[-1])
        if 7 in levels:
            pyramid[7] = self.p7(F.relu(pyramid[6]))
        return [pyramid[level] for level in levels]


def fold_batchnorm(module):
    """In place: every BatchNorm becomes part of the convolution registered right before it. For inference only."""
    name = before = None
    for next_name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too
            setattr(module, name, fuse_conv_bn_eval(before, child))
            setattr(module, next_name, nn.Identity())
        fold_batchnorm(child)
        name, before = next_name, child
