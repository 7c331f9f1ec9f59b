"""The line about what each level learns, on boxes whose level is known by hand."""

import pytest
from folders import write
from helpers import tiny_config

from msad.data import annotations
from msad.engine import levels


def boxes_of(folder, sides, picture=256):
    """Annotations of one picture a box: squares of these sides in the middle of a location's cell at stride 128."""
    images = [{"id": i, "file_name": f"{i}.png", "height": picture, "width": picture} for i in range(len(sides))]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [64 - side / 2, 64 - side / 2, side, side], "iscrowd": 0}
        for i, side in enumerate(sides)
    ]
    write(folder, {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}, "train")
    return annotations.read(folder, "train")


def shares(read, short_side=256, **config):
    learned = levels.boxes_of_levels(tiny_config("high", **config), read, short_side, 256)
    return learned.float().mean(1).tolist()


def test_shares_of_squares_that_are_assigned_by_hand(tmp_path):
    """FCOS at scale 1: level 0 is responsible for farthest sides up to 64 pixels, level 1 for 64 to 128, from points
    less than 1.5 strides from the centre, here (64, 64)."""
    # Side 40: points of stride 8 at 60 and 68 have a farthest side of 24: level 0 only. Those of stride 16 at 56 and 72
    # are 28 away: not level 1's.
    # Side 100: at (60, 60) the farthest is 54: level 0; at (52, 52), in the radius of 12 (exactly 12 is outside), no
    # other. Level 1, at 56 or 40 (24 away, outside): 58: none. Of stride 32, points at 48 and 80: 66, not over 128.
    # Side 124: at 60: 66 is level 1's; at (68, 68) too; level 0 none. Stride 16 at 56: 70: level 1 owns it.
    read = boxes_of(tmp_path, (40, 100, 124))
    assert shares(read, object_scale=1.0) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    # Pictures half as large, or levels responsible for twice the sizes: all on level 0.
    assert shares(read, 128, object_scale=1.0) == shares(read, object_scale=2.0) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("boxes", [1, 3])
def test_pictures_without_boxes_are_not_looked_at(tmp_path, head, boxes):
    """Of 150 pictures a few have a box: not every second one is taken, but these."""
    read = boxes_of(tmp_path, (20,) * 150)
    read.crowd[:] = True
    read.crowd[[1, 77, 149][:boxes]] = False
    line = levels.describe_levels(tiny_config("high", head=head), read, 256, 256)
    assert "nan" not in line and line.count("\n") == 0
    assert f"% of {boxes} boxes learn at" in line


def test_where_the_finest_level_learns_few_boxes_the_line_says_what_to_change(tmp_path):
    for scale, told in ((1.0, False), (0.1, True)):
        read = boxes_of(tmp_path / f"{scale}", (50,) * 20)
        line = levels.describe_levels(tiny_config("high", object_scale=scale), read, 256, 256)
        assert line.startswith("levels    ") and "strides 8, 16, 32, 64, 128" in line and "short side 256" in line
        assert ("--object-scale" in line) == told
