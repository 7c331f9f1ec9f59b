"""What holds for either head: finite whatever the targets, bounded memory, no waiting for the device, any channels."""

import random
from collections import Counter

import pytest
import torch
from helpers import randomize, tiny_config, total
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msad.heads import AbsentLoss, GroupNorm
from msad.models import HEADS, build

SIZE = (64, 128)  # of the high-resolution input
CELLS = [(8, 16), (4, 8), (2, 4), (1, 2), (1, 1)]
BATCHES, IMAGES = 12, 10

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


def boxes_by_kind(draw):
    """{kind: a box of it, in pixels}."""
    height, width = SIZE
    x, y = draw.uniform(0, width), draw.uniform(0, height)
    w, h = draw.uniform(1, 60), draw.uniform(1, 60)
    return {
        "plain": [x - w, y - h, x + w, y + h],
        "of whole pixels": [8 * (x // 8), 8 * (y // 8), 8 * (x // 8) + 16, 8 * (y // 8) + 16],
        "thin": [x, y - h, x + 10 ** draw.uniform(-6, 0), y + h],
        "without width": [x, y, x, y + h],
        "a point": [width, height, width, height],
        "tiny": [x, y, x + 1e-6 * w, y + 1e-6 * h],
        "outside": [x + 2 * width, y - 2 * height, x + 2 * width + w, y - 2 * height + h],
        "the whole image": [0, 0, width, height],
        "huge": [x - 1e6 * w, y - 1e6 * h, x + 1e6 * w, y + 1e6 * h],
        "huge and thin": [-1e6 * w, y, 1e6 * w, y + 0.01],
        "of an area beyond float32": [-1e20, -1e20, 1e20, 1e20],
    }


def random_targets(draw, met):
    """Boxes (M,4) and labels (M,) of one image: none, one, a mixture, or many on top of each other. Counts them."""
    count = draw.choice((0, 0, 1, 1, 3, 10, 40))
    drawn = [draw.choice(list(boxes_by_kind(draw).items())) for _ in range(count)]
    if draw.random() < 0.2:
        drawn = drawn[:1] * count
    met.update({kind for kind, _ in drawn})
    labels = torch.tensor([draw.randrange(3) for _ in drawn], dtype=torch.long)
    return torch.tensor([box for _, box in drawn]).view(-1, 4), labels


def random_pyramid(model, images, spread):
    """Five maps that ask for a gradient, of values from nearly nothing to far beyond what a pyramid holds."""
    channels = model.config.fpn_channels
    return [(torch.randn(images, channels, *cells) * spread).requires_grad_() for cells in CELLS]


def assert_finite(named):
    for name, value in named:
        assert value.isfinite().all(), name


def detections(model, pyramid, outputs, draw):
    """How many things are found, each a box within its image."""
    originals = [(draw.choice((1, 48, 900)), draw.choice((1, 50, 1100))) for _ in range(IMAGES)]
    with torch.no_grad():
        assert_finite(zip(("boxes", "scores"), model.head.decode(outputs, CELLS, slice(None))))
        results = model.postprocess(pyramid, outputs, "high", [(60, 120)] * IMAGES, originals)
    for (height, width), found in zip(originals, results, strict=True):
        boxes, scores = found["boxes"], found["scores"]
        assert boxes.isfinite().all() and (boxes >= 0).all() and len(boxes) == len(scores) <= 100
        assert (boxes <= torch.tensor([width, height] * 2) * (1 + 1e-6)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((scores > 0) & (scores <= 1)).all() and scores.equal(scores.sort(descending=True).values)
    return sum(len(found["scores"]) for found in results)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@either
def test_whatever_the_targets_losses_gradients_and_detections_are_finite(head, precision):
    draw, met, positive, found = random.Random(f"{head} {precision}"), Counter(), 0, 0
    model = make_model(head)
    for number in range(BATCHES):
        sets = [random_targets(draw, met) for _ in range(IMAGES)]
        if number == 0:
            sets = [(boxes[:0], labels[:0]) for boxes, labels in sets]
        boxes, labels = map(list, zip(*sets))
        pyramid = random_pyramid(model, IMAGES, 10 ** draw.uniform(-3, 3))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = model.predict({"high": pyramid})
        assert all(value.dtype == torch.float32 for name, value in outputs["high"].items() if name != "logits")
        targets = model.head.assign(CELLS, boxes, labels)
        assert_finite(targets.items())
        positive += ((targets["labels"] >= 0) & (targets["labels"] < 3)).sum()
        losses = model.losses({"high": pyramid}, outputs, boxes, labels)
        assert_finite(losses["high"].items())
        model.zero_grad()
        total(losses).backward()
        assert_finite((name, p.grad) for name, p in model.head.named_parameters())
        assert_finite((f"level {level}", maps.grad) for level, maps in enumerate(pyramid))
        found += detections(model, pyramid, outputs["high"], draw)
    assert min(positive, found) > 100 and len(met) == 11 and min(met.values()) > 8, (positive, found, met)


class LargestTensor(TorchDispatchMode):
    numel = 0  # of the largest tensor made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(result) if torch.is_tensor(x)])
        return result


@either
def test_the_memory_of_assignment_does_not_grow_with_the_number_of_boxes(head):
    few, many = LargestTensor(), LargestTensor()
    for mode, count in ((few, 256), (many, 3000)):
        boxes, labels = torch.zeros(count, 4), torch.zeros(count, dtype=torch.long)
        with mode:
            make_model(head).head.assign(CELLS, [boxes], [labels])
    assert few.numel == many.numel


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
