"""What reaches the network, in which memory layout, and models that go through a file."""

import pytest
import torch
from helpers import tiny_model

import msad
from msad import checkpoint, models
from msad.annotations import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_normalisation_and_padding_by_hand(kind):
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)  # not zero in the padding either
    sizes = [(64, 50), (3, 64)]
    found = tiny_model("high").normalize(pixels if kind == "uint8" else pixels / 255, sizes)
    assert found.shape == pixels.shape and found.dtype == torch.float32
    for n, c, y, x in [(0, 0, 0, 0), (0, 1, 63, 49), (0, 2, 63, 50), (1, 0, 2, 63), (1, 1, 3, 0), (1, 2, 63, 63)]:
        inside = y < sizes[n][0] and x < sizes[n][1]
        expected = (pixels[n, c, y, x].item() / 255 - MEAN[c]) / STD[c] if inside else 0
        assert found[n, c, y, x].item() == pytest.approx(expected, abs=1e-5)
    assert not found[0, :, :, 50:].any() and not found[1, :, 3:].any()


@pytest.mark.parametrize(
    "kind, size, padded",
    [("high", (128, 192), (128, 192)), ("high", (100, 150), (128, 192)), ("high", (300, 90), (256, 128)),
     ("low", (128, 192), (64, 96)), ("low", (101, 203), (64, 128)), ("low", (300, 90), (128, 64))],
)  # fmt: skip
def test_images_are_resized_and_padded_to_what_the_model_is_made_for(kind, size, padded):
    model = tiny_model(kind)
    inputs = []
    model.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    image = torch.tensor(MEAN).view(3, 1, 1).expand(3, *size) + torch.tensor(STD).view(3, 1, 1)
    model.detect([image])
    assert [tuple(x.shape) for x in inputs] == [(1, 3, *padded)]
    high = (128, size[1] * 128 // size[0]) if size[0] < size[1] else (256, 90 * 256 // 300)
    if size == (101, 203):
        high = (101 * 256 // 203, 256)
    height, width = high if kind == "high" else (-(-high[0] // 2), -(-high[1] // 2))
    expected = torch.zeros(padded)
    expected[:height, :width] = 1  # one standard deviation above the mean, and the mean in the padding
    torch.testing.assert_close(inputs[0], expected.expand(1, 3, -1, -1), rtol=0, atol=1e-4)


def test_the_multiple_of_the_padding_is_a_setting():
    for pad, expected in ((64, (128, 192)), (256, (256, 256))):
        assert tiny_model("teacher", pad=pad).padded_size((128, 180)) == expected
        assert tiny_model("low", pad=pad).padded_size((64, 90)) == tuple(side // 2 for side in expected)


@pytest.mark.parametrize("kind", ["teacher", "conventional", "low"])
def test_the_memory_layout_changes_nothing(kind):
    model = tiny_model(kind)
    assert model.backbone.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        _, last = model(images.contiguous(memory_format=torch.channels_last))
        _, first = model.to(memory_format=torch.contiguous_format)(images)
    for branch in model.branches:
        for key in ("logits", "boxes", "centerness"):
            torch.testing.assert_close(last[branch][key], first[branch][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, backbone", [("teacher", "resnet18"), ("conventional", "resnet50"), ("low", "resnet50")])
def test_folding_batchnorm_changes_nothing_but_the_work(kind, backbone):
    batchnorm = torch.nn.modules.batchnorm._BatchNorm
    model = tiny_model(kind, backbone=backbone)
    if kind == "teacher":  # as of a run on several GPUs
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    folded = model.train().folded()
    assert model.training and any(isinstance(module, batchnorm) for module in model.modules())
    model.eval()
    assert not any(isinstance(module, batchnorm) for module in folded.modules()) and not folded.training
    assert folded.backbone.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        (pyramids, outputs), (expected, expected_outputs) = folded(images), model(images)
    for branch in model.branches:
        for level, wanted in zip(pyramids[branch], expected[branch], strict=True):
            assert (level - wanted).abs().max() < 1e-4 * wanted.abs().max()
        for key in ("logits", "boxes", "centerness"):
            torch.testing.assert_close(outputs[branch][key], expected_outputs[branch][key], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_several_branches_at_once_equal_each_alone():
    model = tiny_model("teacher")
    image = torch.rand(3, 128, 192)
    found = model.detect_batch(image[None], [(128, 192)], [(256, 384)], ["low", "fused"])
    assert list(found) == ["low", "fused"]
    for branch, detections in found.items():
        (expected,) = model.detect([image], branch, resize=False)
        assert len(expected["scores"]) > 10 and len(detections) == 1
        torch.testing.assert_close(detections[0]["scores"], expected["scores"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(detections[0]["boxes"], expected["boxes"] * 2, rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("kind", models.KINDS)
def test_a_model_comes_back_from_its_file_as_it_was(kind, tmp_path):
    model = tiny_model(kind, width=0.5, head_convs=2)
    checkpoint.save(tmp_path / "model.pt", model.train())
    loaded = msad.load(tmp_path / "model.pt")
    assert type(loaded) is type(model) and loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    images = [torch.rand(3, 128, 192), torch.rand(3, 90, 80)]
    for branch in model.branches:
        for found, expected in zip(loaded.detect(images, branch), model.eval().detect(images, branch), strict=True):
            assert len(expected["scores"]) > 0 and all(torch.equal(found[key], expected[key]) for key in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("fault", ["another width", "a tensor less", "a tensor more"])
def test_a_model_that_does_not_fit_its_description_is_refused(fault, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, tiny_model("low"))
    content = torch.load(path, weights_only=True)
    if fault == "another width":
        content["config"]["width"] = 0.5
    elif fault == "a tensor less":
        del content["model"]["fpn.p6.bias"]
    else:
        content["model"]["fusion.squeeze.weight"] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(InputError, match="do not fit"):
        msad.load(path)
