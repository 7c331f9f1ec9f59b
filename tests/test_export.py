"""Exported networks: .github/exported.py runs them without the package, and finds what the model itself finds."""

import functools
import subprocess
import sys

import evaluate
import pytest
import torch
from folders import noise
from helpers import CLASSES, tiny_model
from PIL import Image
from scripts import ROOT, complaint, in_github, succeed

from msad import align
from msad.engine import checkpoint, processes
from msad.engine.export import Exported, describe

SIZES = ((90, 150), (300, 200))  # height, width of pictures that are enlarged, and shrunk
FCOS, FUSED = ("fcos", "low", "fp32"), ("retinanet", "teacher", "bf16")  # head, kind, precision of what is traced
exported = in_github("exported")
load = functools.cache(exported.load)  # loading takes seconds


def model_of(head, kind):
    model = tiny_model(kind, head=head)
    model.head.cls_logits.weight.data /= 5  # else many scores are 1.0, and equal scores have no order
    return model


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A function that writes a tiny model with evaluate.py, once -> the folded model and the path of the file."""

    @functools.cache
    def run(head, kind, precision):
        file = tmp_path_factory.mktemp("exported") / "student.pt2"
        model = model_of(head, kind)
        checkpoint.save(file.with_name("last.pt"), model)
        printed = succeed(evaluate, "--ckpt", file.with_name("last.pt"), "--export", file, "--precision", precision)
        assert f"{kind} @ {model.branches[0]}; images, uint8 (N,3,h,w) -> boxes (N,R,4), scores (N,R,3)" in printed
        return model.folded(), file

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


def assert_same(found, expected):
    """The same boxes, scores and labels, whatever the order of near ties."""
    ours, theirs = rows(dict(zip(("boxes", "scores", "labels"), found))), rows(expected)
    assert len(ours) == len(theirs) > 10
    difference = (ours[:, None] - theirs[None]).abs().amax(-1)
    assert max(difference.amin(0).max(), difference.amin(1).max()) < 1e-4


def test_the_script_finds_what_the_model_finds(export):
    model, file = export(*FCOS)
    network, about = load(str(file))
    for size in SIZES:
        pictures = [picture(size, seed) for seed in range(3)]
        for image in pictures:
            assert_same(exported.find(network, about, image), model.detect(image)[0])
        # Three pictures at once: so many have kernels of their own, which round otherwise.
        boxes, scores = network(torch.cat([exported.resize(image, about) for image in pictures]))
        together = exported.find(lambda _: (boxes[2:], scores[2:]), about, pictures[2])
        assert_same(together, model.detect(pictures)[2])


BRANCHES = [("fcos", "high", "high"), ("fcos", "conventional", "low"), ("fcos", "teacher", "low")]
BRANCHES += [("retinanet", "low", "low"), ("retinanet", "teacher", "fused")]


@pytest.mark.parametrize("head, kind, branch", BRANCHES)
def test_every_kind_gives_the_branch_that_is_asked_for(head, kind, branch):
    """Without PyTorch's tracing, which takes long."""
    model, image = model_of(head, kind), picture(SIZES[0], 0)
    with torch.no_grad():
        found = exported.find(Exported(model, branch).eval(), describe(model, branch), image)
    assert_same(found, model.folded().detect(image, branch)[0])


@pytest.mark.parametrize("case", [FCOS, FUSED], ids=["fcos", "fused"])
@pytest.mark.parametrize("size", [(1, 1), (5, 200), (257, 64)])
def test_the_file_computes_what_the_model_does_of_any_size_in_its_own_precision(export, case, size):
    """Where a map of the pyramid has one cell only, PyTorch would have the export refuse the picture."""
    (model, file), precision = export(*case), case[2]
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, scores = load(str(file))[0](images)
    padded = torch.zeros(2, 3, *model.padded_size(size), dtype=torch.uint8)
    padded[:, :, : size[0], : size[1]] = images
    branch = model.branches[0]
    with processes.autocast(torch.device("cpu"), precision), torch.no_grad():
        maps = model.pyramids(model.normalize(padded, [size] * 2), [branch])
        outputs, sizes = model.predict(maps)[branch], align.map_sizes(maps[branch])
        assert outputs["logits"].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    decoded, expected = model.head.decode(outputs, sizes, torch.arange(boxes.shape[1]))
    found = (expected > 0).any(-1)
    assert found.sum() > 10 and (boxes[~found] == 0).all()
    exact = 0 if precision == "bf16" else 1
    torch.testing.assert_close(scores, expected, rtol=1e-4 * exact, atol=1e-5 * exact)
    torch.testing.assert_close(model.scale * boxes[found], decoded[found], rtol=1e-4 * exact, atol=1e-3 * exact)


def test_a_box_outside_the_picture_suppresses_none():
    found = torch.tensor([[[-30.0, 0, -0.5, 10], [-30, 0, 4, 10]]]), torch.tensor([[[0.9], [0.8]]])
    about = {"short_side": 64, "long_side": 64, "downsample": None, "nms_iou": 0.6, "detections": 100}
    assert exported.find(lambda _: found, about, Image.new("RGB", (64, 64)))[0].tolist() == [[0, 0, 4, 10]]


def test_the_script_prints_what_it_finds(export, tmp_path):
    model, file = export(*FCOS)
    picture(SIZES[0], 0).save(tmp_path / "picture.png")
    Image.new("I;16", (80, 60)).save(tmp_path / "grey.png")
    # Isolated, so that no msad can be imported.
    command = [sys.executable, "-I", ROOT / ".github" / "exported.py", file, "picture.png", "grey.png"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and run.stderr.startswith("grey.png: has more than 8 bits a value")
    lines = run.stdout.splitlines()
    (expected,) = model.detect(Image.open(tmp_path / "picture.png"))
    assert len(lines) == len(expected["scores"]) > 10
    path, name, score, *box = lines[0].split()
    assert path == "picture.png" and name == CLASSES[int(expected["labels"][0])]["name"]
    assert float(score) == pytest.approx(expected["scores"][0].item(), abs=1e-3)
    assert [float(side) for side in box] == pytest.approx(expected["boxes"][0].tolist(), abs=0.05)


def test_the_file_needs_nothing_but_pytorch(export):
    _, file = export(*FCOS)
    network, _ = load(str(file))
    operators = [node.target for node in network.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert len(operators) > 50 and {operator.namespace for operator in operators} == {"aten"}
    assert not any(output.requires_grad for output in network(torch.zeros(1, 3, 70, 100, dtype=torch.uint8)))


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    checkpoint.save(tmp_path / "last.pt", tiny_model("low"))
    flags = ["--ckpt", tmp_path / "last.pt", "--export"]
    assert "must end in .pt2" in complaint(evaluate, *flags, tmp_path / "a.pth")
    assert "--res fused" in complaint(evaluate, *flags, tmp_path / "a.pt2", "--res", "fused")
    for others in (["--images", tmp_path], ["--data", tmp_path], ["--draw"], ["--json", "a.json"], ["--per-class"]):
        line = complaint(evaluate, *flags, tmp_path / "a.pt2", *others)
        assert others[0] in line and "--export" in line
    assert not list(tmp_path.glob("a.*"))
