"""Training steps and inference for benchmark.py: ours and torchvision's, as functions to time.

Run as a script, with "ours" or "peer": prints the megabytes that a step of that one takes at its peak.
"""

import gc
import math
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torchvision
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msad import align, distillation, models
from msad.engine import processes
from msad.engine.optimizer import build_optimizer, set_learning_rate
from msad.engine.run import check_finite
from msad.engine.settings import COCO
from msad.fusion import LOSS_WEIGHTS
from msad.images import pad_to_multiple
from msad.models import ModelConfig

HEIGHT, WIDTH, DEVICE = 512, 768, torch.device("cpu")  # benchmark_cuda.py sets its own
CLASSES = tuple({"id": k + 1, "name": str(k)} for k in range(80))


def config(kind, **changes):
    return ModelConfig(kind, CLASSES, short_side=HEIGHT, long_side=WIDTH, **changes)


def pictures(batch, low=False, scale=1.0, boxes=100):
    """uint8 images and, in pixels of the full size, boxes and labels."""
    torch.manual_seed(0)
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    sides = (-(-height // 2), -(-width // 2)) if low else (height, width)
    images = torch.randint(0, 256, (batch, 3, *sides), dtype=torch.uint8)
    corner = torch.rand(batch, boxes, 2) * torch.tensor([width / 2, height / 2])
    side = 8 * 32 ** torch.rand(batch, boxes, 2)  # 8 to 256 pixels, log-uniform
    boxes, labels = torch.cat([corner, corner + side], dim=2), torch.randint(0, 80, (batch, boxes))
    return images.to(DEVICE), list(boxes.to(DEVICE)), list(labels.to(DEVICE))


def make_update(model):
    """A function that does with a loss what both scripts do: backward, the look at its numbers, new weights."""
    settings = Namespace(**COCO)
    optimizer = build_optimizer(model, settings)

    def update(loss, read):
        optimizer.zero_grad()
        loss.backward()
        gradient = clip_grad_norm_(model.parameters(), settings.clip or math.inf)
        if read:
            check_finite(1, dict(zip(("loss", "gradient"), torch.stack([loss.detach(), gradient]).tolist())))
        set_learning_rate(optimizer, settings, 1)
        optimizer.step()

    return update


def our_step(kind, head="fcos", batch=2, precision="fp32", scale=1.0):
    """A training step as train.py makes it, from uint8 images to updated weights. With `read=False` it leaves out the
    look at its numbers, for which it waits for the device."""
    model = models.build(config(kind, head=head)).train()
    model.to(DEVICE, memory_format=processes.training_layout(DEVICE, precision))
    update = make_update(model)
    images, boxes, labels = pictures(batch, kind == "low", scale)
    padded, sizes = pad_to_multiple(list(images), model.multiple), [tuple(images.shape[-2:])] * batch
    autocast = processes.autocast(DEVICE, precision)

    def step(read=True):
        with autocast:
            pyramids, outputs = model(model.normalize(padded, sizes))
        losses = model.losses(pyramids, outputs, boxes, labels)
        update(sum(LOSS_WEIGHTS[branch] * value for branch, parts in losses.items() for value in parts.values()), read)

    return step


def our_distillation(head="fcos", batch=2, precision="fp32"):
    """A step as distill.py makes it: the frozen teacher's fused pyramid, the student forward and backward."""
    teacher = distillation.freeze(models.build(config("teacher", head=head)), precision).to(DEVICE)
    student = models.build(config("low", head=head)).train()
    student.to(DEVICE, memory_format=processes.training_layout(DEVICE, precision))
    update = make_update(student)
    images, boxes, labels = pictures(batch)
    padded, sizes = pad_to_multiple(list(images), teacher.multiple), [tuple(images.shape[-2:])] * batch
    autocast = processes.autocast(DEVICE, precision)

    def step(read=True):
        high = student.normalize(padded, sizes)
        with autocast:
            pyramids, outputs = student(align.downsample(high))
        losses = student.losses(pyramids, outputs, boxes, labels)
        with torch.no_grad(), autocast:
            fused = teacher.pyramids(high, ["fused"])["fused"]
        distance = distillation.pyramid_l1(pyramids["low"], fused)
        update(sum(losses["low"].values()) + distillation.WEIGHT * distance, read)

    return step


def our_inference(precision="fp32", network=False, **changes):
    """One low-resolution image to boxes, or with `network` to the head's outputs only."""
    model = models.build(config("low", **changes)).folded().to(DEVICE)
    image = pictures(1, low=True)[0][0]
    padded, autocast = pad_to_multiple([image], model.multiple), processes.autocast(DEVICE, precision)

    def run():
        with torch.no_grad(), autocast:
            if network:
                model.predict(model.pyramids(model.normalize(padded, [tuple(image.shape[-2:])])))
            else:
                model.detect([image], resize=False)

    return run


def peer(head="fcos"):
    """torchvision's detector. Its own resizing finds the images at their size already."""
    make = getattr(torchvision.models.detection, f"{head}_resnet50_fpn")
    model = make(weights=None, weights_backbone=None, num_classes=80, min_size=HEIGHT, max_size=WIDTH)
    return model.to(DEVICE)


def peer_step(head="fcos", batch=2, precision="fp32"):
    model = peer(head).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images, boxes, labels = pictures(batch)
    images = [image.float() / 255 for image in images]
    targets = [{"boxes": b, "labels": l} for b, l in zip(boxes, labels)]
    autocast = processes.autocast(DEVICE, precision)

    def step():
        with autocast:
            losses = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def peer_inference(head="fcos", precision="fp32"):
    model = peer(head).eval()
    image = pictures(1)[0][0].float() / 255
    autocast = processes.autocast(DEVICE, precision)

    def run():
        with torch.inference_mode(), autocast:
            model([image])

    return run


def gmacs(function):
    """10^9 multiply-accumulates of one call, counted by PyTorch."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2e9


def median(function, runs=7):
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def assignment(head):
    """Seconds of the assignment for a batch, and of the training step it is part of."""
    model = models.build(config("high", head=head))
    _, boxes, labels = pictures(2)
    sizes = [(HEIGHT // stride, WIDTH // stride) for stride in align.STRIDES]
    return median(lambda: model.head.assign(sizes, boxes, labels)), median(our_step("high", head), 3)


def postprocessing(head):
    """Seconds from outputs to detections, and of the inference they are part of. Every location that trains an object,
    of 100 in the image, finds it; the others find nothing."""
    model = models.build(config("low", head=head)).folded()
    images, boxes, labels = pictures(1, low=True)
    with torch.inference_mode():
        pyramids = model.pyramids(model.normalize(images, [images.shape[-2:]]))
        outputs = model.predict(pyramids)["low"]
        targets = model.head.assign(align.map_sizes(pyramids["low"]), boxes, labels)
        found = (targets["labels"] >= 0) & (targets["labels"] < len(CLASSES))
        outputs["logits"].fill_(-6.0)
        outputs["logits"][found, targets["labels"][found]] = 2.0
        regressed = "distances" if head == "fcos" else "deltas"
        outputs[regressed] = targets[regressed]
    sizes = [tuple(images.shape[-2:])]
    whole = (pyramids["low"], outputs, "low", sizes, [(HEIGHT, WIDTH)])
    finish = torch.inference_mode()(lambda: model.postprocess(*whole))
    assert len(finish()[0]["scores"]) > 50
    return median(finish), median(our_inference(head=head))


def peak_memory():
    """Megabytes at the peak of our teacher step and of torchvision's step, each in a process of its own."""
    return [float(subprocess.check_output([sys.executable, __file__, name])) for name in STEPS]


def peak():
    """Megabytes that this process has had at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


STEPS = {"ours": lambda: our_step("teacher"), "peer": peer_step}


def growth(large, small, share):
    """Seconds of a large step times `share`, the part of its work that a small step does, and of the small step."""
    large, small = our_step("high", **large), our_step("high", **small)
    times = [(median(large, 2), median(small, 2)) for _ in range(3)]
    a, b = (statistics.median(column) for column in zip(*times))
    return a * share, b


if __name__ == "__main__":
    make = STEPS[sys.argv[1]]
    gc.collect()
    before = peak()
    step = make()
    step(), step()
    print(peak() - before)
