"""Exported networks: .github/exported.py runs them without the package, and finds what the model itself finds."""

import functools
import importlib.util
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from folders import noise
from helpers import CLASSES, tiny_model
from PIL import Image
from scripts import ROOT, complaint, succeed

from msad import align
from msad.engine import checkpoint, processes
from msad.engine.export import Exported, describe

SIZES = ((90, 150), (300, 200))  # height, width of pictures that are enlarged, and shrunk
CASES = [("fcos", "low", "low"), ("retinanet", "low", "low"), ("fcos", "teacher", "fused")]


def load_script():
    """The module .github/exported.py."""
    specification = importlib.util.spec_from_file_location("exported", ROOT / ".github" / "exported.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


exported = load_script()
load = functools.cache(exported.load)  # loading takes seconds


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A function that writes a tiny model with evaluate.py -> the folded model and the folder of the file."""
    done = {}

    def run(head, kind, branch, suffix, *flags):
        key = (head, kind, branch, suffix, *flags)
        if key not in done:
            folder = tmp_path_factory.mktemp("exported")
            model = tiny_model(kind, head=head)
            model.head.cls_logits.weight.data /= 5  # else many scores are 1.0, and equal scores have no order
            checkpoint.save(folder / "last.pt", model)
            ask = [] if branch == model.branches[0] else ["--res", branch]
            file = folder / f"student{suffix}"
            printed = succeed(evaluate, "--ckpt", folder / "last.pt", "--export", file, *ask, *flags)
            assert f"{kind} @ {branch}; images, uint8 (N,3,h,w) -> boxes (N,R,4), scores (N,R,3)" in printed
            done[key] = model.folded(), folder
        return done[key]

    return run


def picture(size, seed):
    """Blocks of noise: smooth enough that two ways of resizing nearly agree, and every model finds something."""
    height, width = size
    blocks = Image.fromarray(noise(height // 10, width // 10, seed, 0, 256))
    return blocks.resize((width, height), Image.Resampling.BICUBIC)


def rows(detections):
    """Detections as rows in which all numbers that may differ a little are comparable, and labels are far apart."""
    columns = detections["boxes"], detections["scores"][:, None], 1e4 * detections["labels"][:, None]
    return torch.cat(columns, dim=1).double()


def assert_same(found, expected, tolerance):
    """The same boxes, scores and labels, whatever the order of near ties."""
    ours, theirs = rows(dict(zip(("boxes", "scores", "labels"), found))), rows(expected)
    assert len(ours) == len(theirs) > 10
    difference = (ours[:, None] - theirs[None]).abs().amax(-1)
    assert difference.amin(0).max() < tolerance and difference.amin(1).max() < tolerance


@pytest.mark.parametrize("head, kind, branch", CASES)
def test_the_script_finds_what_the_model_finds(export, head, kind, branch):
    model, folder = export(head, kind, branch, ".pt2")
    network, about = load(f"{folder}/student.pt2")
    for size in SIZES:
        pictures = [picture(size, seed) for seed in range(3)]
        for image in pictures:
            assert_same(exported.find(network, about, image), model.detect(image, branch)[0], 1e-4)
        # Three pictures at once: so many have kernels of their own, which round otherwise.
        boxes, scores = network(torch.cat([exported.resize(image, about) for image in pictures]))
        together = exported.find(lambda _: (boxes[2:], scores[2:]), about, pictures[2])
        assert_same(together, model.detect(pictures, branch)[2], 1e-4)


@pytest.mark.parametrize("kind, branch", [("high", "high"), ("conventional", "low"), ("teacher", "low")])
def test_the_other_kinds_give_the_branch_that_is_asked_for(kind, branch):
    """Without PyTorch's tracing, which takes long."""
    model, image = tiny_model(kind), picture(SIZES[0], 0)
    model.head.cls_logits.weight.data /= 5
    with torch.no_grad():
        found = exported.find(Exported(model, branch).eval(), describe(model, branch), image)
    assert_same(found, model.folded().detect(image, branch)[0], 1e-4)


def test_the_script_prints_what_it_finds(export, tmp_path):
    model, folder = export("fcos", "low", "low", ".pt2")
    picture(SIZES[0], 0).save(tmp_path / "picture.png")
    command = [sys.executable, ROOT / ".github" / "exported.py", folder / "student.pt2", tmp_path / "picture.png"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    (expected,) = model.detect(Image.open(tmp_path / "picture.png"))
    assert len(lines) == len(expected["scores"]) > 10
    path, name, score, *box = lines[0].split()
    assert path == str(tmp_path / "picture.png") and name == CLASSES[int(expected["labels"][0])]["name"]
    assert float(score) == pytest.approx(expected["scores"][0].item(), abs=1e-3)
    assert [float(side) for side in box] == pytest.approx(expected["boxes"][0].tolist(), abs=0.05)


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_onnxruntime_finds_the_same(export, head):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model, folder = export(head, "low", "low", ".onnx")
    network, about = load(f"{folder}/student.onnx")
    for size in SIZES:
        pictures = [picture(size, seed) for seed in range(3)]
        for image in pictures:
            assert_same(exported.find(network, about, image), model.detect(image)[0], 1e-3)
        boxes, scores = network(torch.cat([exported.resize(image, about) for image in pictures]))
        together = exported.find(lambda _: (boxes[2:], scores[2:]), about, pictures[2])
        assert_same(together, model.detect(pictures)[2], 1e-3)
    content = pytest.importorskip("onnx").load(folder / "student.onnx")
    assert [i.name for i in content.graph.input] == ["images"]
    assert [o.name for o in content.graph.output] == ["boxes", "scores"]
    assert [(o.domain, o.version) for o in content.opset_import] == [("", 20)]
    assert [path.name for path in folder.glob("*.onnx*")] == ["student.onnx"]  # weights and all


@pytest.mark.parametrize("size", [(1, 1), (5, 200), (257, 64)])
def test_pictures_may_be_as_small_as_one_pixel(export, size):
    """Where a map of the pyramid has one cell only, PyTorch would have the export refuse the picture."""
    model, folder = export("fcos", "low", "low", ".pt2")
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, scores = load(f"{folder}/student.pt2")[0](images)
    padded = torch.zeros(2, 3, *model.padded_size(size), dtype=torch.uint8)
    padded[:, :, : size[0], : size[1]] = images
    with torch.no_grad():
        maps = model.pyramids(model.normalize(padded, [size] * 2))
        outputs, sizes = model.predict(maps)["low"], align.map_sizes(maps["low"])
        decoded, expected = model.head.decode(outputs, sizes, torch.arange(boxes.shape[1]))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    found = (expected > 0).any(-1)
    assert found.sum() > 10 and (boxes[~found] == 0).all()
    torch.testing.assert_close(2 * boxes[found], decoded[found], rtol=1e-4, atol=1e-3)


ALONE = """
import sys
sys.modules.update(dict.fromkeys(["msad", "torchvision", "PIL", "pycocotools"]))  # importing any of these fails
import torch
images = torch.load("images.pt")
boxes, scores = torch.export.load("student.pt2").module()(images)
assert not boxes.requires_grad and sys.modules["msad"] is None
torch.save((boxes, scores), "alone.pt")
"""


def test_pytorch_alone_runs_the_file(export):
    _, folder = export("fcos", "low", "low", ".pt2")
    images = torch.randint(256, (3, 3, 70, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.save(images, folder / "images.pt")
    subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=folder, check=True)
    expected = load(f"{folder}/student.pt2")[0](images)
    for one, other in zip(torch.load(folder / "alone.pt"), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head, kind, branch", [CASES[0], CASES[2]])
def test_what_a_caller_needs_to_know_is_in_the_file(export, head, kind, branch):
    model, folder = export(head, kind, branch, ".pt2")
    low = kind == "low"
    assert load(f"{folder}/student.pt2")[1] == {
        "kind": kind, "branch": branch, "classes": list(CLASSES), "short_side": 128, "long_side": 256,
        "scale": 2 if low else 1, "multiple": 32 if low else 64, "downsample": "area" if low else "",
        "score_threshold": 0.05, "nms_iou": 0.6 if head == "fcos" else 0.5, "detections": 100,
    }  # fmt: skip


def test_bf16_is_exported_as_the_model_computes_it(export):
    model, folder = export("fcos", "low", "low", ".pt2", "--precision", "bf16")
    image = torch.from_numpy(np.array(picture((64, 96), 0))).permute(2, 0, 1)
    boxes, scores = torch.export.load(folder / "student.pt2").module()(image[None])
    with processes.autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        maps = model.pyramids(model.normalize(image[None], [(64, 96)]))
        outputs, sizes = model.predict(maps)["low"], align.map_sizes(maps["low"])
        assert outputs["logits"].dtype == torch.bfloat16
    decoded, expected = model.head.decode(outputs, sizes, torch.arange(boxes.shape[1]))
    assert scores.equal(expected) and (scores > 0).sum() > 10
    assert (2 * boxes).equal(torch.where((scores > 0).any(-1, keepdim=True), decoded, 0.0))


def test_what_cannot_be_exported_is_said_in_one_line(export, monkeypatch):
    _, folder = export("fcos", "low", "low", ".pt2")
    for slow in ("trace", "to_pt2"):
        monkeypatch.setattr(f"msad.engine.export.{slow}", lambda *_: b"")
    flags = ["--ckpt", folder / "last.pt", "--export"]
    assert "must end in .pt2 or .onnx" in complaint(evaluate, *flags, folder / "student.pth")
    assert "nothing/student.pt2: cannot be written" in complaint(evaluate, *flags, folder / "nothing" / "student.pt2")
    assert "--res fused" in complaint(evaluate, *flags, folder / "a.pt2", "--res", "fused")
    for others in (["--images", folder], ["--data", folder], ["--draw"], ["--json", "a.json"], ["--per-class"]):
        line = complaint(evaluate, *flags, folder / "a.pt2", *others)
        assert others[0] in line and "--export" in line
    assert "--precision bf16" in complaint(evaluate, *flags, folder / "a.onnx", "--precision", "bf16")
    assert not list(folder.glob("a.*"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # importing it fails
    assert "pip install onnx onnxscript" in complaint(evaluate, *flags, folder / "a.onnx")
