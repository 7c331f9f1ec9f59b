"""What an application hands to `detect` and does with what it gets: forms of pictures, refusals that name what came,
results to be changed, models of other precisions and folded ones, large pictures."""

import copy

import numpy as np
import pytest
import torch
from helpers import LargestFloats, tiny_model
from PIL import Image
from test_detect import same_detections

from msad.engine import checkpoint
from msad.data.errors import InputError
from msad.data.reading import read_image

PIXELS = {size: np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((50, 60), (200, 300))}
SMALL = PIXELS[50, 60]
READERS = {
    "high": tiny_model("high"), "low": tiny_model("low"), "low, nearest": tiny_model("low", downsample="nearest"),
    "teacher": tiny_model("teacher"), "conventional": tiny_model("conventional"),
}  # fmt: skip


def same(one, other):
    """Two lists of detections are equal to the bit."""
    return len(one) == len(other) and all(
        a[key].equal(b[key]) for a, b in zip(one, other) for key in ("boxes", "scores", "labels")
    )


def input_of(model, pictures):
    """What the network of a model reads of pictures: its backbone's first input."""
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    model.detect(pictures)
    hook.remove()
    return seen[0]


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
    exact = input_of(model, floats[0])
    step = 1 / 255 / 0.224  # one grey level, normalised
    assert (input_of(model, bytes_[0]) - exact).abs().max() <= 1.01 * step
    for form in floats:
        assert (input_of(model, form) - exact).abs().max() <= 0.02 * step
    for form in coarse:
        assert (input_of(model, form) - exact).abs().max() <= 0.6 * step


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
REFUSED = {  # what came, and how it is called
    "0 to 255": (ROW * 255, "a Tensor (3, 50, 60) of torch.float32 from 0 to 255: a picture's floats are in 0-1"),
    "0 to 255, NumPy": (SMALL * 1.0, "a ndarray (50, 60, 3) of float64 from 0 to 255: a picture's floats are in 0-1"),
    "normalised": (ROW * 4 - 2, "from -2 to 2: a picture's floats are in 0-1"),
    "a little dark": (ROW - 0.02, "from -0.02 to 0.98: a picture's floats are in 0-1"),
    "a little bright": (ROW + 0.02, "from 0.02 to 1.02: a picture's floats are in 0-1"),
    "one pixel not a number": (torch.where(ROW == 1, torch.nan, ROW), "from nan to nan: a picture's floats"),
    "int64": (torch.from_numpy(SMALL).permute(2, 0, 1).long(), "a Tensor (3, 50, 60) of torch.int64 is no picture"),
    "16 bits": (SMALL.astype(np.uint16), "a ndarray (50, 60, 3) of uint16 is no picture"),
    "extended precision": (SMALL / np.longdouble(255), "a ndarray (50, 60, 3) of "),
    "nothing": (None, "a NoneType is no picture"),
    "a number, PyTorch": (torch.tensor(3.0), "a Tensor () of torch.float32 is no picture"),
    "a mask": (SMALL > 9, "a ndarray (50, 60, 3) of bool is no picture"),
    "a tensor (h,w,3)": (ROW.permute(1, 2, 0), "a Tensor (50, 60, 3) of torch.float32 is no picture"),
    "a tensor (h,w)": (ROW[0], "a Tensor (50, 60) of torch.float32 is no picture"),
    "an array (3,h,w)": (ROW.numpy(), "a ndarray (3, 50, 60) of float32 is no picture"),
    "RGBA (h,w,4)": (np.dstack([SMALL, SMALL[..., :1]]), "a ndarray (50, 60, 4) of uint8 is no picture"),
    "a batch in a list": ([ROW[None]], "a Tensor (1, 3, 50, 60) of torch.float32 is no picture"),
    "no columns": (SMALL[:, :0], "a ndarray (50, 0, 3) of uint8 is no picture"),
    "file names": (["a.png"], "a str is no picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused_with_what_came_and_what_is_wanted(case):
    came, expected = REFUSED[case]
    good = torch.rand(3, 40, 40)
    for pictures in (came, [good, *(came if isinstance(came, list) else [came])]):
        with pytest.raises(ValueError) as caught:
            READERS["low"].detect(pictures)
        message = str(caught.value)
        assert expected in message and "\n" not in message and len(message) < 300
        wanted = "wanted is a PIL image, an array (h,w,3) or (h,w), or a tensor (3,h,w) or (1,h,w)"
        assert wanted in message or "(divide by 255?)" in message


def test_results_are_the_caller_s_to_change():
    model = READERS["teacher"]
    first, second = model.detect([SMALL, SMALL])
    kept = {key: value.clone() for key, value in second.items()}
    assert len(first["boxes"]) > 20 and not any(value.is_inference() or value.requires_grad for value in first.values())
    first["boxes"][:, 2:] -= first["boxes"][:, :2]
    first["boxes"].mul_(2)
    first["scores"].clamp_(max=0.5)
    first["labels"] += 1
    assert all(second[key].equal(kept[key]) for key in kept), "another picture's are its own"
    assert same(model.detect([SMALL, SMALL]), [kept, kept])
    weight = torch.ones(1, requires_grad=True)
    (weight * second["scores"]).sum().backward()
    assert weight.grad.item() == pytest.approx(second["scores"].sum().item(), rel=1e-5)


def test_a_folded_model_detects_and_is_not_saved(tmp_path):
    model = tiny_model("teacher")
    folded, path = model.folded(), tmp_path / "model.pt"
    expected, found = model.detect(SMALL)[0], folded.detect(SMALL)[0]
    torch.testing.assert_close(found["scores"][:10], expected["scores"][:10], rtol=1e-3, atol=1e-4)
    checkpoint.save(path, model)
    before = path.read_bytes()
    for other in (folded, copy.deepcopy(folded)):
        with pytest.raises(InputError, match="a folded model, .* cannot be saved; save the one it was made from"):
            checkpoint.save(path, other)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert same(checkpoint.load(path).detect(SMALL), [expected]), "folding leaves the model as it was"


@pytest.mark.parametrize("reader", READERS)
def test_a_large_picture_is_not_turned_into_floats_before_it_is_reduced(reader):
    array = np.random.default_rng(0).integers(0, 256, (1000, 1200, 3), np.uint8)
    model, grey = READERS[reader], np.ascontiguousarray(array[..., 0])
    for form in (array, torch.from_numpy(array).permute(2, 0, 1), Image.fromarray(array), grey, Image.fromarray(grey)):
        with LargestFloats() as noted:
            model.detect(form)
        assert 10_000 < noted.largest < array.size / 10
    with LargestFloats() as noted:
        model.detect(torch.from_numpy(array).permute(2, 0, 1) / 255)
    assert noted.largest >= array.size, "the noting itself works"
