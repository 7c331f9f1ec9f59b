"""The RetinaNet head against torchvision's matcher, coder, losses and layers, and against cases by hand."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import RetinaNetHead as TorchvisionHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from msad.retinanet import RetinaNetHead

SIZES = [(8, 16), (4, 8), (2, 4), (1, 2), (1, 1)]  # of a 64x128 image
CLASSES = 3
CPU = torch.device("cpu")
CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))


def make_head(object_scale=0.25, convs=1):
    torch.manual_seed(0)
    return RetinaNetHead(16, CLASSES, 16, convs, object_scale)


def random_boxes(count, smallest, largest):
    """Log-uniform sides, partly outside the image; every third box a little beside another, the last like the first."""
    sides = smallest * (largest / smallest) ** torch.rand(count, 2)
    centers = torch.rand(count, 2) * torch.tensor([128.0, 64.0])
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], 1)
    boxes[2::3] = boxes[1::3][: len(boxes[2::3])] + torch.rand(len(boxes[2::3]), 2).repeat(1, 2)
    boxes[-1:] = boxes[:1]
    return boxes


def random_images(seed):
    """Boxes and labels of six images: none to more than are matched at once; with an odd seed all tiny."""
    torch.manual_seed(seed)
    counts = (0, 1, 2, 7, 30, 80)
    boxes = [random_boxes(m, *((0.01, 4.0) if seed % 2 else (4.0, 100.0))) for m in counts]
    return boxes, [torch.randint(CLASSES, (m,)) for m in counts]


def test_anchors_follow_the_formula_cell_by_cell():
    expected = []
    for level, (height, width) in enumerate(SIZES):
        for row, column, ratio, third in itertools.product(range(height), range(width), (0.5, 1, 2), range(3)):
            side = 0.25 * 32 * 2**level * 2 ** (third / 3)
            w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
            x, y = column * 8 * 2**level, row * 8 * 2**level
            expected.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    torch.testing.assert_close(make_head().anchor_boxes(SIZES, CPU), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_anchors_are_the_same_in_a_model_of_any_precision(dtype):
    head = RetinaNetHead(32, 3, 64, 1, 0.3)
    sizes = [(4, 3), (2, 2), (1, 1), (1, 1), (1, 1)]
    wanted = head.anchor_boxes(sizes, CPU)
    model = torch.nn.Sequential(head).to(dtype)
    assert head.box_pred.weight.dtype == dtype and head.anchor_boxes(sizes, CPU).equal(wanted)
    assert copy.deepcopy(model).float()[0].anchor_boxes(sizes, CPU).equal(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_targets_are_those_of_torchvisions_matcher_and_coder(seed):
    boxes, labels = random_images(seed)
    head, matcher = make_head(), Matcher(0.5, 0.4, allow_low_quality_matches=True)
    anchors = head.anchor_boxes(SIZES, CPU)
    targets = head.assign(SIZES, boxes, labels)
    assert (targets["labels"][0] == CLASSES).all()  # the image without boxes, which torchvision does not take
    for i in range(1, len(boxes)):
        matches = matcher(box_iou(boxes[i], anchors))
        positive = matches >= 0
        expected = torch.where(matches == -1, CLASSES, -1)
        expected[positive] = labels[i][matches[positive]]
        assert torch.equal(targets["labels"][i], expected)
        deltas = torch.zeros(len(anchors), 4)
        deltas[positive] = CODER.encode_single(boxes[i][matches[positive]], anchors[positive])
        torch.testing.assert_close(targets["deltas"][i], deltas, rtol=1e-4, atol=1e-5)


def test_a_box_without_area_takes_no_anchor():
    """torchvision's matcher would give it all of them: none is better than the others."""
    boxes = torch.tensor([[8.0, 8, 24, 24], [8, 16, 24, 16], [90, 10, 90, 50]])  # an object and two lines, one on it
    labels = make_head().assign(SIZES, [boxes, boxes[:1]], [torch.tensor([1, 2, 2]), torch.tensor([1])])["labels"]
    assert torch.equal(labels[0], labels[1]) and set(labels[0].tolist()) == {1, CLASSES}


