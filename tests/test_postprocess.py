"""From a head's outputs to detections: candidates, the best of each level, NMS, the original image's pixels."""

import random

import pytest
import torch

from msad.models import HEADS
from msad.postprocess import postprocess

FRAME = (128, 192)
LEVELS = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]  # of an image of that size


class PlantedHead:
    """Finds the same in every image: boxes (R,4) and scores (R,K), as `decode` gives them; below 0.05 nothing."""

    def __init__(self, boxes, scores, anchors=1, nms_threshold=0.6):
        self.anchors, self.nms_threshold = anchors, nms_threshold
        self.outputs = {"boxes": boxes.float()[None], "scores": scores[None], "logits": scores.logit()[None]}

    def decode(self, outputs, sizes, where):
        return outputs["boxes"], outputs["scores"]


def detect(boxes, labels, scores, frame=FRAME, original=None, nms_threshold=0.6, **limits):
    """What comes of these boxes, all on the first level, in an image."""
    table = torch.zeros(len(boxes), 1203)
    table[torch.arange(len(boxes)), torch.tensor(labels)] = torch.tensor(scores)
    head = PlantedHead(torch.as_tensor(boxes), table, nms_threshold=nms_threshold)
    (found,) = postprocess(head, head.outputs, LEVELS, [frame], [original or frame], **limits)
    return found


def test_boxes_are_clipped_to_the_image_and_dropped_outside_it():
    boxes = [[-20, 40, 60, 500], [20, 20, 40, 40], [190, 10, 250, 50], [10, -30, 30, 0], [100, 90, 400, 110]]
    found = detect(boxes, [0, 1, 0, 0, 2], [0.5, 0.9, 0.95, 0.8, 0.6], frame=(100, 180))
    assert found["boxes"].tolist() == [[20, 20, 40, 40], [100, 90, 180, 100], [0, 40, 60, 100]]
    assert found["labels"].tolist() == [1, 2, 0] and found["scores"].tolist() == pytest.approx([0.9, 0.6, 0.5])


def test_boxes_come_back_in_the_original_image_s_pixels():
    found = detect([[16, 32, 96, 64], [150, 100, 300, 300]], [1, 2], [0.75, 0.5], original=(320, 96))
    assert found["boxes"].tolist() == [[8, 80, 48, 160], [75, 250, 96, 320]]


def test_boxes_outside_the_image_take_no_place_among_the_most_wanted():
    outside = [[200 + 50 * i, 10, 240 + 50 * i, 50] for i in range(3)]
    inside = [[20, 20, 40, 40], [60, 20, 90, 40]]
    found = detect(outside + inside, [0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5], max_detections=2)
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
    draw, removed = random.Random(0), 0
    for _ in range(10):
        centers = [(draw.uniform(20, 170), draw.uniform(20, 105)) for _ in range(4)]
        boxes = []
        for _ in range(40):
            (x, y), w, h = draw.choice(centers), draw.uniform(14, 20), draw.uniform(14, 20)
            x, y = x + draw.uniform(-4, 4), y + draw.uniform(-4, 4)
            boxes.append([x - w, y - h, x + w, y + h])
        boxes = torch.tensor(boxes).clamp(min=0).tolist()
        labels = [draw.randrange(3) for _ in boxes]
        scores = [(i + 3) / 50 for i in draw.sample(range(40), 40)]
        found, kept = detect(boxes, labels, scores), loop_nms(boxes, labels, scores)
        removed += len(boxes) - len(kept)
        assert found["scores"].tolist() == pytest.approx([scores[i] for i in kept])
        assert found["labels"].tolist() == [labels[i] for i in kept]
    assert removed > 50


@pytest.mark.parametrize("head, threshold", [("fcos", 0.6), ("retinanet", 0.5)])
def test_each_head_has_the_threshold_of_its_paper(head, threshold):
    for overlap, count in ((threshold + 0.02, 1), (threshold - 0.02, 2)):  # of two boxes, one within the other
        boxes = [[0, 0, 100, 100], [0, 0, 100, 100 * overlap]]
        found = detect(boxes, [1, 1], [0.9, 0.8], nms_threshold=HEADS[head].nms_threshold)
        assert len(found["scores"]) == count


