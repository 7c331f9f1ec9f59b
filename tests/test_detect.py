"""From pictures to detections in each picture's own pixels, for every kind of model and branch; and
what an application hands to `detect`: pictures in every form, refusals that name what came."""

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from PIL import Image

from msad import models
from msad.data.reading import read_image
from msad.engine.weights import copy_detector

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
        self.found = {"boxes": torch.tensor([[place]]).float(), "logits": torch.tensor([[[-9.0, 5.0, -9.0]]])}

    def forward(self, pyramid):
        return {name: x.expand(len(pyramid[0]), 1, -1) for name, x in self.found.items()}

    def decode(self, outputs, sizes, where):
        return outputs["boxes"], torch.where(outputs["logits"] > 0, 0.75, 0.0)


def plant(kind, branch):
    """A model that finds a box at (16, 32, 96, 64) in H's pixels. Only the conventional low branch decodes to L's."""
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
    # Their heights and widths in H; of 127 rows (the long side is the limit) a low model reads 64.
    sizes = [(128, 192), (128, 192), (128 if kind == "low" else 127, 256), (192, 128)]
    for image, size, detections in zip(images, sizes, plant(kind, branch).detect(images, branch), strict=True):
        rows, columns = (side / network for side, network in zip(image.shape[1:], size))
        box = [16 * columns, 32 * rows, 96 * columns, 64 * rows]
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
@pytest.mark.parametrize("kind, branch", [KINDS_AND_BRANCHES[i] for i in (1, 2, 6)])
def test_together_equals_one_by_one(kind, branch, resize):
    torch.manual_seed(1)
    model, sizes = tiny_model(kind), [(128, 192), (120, 180), (200, 130), (70, 128), (128, 192), (128, 129)]
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
    copy_detector(student, teacher)
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


def test_the_branch_must_be_the_model_s_and_the_model_in_eval_mode():
    model = tiny_model("conventional")
    with pytest.raises(ValueError, match="conventional has no branch 'fused'"):
        model.detect(torch.rand(3, 64, 64), "fused")
    before = model.backbone.bn1.running_mean.clone()
    with pytest.raises(RuntimeError, match="eval"):
        model.train().detect(torch.rand(3, 64, 64))
    assert before.equal(model.backbone.bn1.running_mean)


# What an application hands to `detect`.

PIXELS = {size: np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((50, 60), (200, 300))}
SMALL = PIXELS[50, 60]
READERS = {
    "high": tiny_model("high"), "low": tiny_model("low"), "low, nearest": tiny_model("low", downsample="nearest"),
    "teacher": tiny_model("teacher"), "conventional": tiny_model("conventional"),
}  # fmt: skip


def same(one, other):
    """Two lists of detections are equal to the bit."""
    return len(one) == len(other) and all(a[key].equal(b[key]) for a, b in zip(one, other) for key in a)


def inputs_of(model, pictures):
    """What the network of a model reads of each picture: its backbone's first input."""
    for picture in pictures:
        seen = []
        hook = model.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
        model.detect(picture)
        hook.remove()
        yield seen[0]


@pytest.mark.parametrize("size", PIXELS)
@pytest.mark.parametrize("reader", READERS)
def test_every_form_of_a_picture_is_read_alike_by_every_model(reader, size):
    """Enlarged and reduced. 8-bit forms are rounded once more than floats are, in resizing."""
    model, array = READERS[reader], PIXELS[size]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    bytes_ = [tensor, tensor.contiguous(), array, np.asfortranarray(array), array[::-1][::-1], Image.fromarray(array)]
    # A hair beyond 0 and 1 is rounding.
    floats = [tensor / 255, tensor.double() / 255, array / 255, array / 254.99 - 2e-5, (array / 255).astype(">f4")]
    floats += [(tensor / 255).requires_grad_()]
    coarse = [(tensor / 255).half(), (tensor / 255).bfloat16(), (array / 255).astype(np.float16)]
    wanted = model.detect(bytes_[0]), model.detect(floats[0])
    assert min(len(found[0]["scores"]) for found in wanted) > 20
    for forms, expected in ((bytes_, wanted[0]), (floats[-1:], wanted[1])):
        for form in forms:
            assert same(model.detect(form), expected), (type(form), form.dtype if hasattr(form, "dtype") else "")
    exact, *others = inputs_of(model, [floats[0], bytes_[0], *floats, *coarse])
    step = 1 / 255 / 0.224  # one grey level, normalised
    for found, share in zip(others, [1.01, *[0.02] * len(floats), *[0.6] * len(coarse)], strict=True):
        assert (found - exact).abs().max() <= share * step


