"""The detectors: what reaches the network, pyramids to losses for every kind and head, and a head nobody has seen."""

from argparse import Namespace

import pytest
import torch
from folders import draw_rectangles
from helpers import tiny_config, tiny_model, total
from torch import nn

import msad
from msad import align, distillation, heads, models
from msad.data import annotations
from msad.data.dataset import CocoDataset
from msad.engine import checkpoint, evaluation, processes
from msad.engine.weights import copy_detector

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOXES = [torch.tensor([[10.0, 20, 60, 90], [30, 30, 45, 50]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.long)]


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_normalisation_and_padding_by_hand(kind):
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)  # not zero in the padding either
    images, sizes = pixels if kind == "uint8" else pixels / 255, [(64, 50), (3, 64)]
    before = images.clone()
    found = tiny_model("high").normalize(images, sizes)
    assert found.shape == pixels.shape and found.dtype == torch.float32 and images.equal(before)
    for n, c, y, x in [(0, 0, 0, 0), (0, 1, 63, 49), (0, 2, 63, 50), (1, 0, 2, 63), (1, 1, 3, 0), (1, 2, 63, 63)]:
        inside = y < sizes[n][0] and x < sizes[n][1]
        expected = (pixels[n, c, y, x].item() / 255 - MEAN[c]) / STD[c] if inside else 0
        assert found[n, c, y, x].item() == pytest.approx(expected, abs=1e-5)
    assert not found[0, :, :, 50:].any() and not found[1, :, 3:].any()


@pytest.mark.parametrize("kind, size, pad, padded", [
    ("high", (100, 150), 64, (128, 192)), ("high", (300, 90), 64, (256, 128)), ("high", (100, 150), 256, (256, 256)),
    ("low", (101, 203), 64, (64, 128)), ("low", (300, 90), 64, (128, 64)), ("low", (300, 90), 256, (128, 128)),
])  # fmt: skip
def test_images_are_resized_and_padded_to_what_the_model_is_made_for(kind, size, pad, padded):
    model = tiny_model(kind, pad=pad)
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


@pytest.mark.parametrize("kind", ["teacher", "conventional", "low"])
@torch.no_grad()
def test_predicting_all_branches_at_once_equals_the_head_on_each(kind):
    model = tiny_model(kind)
    pyramids, outputs = model(torch.randn(2, 3, 64, 128))
    assert outputs.keys() == pyramids.keys() == set(model.branches)
    for branch, maps in pyramids.items():
        alone = model.head(maps)
        assert outputs[branch].keys() == alone.keys() == {"logits", "distances", "centerness"}
        for key in alone:
            torch.testing.assert_close(outputs[branch][key], alone[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", models.HEADS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_every_model_trains_with_and_without_boxes_and_detects(kind, head):
    torch.manual_seed(0)
    model = models.build(tiny_config(kind, head=head, short_side=64, long_side=128)).train()
    parts = {"cls", "box", "centerness"} if head == "fcos" else {"cls", "box"}
    for boxes, labels in ((BOXES, LABELS), (BOXES[1:] * 2, LABELS[1:] * 2)):
        pyramids, outputs = model(torch.randn(2, 3, 64, 64) if kind == "low" else torch.randn(2, 3, 128, 128))
        losses = model.losses(pyramids, outputs, boxes, labels)
        assert losses.keys() == set(model.branches) and all(found.keys() == parts for found in losses.values())
        model.zero_grad()
        total(losses).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in model.parameters())
        if len(boxes[0]):
            assert all(value > 0 for found in losses.values() for value in found.values())
            halved = model.losses(pyramids, outputs, boxes, labels, average=lambda totals: 2 * totals)
            for branch, part in ((branch, part) for branch in losses for part in parts):
                torch.testing.assert_close(halved[branch][part], losses[branch][part] / 2)

    nn.init.constant_(model.head.cls_logits.bias, 0.0)  # so that there is something to find
    model.eval()
    for branch in model.branches:
        (found,) = model.detect([torch.rand(3, 30, 50)], branch)
        assert 0 < len(found["boxes"]) <= 100 and (found["scores"] > 0.05).all()
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([50.0, 30, 50, 30]) + 1e-3).all()


