"""Milliseconds an exported student takes for a picture on this CPU: benchmark.py --only export

The student reads 400x672, ResNet-50, 80 classes, FCOS; slim is 128 channels in the head instead of 256. Its peer is
torchvision's FCOS, eager, in fp32, at 800x1344. All forms of the network are measured in turns with it, from 8-bit
pixels to what NMS keeps; the networks are untrained and find nothing, so NMS costs neither anything. torchvision's
network in onnxruntime has neither resizing nor post-processing. With one thread the time is the processor's, with more
the clock's. Compiling takes minutes; onnxruntime is measured where it is installed.
"""

import io
import os
import statistics
import tempfile
import time
import warnings
from functools import cache, partial

import benchmark_networks as net
import torch
import torchvision
from torchvision.ops import batched_nms

from msad import models
from msad.engine import export
from msad.engine.processes import autocast

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

RUNS = 5
THREADS = torch.get_num_threads()
STUDENTS = {"student": 256, "slim student": 128}  # channels of the head
# Forms of the network, and which ratio to the peer each may have, of the student and of its slim form.
LIMITS = {"eager": (0.60, 0.30), "exported": (0.60, 0.30), "exported, bf16": (0.40, 0.20), "compiled": (0.60, 0.30)}
ONNX = {"onnxruntime": (0.60, 0.30)} if onnxruntime else {}
PEERS = ["in bf16"] + ["in onnxruntime"] * bool(onnxruntime)


def session(network, images, threads):
    """A function that runs a network, or a traced one, in onnxruntime on images like these."""
    file = io.BytesIO()
    torch.onnx.export(network, (images,), file, input_names=["images"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    running = onnxruntime.InferenceSession(file.getvalue(), options)
    return lambda images: [torch.from_numpy(output) for output in running.run(None, {"images": images.numpy()})]


def forms(channels, threads):
    """{form: function} of one student, each from pixels to boxes and scores."""
    model = models.build(models.ModelConfig("low", net.CLASSES, head_channels=channels))
    network = export.Exported(model, "low")
    program, in_bf16 = export.trace(network), export.trace(export.Exported(model, "low", "bf16"))
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=os.path.join(folder, "a.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
    found = {"eager": network, "exported": program.module(), "exported, bf16": in_bf16.module(), "compiled": compiled}
    if onnxruntime:
        found["onnxruntime"] = session(program, torch.zeros(export.SAMPLE, dtype=torch.uint8), threads)
    return found


def finish(network, images):
    """What remains after an exported network, of one picture."""
    boxes, scores = (output[0] for output in network(images))
    location, label = scores.nonzero(as_tuple=True)
    return batched_nms(boxes[location] - boxes.min(), scores[location, label], label, 0.6)[:100]


class PeerNetwork(torch.nn.Module):
    """torchvision's detector without what is before and after its network."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        outputs = self.detector.head(list(self.detector.backbone(images).values()))
        return tuple(outputs.values())


def peers(threads):
    """{form: function} of torchvision's detector."""
    sizes = {"min_size": 800, "max_size": 1344}
    make = torchvision.models.detection.fcos_resnet50_fpn
    detector = make(weights=None, weights_backbone=None, num_classes=80, **sizes).eval()
    images = torch.rand(1, 3, 800, 1344)

    def in_bf16():
        with autocast(torch.device("cpu"), "bf16"):
            detector([images[0]])

    found = {"eager": lambda: detector([images[0]]), "in bf16": in_bf16}
    if onnxruntime:
        found["in onnxruntime"] = partial(session(PeerNetwork(detector), images, threads), images)
    return found


@cache
@torch.inference_mode()
def measure(threads):
    """{(student or "torchvision", form): median milliseconds}, all measured in turns."""
    torch.set_num_threads(threads)
    images = torch.randint(0, 256, (1, 3, 400, 672), dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        functions = {("torchvision", form): function for form, function in peers(threads).items()}
        for student, channels in STUDENTS.items():
            for form, network in forms(channels, threads).items():
                functions[student, form] = partial(finish, network, images)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = {key: [] for key in functions}
    for _ in range(1 + RUNS):
        for key, function in functions.items():
            began = clock()
            function()
            times[key].append(1000 * (clock() - began))
    torch.set_num_threads(THREADS)
    return {key: statistics.median(values[1:]) for key, values in times.items()}


def pair(threads, network, form):
    """Milliseconds of a form of a network, and of torchvision's detector in eager mode."""
    found = measure(threads)
    return found[network, form], found["torchvision", "eager"]


def rows():
    """(name, limit, function) of every row."""
    for threads in (1, 2):
        entries = [("torchvision", form, 1.0) for form in PEERS]
        for form, limits in (LIMITS | ONNX).items():
            entries += [(student, form, limit) for student, limit in zip(STUDENTS, limits)]
        for network, form, limit in entries:
            yield f"export: {network}, {form}, {threads} thread(s)", limit, partial(pair, threads, network, form)