def test_one_picture_several_and_whole_batches():
    model, tensor = READERS["low"], torch.from_numpy(SMALL).permute(2, 0, 1)
    (one,), other = model.detect(tensor), torch.rand(3, 90, 40)
    pair = torch.stack([tensor, tensor])
    for two in ((SMALL, tensor), pair, pair.numpy().transpose(0, 2, 3, 1), iter([SMALL, SMALL])):
        same_detections(model.detect(two), [one, one])
    mixed = model.detect([SMALL, other, Image.fromarray(SMALL), other.double().numpy().transpose(1, 2, 0)])
    same_detections(mixed, [one, *model.detect(other)] * 2)
    floats = torch.rand(3, *tensor.shape[1:])  # of one size with bytes, but in no batch with them
    same_detections(model.detect([tensor, floats]), [one, *model.detect(floats)])
    grey = tensor[:1]
    same_detections(model.detect(torch.stack([grey, grey])), 2 * model.detect(SMALL[..., 0]))
    for nothing in ([], torch.zeros(0, 3, 40, 40), np.zeros((0, 40, 40, 3), np.uint8), iter([])):
        assert model.detect(nothing) == []


WIDE = np.random.default_rng(0).integers(0, 256, (50, 60))
MODES = {
    "RGBA": Image.fromarray(SMALL).convert("RGBA"), "P": Image.fromarray(SMALL).quantize(20),
    "I;16": Image.fromarray((WIDE * 16).astype(np.uint16)), "F": Image.fromarray((WIDE / 255).astype(np.float32)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_pil_image_is_read_as_its_file_is(tmp_path, mode):
    assert MODES[mode].mode == mode
    MODES[mode].save(tmp_path / "a.tif")
    model = READERS["low"]
    expected = model.detect(read_image(tmp_path / "a.tif"))
    assert same(model.detect(MODES[mode]), expected) and same(model.detect([MODES[mode]]), expected)
    assert len(expected[0]["scores"]) > 20


ROW = torch.linspace(0, 1, 60).expand(3, 50, 60)
RANGE = ": a picture's floats are in 0-1"
REFUSED = [  # what came, and how it is called
    (ROW * 255, "a Tensor (3, 50, 60) of torch.float32 from 0 to 255" + RANGE),
    (ROW + 0.02, "from 0.02 to 1.02" + RANGE),
    (torch.where(ROW == 1, torch.nan, ROW), "from nan to nan" + RANGE),
    (torch.from_numpy(SMALL).permute(2, 0, 1).long(), "a Tensor (3, 50, 60) of torch.int64 is no picture"),
    (None, "a NoneType is no picture"),
    (SMALL > 9, "a ndarray (50, 60, 3) of bool is no picture"),
    (ROW.permute(1, 2, 0), "a Tensor (50, 60, 3) of torch.float32 is no picture"),
    (ROW.numpy(), "a ndarray (3, 50, 60) of float32 is no picture"),
    (np.dstack([SMALL, SMALL[..., :1]]), "a ndarray (50, 60, 4) of uint8 is no picture"),
    ([ROW[None]], "a Tensor (1, 3, 50, 60) of torch.float32 is no picture"),
    (SMALL[:, :0], "a ndarray (50, 0, 3) of uint8 is no picture"),
    (["a.png"], "a str is no picture"),
]


@pytest.mark.parametrize("came, expected", REFUSED, ids=[expected for _, expected in REFUSED])
def test_what_is_no_picture_is_refused_with_what_came_and_what_is_wanted(came, expected):
    good = torch.rand(3, 40, 40)
    for pictures in (came, [good, *(came if isinstance(came, list) else [came])]):
        with pytest.raises(ValueError) as caught:
            READERS["low"].detect(pictures)
        message = str(caught.value)
        assert expected in message and "\n" not in message and len(message) < 300
        wanted = "wanted is a PIL image, an array (h,w,3) or (h,w), or a tensor (3,h,w) or (1,h,w)"
        assert wanted in message or "(divide by 255?)" in message


def test_a_folded_copy_detects_and_leaves_the_model_as_it_was():
    model = tiny_model("teacher")
    folded, expected = model.folded(), model.detect(SMALL)[0]
    torch.testing.assert_close(folded.detect(SMALL)[0]["scores"][:10], expected["scores"][:10], rtol=1e-3, atol=1e-4)
    assert same(model.detect(SMALL), [expected])
