"""From outputs to detections: candidates, NMS, and boxes in each image's own pixels."""

import random

import pytest
import torch
from helpers import tiny_config, tiny_model
from torch import nn

from msad import models
from msad.engine import checkpoint

KINDS_AND_BRANCHES = [
    ("high", "high"), ("low", "low"), ("teacher", "fused"), ("teacher", "high"), ("teacher", "low"),
    ("conventional", "high"), ("conventional", "low"),
]  # fmt: skip


class PlantedHead(nn.Module):
    """Finds the same in every image: per level boxes (R,4), in the pixels a head decodes to, and scores (R,K)."""

    nms_threshold = 0.6

    def __init__(self, *levels, anchors=1):
        super().__init__()
        levels = list(levels) + [(torch.zeros(0, 4), torch.zeros(0, 3))] * (5 - len(levels))
        self.anchors = anchors
        self.cells = [(len(boxes) // anchors, 1) for boxes, _ in levels]
        self.boxes, self.scores = (torch.cat(part) for part in zip(*levels))
        self.logits = torch.where(self.scores > 0, 5.0, -9.0)

    def forward(self, pyramid):
        expand = lambda x: x.expand(len(pyramid[0]), *x.shape)
        outputs = {"boxes": self.boxes, "scores": self.scores, "logits": self.logits}
        return {name: expand(value) for name, value in outputs.items()} | {"sizes": self.cells}

    def decode(self, outputs, where):
        return outputs["boxes"], outputs["scores"]


def plant(model, boxes, labels, scores):
    """Make a model find exactly these candidates, all on the first level."""
    table = torch.zeros(len(boxes), 3)
    table[torch.arange(len(boxes)), torch.tensor(labels)] = torch.tensor(scores)
    model.head = PlantedHead((torch.tensor(boxes).float(), table))
    return model


def same_detections(found, expected):
    assert [len(d["scores"]) for d in found] == [len(d["scores"]) for d in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist()
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("kind, branch", KINDS_AND_BRANCHES)
def test_boxes_come_back_in_each_images_own_pixels(kind, branch):
    # The place is (16, 32, 96, 64) in H's pixels. The conventional model's low branch alone decodes to L's.
    place = [8, 16, 48, 32] if (kind, branch) == ("conventional", "low") else [16, 32, 96, 64]
    model = plant(tiny_model(kind), [place], [1], [0.75])
    images = [torch.rand(3, 200, 300), torch.rand(3, 128, 192), torch.rand(3, 101, 203), torch.rand(3, 60, 40)]
    found = model.detect(images, branch)
    # H is 128x192, 128x192, 127x256 (the long side is the limit; a low model reads 64x128 of 128x256) and 192x128.
    rows = 101 / (128 if kind == "low" else 127)
    if branch == "low" and kind == "conventional":
        rows = 101 / 127
    expected = [
        [16 * 300 / 192, 32 * 200 / 128, 96 * 300 / 192, 64 * 200 / 128],
        [16, 32, 96, 64],
        [16 * 203 / 256, 32 * rows, 96 * 203 / 256, 64 * rows],
        [16 * 40 / 128, 32 * 60 / 192, 96 * 40 / 128, 64 * 60 / 192],
    ]
    for detections, box in zip(found, expected, strict=True):
        assert detections["boxes"][0].tolist() == pytest.approx(box, abs=1e-3)
        assert detections["scores"].tolist() == [0.75] and detections["labels"].tolist() == [1]


@pytest.mark.parametrize("kind, branch", KINDS_AND_BRANCHES)
def test_without_resizing_the_image_is_the_networks_input(kind, branch):
    place = [8, 16, 48, 32] if (kind, branch) == ("conventional", "low") else [16, 32, 96, 64]
    model = plant(tiny_model(kind), [place], [1], [0.75])
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    image = torch.rand(3, 50, 90) if kind == "low" else torch.rand(3, 100, 180)
    (found,) = model.detect([image], branch, resize=False)
    own = [8, 16, 48, 32] if kind == "low" else [16, 32, 96, 64]
    assert found["boxes"].tolist() == [own]
    whole, half = (128, 192), (64, 96)  # padded to multiples of 64, or of 32 for the low-resolution input
    assert set(sizes) <= {whole, half} and (half in sizes) == (branch in ("low", "fused"))


@pytest.mark.parametrize("kind", ["high", "low"])
def test_boxes_are_clipped_to_the_image_and_dropped_outside_it(kind):
    boxes = [[-20, 40, 60, 500], [20, 20, 40, 40], [190, 10, 250, 50], [10, -30, 30, 0], [100, 90, 400, 110]]
    model = plant(tiny_model(kind), boxes, [0, 1, 0, 0, 2], [0.5, 0.9, 0.95, 0.8, 0.6])
    half = 2 if kind == "low" else 1
    (found,) = model.detect([torch.rand(3, 100 // half, 180 // half)], resize=False)
    expected = [[20, 20, 40, 40], [100, 90, 180, 100], [0, 40, 60, 100]]
    assert (found["boxes"] * half).tolist() == expected
    assert found["labels"].tolist() == [1, 2, 0] and found["scores"].tolist() == pytest.approx([0.9, 0.6, 0.5])


def test_boxes_outside_the_image_take_no_place_among_the_most_wanted():
    outside = [[200 + 50 * i, 10, 240 + 50 * i, 50] for i in range(3)]
    inside = [[20, 20, 40, 40], [60, 20, 90, 40]]
    model = plant(tiny_model("high"), outside + inside, [0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5])
    (found,) = model.detect([torch.rand(3, 100, 180)], resize=False, max_detections=2)
    assert found["boxes"].tolist() == inside


def loop_nms(boxes, labels, scores, threshold=0.6):
    """Indices that class-wise NMS keeps, best first."""

    def iou(a, b):
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(width, 0) * max(height, 0)
        return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(labels[i] != labels[j] or iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_nms_equals_a_loop_over_pairs_of_one_class():
    draw = random.Random(0)
    model = tiny_model("high")
    removed = 0
    for _ in range(30):
        centers = [(draw.uniform(20, 170), draw.uniform(20, 105)) for _ in range(4)]
        boxes = []
        for _ in range(40):
            (x, y), w, h = draw.choice(centers), draw.uniform(14, 20), draw.uniform(14, 20)
            x, y = x + draw.uniform(-4, 4), y + draw.uniform(-4, 4)
            boxes.append([x - w, y - h, x + w, y + h])
        boxes = torch.tensor(boxes).clamp(min=0).tolist()
        labels = [draw.randrange(3) for _ in boxes]
        scores = [(i + 1) / 50 for i in draw.sample(range(40), 40)]
        (found,) = plant(model, boxes, labels, scores).detect([torch.rand(3, 128, 192)], resize=False)
        kept = loop_nms(boxes, labels, scores)
        removed += len(boxes) - len(kept)
        assert found["scores"].tolist() == pytest.approx([scores[i] for i in kept])
        assert found["labels"].tolist() == [labels[i] for i in kept]
    assert removed > 100


@pytest.mark.parametrize("head, threshold", [("fcos", 0.6), ("retinanet", 0.5)])
def test_each_head_has_the_threshold_of_its_paper(head, threshold):
    for overlap, count in ((threshold + 0.02, 1), (threshold - 0.02, 2)):  # of two boxes, one within the other
        model = plant(tiny_model("high"), [[0, 0, 100, 100], [0, 0, 100, 100 * overlap]], [1, 1], [0.9, 0.8])
        model.head.nms_threshold = models.HEADS[head].nms_threshold
        assert len(model.detect(torch.rand(3, 128, 192), resize=False)[0]["scores"]) == count


def test_nms_keeps_classes_apart_for_boxes_that_reach_out_of_the_image():
    boxes, labels, scores = [[-90, -90, 10, 10], [39, 39, 128, 128]], [1, 0], [0.9, 0.8]
    (found,) = plant(tiny_model("high"), boxes, labels, scores).detect([torch.rand(3, 128, 192)], resize=False)
    assert loop_nms(boxes, labels, scores) == [0, 1]
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [39, 39, 128, 128]]


def tiles(count, left):
    """Boxes that do not overlap: `count` squares of 4 pixels in columns of 32, from x = `left`."""
    corners = [(left + i // 32 * 4, i % 32 * 4) for i in range(count)]
    return torch.tensor([(x, y, x + 4, y + 4) for x, y in corners])


@pytest.mark.parametrize("anchors", [1, 10])
@pytest.mark.parametrize("absent, candidates", [(400, 1100), (550, 950)])
def test_each_level_has_at_most_a_thousand_candidates(absent, candidates, anchors):
    torch.manual_seed(0)
    # 800 locations and two classes are 1600 candidates, some of them out of the question; at 100 locations both.
    first, second, third = torch.rand(800, 3), torch.rand(50, 3) / 100 + 0.001, torch.rand(20, 3) / 2000
    first[:, 2] = first[:absent, 0] = first[:100, 1] = 0
    second[:, :2] = third[:, :2] = 0
    assert (first > 0).sum() == candidates
    model = tiny_model("high")
    levels = (tiles(800, 0).float(), first), (tiles(50, 120).float(), second), (tiles(20, 160).float(), third)
    model.head = PlantedHead(*levels, anchors=anchors)
    (found,) = model.detect([torch.rand(3, 128, 192)], resize=False, max_detections=10**6)
    best = first.flatten().sort(descending=True).values[: min(candidates, 1000)]
    # However low their scores, those of other levels stay.
    expected = torch.cat([best, second[:, 2], third[:, 2]]).sort(descending=True).values
    torch.testing.assert_close(found["scores"], expected)
    assert (found["labels"] == 2).sum() == 70


def test_an_image_has_at_most_a_hundred_detections_the_best():
    scores = torch.randperm(300).add(1).div(400).tolist()
    model = plant(tiny_model("high"), tiles(300, 0).tolist(), [i % 3 for i in range(300)], scores)
    (found,) = model.detect([torch.rand(3, 128, 192)], resize=False)
    order = sorted(range(300), key=lambda i: -scores[i])[:100]
    assert found["scores"].tolist() == pytest.approx([scores[i] for i in order])
    assert found["boxes"].tolist() == tiles(300, 0)[order].tolist()
    assert found["labels"].tolist() == [i % 3 for i in order]


def test_the_caller_may_want_the_likeliest_alone():
    scores = [0.5, 0.25, 0.75, 0.3]  # the second lies below a threshold, the others not
    model = plant(tiny_model("high"), tiles(4, 0).tolist(), [0, 1, 2, 0], scores)
    image = torch.rand(3, 128, 192)
    for limits, kept in (({}, [2, 0, 3, 1]), ({"threshold": 0.5}, [2, 0]), ({"max_detections": 3}, [2, 0, 3])):
        (found,) = model.detect([image], resize=False, **limits)
        assert found["scores"].tolist() == pytest.approx([scores[i] for i in kept])
        assert found["boxes"].tolist() == tiles(4, 0)[kept].tolist()
        batch = model.detect_batch(image[None], [(128, 192)], [(128, 192)], ["high"], **limits)
        assert all(batch["high"][0][key].equal(found[key]) for key in found)


def test_what_is_likelier_than_the_threshold_is_decoded_and_nothing_else():
    boxes = [[0, 0, 30, 30], [40, 0, 70, 30], [0, 40, 30, 70]]
    model = plant(tiny_model("high"), boxes, [0, 1, 2], [0.051, 0.049, 0.9])
    model.head.logits = model.head.scores.logit()
    (found,) = model.detect([torch.rand(3, 128, 128)])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.051]) and found["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("kind, branch", [KINDS_AND_BRANCHES[i] for i in (0, 1, 2, 6)])
def test_together_equals_one_by_one(kind, branch, resize):
    torch.manual_seed(1)
    model = tiny_model(kind)
    sizes = [(128, 192), (120, 180), (200, 130), (70, 128), (128, 192), (128, 129)]
    images = [torch.rand(3, *size) for size in sizes]
    together = model.detect(images, branch, resize)
    alone = [model.detect([image], branch, resize)[0] for image in images]
    assert min(len(d["scores"]) for d in alone) > 10
    same_detections(together, alone)
    for (height, width), found in zip(sizes, together):
        box, scores = found["boxes"], found["scores"].tolist()
        assert scores == sorted(scores, reverse=True) and set(found["labels"].tolist()) <= {0, 1, 2}
        assert (box[:, :2] >= 0).all() and (box <= torch.tensor([width, height] * 2) + 1e-3).all()


def test_a_student_reads_low_what_its_teachers_low_branch_makes_of_high():
    teacher, student = tiny_model("teacher"), tiny_model("low", seed=1)
    checkpoint.start_from(student, teacher.state_dict())
    image = torch.rand(3, 128, 192)
    (expected,) = teacher.detect([image], "low", resize=False)
    (found,) = student.detect([image.view(3, 64, 2, 96, 2).mean((2, 4))], resize=False)
    assert len(expected["scores"]) > 10
    same_detections([found | {"boxes": found["boxes"] * 2}], [expected])


def test_a_picture_of_nothing_has_no_detections():
    model = models.build(tiny_config("teacher")).eval()
    torch.nn.init.zeros_(model.head.cls_logits.weight)  # every class at its prior of 0.01
    assert model.detect([]) == []
    (found,) = model.detect([torch.zeros(3, 64, 64)])
    assert [found[key].shape for key in ("boxes", "scores", "labels")] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("head", models.HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_lower_precision_finds_nearly_the_same(dtype, head):
    picture = torch.randint(256, (3, 100, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = tiny_model("low", head=head)
    (expected,), (found,) = model.detect(picture), model.to(dtype).detect(picture)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert len(found["scores"]) == pytest.approx(len(expected["scores"]), abs=5)
    torch.testing.assert_close(found["scores"][:10], expected["scores"][:10], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind, branch", [("high", "low"), ("low", "fused"), ("conventional", "fused")])
def test_a_branch_must_be_one_of_the_models(kind, branch):
    with pytest.raises(ValueError, match=f"{kind} has no branch '{branch}'"):
        tiny_model(kind).detect(torch.rand(3, 64, 64), branch)


def test_detection_needs_eval_mode():
    model = tiny_model("high").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="eval"):
        model.detect([torch.rand(3, 128, 128)])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
