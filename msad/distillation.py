"""Idea 3: distilling the fused pyramid into a student that sees low resolution only.

The student is a plain detector of kind "low". It starts from the teacher's weights and is trained on its own detection
loss plus the distance of its five maps to the teacher's fused ones. The teacher is frozen.

    L_student = L_det(student) + w(t) alpha tau^2 sum over levels of mean|s/tau - f/tau|,  w(t) = min(1, t/500)

The temperature tau is inside an absolute value, so all it leaves is a factor: alpha tau = 0.2 * 3 = 0.6.

Difference from the authors' code: there the frozen teacher's BatchNorm still runs on batch statistics. Here it is in
eval mode, as at test time.
"""

import zlib

import torch

from . import align

WEIGHT = 0.6  # of the distance: alpha 0.2 times tau 3
RAMP = 500  # iterations until the distance has its full weight


def pyramid_l1(student, fused):
    """Two lists of five maps (N,C,h,w) -> the sum over levels of mean|s - f|, a scalar: the paper's distance."""
    align.check_pyramids(fused, student)
    return torch.stack([(s.float() - f.float()).abs().mean() for s, f in zip(student, fused)]).sum()


def pyramid_pkd(student, fused):
    """Two lists of five maps (N,C,h,w) -> the sum over levels of the mean squared difference of standardised channels,
    a scalar. For one channel that is 2 (1 - Pearson's correlation): the scale of the features does not count.

    Not the paper's: after PKD (Cao et al., NeurIPS 2022), offered beside it; its weight is to be chosen anew (3 here).
    """
    align.check_pyramids(fused, student)
    return torch.stack([(standardized(s) - standardized(f)).square().mean() for s, f in zip(student, fused)]).sum()


def standardized(x):
    """A map (N,C,h,w), every channel brought to mean 0 and variance 1 over N, h and w."""
    variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


DISTANCES = {"l1": pyramid_l1, "pkd": pyramid_pkd}


def ramp(iteration, length=RAMP):
    """w(t): 0 at the start, 1 from `length` iterations on."""
    return min(1.0, iteration / length) if length else 1.0


def freeze(teacher, precision="fp32"):
    """A teacher as a constant: no gradients, eval mode, BatchNorm folded into the convolutions. `precision` is that at
    which it will run, "fp32" or "bf16", as in Detector.folded."""
    return teacher.folded(precision).requires_grad_(False)


def checksum(teacher):
    """A teacher's fingerprint, so that a run which goes on notices another teacher."""
    return zlib.crc32(b"".join(tensor.cpu().numpy().tobytes() for tensor in teacher.state_dict().values()))
