"""The shift by one level: sizes, strides and locations of the two branches."""

import math

import pytest
import torch
from helpers import tiny_model

from msad import align


@pytest.fixture(scope="module")
def meta_teacher():
    """Shapes without numbers: the real layers on the meta device."""
    return tiny_model("teacher").to("meta")


@pytest.mark.parametrize("side", (1, 63, 65, 96, 1366))
def test_every_other_side_is_an_error(side):
    for size in ((side, 128), (128, side)):
        for refuse in (tiny_model("teacher").pyramids, align.downsample):
            with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of 64"):
                refuse(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("side", range(64, 1401, 256))
def test_the_networks_two_pyramids_agree_at_allowed_sides(meta_teacher, side):
    pyramids = meta_teacher.pyramids(torch.empty(1, 3, side, 1408 - side, device="meta"))
    shapes = {branch: [tuple(m.shape) for m in maps] for branch, maps in pyramids.items()}
    # Cells of 8 to 32 pixels fill the image exactly, larger ones cover it.
    expected = [(1, 32, math.ceil(side / s), math.ceil((1408 - side) / s)) for s in (8, 16, 32, 64, 128)]
    assert shapes["high"] == shapes["low"] == shapes["fused"] == expected


def test_the_low_branchs_strides_seen_from_high_pixels_are_the_high_branchs():
    for level, stride in enumerate(align.STRIDES):
        high, low = align.LEVELS["high"][level], align.LEVELS["low"][level]
        assert stride == 2**high == 2 * 2**low


def test_a_cell_of_either_branch_looks_at_the_same_place_of_the_image():
    model = tiny_model("teacher")
    for module in model.modules():  # averages everywhere, so that what a cell looks at has a centre
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.bias), module.reset_running_stats()
    image = torch.rand(1, 3, 256, 512, requires_grad=True)
    pyramids = model.pyramids(image, ("high", "low"))
    for level, stride in enumerate(align.STRIDES[:3]):
        y, x = 128, 384
        cell = y // stride, x // stride
        for branch in ("high", "low"):
            value = pyramids[branch][level][0, :, *cell].sum()
            (weight,) = torch.autograd.grad(value, image, retain_graph=True)
            weight = weight.double().sum((0, 1))
            center = [(weight.sum(1 - d) * torch.arange(weight.shape[d])).sum() / weight.sum() for d in (0, 1)]
            assert abs(center[0] - y) < 32 and abs(center[1] - x) < 32, (branch, stride, center)


def test_cells_equal_a_loop():
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    expected = []
    for level, (height, width) in enumerate(sizes):
        stride = 8 * 2**level
        for row in range(height):
            for column in range(width):
                expected.append((column * stride, row * stride, stride))
    assert align.map_sizes([torch.empty(2, 3, *size) for size in sizes]) == sizes
    corners, strides = align.cells(sizes)
    assert torch.cat([corners, strides[:, None]], 1).tolist() == [list(map(float, cell)) for cell in expected]
    with pytest.raises(ValueError):  # of any other number of levels
        align.cells(sizes[:4])


def test_area_is_the_default_and_the_models_setting_decides():
    high = torch.rand(1, 3, 64, 64)
    mean = high.view(1, 3, 32, 2, 32, 2).mean((3, 5))
    torch.testing.assert_close(align.downsample(high), mean)
    for mode, expected in (("area", mean), ("nearest", high[:, :, 0::2, 0::2])):
        seen = []
        model = tiny_model("teacher", downsample=mode)
        model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.pyramids(high, ["low"])
        torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("change", ["height", "channels", "batch", "levels"])
def test_pyramids_that_differ_in_shape_are_an_error(change):
    high = [torch.zeros(2, 4, 16 // 2**i, 16 // 2**i) for i in range(5)]
    align.check_pyramids(high, [m.clone() for m in high])
    low = {
        "height": [*high[:2], torch.zeros(2, 4, 3, 4), *high[3:]],
        "channels": [torch.zeros(2, 5, 16, 16), *high[1:]],
        "batch": [m[:1] for m in high],
        "levels": high[:4],
    }[change]
    with pytest.raises(ValueError, match="do not align"):
        align.check_pyramids(high, low)
