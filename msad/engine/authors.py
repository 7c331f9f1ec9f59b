"""A detector that the paper's authors trained, converted to a checkpoint of this program.

    python -m msad.engine.authors THEIRS.pth OURS.pt              the student, or the teacher where there is no student
    python -m msad.engine.authors THEIRS.pth OURS.pt --teacher    the teacher, which a student's file holds too

OURS.pt is then what evaluate.py --ckpt evaluates (with --data), distill.py --teacher learns from, if it is a teacher,
and --weights starts from. It has COCO's 80 classes and is tested as theirs are: padded to 256, L every second pixel.
"""

from pathlib import Path

import torch
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from ..data.errors import MALFORMED, InputError, input_errors
from ..models import STD, ModelConfig, build
from . import checkpoint, processes
from .files import read_tensors
from .weights import rename, slimmed

NAMES = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # of COCO, at their ids, with words for ids not in use
COCO = tuple({"id": i, "name": name} for i, name in enumerate(NAMES) if name not in ("__background__", "N/A"))

# A file of theirs (detectron2 0.2.1, PyTorch 1.4) is {"model": state dict, ...} or the bare state dict:
#
#     T_backbone.bottom_up.features.*       the teacher's slimmable ResNet-50, as in msad/engine/weights.py
#     T_backbone.fpn_lateral{2-5} .fpn_output{2-5} .top_block.{p6,p7}
#     SE.fc.{0,2}                           the gate of the fusion
#     T_fcos_head.{cls,bbox}_tower .cls_logits .bbox_pred .ctrness .scales.{0-4}.scale
#     S_backbone.* S_fcos_head.*            in a student's file, beside all of the above
#
# All but the backbone was made for one width, which the laterals' input channels tell. Their detectors see BGR from 0
# to 255 less the mean, divided by nothing; ours see RGB normalised by mean and std. The means agree, so the stem's
# weights take up the difference exactly, zero padding included.

# How names begin in their detectors, where # is T or S, and here.
PREFIXES = {"#_backbone.bottom_up.": "backbone.", "#_backbone.top_block.": "fpn."}
PREFIXES |= {"#_backbone.fpn_lateral": "fpn.lateral.", "#_backbone.fpn_output": "fpn.output."}
PREFIXES |= {"#_fcos_head.bbox_": "head.box_", "#_fcos_head.ctrness.": "head.centerness.", "#_fcos_head.": "head."}
PREFIXES |= {"SE.fc.0.": "fusion.squeeze.", "SE.fc.2.": "fusion.excite."}


def main():
    parser = processes.Parser(__doc__, usage="python -m msad.engine.authors THEIRS.pth OURS.pt [--teacher]")
    parser.add_argument("theirs", metavar="THEIRS.pth", help="a file of the authors'")
    parser.add_argument("ours", metavar="OURS.pt", help="the checkpoint to write, which must not exist")
    parser.add_argument("--teacher", action="store_true", help="of a student's file, take its teacher")
    args = parser.parse_args()
    if Path(args.ours).exists():
        raise InputError(f"{args.ours}: is there already; choose another name")
    content = read_tensors(args.theirs)
    with input_errors(args.theirs, "not a detector of the paper's authors, or damaged", errors=MALFORMED):
        model = convert(content.get("model", content), args.teacher)
    checkpoint.save(args.ours, model)
    kind = "teacher" if model.config.kind == "teacher" else "student"
    print(f"written to {args.ours}: the authors' {kind}, width {model.config.width:g}")


def convert(state, teacher=False):
    """The state dict of a file of theirs -> its student, or its `teacher`, or the only one there is, as our model.

    Raises almost anything unless all tensors of that detector are there, fit, and are all there are.
    """
    student = not teacher and any(name.startswith("S_") for name in state)
    letter = "S" if student else "T"
    others = ("T_", "SE.", "S_backbone.top_block.p7.") if student else "S_"  # a student never reads P7
    width = state[f"{letter}_backbone.fpn_lateral2.weight"].shape[1] / 256
    # Their numbers depend on how they pad and downsample.
    model = build(ModelConfig("low" if student else "teacher", COCO, width=width, pad=256, downsample="nearest"))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(others)}
    state = rename(state, {theirs.replace("#", letter): ours for theirs, ours in PREFIXES.items()})
    state = slimmed(state, model, width, "backbone.")
    state["head.scales"] = torch.cat([state.pop(f"head.scales.{level}.scale") for level in range(5)])
    scale = 255 * torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)  # their input is this times ours, flipped
    state["backbone.conv1.weight"] = (state["backbone.conv1.weight"].flip(1) * scale).float()
    model.load_state_dict(state)
    return model.eval()


if __name__ == "__main__":
    processes.run_script(main)
