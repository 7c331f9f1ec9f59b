"""Multi-Scale Aligned Distillation for Low-Resolution Detection (CVPR 2021, arXiv 2109.06875), in plain PyTorch.

    import msad
    model = msad.load("runs/student/last.pt")
    for found in model.detect([image]):        # PIL images, arrays or tensors, of any size
        found["boxes"], found["scores"], found["labels"]

This folder is the paper. Reading order: train.py and distill.py, top to bottom; align, fusion, distillation, the three
ideas; models, which puts them together; then what it is made of: backbone, heads, fcos, retinanet, postprocess, images.
None of these imports anything from the two folders: data (annotations and pictures to batches), and above it engine
(settings, what surrounds the training step, checkpoints, evaluation, drawings, export).

Shapes, everywhere: N images, C channels, R locations (or anchors) over all levels, K classes, M annotated boxes, D
detections. H and L are the high- and low-resolution input, P2..P7 the levels of the pyramid; boxes are in H's pixels
until the last step of evaluation puts them into the original image's.
"""

from .data.errors import InputError
from .engine.checkpoint import load
from .models import Conventional, Detector, ModelConfig, Teacher

__all__ = ["Conventional", "Detector", "InputError", "ModelConfig", "Teacher", "load"]
