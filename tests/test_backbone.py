"""ResNet against torchvision's, FPN against a direct computation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import randomize

from msad import ModelConfig
from msad.backbone import FPN, LAYERS, WIDTHS, Conv3x3, ResNet
from msad.models import build

STAGES = ("layer1", "layer2", "layer3", "layer4")


def torchvision_maps(model, images):
    """C2..C5 as torchvision's own layers compute them."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    maps = []
    for stage in STAGES:
        x = getattr(model, stage)(x)
        maps.append(x)
    return maps


def without_classifier(state):
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_equal_torchvisions_with_the_same_weights(name, training):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None)
    randomize(theirs)
    ours = ResNet(name)
    ours.load_state_dict(without_classifier(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 96)
    ours.train(training), theirs.train(training)
    with torch.no_grad():
        found, expected = ours(images), torchvision_maps(theirs, images)
    assert [m.shape[1] for m in expected] == ours.channels
    for ours_map, their_map in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_map, their_map, rtol=1e-4, atol=1e-4)
    after = without_classifier(theirs.state_dict())
    for key, value in ours.state_dict().items():  # the running statistics moved alike, or not at all
        torch.testing.assert_close(value, after[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_tensor_names_and_shapes_equal_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = ResNet(name), torchvision.models.get_model(name, weights=None)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    expected = {key: value.shape for key, value in without_classifier(theirs.state_dict()).items()}
    assert shapes == expected
    assert dict(ours.named_parameters()).keys() == without_classifier(dict(theirs.named_parameters())).keys()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("width", WIDTHS[:3])
def test_width_takes_that_share_of_every_layers_channels(name, width):
    with torch.device("meta"):
        narrow, full = ResNet(name, width), torchvision.models.get_model(name, weights=None)
        maps = narrow(torch.empty(1, 3, 64, 64))
    expected = [int(width * channels) * (4 if name == "resnet50" else 1) for channels in (64, 128, 256, 512)]
    assert narrow.channels == [m.shape[1] for m in maps] == expected
    theirs = dict(full.named_parameters())
    for key, parameter in narrow.named_parameters():
        # Kernels and the picture's three colours are not channels.
        share = [side if i > 1 or side == 3 else int(width * side) for i, side in enumerate(theirs[key].shape)]
        assert list(parameter.shape) == share, key


def test_first_weights_keep_the_size_of_values():
    """Convolutions before ReLU start as He et al. say, by their outputs; those of the pyramid uniformly, by inputs."""
    torch.manual_seed(0)
    for conv in (m for m in ResNet("resnet50").modules() if isinstance(m, torch.nn.Conv2d)):
        fan_out = conv.weight[:, 0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    for conv in (m for m in FPN((256, 512, 1024, 2048), 256, range(2, 8)).modules() if isinstance(m, torch.nn.Conv2d)):
        bound = (3 / conv.weight[0].numel()) ** 0.5  # of a uniform distribution of variance 1 / inputs
        assert 0.99 * bound < conv.weight.max() <= bound and not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, 0.02)


def backbone_maps(height, width, channels=(4, 8, 12, 16)):
    """Random C2..C5 of an image, sides rounded up."""
    return [torch.randn(2, c, -(-height // s), -(-width // s)) for c, s in zip(channels, (4, 8, 16, 32))]


def direct_pyramid(weights, features, wanted):
    """Every level 2..7 from the definition, with plain functions and repetition by indexing."""
    conv = lambda name, x, **more: F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **more)
    pyramid, merged = {}, None
    for level in (5, 4, 3, 2):
        if level < min(wanted):
            continue
        lateral = conv(f"lateral.{level}", features[level - 2])
        if merged is not None:
            rows, columns = (torch.arange(side) // 2 for side in lateral.shape[-2:])
            lateral = lateral + merged[:, :, rows][..., columns]
        merged = lateral
        pyramid[level] = conv(f"output.{level}", merged, padding=1)
    pyramid[6] = conv("p6", features[-1], stride=2, padding=1)
    if 7 in wanted:
        pyramid[7] = conv("p7", pyramid[6].clamp(min=0), stride=2, padding=1)
    return [pyramid[level] for level in wanted]


@pytest.mark.parametrize("size", [(128, 192), (72, 104)])
@pytest.mark.parametrize("wanted", [(3, 4, 5, 6, 7), (2, 3, 4, 5, 6)], ids=["P3-P7", "P2-P6"])
@pytest.mark.parametrize("built", ["own levels", "all levels"])
def test_pyramid_equals_the_direct_computation(size, wanted, built):
    torch.manual_seed(1)
    fpn = FPN((4, 8, 12, 16), 8, range(2, 8) if built == "all levels" else wanted)
    randomize(fpn)
    features = backbone_maps(*size)
    with torch.no_grad():
        found = fpn(features, wanted)
        expected = direct_pyramid(dict(fpn.named_parameters()), features, wanted)
    assert [tuple(m.shape[-2:]) for m in found] == [(-(-size[0] // 2**l), -(-size[1] // 2**l)) for l in wanted]
    for ours, direct in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted, unread", [((3, 4, 5, 6, 7), {"lateral.2", "output.2"}), ((2, 3, 4, 5, 6), {"p7"})])
def test_levels_nobody_reads_are_neither_built_nor_computed(wanted, unread):
    whole = FPN((4, 8, 12, 16), 8, range(2, 8))
    convs = {name: module for name, module in whole.named_modules() if isinstance(module, torch.nn.Conv2d)}
    calls = []
    for name, module in convs.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    sum(m.sum() for m in whole(backbone_maps(64, 64), wanted)).backward()
    assert sorted(calls) == sorted(convs.keys() - unread)
    assert {name for name, module in convs.items() if module.weight.grad is None} == unread
    own = FPN((4, 8, 12, 16), 8, wanted)
    assert {name.rsplit(".", 1)[0] for name, _ in own.named_parameters()} == convs.keys() - unread


def spoil_free_memory():
    """Leave large numbers in the memory that is handed out next."""
    for power in range(8, 23):
        torch.full((2**power,), 3e38, dtype=torch.bfloat16)


@pytest.mark.parametrize("channels", [64, 512])
def test_halving_narrow_maps_in_bf16_reads_no_memory_that_nobody_wrote(channels):
    layer = Conv3x3(channels, 64, stride=2, bias=True).to(memory_format=torch.channels_last)
    for height, width in itertools.product((3, 9, 16), (1, 2, 3, 4)):
        x = torch.randn(2, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
        right = F.conv2d(x.float(), layer.weight, layer.bias, 2, 1)
        spoil_free_memory()
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        torch.testing.assert_close(found.float(), right, rtol=0.02, atol=0.02)
        (expected,) = torch.autograd.grad(right.sum(), layer.weight)
        spoil_free_memory()
        (gradient,) = torch.autograd.grad(found.sum(), layer.weight)
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.2)


def test_narrow_pictures_give_the_same_maps_in_bf16_as_in_fp32():
    config = ModelConfig("high", ({"id": 1, "name": "thing"},), backbone="resnet18", width=0.25, fpn_channels=256)
    model = build(config).eval()
    for height, width in ((64, 64), (576, 64), (640, 128)):
        with torch.no_grad():
            pixels = model.normalize(torch.rand(1, 3, height, width), [])
            right = model.pyramids(pixels)["high"]
            spoil_free_memory()
            with torch.autocast("cpu", torch.bfloat16):
                found = model.pyramids(pixels)["high"]
        for map_found, map_right in zip(found, right):
            assert (map_found.float() - map_right).abs().max() < 0.05 * map_right.abs().max()
