"""The line about what each level learns, on boxes whose level is known by hand."""

import numpy as np
import pytest
import torch
from folders import write
from helpers import tiny_config

from msad.data import annotations
from msad.engine import evaluation

CPU = torch.device("cpu")


def boxes_of(folder, sides, picture=256):
    """Annotations of one picture a box: squares of these sides in the middle of a location's cell at stride 128."""
    images = [{"id": i, "file_name": f"{i}.png", "height": picture, "width": picture} for i in range(len(sides))]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [64 - side / 2, 64 - side / 2, side, side], "iscrowd": 0}
        for i, side in enumerate(sides)
    ]
    write(folder, {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}, "train")
    return annotations.read(folder, "train")


def test_shares_of_squares_that_are_assigned_by_hand(tmp_path):
    """FCOS at scale 1: level 0 is responsible for farthest sides up to 64 pixels, level 1 for 64 to 128, from points
    less than 1.5 strides from the centre, here (64, 64)."""
    # Side 40: points of stride 8 at 60 and 68 have a farthest side of 24: level 0 only. Those of stride 16 at 56 and 72
    # are 28 away: not level 1's.
    # Side 100: at (60, 60) the farthest is 54: level 0; at (52, 52), in the radius of 12 (exactly 12 is outside), no
    # other. Level 1, at 56 or 40 (24 away, outside): 58: none. Of stride 32, points at 48 and 80: 66, not over 128.
    # Side 124: at 60: 66 is level 1's; at (68, 68) too; level 0 none. Stride 16 at 56: 70: level 1 owns it.
    found = evaluation.level_shares(tiny_config("high"), boxes_of(tmp_path, (40, 100, 124)), 256, 256, CPU, 1.0, 100)
    assert found == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    # Pictures half as large, or levels responsible for twice the sizes: all on level 0.
    everything = boxes_of(tmp_path, (40, 100, 124))
    for short_side, scale in ((128, 1.0), (256, 2.0)):
        found = evaluation.level_shares(tiny_config("high"), everything, short_side, 256, CPU, scale, 100)
        assert found == pytest.approx([1, 0, 0, 0, 0])


def test_of_boxes_in_one_another_each_counts(tmp_path):
    read = boxes_of(tmp_path, (40, 40))
    read.starts = np.array([0, 2, 2])  # both are in the first picture: of equal boxes one has all locations
    for crowd, share in (([False, False], 0.5), ([True, False], 1)):
        read.crowd[:] = crowd
        found = evaluation.level_shares(tiny_config("high"), read, 256, 256, CPU, 1.0, 100)
        assert found == pytest.approx([share, 0, 0, 0, 0])


@pytest.mark.parametrize("head, scale", [("fcos", 0.1), ("retinanet", 6)])
def test_what_is_proposed_puts_half_of_the_boxes_on_the_finest_level(head, scale, tmp_path):
    read = boxes_of(tmp_path, (16, 24, 32, 40, 50, 60, 80, 90, 100, 120))
    config = tiny_config("high", head=head, object_scale=scale)
    first, second = evaluation.describe_levels(config, read, 256, 256, CPU).splitlines()
    assert first.startswith("levels    ") and " at strides 8, 16, 32, 64, 128 " in first
    proposed = float(second.split("--object-scale ")[1].split()[0])
    shares = evaluation.level_shares(config, read, 256, 256, CPU, proposed, 100)
    assert 0.3 <= shares[0] <= 0.7
