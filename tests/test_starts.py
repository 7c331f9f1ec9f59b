"""What a run starts from besides a backbone: checkpoints of this program."""

import distill
import pytest
import train
from helpers import CLASSES, tiny_config, tiny_model
from scripts import TINY, complaint, succeed

from msad import ModelConfig
from msad.engine import checkpoint
from msad.engine.weights import load_weights
from msad.models import build

def start_tiny(model, source, path, capsys):
    """The line that is printed, and the names of tensors that are the source's; the others are as they were."""
    checkpoint.save(path, source)
    own = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    load_weights(model, str(path))
    state, there = model.state_dict(), source.state_dict()
    taken = {n for n, tensor in state.items() if n in there and tensor.equal(there[n])}
    assert all(state[n].equal(own[n]) for n in own.keys() - taken)
    return capsys.readouterr().out, taken


@pytest.mark.parametrize("kind, source", [("teacher", "low"), ("low", "teacher"), ("conventional", "high")])
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_a_detector_of_other_classes_gives_all_but_its_class_outputs(kind, source, head, tmp_path, capsys):
    model, other = tiny_model(kind, head=head), tiny_model(source, seed=1, head=head)
    names = model.state_dict().keys()
    # Equal classes: everything that both have.
    _, taken = start_tiny(model, other, tmp_path / "a.pt", capsys)
    assert taken == names & other.state_dict().keys()
    # Other classes, as many or not: their outputs start afresh.
    for classes in (CLASSES[1:], [c | {"name": c["name"] + "s"} for c in CLASSES]):
        there = build(ModelConfig(**vars(other.config) | {"classes": tuple(classes)}))
        line, taken = start_tiny(tiny_model(kind, head=head, seed=2), there, tmp_path / "a.pt", capsys)
        assert {"head.cls_logits.weight", "head.cls_logits.bias"}.isdisjoint(taken)
        assert taken >= (names & there.state_dict().keys()) - {"head.cls_logits.weight", "head.cls_logits.bias"}
        assert line.startswith(f"weights   --weights {tmp_path}/a.pt: taken backbone 120, fpn ")
        assert ", head 2; new " in line or "left behind head 2; new " in line


def test_of_a_detector_with_another_head_the_backbone_and_pyramid_are_taken(tmp_path, capsys):
    model, other = tiny_model("low"), tiny_model("low", seed=1, head="retinanet")
    _, taken = start_tiny(model, other, tmp_path / "a.pt", capsys)
    assert taken == {name for name in model.state_dict() if not name.startswith("head.")}


def test_both_scripts_start_from_a_checkpoint_and_not_from_another_backbone_s(uninterrupted, tmp_path):
    flags = [*TINY, "--data", uninterrupted / "data", "--iters", 1, "--weights", tmp_path / "a.pt", "--out"]
    checkpoint.save(tmp_path / "a.pt", build(tiny_config("low")))
    said = f"weights   --weights {tmp_path}/a.pt: taken backbone 120, fpn "
    assert said in succeed(train, *flags, tmp_path / "out", "--res", "low")
    printed = succeed(distill, *flags, tmp_path / "student", "--teacher", uninterrupted / "teacher" / "last.pt")
    assert said in printed
    for other in ("--backbone resnet18 --width 0.5", "--backbone resnet34 --width 0.25"):
        line = complaint(train, *flags, tmp_path / "b", *other.split())
        assert f"a.pt: does not fit {other}, only --backbone resnet18 --width 0.25" in line
