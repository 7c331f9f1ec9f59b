"""How fast this is beside torchvision's detectors at the same work: python tests/benchmark.py [--json FILE]

Every row measures ours and its peer in turn in one process and compares medians. ResNet-50, 256 channels, 80 classes,
512x768, all layers training, unless the row says otherwise. Run it on a machine that does nothing else.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msad import align, checkpoint, cost, distillation, training
from msad.detector import ModelConfig

HEIGHT, WIDTH = 512, 768
CLASSES = tuple({"id": k + 1, "name": str(k)} for k in range(80))
WEIGHT = {"high": 1.0, "low": 1.0, "fused": 0.4}


def config(kind, **changes):
    return ModelConfig(kind, CLASSES, short_side=HEIGHT, long_side=WIDTH, **changes)


def pictures(batch, low=False):
    """uint8 images and, in pixels of the full size, 10 boxes each."""
    torch.manual_seed(0)
    scale = 2 if low else 1
    images = torch.randint(0, 256, (batch, 3, HEIGHT // scale, WIDTH // scale), dtype=torch.uint8)
    corner = torch.rand(batch, 10, 2) * torch.tensor([WIDTH / 2, HEIGHT / 2])
    boxes = torch.cat([corner, corner + 16 + torch.rand(batch, 10, 2) * 200], dim=2)
    return images, list(boxes), list(torch.randint(0, 80, (batch, 10)))


def our_step(kind, head="fcos", batch=2, precision="fp32"):
    """A training step of a teacher or of one resolution, from uint8 images to updated weights."""
    model = checkpoint.build(config(kind, head=head)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    images, boxes, labels = pictures(batch, kind == "low")
    autocast = training.autocast_for(torch.device("cpu"), precision)

    def step():
        with autocast():
            _, outputs = model(model.normalize(images, [tuple(images.shape[-2:])] * batch))
        losses = model.losses(outputs, boxes, labels)
        optimizer.zero_grad(set_to_none=True)
        sum(WEIGHT[name.split("/")[0]] * value for name, value in losses.items()).backward()
        optimizer.step()

    return step


def our_distillation(batch=2, precision="fp32"):
    """A distillation step: the frozen teacher's fused pyramid, the student forward and backward."""
    teacher = distillation.freeze(checkpoint.build(config("teacher")))
    student = checkpoint.build(config("low")).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, fused=True)
    images, boxes, labels = pictures(batch)
    autocast = training.autocast_for(torch.device("cpu"), precision)

    def step():
        high = student.normalize(images, [(HEIGHT, WIDTH)] * batch)
        with autocast():
            pyramids, outputs = student(align.downsample(high))
            with torch.no_grad():
                fused = teacher.pyramids(high, ["fused"])["fused"]
        losses = student.losses(outputs, boxes, labels)
        optimizer.zero_grad(set_to_none=True)
        (sum(losses.values()) + 0.6 * distillation.pyramid_l1(pyramids["low"], fused)).backward()
        optimizer.step()

    return step


def our_inference(precision="fp32", **changes):
    """One low-resolution image to boxes."""
    model = checkpoint.build(config("low", **changes)).eval()
    images, _, _ = pictures(1, low=True)
    autocast = training.autocast_for(torch.device("cpu"), precision)

    def step():
        with autocast():
            model.detect([images[0].float() / 255], resize=False)

    return step


def peer(head="fcos"):
    make = {"fcos": "fcos_resnet50_fpn", "retinanet": "retinanet_resnet50_fpn"}[head]
    model = getattr(torchvision.models.detection, make)
    return model(weights=None, weights_backbone=None, num_classes=80, min_size=HEIGHT, max_size=WIDTH)


def peer_step(head="fcos", batch=2):
    model = peer(head).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images, boxes, labels = pictures(batch)
    images = [image.float() / 255 for image in images]
    targets = [{"boxes": b, "labels": l} for b, l in zip(boxes, labels)]

    def step():
        losses = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def peer_inference():
    model = peer().eval()
    images, _, _ = pictures(1)
    images = [image.float() / 255 for image in images]

    def step():
        with torch.inference_mode():
            model(images)

    return step


ROWS = (
    ("fp32 step, high, FCOS", lambda: our_step("high"), peer_step, 0.80),
    ("fp32 step, high, RetinaNet", lambda: our_step("high", "retinanet"), lambda: peer_step("retinanet"), 0.80),
    ("fp32 teacher step", lambda: our_step("teacher"), peer_step, 1.75),
    ("fp32 distillation step", our_distillation, peer_step, 0.70),
    ("fp32 inference, student", our_inference, peer_inference, 0.60),
    ("fp32 inference, slim student", lambda: our_inference(head_channels=128), peer_inference, 0.30),
    ("bf16 / fp32 teacher step", lambda: our_step("teacher", precision="bf16"), lambda: our_step("teacher"), 0.45),
    ("bf16 / fp32 inference, student", lambda: our_inference("bf16"), our_inference, 0.45),
)


def alternate(ours, theirs, runs):
    """Median seconds of two functions called in turn, after one call each that does not count."""
    times = ([], [])
    for run in range(runs + 1):
        for function, list_ in zip((ours, theirs), times):
            began = time.perf_counter()
            function()
            list_.append(time.perf_counter() - began)
    return [statistics.median(list_[1:]) for list_ in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    results = []
    print(f"{'what':34} {'ours s':>8} {'peer s':>8} {'ratio':>6} {'limit':>6}")
    for name, ours, theirs, limit in ROWS:
        if args.only in name:
            a, b = alternate(ours(), theirs(), args.runs)
            results.append({"name": name, "ours": a, "peer": b, "ratio": a / b, "limit": limit})
            print(f"{name:34} {a:8.3f} {b:8.3f} {a / b:6.2f} {limit:6.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