def test_nms_keeps_classes_apart_for_boxes_that_reach_out_of_the_image():
    boxes, labels, scores = [[-90, -90, 10, 10], [39, 39, 128, 128]], [1, 0], [0.9, 0.8]
    assert loop_nms(boxes, labels, scores) == [0, 1]
    assert detect(boxes, labels, scores)["boxes"].tolist() == [[0, 0, 10, 10], [39, 39, 128, 128]]
    far, near = [-7e4, -7e4, 7e4, 7e4], [[10.6, 10, 18.6, 18], [13.4, 10, 21.4, 18]]  # IoU 0.48
    assert len(detect([far, *near], [0, 79, 79], [0.9, 0.8, 0.7], nms_threshold=0.5)["scores"]) == 3


@pytest.mark.parametrize("label", [0, 79, 1202])
@pytest.mark.parametrize("x", [3.3, 50.6, 171.7])
@pytest.mark.parametrize("apart, count", [(1.999, 1), (2.001, 2)])  # an IoU of 0.6001, and of 0.5999
def test_nms_is_as_exact_with_many_classes(label, x, apart, count):
    boxes = [[x, 10, x + 8, 18], [x + apart, 10, x + apart + 8, 18]]
    assert len(detect(boxes, [label, label], [0.9, 0.8])["scores"]) == count


def tiles(count, left):
    """Boxes that do not overlap: `count` squares of 4 pixels in columns of 32, from x = `left`."""
    corners = [(left + i // 32 * 4, i % 32 * 4) for i in range(count)]
    return torch.tensor([(x, y, x + 4, y + 4) for x, y in corners])


@pytest.mark.parametrize("anchors", [1, 10])
@pytest.mark.parametrize("absent, candidates", [(400, 1100), (550, 950)])
def test_each_level_has_at_most_a_thousand_candidates(absent, candidates, anchors):
    torch.manual_seed(0)
    # 800 locations and two classes are 1600 candidates, some of them out of the question; at 100 locations both.
    first, second, third = (torch.rand(count, 3) * 0.9 + 0.1 for count in (800, 50, 20))
    first[:, 2] = first[:absent, 0] = first[:100, 1] = 0
    second, third = second * 0.001 + 0.051, third * 0.0001 + 0.0501
    second[:, :2] = third[:, :2] = 0
    assert (first > 0).sum() == candidates
    boxes = torch.cat([tiles(800, 0), tiles(50, 120), tiles(20, 160)])
    head = PlantedHead(boxes, torch.cat([first, second, third]), anchors)
    levels = [(count // anchors, 1) for count in (800, 50, 20, 0, 0)]
    (found,) = postprocess(head, head.outputs, levels, [FRAME], [FRAME], max_detections=10**6)
    best = first.flatten().sort(descending=True).values[: min(candidates, 1000)]
    # However low their scores, those of other levels stay.
    expected = torch.cat([best, second[:, 2], third[:, 2]]).sort(descending=True).values
    torch.testing.assert_close(found["scores"], expected)
    assert (found["labels"] == 2).sum() == 70


def test_an_image_has_at_most_a_hundred_detections_the_best():
    scores = torch.randperm(300).add(30).div(400).tolist()
    found = detect(tiles(300, 0), [i % 3 for i in range(300)], scores)
    order = sorted(range(300), key=lambda i: -scores[i])[:100]
    assert found["scores"].tolist() == pytest.approx([scores[i] for i in order])
    assert found["boxes"].tolist() == tiles(300, 0)[order].tolist()
    assert found["labels"].tolist() == [i % 3 for i in order]


@pytest.mark.parametrize(
    "limits, kept", [({}, [2, 0, 3, 1]), ({"threshold": 0.5}, [2, 0]), ({"max_detections": 3}, [2, 0, 3])]
)
def test_the_caller_may_want_the_likeliest_alone(limits, kept):
    scores = [0.5, 0.25, 0.75, 0.3]  # the first lies at a threshold
    found = detect(tiles(4, 0), [0, 1, 2, 0], scores, **limits)
    assert found["scores"].tolist() == [pytest.approx(scores[i]) for i in kept]
    assert found["boxes"].tolist() == tiles(4, 0)[kept].tolist()


def test_what_is_likelier_than_the_threshold_is_decoded_and_nothing_else():
    boxes = [[0, 0, 30, 30], [40, 0, 70, 30], [0, 40, 30, 70]]
    found = detect(boxes, [0, 1, 2], [0.051, 0.049, 0.9])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.051]) and found["labels"].tolist() == [2, 0]
