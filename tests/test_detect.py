"""From pictures to detections in each picture's own pixels, for every kind of model and branch."""

import pytest
import torch
from helpers import tiny_config, tiny_model

from msad import models
from msad.engine.weights import copy_matching

KINDS_AND_BRANCHES = [
    ("high", "high"), ("low", "low"), ("teacher", "fused"), ("teacher", "high"), ("teacher", "low"),
    ("conventional", "high"), ("conventional", "low"),
]  # fmt: skip


class PlantedHead(torch.nn.Module):
    """Finds one box of class 1 in every image, at a place in the pixels that a head decodes to."""

    anchors = 1
    nms_threshold = 0.6

    def __init__(self, place):
        super().__init__()
        self.place = torch.tensor([[place]]).float()

    def forward(self, pyramid):
        logits = torch.tensor([[[-9.0, 5.0, -9.0]]])
        return {name: x.expand(len(pyramid[0]), 1, -1) for name, x in {"boxes": self.place, "logits": logits}.items()}

    def decode(self, outputs, sizes, where):
        return outputs["boxes"], torch.where(outputs["logits"] > 0, 0.75, 0.0)


def plant(kind, branch):
    """A model that finds a box at (16, 32, 96, 64) in H's pixels. The conventional model's low branch alone decodes to
    L's."""
    model = tiny_model(kind)
    model.head = PlantedHead([8, 16, 48, 32] if (kind, branch) == ("conventional", "low") else [16, 32, 96, 64])
    return model


def same_detections(found, expected):
    assert [len(d["scores"]) for d in found] == [len(d["scores"]) for d in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist()
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("kind, branch", KINDS_AND_BRANCHES)
def test_boxes_come_back_in_each_images_own_pixels(kind, branch):
    images = [torch.rand(3, 200, 300), torch.rand(3, 128, 192), torch.rand(3, 101, 203), torch.rand(3, 60, 40)]
    found = plant(kind, branch).detect(images, branch)
    # H is 128x192, 128x192, 127x256 (the long side is the limit; a low model reads 64x128 of 128x256) and 192x128.
    rows = 101 / (128 if kind == "low" else 127)
    expected = [
        [16 * 300 / 192, 32 * 200 / 128, 96 * 300 / 192, 64 * 200 / 128],
        [16, 32, 96, 64],
        [16 * 203 / 256, 32 * rows, 96 * 203 / 256, 64 * rows],
        [16 * 40 / 128, 32 * 60 / 192, 96 * 40 / 128, 64 * 60 / 192],
    ]
    for detections, box in zip(found, expected, strict=True):
        assert detections["boxes"].tolist() == [pytest.approx(box, abs=1e-3)]
        assert detections["scores"].tolist() == [0.75] and detections["labels"].tolist() == [1]


@pytest.mark.parametrize("kind, branch", KINDS_AND_BRANCHES)
def test_without_resizing_the_image_is_the_networks_input(kind, branch):
    model, sizes = plant(kind, branch), []
    model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    image = torch.rand(3, 50, 90) if kind == "low" else torch.rand(3, 100, 180)
    (found,) = model.detect([image], branch, resize=False)
    assert found["boxes"].tolist() == [[8, 16, 48, 32] if kind == "low" else [16, 32, 96, 64]]
    whole, half = (128, 192), (64, 96)  # padded to multiples of 64, or of 32 for the low-resolution input
    assert set(sizes) <= {whole, half} and (half in sizes) == (branch in ("low", "fused"))


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


def test_limits_reach_every_way_to_detect():
    model, image = tiny_model("high"), torch.rand(3, 128, 192)
    (every,) = model.detect(image, resize=False)
    for limits, count in (({"threshold": every["scores"][9].item()}, 10), ({"max_detections": 7}, 7)):
        (found,) = model.detect(image, resize=False, **limits)
        batch = model.detect_batch(image[None], [(128, 192)], [(128, 192)], ["high"], **limits)
        assert all(found[key].equal(batch["high"][0][key]) and found[key].equal(every[key][:count]) for key in every)


def test_a_student_reads_low_what_its_teachers_low_branch_makes_of_high():
    teacher, student = tiny_model("teacher"), tiny_model("low", seed=1)
    copy_matching(student, teacher.state_dict())
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
@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 0.02), (torch.float16, 0.02), (torch.float64, 1e-3)])
def test_a_model_of_another_precision_finds_nearly_the_same(dtype, share, head):
    picture = torch.randint(256, (3, 100, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = tiny_model("low", head=head)
    (expected,), (found,) = model.detect(picture), model.to(dtype).detect(picture)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert len(found["scores"]) == pytest.approx(len(expected["scores"]), abs=5)
    torch.testing.assert_close(found["scores"][:10], expected["scores"][:10], rtol=share, atol=0)


def test_the_branch_must_be_the_model_s_and_the_model_in_eval_mode():
    model = tiny_model("conventional")
    with pytest.raises(ValueError, match="conventional has no branch 'fused'"):
        model.detect(torch.rand(3, 64, 64), "fused")
    before = model.backbone.bn1.running_mean.clone()
    with pytest.raises(RuntimeError, match="eval"):
        model.train().detect(torch.rand(3, 64, 64))
    assert before.equal(model.backbone.bn1.running_mean)
