"""How much of a teacher's fused maps a student has: python .github/handed_on.py TEACHER.pt STUDENT.pt

Prints, of the validation pictures: for each aligned level, the mean distance |s - f| of the student's maps to the fused
ones, relative to the mean |f|; and AP by the teacher's head, with the student's maps in place of the fused ones on no
level, on all, and on each alone.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msad import align, models
from msad.data.dataset import CocoDataset, open_data
from msad.engine import checkpoint, evaluation, processes


class Mixed(models.Teacher):
    """A teacher with a student's maps on the levels `taken` (0 is the finest) in place of its fused ones."""

    def pyramids(self, images, branches=("fused",)):
        fused = super().pyramids(images, ["fused"])["fused"]
        student = self.student.pyramids(align.downsample(images, self.config.downsample))["low"]
        for level, (s, f) in enumerate(zip(student, fused)):
            self.sums[level] += torch.stack([(s - f).abs().sum(), f.abs().sum()]).double()
        return {"fused": [s if level in self.taken else f for level, (s, f) in enumerate(zip(student, fused))]}


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    content = checkpoint.read(sys.argv[1], want="teacher")
    teacher, student = checkpoint.restore(content, sys.argv[1]), checkpoint.load(sys.argv[2], want="low")
    (annotations,) = open_data(content["training"]["settings"]["data"], ["val"])
    annotations = annotations.with_classes(teacher.config.classes, sys.argv[1])
    dataset = CocoDataset(annotations, (teacher.config.short_side,), teacher.config.long_side)
    teacher.__class__, teacher.student = Mixed, student.folded()
    for taken in ((), range(5), *([level] for level in range(5))):
        # Of the class, since `evaluate` works with a copy of the model.
        Mixed.taken, Mixed.sums = taken, torch.zeros(5, 2, dtype=torch.double)
        ap = 100 * evaluation.evaluate(teacher, dataset, ["fused"], 8)["fused"][0]["AP"]
        if not taken:
            print("distance", *(f"{distance:.2f}" for distance in Mixed.sums[:, 0] / Mixed.sums[:, 1]))
        print(f"AP {ap:.1f} with the student's maps at strides {[align.STRIDES[level] for level in taken]}", flush=True)


if __name__ == "__main__":
    processes.run_script(main)