@torch.no_grad()
def test_the_conventional_low_branch_is_a_detector_of_half_the_image_in_its_own_pixels():
    both = tiny_model("conventional")
    alone = models.build(tiny_config("high")).eval()
    alone.load_state_dict(both.state_dict())
    images = torch.rand(2, 3, 128, 256)
    half = images.view(2, 3, 64, 2, 128, 2).mean((3, 5))
    losses = both.losses(*both(images), BOXES, LABELS)
    assert list(losses) == ["high", "low"]
    for branch, pixels, boxes in (("high", images, BOXES), ("low", half, [b / 2 for b in BOXES])):
        expected = alone.losses(*alone(pixels), boxes, LABELS)["high"]
        assert expected["box"] > 0 and losses[branch].keys() == expected.keys()
        for part, value in expected.items():
            torch.testing.assert_close(losses[branch][part], value, rtol=1e-4, atol=1e-5)

    (found,) = both.detect(images[:1], "low", resize=False)  # boxes are in the pixels of the image that was given
    (expected,) = alone.detect(half[:1], resize=False)
    assert len(found["scores"]) > 10
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["boxes"], expected["boxes"] * 2, rtol=1e-3, atol=1e-2)


def test_one_image_of_the_smallest_size_cannot_be_trained_on():
    with pytest.raises(ValueError) as caught:
        tiny_model("low").train()(torch.randn(1, 3, 32, 32))
    assert "one image of one cell is too little for BatchNorm" in processes.explain(caught.value)
    tiny_model("low").train()(torch.randn(2, 3, 32, 32)), tiny_model("low")(torch.randn(1, 3, 32, 32))
    frozen = tiny_model("low")
    processes.parallel(frozen, torch.device("cpu"), Namespace(norm="frozen", precision="fp32"))
    frozen(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["teacher", "conventional", "low"])
