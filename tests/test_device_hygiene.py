"""What CUDA would refuse or wait for, found without a GPU: PyTorch's fake tensors lie on a device "cuda:0" that is not
there. They have shapes, types and devices, and no values, so mixed devices and reads of values are errors.

Both scripts run as they are, from the command line to the weights' update, in bf16. Replaced are moving a model (its
parameters are made on the device), the backward pass (autograd asks for the device itself; gradients are made up), the
one read a step may do, and reading, evaluating and saving. Not seen here: what is in the kernels, and post-processing,
whose shapes depend on values.
"""

import contextlib

import distill
import numpy as np
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import tiny_config, tiny_model
from scripts import TINY, call
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from msad import align, distillation, models
from msad.data import annotations
from msad.engine import checkpoint, evaluation, optimizer, processes, run
from msad.data.dataset import Batch

CUDA = torch.device("cuda:0")
HEADS = ("fcos", "retinanet")


class Watch(TorchDispatchMode):
    """Writes down every copy between devices, and refuses operations on tensors of several devices.

    Fake tensors let single numbers on the CPU pass everywhere; CUDA takes them in arithmetic, but not in `stack`.
    """

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        fused = function.__name__.startswith("_fused_sgd_")  # has no version for fake tensors, and gives nothing back
        result = None if fused else function(*arguments, **(keywords or {}))
        devices_in, devices_out = (
            [leaf.device.type for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]
            for tree in ((arguments, keywords), result)
        )
        filled = function is torch.ops.aten.fill_.Tensor  # a number into a tensor: it travels with the kernel
        assert len(set(devices_in)) < 2 or filled, f"{function} of tensors on {devices_in}"
        if len(set(devices_in + devices_out)) > 1 and not filled:
            self.copies.append(f"{devices_in[0]} to {devices_out[0]}")
        return result


@contextlib.contextmanager
def fake_cuda(patch):
    """Tensors are fake within, and models can be moved to the device -> a Watch."""
    made_up = FakeTensorMode(allow_non_fake_inputs=True)  # what was made before becomes fake, where it lies
    try:
        with made_up:
            torch.empty(1, 3, 2, 2, device=CUDA).contiguous(memory_format=torch.channels_last)
    except RuntimeError as error:
        pytest.skip(f"this PyTorch cannot pretend to have a CUDA device: {str(error).splitlines()[0]}")
    patch.setattr(torch.nn.Module, "to", moved)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with made_up, Watch() as watch:
        yield watch


def moved(module, device=None, memory_format=None):
    """nn.Module.to, which cannot move parameters to a device of another type under fake tensors: makes them anew."""
    for part in module.modules():
        for kind, wrap in (("_parameters", torch.nn.Parameter), ("_buffers", lambda tensor: tensor)):
            for name, tensor in getattr(part, kind).items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device or tensor.device)
                    layout = memory_format if memory_format and new.dim() == 4 else torch.preserve_format
                    getattr(part, kind)[name] = wrap(new.clone(memory_format=layout))
    return module