def test_five_anchors_by_hand():
    """IoU 1, 5/10, 4/10 and 1/10 with the first box; the last has 2/50 with the second, which has no better one."""
    anchors = [[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [9, 0, 10, 10], [100, 100, 105, 110]]
    anchors, boxes = torch.tensor(anchors), torch.tensor([[0.0, 0, 10, 10], [100, 100, 102, 101]])
    labels, deltas = make_head().assign_image(anchors, boxes, torch.tensor([2, 1]))
    assert labels.tolist() == [2, 2, -1, CLASSES, 1]
    # From (5, 2.5), 10 x 5 to (5, 5), 10 x 10; from (102.5, 105), 5 x 10 to (101, 100.5), 2 x 1.
    second, last = [0, 2.5 / 5, 0, math.log(10 / 5)], [-1.5 / 5, -4.5 / 10, math.log(2 / 5), math.log(1 / 10)]
    torch.testing.assert_close(deltas, torch.tensor([[0.0] * 4, second, [0.0] * 4, [0.0] * 4, last]))


@pytest.mark.parametrize("seed", range(2))
def test_losses_are_torchvisions_over_the_whole_batch(seed):
    boxes, labels = random_images(seed)
    head = make_head()
    targets = head.assign(SIZES, boxes, labels)
    logits, deltas = 3 * torch.randn(*targets["labels"].shape, CLASSES), torch.randn_like(targets["deltas"])
    losses = head.losses({"logits": logits, "deltas": deltas}, targets)
    counted = targets["labels"] >= 0
    positive = counted & (targets["labels"] < CLASSES)
    one_hot = F.one_hot(targets["labels"][counted], CLASSES + 1)[:, :CLASSES].float()
    cls = sigmoid_focal_loss(logits[counted], one_hot, 0.25, 2, "sum")
    box = F.smooth_l1_loss(deltas[positive], targets["deltas"][positive], beta=0.1, reduction="sum")
    torch.testing.assert_close(losses["cls"], cls / positive.sum())
    torch.testing.assert_close(losses["box"], box / positive.sum())


def test_forward_is_torchvisions_with_the_same_weights():
    head, other = make_head(convs=4), TorchvisionHead(16, RetinaNetHead.anchors, CLASSES)
    ours = [p for part in (head.cls_tower, head.cls_logits, head.box_tower, head.box_pred) for p in part.parameters()]
    with torch.no_grad():
        for mine, theirs in zip(ours, other.parameters(), strict=True):
            theirs.copy_(mine.normal_(std=0.1))
    pyramid = [torch.randn(2, 16, h, w) for h, w in SIZES]
    outputs, expected = head(pyramid), other(pyramid)
    torch.testing.assert_close(outputs["logits"], expected["cls_logits"])
    torch.testing.assert_close(outputs["deltas"], expected["bbox_regression"])


@pytest.mark.parametrize("width, depth, tower", [(256, 4, 0.01), (64, 2, 0.01), (64, 4, math.sqrt(2 / (9 * 64)))])
def test_a_new_head_is_small_and_gives_every_class_the_prior(width, depth, tower):
    """Its towers start as the paper's, or where they are narrow and deep as He et al.'s."""
    torch.manual_seed(0)
    head = RetinaNetHead(width, CLASSES, width, depth)
    convs = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 2 * (depth + 1)
    for conv in convs:
        std = 0.01 if conv in (head.cls_logits, head.box_pred) else tower
        assert conv.weight.std().item() == pytest.approx(std, rel=0.1)
        assert conv is head.cls_logits or not conv.bias.any()
    torch.testing.assert_close(head.cls_logits.bias.sigmoid(), torch.full((9 * CLASSES,), 0.01))


def test_decoding_is_torchvisions_with_scores_above_the_threshold():
    head = make_head()
    anchors = head.anchor_boxes(SIZES, CPU)
    logits, deltas = 3 * torch.randn(2, len(anchors), CLASSES), 3 * torch.randn(2, len(anchors), 4)
    assert (deltas[..., 2:] > math.log(1000 / 16)).any()  # some reach the largest ratio
    boxes, scores = head.decode({"logits": logits, "deltas": deltas}, SIZES, slice(None))
    torch.testing.assert_close(boxes, CODER.decode(deltas, [anchors, anchors]).view(2, -1, 4))
    assert torch.equal(scores, F.threshold(logits.sigmoid(), 0.05, 0.0)) and (scores == 0).any() and (scores > 0).any()
    some = torch.rand(len(anchors)) < 0.1
    part = head.decode({"logits": logits[1, some], "deltas": deltas[1, some]}, SIZES, some)
    assert part[0].equal(boxes[1, some]) and part[1].equal(scores[1, some])
