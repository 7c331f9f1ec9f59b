"""Which boxes of a data set each level of the aligned pyramids learns."""

import torch

from .. import align
from ..images import fitted_size
from ..models import HEADS

PICTURES = 100  # that are looked at, evenly spread over those to train on


def describe_levels(config, annotations, short_side, long_side):
    """A line on how many of the boxes each aligned level learns, and on what to change if the finest learns few."""
    learned = boxes_of_levels(config, annotations, short_side, long_side)
    shares = 100 * learned.float().mean(1)
    percent, strides = (", ".join(f"{number:.0f}" for number in numbers) for numbers in (shares, align.STRIDES))
    line = f"levels    {percent} % of {learned.shape[1]} boxes learn at strides {strides} (some at several)"
    few = "; few at the first, where alignment helps: try a larger --object-scale or smaller sides"
    return f"{line}, short side {short_side}{few if shares[0] < 10 else ''}"


def boxes_of_levels(config, annotations, short_side, long_side):
    """Which boxes of a sample of pictures each of the five levels learns: bool (5,M), M over all pictures.

    A level learns a box if the head's own assignment trains some location (or anchor) of it to find that box, in
    pictures of this short side in H's pixels.
    """
    head = HEADS[config.head](32, len(config.classes), 32, 1, config.object_scale)
    trainable = annotations.trainable()
    learned = []
    for index in trainable[:: -(-len(trainable) // PICTURES)]:
        height, width = fitted_size(*map(int, annotations.sizes[index]), short_side, long_side)
        boxes, _ = annotations.objects(index)
        boxes = torch.from_numpy(boxes) * (height / int(annotations.sizes[index][0]))
        sizes = [(-(-height // stride), -(-width // stride)) for stride in align.STRIDES]
        names = len(config.classes) + 1 + torch.arange(len(boxes))  # each box has a label of its own
        labels = head.assign(sizes, [boxes], [names])["labels"][0]
        levels = labels.split([height * width * head.anchors for height, width in sizes])
        learned.append(torch.stack([torch.isin(names, level) for level in levels]))
    return torch.cat(learned, dim=1)
