"""The gate and the teacher: what is fused, what is computed for which branch, and what each branch is trained on."""

from itertools import combinations

import pytest
import torch
from helpers import tiny_model

from msad.fusion import CrossingFusion, LOSS_WEIGHTS

SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
BOXES = [torch.tensor([[10.0, 20, 60, 90], [30, 30, 45, 50]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.long)]


def random_pyramid(channels=32):
    return [torch.randn(2, channels, h, w) + 0.5 * torch.randn(2, channels, 1, 1) for h, w in SIZES]


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance or {"rtol": 1e-4, "atol": 1e-5})


def test_the_gate_equals_einsum():
    torch.manual_seed(0)
    gate = CrossingFusion(32)
    squeeze, excite = gate.squeeze.weight, gate.excite.weight
    assert squeeze.shape == (4, 64) and excite.shape == (2, 4) and len(list(gate.parameters())) == 2
    with torch.no_grad():  # strong enough to prefer one branch here and the other there
        squeeze.mul_(5), excite.mul_(5)
        high, low = random_pyramid(), random_pyramid()
        fused = gate(high, low)
        shares = []
        for h, l, f in zip(high, low, fused, strict=True):
            pooled = torch.cat([torch.einsum("nchw->nc", m) / m[0, 0].numel() for m in (h, l)], dim=1)
            hidden = torch.einsum("rc,nc->nr", squeeze, pooled).clamp(min=0)
            exponentials = torch.einsum("br,nr->nb", excite, hidden).exp()
            weights = exponentials / exponentials.sum(1, keepdim=True)
            same(gate.weights(h, l), weights)
            same(f, torch.einsum("nb,bnchw->nchw", weights, torch.stack([h, l])))
            shares.append(weights[:, 0])
    assert torch.stack(shares).std() > 0.05  # one pair per image and level, not the same everywhere


def test_the_gate_s_layers_start_as_wide_as_the_authors():
    torch.manual_seed(0)
    gate = CrossingFusion(256)
    for layer, inputs in ((gate.squeeze, 512), (gate.excite, 32)):
        assert layer.weight.shape[1] == inputs
        scaled = layer.weight.detach().flatten() * (inputs / 3) ** 0.5  # uniform from -1 to 1
        assert 0.9 < scaled.max() < 1 and -1 < scaled.min() < -0.9
        assert abs(scaled.std() - 3**-0.5) < 0.1


def test_fusing_pyramids_that_differ_in_size_is_an_error():
    with pytest.raises(ValueError, match="do not align"):
        CrossingFusion(32)(random_pyramid(), random_pyramid()[:4] + [torch.zeros(2, 32, 1, 2)])


@torch.no_grad()
def test_any_choice_of_branches_equals_the_full_set_and_computes_no_more():
    model = tiny_model("teacher")
    images = torch.randn(2, 3, 64, 128)
    everything = model.pyramids(images)
    assert list(everything) == ["fused", "high", "low"] == list(model.branches)
    for fused, expected in zip(everything["fused"], model.fusion(everything["high"], everything["low"]), strict=True):
        same(fused, expected)
    read = []
    model.backbone.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[-2:])))
    for count in (1, 2, 3):
        for branches in combinations(("low", "high", "fused"), count):
            read.clear()
            pyramids = model.pyramids(images, branches)
            assert list(pyramids) == list(branches)
            for branch in branches:
                for found, expected in zip(pyramids[branch], everything[branch], strict=True):
                    assert torch.equal(found, expected), branch
            needed = {("high",): [(64, 128)], ("low",): [(32, 64)]}.get(branches, [(64, 128), (32, 64)])
            assert read == needed, branches


@torch.no_grad()
def test_the_teacher_detects_from_the_fused_pyramid_alone():
    model = tiny_model("teacher")
    image, seen = torch.rand(3, 128, 192), []
    fused = model.pyramids(model.normalize(image[None], [(128, 192)]))["fused"]
    expected = model.postprocess(fused, model.head(fused), "fused", [(128, 192)], [(128, 192)])[0]
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    (found,) = model.detect([image], resize=False)
    assert len(seen) == 1 and len(expected["scores"]) > 0
    for key in expected:
        same(found[key], expected[key])


def test_every_branch_of_the_teacher_is_trained_on_the_same_targets_in_high_pixels():
    model = tiny_model("teacher")
    with torch.no_grad():
        pyramids, outputs = model(torch.randn(2, 3, 128, 192))
        losses = model.losses(pyramids, outputs, BOXES, LABELS)
        assert losses.keys() == LOSS_WEIGHTS.keys() == set(model.branches)
        targets = model.head.assign([(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)], BOXES, LABELS)
        assert (targets["labels"] < 3).sum() > 0
        for branch in model.branches:
            expected = model.head.losses(outputs[branch], targets)
            assert losses[branch].keys() == expected.keys() == {"cls", "box", "centerness"}
            for part, value in expected.items():
                same(losses[branch][part], value)
    assert LOSS_WEIGHTS == {"high": 1, "low": 1, "fused": 0.4}  # the paper's
