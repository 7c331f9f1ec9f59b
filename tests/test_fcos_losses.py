"""GIoU, focal loss, centerness and the whole of FCOS's loss against the formulas, number by number in float64."""

import math

import pytest
import torch

from msad import boxes as box_ops
from msad.dense import focal_loss
from msad.fcos import FCOSHead, centerness_target

CLASSES = 3
SIZES = [(6, 4), (3, 2), (2, 1), (1, 1), (1, 1)]


def giou_by_corners(predicted, target):
    """GIoU with one unit added to intersection and union, of distances from the origin, by corners."""
    a, b = ([-left, -top, right, bottom] for left, top, right, bottom in (predicted, target))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    intersection = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - intersection
    return (intersection + 1) / (union + 1) - (hull - union) / hull


def centerness_by_formula(left, top, right, bottom):
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def focal_by_formula(logit, is_class):
    probability = 1 / (1 + math.exp(-logit))
    if is_class:
        return -0.25 * (1 - probability) ** 2 * math.log(probability)
    return -0.75 * probability**2 * math.log(1 - probability)


def test_giou_loss_equals_the_formula():
    torch.manual_seed(0)
    predicted, target = torch.rand(200, 4, dtype=torch.float64) * 8, torch.rand(200, 4, dtype=torch.float64) * 8 + 0.01
    predicted[0] = 0  # what ReLU leaves of a bad prediction
    predicted[1] = target[1]
    found = box_ops.giou_loss_ltrb(predicted, target)
    expected = [1 - giou_by_corners(p, t) for p, t in zip(predicted.tolist(), target.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found[1].item() == pytest.approx(0, abs=1e-12)


def test_focal_loss_equals_the_formula_and_leaves_out_ignored_locations():
    torch.manual_seed(0)
    logits = torch.randn(2, 50, CLASSES, dtype=torch.float64) * 4
    labels = torch.randint(-1, CLASSES + 1, (2, 50))
    expected = sum(
        focal_by_formula(logits[n, r, k].item(), labels[n, r] == k)
        for n in range(2) for r in range(50) for k in range(CLASSES) if labels[n, r] >= 0
    )  # fmt: skip
    assert {-1, CLASSES} < set(labels.flatten().tolist())
    assert focal_loss(logits, labels).item() == pytest.approx(expected, rel=1e-9)


def test_centerness_target_equals_the_formula():
    distances = torch.rand(100, 4, dtype=torch.float64) + 0.01
    expected = [centerness_by_formula(*d) for d in distances.tolist()]
    torch.testing.assert_close(centerness_target(distances), torch.tensor(expected, dtype=torch.float64))
    assert centerness_target(torch.tensor([2.0, 3, 2, 3])).item() == 1


def new_head():
    torch.manual_seed(0)
    return FCOSHead(32, CLASSES, 32, 1)


def random_targets_and_outputs(count):
    """Half the locations positive with distances in strides, the others background with ones; and any outputs."""
    torch.manual_seed(3)
    shape = (count, sum(h * w for h, w in SIZES))
    labels = torch.where(torch.rand(shape) < 0.5, torch.randint(CLASSES, shape), CLASSES)
    distances = torch.where((labels < CLASSES)[..., None], torch.rand(*shape, 4) * 6 + 0.1, 1.0)
    outputs = {
        "logits": torch.randn(*shape, CLASSES) * 3,
        "boxes": (torch.randn(*shape, 4) * 3).relu(),
        "centerness": torch.randn(shape) * 2,
        "sizes": SIZES,
    }
    return {"labels": labels, "boxes": distances}, outputs


def test_losses_equal_the_formulas():
    targets, outputs = random_targets_and_outputs(3)
    targets["labels"][1] = CLASSES  # an image without a box among others
    targets["boxes"][1] = 1.0
    found = new_head().losses(outputs, targets)

    labels, wanted = targets["labels"].flatten().tolist(), targets["boxes"].reshape(-1, 4).tolist()
    logits, predicted = outputs["logits"].reshape(-1, CLASSES).tolist(), outputs["boxes"].reshape(-1, 4).tolist()
    centerness = outputs["centerness"].flatten().tolist()
    positives = [r for r, label in enumerate(labels) if label < CLASSES]
    assert 30 < len(positives) < len(labels) * 2 / 3
    cls = sum(focal_by_formula(logits[r][k], labels[r] == k) for r in range(len(labels)) for k in range(CLASSES))
    weights = {r: centerness_by_formula(*wanted[r]) for r in positives}
    box = sum(weights[r] * (1 - giou_by_corners(predicted[r], wanted[r])) for r in positives)
    bce = sum(math.log(1 + math.exp(centerness[r])) - weights[r] * centerness[r] for r in positives)
    expected = {"cls": cls / len(positives), "box": box / sum(weights.values()), "centerness": bce / len(positives)}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_boxes_is_pure_background_with_finite_gradients():
    head = new_head()
    pyramid = [torch.randn(2, 32, h, w, requires_grad=True) for h, w in SIZES]
    outputs = head(pyramid)
    targets = head.assign(SIZES, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    losses = head.losses(outputs, targets)
    sum(losses.values()).backward()
    expected = sum(focal_by_formula(value, False) for value in outputs["logits"].flatten().tolist())
    assert losses["cls"].item() == pytest.approx(expected, rel=1e-5)  # divided by 1, not by 0
    assert losses["box"].item() == losses["centerness"].item() == 0
    tensors = [*head.parameters(), *pyramid]
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tensors)
