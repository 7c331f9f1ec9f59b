"""A head that nobody has seen before works everywhere: only the table of heads has to know it."""

import torch
from folders import draw_rectangles
from helpers import tiny_config
from torch import nn

import msad
from msad import align, annotations, boxes as box_ops, checkpoint, detector, distillation, evaluation, models
from msad.data import CocoDataset
from msad.dense import flatten_cells


class CenterHead(nn.Module):
    """Finds an object at the cell of its centre, on the finest level only."""

    anchors = 1
    nms_threshold = 0.5
    channel_multiple = 1

    def __init__(self, in_channels, classes, channels, convs, object_scale=1.0):
        super().__init__()
        self.classes = classes
        self.output = nn.Conv2d(in_channels, classes + 4, 1)

    def forward(self, pyramid):
        x = torch.cat([flatten_cells(self.output(level), self.classes + 4) for level in pyramid], 1).float()
        sizes = [tuple(level.shape[-2:]) for level in pyramid]
        return {"logits": x[..., : self.classes], "boxes": x[..., self.classes :].exp(), "sizes": sizes}

    def assign(self, sizes, boxes, labels):
        corners, _ = align.grid(sizes)
        hot, near = torch.zeros(len(boxes), len(corners), self.classes), torch.ones(len(boxes), len(corners), 4)
        for i, (b, l) in enumerate(zip(boxes, labels)):
            x, y = (b[:, :2] + b[:, 2:]).div(16).long().unbind(1)
            cells = y.clamp(max=sizes[0][0] - 1) * sizes[0][1] + x.clamp(max=sizes[0][1] - 1)
            hot[i, cells, l] = 1
            near[i, cells] = box_ops.xyxy_to_ltrb(corners[cells] + 4, b).clamp(min=1) / 8
        return {"hot": hot, "near": near}

    def losses(self, outputs, targets):
        box = (outputs["boxes"] - targets["near"]).abs().mean(-1) * targets["hot"].amax(-1)
        cls = nn.functional.binary_cross_entropy_with_logits(outputs["logits"], targets["hot"], reduction="none")
        return {"cls": cls.sum() / targets["hot"].sum(), "box": box.sum() / targets["hot"].sum()}

    def decode(self, outputs, where):
        corners = align.grid(outputs["sizes"])[0][where]
        scores = outputs["logits"].sigmoid()
        return box_ops.ltrb_to_xyxy(corners + 4, outputs["boxes"] * 8), torch.where(scores > 0.05, scores, 0.0)


def test_teacher_student_baseline_files_and_evaluation_take_any_head(tmp_path, monkeypatch):
    monkeypatch.setitem(detector.HEADS, "center", CenterHead)
    torch.manual_seed(0)
    teacher = models.build(tiny_config("teacher", head="center"))
    student = models.build(tiny_config("low", head="center"))
    assert distillation.start_from(student, teacher).endswith("new nothing")
    images = torch.randn(2, 3, 128, 128)
    boxes, labels = [torch.tensor([[20.0, 30, 60, 70]])] * 2, [torch.tensor([1])] * 2

    for model in (teacher, models.build(tiny_config("conventional", head="center"))):
        _, outputs = model(images)
        losses = model.losses(outputs, boxes, labels)
        assert set(losses) == {f"{branch}/{part}" for branch in model.branches for part in ("cls", "box")}
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.head.parameters())

    frozen, optimizer = distillation.freeze(teacher), torch.optim.AdamW(student.parameters(), lr=3e-3)
    first = None
    for _ in range(30):
        pyramids, outputs = student(align.downsample(images))
        kd = distillation.pyramid_l1(pyramids["low"], frozen.pyramids(images, ["fused"])["fused"])
        loss = sum(student.losses(outputs, boxes, labels).values()) + 0.6 * kd
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first / 2

    checkpoint.save(tmp_path / "student.pt", student)
    loaded = msad.load(tmp_path / "student.pt")
    found = annotations.read(draw_rectangles(tmp_path / "data", {"val": 3}), "val")
    results = evaluation.evaluate(loaded, CocoDataset(found, (128,), 256, "area"), ["low"], batch=2)
    assert 0 <= results["low"][0]["AP"] <= 1 and any(len(d["scores"]) for _, d in results["low"][1])