@torch.no_grad()
def test_the_memory_layout_changes_nothing(kind):
    model = tiny_model(kind)
    assert model.backbone.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.normalize(torch.rand(2, 3, 64, 64), []).is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 128, 192)
    _, last = model(images.contiguous(memory_format=torch.channels_last))
    _, first = model.to(memory_format=torch.contiguous_format)(images)
    assert model.normalize(images, []).is_contiguous()
    assert model.folded().normalize(images, []).is_contiguous(memory_format=torch.channels_last)
    for branch in model.branches:
        for key in ("logits", "distances", "centerness"):
            torch.testing.assert_close(last[branch][key], first[branch][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, backbone", [("teacher", "resnet18"), ("conventional", "resnet50"), ("low", "resnet50")])
def test_folding_batchnorm_changes_nothing_but_the_work(kind, backbone):
    batchnorm = nn.modules.batchnorm._BatchNorm
    model = tiny_model(kind, backbone=backbone)
    if kind == "teacher":  # as of a run on several GPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
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
        for key in ("logits", "distances", "centerness"):
            torch.testing.assert_close(outputs[branch][key], expected_outputs[branch][key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_weights_cast_once_give_what_autocast_gives_to_the_bit(head):
    model = tiny_model("teacher", head=head)
    images = torch.randn(2, 3, 128, 192)
    once = model.folded("bf16")
    weights = [module.weight for module in once.modules() if isinstance(module, nn.Conv2d)]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert distillation.freeze(model, "bf16").fpn.p6.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (pyramids, outputs), (expected, expected_outputs) = once(images), model.folded()(images)
    assert all(found.equal(wanted) for found, wanted in zip(pyramids["fused"], expected["fused"], strict=True))
    assert all(outputs["fused"][name].equal(value) for name, value in expected_outputs["fused"].items())


@pytest.mark.parametrize("kind, head", [("teacher", "fcos"), ("conventional", "fcos"), ("low", "retinanet")])
@torch.no_grad()
def test_a_network_compiles_without_a_break_and_once_for_all_sizes(kind, head):
    model, graphs = tiny_model(kind, head=head), []
    sizes = [(384, 512), (576, 448)] if kind != "conventional" else [(128, 192)]  # a graph of two branches takes long
    backend = lambda graph, inputs: graphs.append(graph) or graph
    compiled = torch.compile(model, fullgraph=True, dynamic=len(sizes) > 1, backend=backend)
    for size in sizes:
        images = torch.randn(2, 3, *size)
        for branch, expected in model(images)[1].items():
            torch.testing.assert_close(compiled(images)[1][branch], expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


class CenterHead(nn.Module):
    """Finds an object at the cell of its centre, on the finest level only, as a square of 16 pixels."""

    anchors = 1
    nms_threshold = 0.5
    channel_multiple = 1

    def __init__(self, in_channels, classes, channels, convs, object_scale=1.0):
        super().__init__()
        self.classes = classes
        self.output = nn.Conv2d(in_channels, classes, 1)

    def forward(self, pyramid):
        return {"logits": torch.cat([heads.flatten_cells(self.output(level), self.classes) for level in pyramid], 1)}

    def assign(self, sizes, boxes, labels):
        learned = torch.full((len(boxes), len(align.cells(sizes)[0])), self.classes)
        for i, (b, l) in enumerate(zip(boxes, labels)):
            x, y = (b[:, :2] + b[:, 2:]).div(16).long().unbind(1)
            learned[i, y.clamp(max=sizes[0][0] - 1) * sizes[0][1] + x.clamp(max=sizes[0][1] - 1)] = l
        hot = (learned[..., None] == torch.arange(self.classes)).float()
        return {"labels": learned, "hot": hot, "totals": hot.sum()[None]}

    def losses(self, outputs, targets):
        cls = nn.functional.binary_cross_entropy_with_logits(outputs["logits"], targets["hot"], reduction="none")
        return {"cls": cls.sum() / targets["totals"][0]}

    def decode(self, outputs, sizes, where):
        scores, corners = outputs["logits"].sigmoid(), align.cells(sizes)[0][where]
        return torch.cat([corners - 4, corners + 12], -1), torch.where(scores > 0.05, scores, 0.0)


def test_a_head_that_only_the_table_of_heads_knows_works_everywhere(tmp_path, monkeypatch):
    monkeypatch.setitem(models.HEADS, "center", CenterHead)
    torch.manual_seed(0)
    teacher, baseline, student = (
        models.build(tiny_config(kind, head="center")) for kind in ("teacher", "conventional", "low")
    )
    assert copy_detector(student, teacher).endswith("new 0")
    images, frozen = torch.randn(2, 3, 128, 192), distillation.freeze(teacher)
    fused = frozen.pyramids(images, ["fused"])["fused"]
    for model in (teacher, baseline, student):
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(20):
            pyramids, outputs = model(align.downsample(images) if model is student else images)
            loss = total(model.losses(pyramids, outputs, [BOXES[0][:1]] * 2, [LABELS[0][:1]] * 2))
            if model is student:
                loss = loss + distillation.WEIGHT * distillation.pyramid_l1(pyramids["low"], fused)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert found[-1] < found[0] / 2

    checkpoint.save(tmp_path / "student.pt", student)
    loaded = msad.load(tmp_path / "student.pt")
    read = annotations.read(draw_rectangles(tmp_path / "data", {"val": 3}), "val")
    ((metrics, detections),) = evaluation.evaluate(loaded, CocoDataset(read, (128,), 256, "area"), ["low"], 2).values()
    assert 0 <= metrics["AP"] <= 1 and any(len(d["scores"]) for _, d in detections)
