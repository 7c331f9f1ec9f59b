"""FCOS: assignment against a loop over locations and boxes, the head and its decoding by hand, losses by formula."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize

from msad.fcos import FCOSHead
from msad.heads import focal_loss, giou_loss

CLASSES = 3
SIZES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]  # of a 128x192 image
LEVEL_STRIDES = (8, 16, 32, 64, 128)
LEVEL_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))


def new_head(convs=1, **more):
    torch.manual_seed(0)
    return FCOSHead(32, CLASSES, 64, convs, **more)


def cells(sizes):
    """Level, stride and centre of every location, in order."""
    for level, ((height, width), stride) in enumerate(zip(sizes, LEVEL_STRIDES)):
        for row in range(height):
            for column in range(width):
                yield level, stride, column * stride + stride // 2, row * stride + stride // 2


def may_train(level, stride, x, y, box, object_scale):
    """Whether a box is a candidate at a location, straight from the rules."""
    x1, y1, x2, y2 = box
    cx, cy, radius = (x1 + x2) / 2, (y1 + y2) / 2, 1.5 * stride
    inside = max(x1, cx - radius) < x < min(x2, cx + radius) and max(y1, cy - radius) < y < min(y2, cy + radius)
    smallest, largest = LEVEL_RANGES[level]
    return inside and smallest * object_scale <= max(x - x1, y - y1, x2 - x, y2 - y) <= largest * object_scale


def check_assignment(sizes, boxes, labels, object_scale=1.0):
    """Compare the assignment of one image with a loop; returns the number of positives on each level."""
    head = new_head(object_scale=object_scale)
    found = head.assign(sizes, [torch.tensor(boxes).reshape(-1, 4)], [torch.tensor(labels, dtype=torch.long)])
    found_labels, found_distances = found["labels"][0].tolist(), found["distances"][0].tolist()
    positives = [0] * 5
    for r, (level, stride, x, y) in enumerate(cells(sizes)):
        candidates = [b for b in zip(boxes, labels) if may_train(level, stride, x, y, b[0], object_scale)]
        if not candidates:
            assert found_labels[r] == CLASSES and found_distances[r] == [1] * 4, (r, boxes)
            continue
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b, _ in candidates]
        # Among boxes of exactly the same area any will do.
        allowed = [
            (label, [(x - b[0]) / stride, (y - b[1]) / stride, (b[2] - x) / stride, (b[3] - y) / stride])
            for (b, label), area in zip(candidates, areas)
            if area == min(areas)
        ]
        assert (found_labels[r], found_distances[r]) in allowed, (r, x, y, boxes)
        positives[level] += 1
    assert len(found_labels) == sum(h * w for h, w in sizes)
    return positives


def random_box(draw):
    """A tiny, ordinary, huge or bordering box on a grid of a quarter pixel, where all arithmetic is exact."""
    kind = draw.choice(("tiny", "ordinary", "ordinary", "huge", "border", "centred"))
    longest = {"tiny": 3, "ordinary": 100, "huge": 2 ** draw.uniform(7, 11), "border": 60, "centred": 140}[kind]
    width, height = (draw.randint(1, int(4 * longest)) / 4 for _ in range(2))
    x, y = draw.randint(-40, 4 * 190) / 4, draw.randint(-40, 4 * 126) / 4
    if kind == "border":
        x, y = draw.choice(((0, y), (192 - width, y), (x, 0), (x, 128 - height)))
    if kind in ("huge", "centred"):  # around a location, so that the distances are often equal to a limit
        x, y = draw.randrange(4, 192, 8) - width / 2, draw.randrange(4, 128, 8) - height / 2
    return [x, y, x + width, y + height]


@pytest.mark.parametrize("object_scale", [1.0, 0.5, 0.25])
def test_assignment_equals_a_loop_over_locations_and_boxes(object_scale):
    draw = random.Random(object_scale)
    positives = [0] * 5
    for count in (300, *[draw.choice((0, 1, 2, 4, 8)) for _ in range(80)]):  # one is crowded
        boxes = [random_box(draw) for _ in range(count)]
        boxes += [[b[0] - 4, b[1] - 4, b[2] + 4, b[3] + 4] for b in boxes[:2]]  # overlapping
        labels = [draw.randrange(CLASSES) for _ in boxes]
        found = check_assignment(SIZES, boxes, labels, object_scale)
        positives = [a + b for a, b in zip(positives, found)]
    assert min(positives) >= 10, positives


def test_where_ranges_and_central_squares_end():
    # Sides 64 pixels away are the end of level 0, of whose other centres one side is farther, and the start of level 1.
    assert check_assignment(SIZES, [[60 - 64, 60 - 64, 60 + 64, 60 + 64]], [1])[0] == 1
    assert check_assignment(SIZES, [[72 - 64, 72 - 64, 72 + 64, 72 + 64]], [1])[1] == 9
    # Those of the central square do not belong to it: 12 = 1.5 strides from its middle to the centres at 4 and 28.
    assert check_assignment(SIZES, [[-4, -4, 36, 36]], [0])[0] == 4


def test_images_of_a_batch_are_assigned_on_their_own():
    head = new_head(object_scale=0.25)
    draw = random.Random(2)
    boxes = [torch.tensor([random_box(draw) for _ in range(n)]).reshape(-1, 4) for n in (3, 0, 5)]
    labels = [torch.randint(CLASSES, (len(b),)) for b in boxes]
    together = head.assign(SIZES, boxes, labels)
    assert together["labels"].shape == (3, 512) and together["distances"].shape == (3, 512, 4)
    for i in range(3):
        alone = head.assign(SIZES, boxes[i : i + 1], labels[i : i + 1])
        assert all(torch.equal(together[key][i], alone[key][0]) for key in ("labels", "distances"))
    # What follows from these two.
    for key, expected in complete(together["labels"], together["distances"]).items():
        torch.testing.assert_close(together[key], expected)


@pytest.mark.parametrize("width", [64, 256])
def test_first_predictions_are_the_prior(width):
    torch.manual_seed(0)
    head = FCOSHead(width, CLASSES, width, 2)
    tower, output = (0.01, 0.01) if width == 256 else (math.sqrt(2 / (9 * 64)), 0.04)  # the authors'; He et al.'s
    assert head.cls_logits.bias.sigmoid().tolist() == pytest.approx([0.01] * CLASSES)
    assert head.box_pred.bias is None and head.centerness.bias is None
    assert head.scales.tolist() == [1] * 5 and head.scales.requires_grad
    convs = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 2 * 2 + 3
    for conv in convs:
        std = output if conv in (head.cls_logits, head.box_pred, head.centerness) else tower
        assert conv.weight.std().item() == pytest.approx(std, rel=0.1)
        assert conv is head.box_pred or abs(conv.weight.mean()) < 0.1 * std
        assert conv.bias is None or conv is head.cls_logits or not conv.bias.any()
    norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32] * 4
    # Distances start on their ReLU's open side, whatever the seed.
    starts = []
    for seed in range(10):
        torch.manual_seed(seed)
        head = FCOSHead(width, CLASSES, width, 2)
        starts.append(head([torch.randn(1, width, 16, 16)] * 5)["distances"].detach())
    assert torch.cat(starts).mean().item() == pytest.approx(1, abs=0.15)
    assert (torch.cat(starts) > 0).float().mean() > 0.9


@torch.no_grad()
def test_outputs_equal_the_layers_applied_one_by_one():
    head = new_head(convs=2)
    randomize(head)
    head.scales.copy_(torch.tensor([1.0, 2, 0.5, 3, 0.25]))
    pyramid = [torch.randn(2, 32, h, w) for h, w in SIZES]
    outputs = head(pyramid)
    weights = dict(head.named_parameters())
    conv = lambda name, x: F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=1)
    level_maps = []
    for x, scale in zip(pyramid, head.scales):
        towers = {}
        for name in ("cls_tower", "box_tower"):
            y = x
            for i in (0, 3):
                norm = weights[f"{name}.{i + 1}.weight"], weights[f"{name}.{i + 1}.bias"]
                y = F.group_norm(conv(f"{name}.{i}", y), 32, *norm).clamp(min=0)
            towers[name] = y
        distances = (scale * conv("box_pred", towers["box_tower"])).clamp(min=0)
        level_maps.append((conv("cls_logits", towers["cls_tower"]), distances, conv("centerness", towers["box_tower"])))
    for r, (level, stride, x, y) in enumerate(cells(SIZES)):
        logits, distances, centerness = (m[:, :, y // stride, x // stride] for m in level_maps[level])
        close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        close(outputs["logits"][:, r], logits), close(outputs["distances"][:, r], distances)
        close(outputs["centerness"][:, r], centerness[:, 0])


def test_decoding_by_hand():
    sizes = [(1, 2), (1, 1), (1, 1), (1, 1), (1, 1)]
    logit = lambda p: math.log(p / (1 - p))
    probability = [[0.9, 0.04], [0.06, 0.05 - 1e-6], [0.049, 0.5], [0.01, 0.01], [0.2, 0.3], [0.051, 0.7]]
    centerness = [0.25, 0.001, 0.999, 0.9, 0.5, 0.81]
    distances = [[1, 2, 3, 4], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [2, 0, 0, 2], [0.5, 1, 1.5, 2]]
    outputs = {
        "logits": torch.tensor([[[logit(p) for p in row] for row in probability]]),
        "centerness": torch.tensor([[logit(c) for c in centerness]]),
        "distances": torch.tensor([distances]),
    }
    boxes, scores = new_head().decode(outputs, sizes, slice(None))
    # Locations (4,4) and (12,4) of stride 8, then (8,8), (16,16), (32,32), (64,64) of 16, 32, 64, 128.
    assert boxes[0].tolist() == [
        [4 - 8, 4 - 16, 4 + 24, 4 + 32], [12, 4, 20, 12], [0, 0, 16, 16],
        [-16, -16, 48, 48], [32 - 128, 32, 32, 32 + 128], [0, -64, 256, 320],
    ]  # fmt: skip
    # The threshold looks at the class alone: a cell off centre stays in, a well centred one below 0.05 does not.
    expected = [[(p * c) ** 0.5 if p > 0.05 else 0 for p in row] for row, c in zip(probability, centerness)]
    torch.testing.assert_close(scores[0], torch.tensor(expected), rtol=1e-4, atol=1e-7)
    assert (scores[0] > 0).int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 0], [1, 1], [1, 1]]
    some = torch.tensor([False, True, False, False, True, True])
    part = new_head().decode({name: x[0, some] for name, x in outputs.items()}, sizes, some)
    assert part[0].equal(boxes[0, some]) and part[1].equal(scores[0, some])


@pytest.mark.parametrize("channels", [16, 48, 64, 256])
def test_every_group_of_a_norm_has_something_to_vary(channels):
    torch.manual_seed(0)
    head = FCOSHead(8, CLASSES, channels, 2)
    norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 4 and all(2 * n.num_groups <= n.num_channels == channels for n in norms)
    assert channels % 64 or {n.num_groups for n in norms} == {32}, "the usual 32 where it can be"
    outputs = head([torch.randn(1, 8, 1, 1) for _ in range(5)])  # the smallest maps there are
    outputs["logits"].sum().backward()
    assert head.cls_tower[0].weight.grad.abs().sum() > 0, "a group of one channel would pass nothing on"


# Losses, number by number.


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
    found = giou_loss(predicted, target)
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


def complete(labels, distances):
    """The targets that follow from labels (N,R) and distances (N,R,4)."""
    objects = (labels < CLASSES).float()
    centerness = torch.tensor([[centerness_by_formula(*d) for d in row] for row in distances.tolist()]) * objects
    totals = torch.stack([objects.sum(), centerness.sum()])
    return dict(labels=labels, distances=distances, objects=objects, centerness=centerness, totals=totals)


def test_losses_equal_the_formulas():
    torch.manual_seed(3)
    labels = torch.where(torch.rand(3, 40) < 0.5, torch.randint(CLASSES, (3, 40)), CLASSES)
    labels[1] = CLASSES  # an image without a box among others
    wanted = torch.where((labels < CLASSES)[..., None], torch.rand(3, 40, 4) * 6 + 0.1, 1.0)
    logits, distances = torch.randn(3, 40, CLASSES) * 3, (torch.randn(3, 40, 4) * 3).relu()
    centers = torch.randn(3, 40) * 2
    outputs = {"logits": logits, "distances": distances, "centerness": centers}
    found = new_head().losses(outputs, complete(labels, wanted))

    logits, distances, centers, wanted, labels = (
        x.flatten(0, 1).tolist() for x in (logits, distances, centers, wanted, labels)
    )
    positives = [r for r, label in enumerate(labels) if label < CLASSES]
    assert 30 < len(positives) < len(labels) * 2 / 3
    cls = sum(focal_by_formula(logits[r][k], labels[r] == k) for r in range(len(labels)) for k in range(CLASSES))
    weights = {r: centerness_by_formula(*wanted[r]) for r in positives}
    box = sum(weights[r] * (1 - giou_by_corners(distances[r], wanted[r])) for r in positives)
    bce = sum(math.log(1 + math.exp(centers[r])) - weights[r] * centers[r] for r in positives)
    expected = {"cls": cls / len(positives), "box": box / sum(weights.values()), "centerness": bce / len(positives)}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_boxes_is_pure_background():
    head = new_head()
    outputs = head([torch.randn(2, 32, h, w) for h, w in SIZES])
    targets = head.assign(SIZES, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    losses = head.losses(outputs, targets)
    expected = sum(focal_by_formula(value, False) for value in outputs["logits"].flatten().tolist())
    assert losses["cls"].item() == pytest.approx(expected, rel=1e-5)  # divided by 1, not by 0
    assert losses["box"].item() == losses["centerness"].item() == 0
