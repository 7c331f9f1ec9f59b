"""The student: its loss and ramp by hand, a teacher that stays as it is, and a start from what fits."""

import numpy as np
import pytest
import torch
from helpers import tiny_model, total

from msad import align
from msad.engine.weights import copy_detector
from msad.distillation import DISTANCES, RAMP, WEIGHT, checksum, freeze, pyramid_l1, pyramid_pkd, ramp

SIZES = [(8, 6), (4, 3), (2, 2), (1, 1), (1, 1)]


def random_pyramids():
    torch.manual_seed(0)
    return [[torch.randn(2, 4, h, w) * (level + 1) for level, (h, w) in enumerate(SIZES)] for _ in range(2)]


def test_the_weighted_distance_equals_the_papers_in_a_loop():
    student, fused = random_pyramids()
    expected, alpha, tau = 0, 0.2, 3
    for s, f in zip(student, fused):
        pairs = list(zip(s.flatten().tolist(), f.flatten().tolist()))
        expected += alpha * tau**2 * sum(abs(a / tau - b / tau) for a, b in pairs) / len(pairs)
    assert WEIGHT * pyramid_l1(student, fused).item() == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_low_precision_maps_is_computed_in_full():
    student, fused = ([m.bfloat16() for m in maps] for maps in random_pyramids())
    expected = sum((s.double() - f.double()).abs().mean() for s, f in zip(student, fused))
    assert pyramid_l1(student, fused).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_goes_to_the_student():
    student, fused = random_pyramids()
    student = [m.requires_grad_() for m in student]
    pyramid_l1(student, fused).backward()
    for s, f in zip(student, fused):
        torch.testing.assert_close(s.grad, (s - f).detach().sign() / s.numel())


def test_pkd_is_two_minus_twice_each_channel_s_correlation():
    torch.manual_seed(0)
    student, fused = ([torch.randn(3, 4, h, w).double() for h, w in SIZES] for _ in range(2))
    fused = [f + s for s, f in zip(student, fused)]
    channels = [[(s[:, c].flatten(), f[:, c].flatten()) for c in range(4)] for s, f in zip(student, fused)]
    expected = sum(np.mean([2 - 2 * np.corrcoef(s, f)[0, 1] for s, f in level]) for level in channels)
    assert pyramid_pkd(student, fused).item() == pytest.approx(expected, rel=1e-4)
    scaled = [7 * f - 3 for f in fused]
    assert pyramid_pkd(student, scaled).item() == pytest.approx(expected, rel=1e-4)


def test_pkd_of_channels_that_are_constant_is_finite():
    student = [torch.zeros(2, 4, h, w, requires_grad=True) for h, w in SIZES]
    pyramid_pkd(student, random_pyramids()[0]).backward()
    assert all(s.grad.isfinite().all() for s in student)


@pytest.mark.parametrize("name", DISTANCES)
def test_pyramids_must_have_the_same_levels(name):
    assert DISTANCES == {"l1": pyramid_l1, "pkd": pyramid_pkd}
    student, fused = random_pyramids()
    with pytest.raises(ValueError):
        DISTANCES[name](student, fused[:4])


def test_ramp_by_hand():
    assert [ramp(t) for t in (0, 1, 125, 250, 499, 500, 501, 90_000)] == [0, 0.002, 0.25, 0.5, 0.998, 1, 1, 1]
    assert [ramp(t, 50) for t in (0, 10, 50, 60)] == [0, 0.2, 1, 1]
    assert ramp(0, 0) == ramp(9, 0) == 1 and RAMP == 500


def test_a_frozen_teacher_is_the_same_to_the_bit_after_a_training_step():
    teacher, student = tiny_model("teacher").train(), tiny_model("low", seed=1)
    copy_detector(student, teacher)
    teacher = freeze(teacher)
    student.train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    students = {key: value.clone() for key, value in student.state_dict().items()}
    optimizer, high = torch.optim.SGD(student.parameters(), lr=0.01), torch.randn(2, 3, 128, 128)
    pyramids, outputs = student(align.downsample(high))
    boxes, labels = [torch.tensor([[10.0, 10, 60, 50]])] * 2, [torch.tensor([1])] * 2
    fused = teacher.pyramids(high, ["fused"])["fused"]
    assert not any(m.requires_grad for m in fused)
    loss = total(student.losses(pyramids, outputs, boxes, labels)) + WEIGHT * pyramid_l1(pyramids["low"], fused)
    loss.backward()
    optimizer.step()
    after = teacher.state_dict()
    assert all(after[key].equal(value) for key, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    moved = {key for key, value in student.state_dict().items() if not value.equal(students[key])}
    assert {"backbone.conv1.weight", "backbone.bn1.running_mean", "fpn.lateral.2.weight"} < moved


STARTS = {  # how a student differs from its teacher, and a tensor that it takes, and one that it does not
    "other width": ({"width": 0.5}, "head.cls_logits.weight", "backbone.conv1.weight"),
    "other blocks": ({"backbone": "resnet50"}, "backbone.conv1.weight", "backbone.layer1.0.conv3.weight"),
    "smaller head": ({"head_convs": 2, "head_channels": 32}, "fpn.p6.weight", "head.cls_logits.weight"),
    "other head": ({"head": "retinanet"}, "fpn.p6.weight", "head.cls_tower.0.weight"),
}


@pytest.mark.parametrize("changes, common, own", STARTS.values(), ids=STARTS)
def test_the_student_starts_from_all_that_fits(changes, common, own):
    teacher, student = tiny_model("teacher"), tiny_model("low", seed=1, **changes)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    given = {key: value.clone() for key, value in teacher.state_dict().items()}
    copy_detector(student, teacher)
    taken = {key for key in given if key in before and before[key].shape == given[key].shape}
    taken -= {key for key in taken if "head" in changes and key.startswith("head.")}
    assert common in taken and own in before.keys() - taken
    assert all(value.equal(given[key] if key in taken else before[key]) for key, value in student.state_dict().items())
    torch.nn.utils.vector_to_parameters(torch.zeros(10**7), student.parameters())
    assert all(teacher.state_dict()[key].equal(value) for key, value in given.items()), "they are copies"


def test_a_student_like_its_teacher_takes_everything_it_has():
    teacher, student = tiny_model("teacher"), tiny_model("low", seed=1)
    line = copy_detector(student, teacher)
    assert line.endswith("; left behind 4; new 0")  # P7's convolution, and the gate
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = teacher.eval().pyramid(images, align.LEVELS["low"])
        for found, wanted in zip(student(images)[0]["low"], expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_the_checksum_is_that_of_every_tensor():
    teacher = tiny_model("teacher")
    assert checksum(teacher) == checksum(tiny_model("teacher"))
    seen = {checksum(teacher)}
    for key, value in teacher.state_dict().items():
        value[(-1,) * value.dim()] += 1e-3 if value.is_floating_point() else 1
        seen.add(checksum(teacher))
    assert len(seen) == 1 + len(teacher.state_dict())
