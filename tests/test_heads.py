"""What holds for either head: finite whatever the targets, bounded memory, no waiting for the device, any channels."""

import pytest
import torch
from helpers import LargestFloats, randomize, tiny_config, total

from msad.heads import AbsentLoss, GroupNorm
from msad.models import HEADS, build

CELLS = [(8, 16), (4, 8), (2, 4), (1, 2), (1, 1)]  # of an image of 64x128

either = pytest.mark.parametrize("head", HEADS)


def make_model(head):
    """An untrained model that finds things in any pyramid; only its head is used here."""
    torch.manual_seed(0)
    model = build(tiny_config("high", head=head))
    randomize(model.head)
    with torch.no_grad():
        model.head.cls_logits.weight.normal_(std=0.1)
        model.head.box_pred.weight.normal_(std=0.1)
    return model.eval()


BOXES = torch.tensor([
    [20, 10, 60, 50], [16, 16, 32, 32], [40, 8, 40.001, 60],  # plain, on whole cells, thin
    [30, 5, 30, 40], [128, 64, 128, 64], [50, 20, 50 + 1e-5, 20 + 1e-5],  # a line, a point, a point but for rounding
    [300, -150, 340, -100], [0, 0, 128, 64], [-5e7, -3e7, 4e7, 6e7],  # outside, the whole image, huge
    [-5e7, 20, 5e7, 20.01], [-1e20, -1e20, 1e20, 1e20],  # huge and thin, of an area beyond float32
])  # fmt: skip


def assert_finite(named):
    for name, value in named:
        assert value.isfinite().all(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])  # of the maps' values
@either
def test_whatever_the_targets_losses_gradients_and_detections_are_finite(head, spread, precision):
    model, found = make_model(head), 0
    batches = [[BOXES[:0]] * 2, *zip(BOXES[:, None], BOXES.roll(1, 0)[:, None]), [BOXES, BOXES.repeat(4, 1)]]
    for boxes in batches:
        labels = [torch.arange(len(b)) % 3 for b in boxes]
        pyramid = [(torch.randn(2, model.config.fpn_channels, *cells) * spread).requires_grad_() for cells in CELLS]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = model.predict({"high": pyramid})
        assert all(value.dtype == torch.float32 for name, value in outputs["high"].items() if name != "logits")
        assert_finite(model.head.assign(CELLS, boxes, labels).items())
        losses = model.losses({"high": pyramid}, outputs, boxes, labels)
        assert_finite(losses["high"].items())
        model.zero_grad()
        total(losses).backward()
        assert_finite((name, p.grad) for name, p in model.head.named_parameters())
        assert_finite((f"level {level}", maps.grad) for level, maps in enumerate(pyramid))
        with torch.no_grad():
            assert_finite(zip(("boxes", "scores"), model.head.decode(outputs["high"], CELLS, slice(None))))
            results = model.postprocess(pyramid, outputs["high"], "high", [(60, 120)] * 2, [(1, 50), (900, 1100)])
        for (height, width), detections in zip([(1, 50), (900, 1100)], results):
            boxes, scores = detections["boxes"], detections["scores"]
            found += len(scores)
            assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes <= torch.tensor([width, height] * 2) * (1 + 1e-6)).all()
            assert ((scores > 0) & (scores <= 1)).all() and scores.equal(scores.sort(descending=True).values)
    assert found > 100


@either
def test_the_memory_of_assignment_does_not_grow_with_the_number_of_boxes(head):
    few, many = LargestFloats(), LargestFloats()
    for mode, count in ((few, 256), (many, 3000)):
        boxes, labels = torch.zeros(count, 4), torch.zeros(count, dtype=torch.long)
        with mode:
            make_model(head).head.assign(CELLS, [boxes], [labels])
    assert few.largest == many.largest > 0


@either
def test_training_never_asks_for_a_number(head):
    """Tensors on the meta device have no content: a step that waits for some, or masks by it, raises there."""
    head = make_model(head).head.to("meta")
    boxes, labels = torch.empty(5, 4, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
    targets = head.assign(CELLS, [boxes, boxes[:0]], [labels, labels[:0]])
    losses = head.losses(head([torch.empty(2, 32, h, w, device="meta") for h, w in CELLS]), targets)
    sum(losses.values()).backward()
    assert all(p.grad.is_meta for p in head.parameters())


@pytest.mark.parametrize("channels", [32, 64, 256])
def test_the_layout_in_which_a_norm_is_computed_changes_nothing(channels):
    torch.manual_seed(0)
    norm, plain = GroupNorm(32, channels), torch.nn.GroupNorm(32, channels)
    randomize(norm)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(2, channels, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = norm(x), plain(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2**-8)])
def test_the_loss_of_absent_classes_and_its_gradient_in_closed_form(dtype, tolerance):
    logits = (4 * torch.randn(3, 50, 7)).to(dtype).requires_grad_()
    above = torch.rand(3, 50, dtype=torch.float64)
    found = AbsentLoss.apply(logits)
    (found.double() * above).sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = (0.75 * exact.sigmoid() ** 2 * -(1 - exact.sigmoid()).log()).sum(-1)
    (expected * above).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 if tolerance > 1e-6 else tolerance, atol=0.0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=1e-9)