def batches(settings, low):
    """Batches without an end, as a loader gives them: on the CPU."""
    side = 64 if low else 128
    count = [1 + k % 3 for k in range(settings.batch)]
    count[0] = 0
    while True:
        images = torch.empty(settings.batch, 3, side, side, dtype=torch.uint8)
        sizes = [(side, side - 9)] * settings.batch
        boxes, labels = torch.empty(sum(count), 4), torch.empty(sum(count), dtype=torch.long)
        yield Batch(images, sizes, boxes, labels, count, list(range(settings.batch)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data and an untrained teacher of either head."""
    folder = tmp_path_factory.mktemp("home")
    draw_rectangles(folder / "data", {"train": 4, "val": 2})
    for head in HEADS:
        config = tiny_config("teacher", annotations.read(folder / "data", "train").classes, head=head)
        checkpoint.save(folder / f"{head}.pt", models.build(config))
    return folder


def steps(script, patch, out, *flags):
    """Two steps of a script on the fake device -> the copies between devices in them."""
    stack, reads, starts, optimized = contextlib.ExitStack(), [], [], []

    def settle(*arguments):
        settings = settled(*arguments)
        starts.append(stack.enter_context(fake_cuda(patch)))
        return settings

    def loader(dataset, multiple, settings, first, device):
        assert device == CUDA
        starts[0].copies.clear()  # those of the models
        return batches(settings, bool(dataset.downsample))

    def backward(loss):
        assert loss.device == CUDA and loss.requires_grad and loss.dim() == 0
        for parameter in optimized:
            assert parameter.device == CUDA
            parameter.grad = torch.empty_like(parameter)

    def build_optimizer(model, settings):
        optimized.extend(model.parameters())
        return optimizer.build_optimizer(model, settings)

    def to_list(values):
        if values.device == CUDA:
            reads.append(values)
        return np.zeros(values.shape).tolist()

    def freeze(*teacher):
        with _disable_current_modes():  # a copy of what was read is no fake
            return original(*teacher)

    original, settled, end_iteration = distillation.freeze, script.settle, run.Run.end_iteration
    fake_results = lambda *_: dict.fromkeys(("fused", "high", "low"), dict.fromkeys(evaluation.METRICS, 0.5))
    patch.setattr(processes, "init_device", lambda name: CUDA)
    patch.setattr(script, "settle", settle)
    patch.setattr(script, "train_loader", loader)
    patch.setattr(script, "print_header", lambda *_: None)
    patch.setattr(torch.Tensor, "backward", backward)
    patch.setattr(script, "build_optimizer", build_optimizer)
    patch.setattr(FakeTensor, "tolist", to_list)
    patch.setattr(run, "evaluate_all", fake_results)
    patch.setattr(run.Run, "save", lambda *_: None)
    patch.setattr(run.Run, "end_iteration", lambda self, i, n: end_iteration(self, i, n) or i == 1 and self.stop(i))
    if script is distill:
        patch.setattr(script, "evaluate_all", fake_results)
        patch.setattr(distillation, "freeze", freeze)
    with stack:
        code, _, complained = call(script, *TINY, *SHORTER, *flags, "--out", out)
    assert code == processes.INTERRUPTED, complained
    assert len(reads) == 2, "one read a step"
    return starts[0].copies


SHORTER = ("--iters", 3, "--precision", "bf16", "--optimizer", "sgd")
PARTS = ("--batch", 4, "--accumulate", 2, "--norm", "frozen", "--clip", 0)
STEPS = [(train, "fcos", flags) for flags in ((), ("--no-align",), ("--res", "low"), PARTS)]
STEPS += [(distill, "fcos", ()), (distill, "fcos", ("--kd-loss", "pkd", "--downsample", "nearest"))]
STEPS += [(train, "retinanet", ()), (train, "retinanet", ("--no-align",)), (distill, "retinanet", PARTS)]


@pytest.mark.parametrize("script, head, flags", STEPS)
def test_a_step_stays_on_the_device_and_reads_once(home, tmp_path, monkeypatch, head, script, flags):
    teacher = ["--teacher", home / f"{head}.pt"] if script is distill else []
    flags = ["--data", home / "data", "--head", head, *teacher, *flags]
    uploads = 2 * 3 * ["cpu to cuda"]  # of two batches: images, boxes, labels
    assert steps(script, monkeypatch, tmp_path / "out", *flags) == uploads


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_detection_stays_on_the_device_until_its_boxes_are_chosen(monkeypatch, kind, head):
    """Network and decoding; which locations are decoded, and which boxes remain, depends on values."""
    decoded = []

    def postprocess(model, pyramid, outputs, branch, *_):
        assert {value.device for value in outputs.values()} == {CUDA}
        likely = torch.empty(7, dtype=torch.long, device=CUDA)
        boxes, scores = model.head.decode({k: v[0, :7] for k, v in outputs.items()}, align.map_sizes(pyramid), likely)
        assert boxes.shape == (7, 4) and scores.shape == (7, 3) and {boxes.device, scores.device} == {CUDA}
        decoded.append(branch)

    monkeypatch.setattr(models.Detector, "postprocess", postprocess)
    model = tiny_model(kind, head=head).folded()
    with fake_cuda(monkeypatch) as watch:
        model = model.to(CUDA)
        images = torch.empty(2, 3, 128, 192, dtype=torch.uint8).to(CUDA)
        watch.copies.clear()
        with processes.autocast(CUDA, "bf16"):
            model.detect_batch(images, [(128, 150), (99, 192)], [(50, 60), (70, 80)], model.branches)
    assert decoded == list(model.branches) and watch.copies == []


@pytest.mark.parametrize("device, precision, capability, last", [
    ("cuda", "bf16", "", True), ("cuda", "fp32", "", False),  # without TF32 NCHW is the fast side
    ("cpu", "bf16", "AVX512", True), ("cpu", "fp32", "AVX512", True), ("cpu", "fp32", "AVX2", False),
])  # fmt: skip
def test_training_has_the_layout_that_its_device_likes(monkeypatch, device, precision, capability, last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layout = processes.training_layout(torch.device(device), precision)
    assert layout == (torch.channels_last if last else torch.contiguous_format)
