"""Idea 3: distilling the fused pyramid into a student that sees low resolution only.

The student is a plain detector of kind "low". It starts from the teacher's weights and is trained on its own
detection loss plus the distance of its five maps to the teacher's fused ones. The teacher is frozen.

Difference from the authors' code: there the frozen teacher's BatchNorm still runs on batch statistics. Here it is in
eval mode, as at test time.
"""

import zlib

import torch

from . import align


def freeze(teacher):
    """A teacher as a constant: no gradients, eval mode, BatchNorm folded into the convolutions."""
    return teacher.folded().requires_grad_(False)


def checksum(teacher):
    """A number that tells a teacher from every other, so that a run which goes on can see that it has its own."""
    return zlib.crc32(b"".join(tensor.cpu().numpy().tobytes() for tensor in teacher.state_dict().values()))


def pyramid_l1(student, fused):
    """Two lists of five maps (N,C,h,w) -> the sum over levels of mean|s - f|, a scalar.

    The paper's loss is alpha * tau^2 * sum of mean|s/tau - f/tau| with alpha 0.2 and tau 3. The temperature leaves a
    mere factor, alpha * tau = 0.6: the script's default weight of this loss.
    """
    align.check_pyramids(fused, student)
    return torch.stack([(s.float() - f.float()).abs().mean() for s, f in zip(student, fused)]).sum()


def pyramid_pkd(student, fused):
    """Two lists of five maps (N,C,h,w) -> the sum over levels of the mean squared difference once every channel is
    standardised over the batch and all places: 2 (1 - its Pearson correlation), whatever the scale of the features.

    Not the paper's: after PKD (Cao et al., NeurIPS 2022), offered beside it.
    """
    align.check_pyramids(fused, student)
    return torch.stack([(_standardized(s) - _standardized(f)).square().mean() for s, f in zip(student, fused)]).sum()


def _standardized(x):
    variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


LOSSES = {"l1": pyramid_l1, "pkd": pyramid_pkd}


def ramp(iteration, length=500):
    """The weight of the distillation loss: 0 at the start, 1 from `length` iterations on."""
    return min(1.0, iteration / length) if length else 1.0


@torch.no_grad()
def start_from(student, teacher):
    """Copy every tensor of the teacher, not frozen yet, that the student has by name and shape.

    Returns one line saying what was taken, what of the teacher was not, and what of the student starts afresh.
    """
    source, target = teacher.state_dict(), student.state_dict()
    taken = {k: v for k, v in source.items() if k in target and target[k].shape == v.shape}
    student.load_state_dict(target | taken)
    left, new = source.keys() - taken.keys(), target.keys() - taken.keys()
    return f"from the teacher {_parts(taken)}; left behind {_parts(left)}; new {_parts(new)}"


def _parts(keys):
    """Names of tensors -> "backbone 320, fpn 12", or "nothing"."""
    names = [key.split(".")[0] for key in keys]
    return ", ".join(f"{part} {names.count(part)}" for part in sorted(set(names))) or "nothing"
