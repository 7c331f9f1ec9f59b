"""A head's outputs -> detections: candidates, the best of each level, non-maximum suppression, the file's pixels."""

from itertools import accumulate

import torch
from torchvision.ops import batched_nms, clip_boxes_to_image

from .heads import SCORE_THRESHOLD

CANDIDATES_PER_LEVEL = 1000
DETECTIONS_PER_IMAGE = 100


def postprocess(head, outputs, map_sizes, frames, originals, threshold=0.0, max_detections=DETECTIONS_PER_IMAGE):
    """A head and its outputs for N images -> one dict of detections per image, as `Detector.detect` gives them.

    `map_sizes` are those [(h,w)] of the five maps, `frames` [(height, width)] those of the images in the pixels that
    the boxes are predicted in, `originals` those of their files, in whose pixels the boxes are returned.
    """
    ends = list(accumulate(height * width * head.anchors for height, width in map_sizes))
    results = []
    for number, ((height, width), original) in enumerate(zip(frames, originals)):
        # Most locations have nothing: on a CPU only those whose best class is above the threshold are decoded. On a GPU
        # the host would have to wait for their number, so all are.
        logits = outputs["logits"][number]
        likely = torch.arange(len(logits), device=logits.device)
        if not logits.is_cuda:
            likely = likely[logits.amax(-1).float().sigmoid() > SCORE_THRESHOLD]
        boxes, scores = head.decode({name: value[number, likely] for name, value in outputs.items()}, map_sizes, likely)
        # A candidate is a pair of a location, whose box has an area within the image, and a class.
        inside = clip_boxes_to_image(boxes, (height, width))
        wanted = (inside[:, 2:] > inside[:, :2]).all(1, keepdim=True) & (scores >= threshold)
        location, labels = (scores * wanted).nonzero(as_tuple=True)
        scores = scores[location, labels]
        # Of each level the best are kept.
        if len(scores) > CANDIDATES_PER_LEVEL:
            best = best_of_levels(scores, likely[location], ends)
            location, labels, scores = location[best], labels[best], scores[best]
        # Non-maximum suppression within each class, of boxes that are clipped only far outside: batched_nms moves the
        # classes apart by offsets, for which no coordinate may be negative, and in which float32 would lose digits.
        far = max(height, width)
        near = boxes[location].double().clamp(-far, 2 * far) + far
        keep = batched_nms(near, scores.double(), labels, head.nms_threshold)[:max_detections]
        # From the branch's frame to the original image's.
        boxes = inside[location[keep]]
        boxes[:, 0::2] *= original[1] / width
        boxes[:, 1::2] *= original[0] / height
        results.append({"boxes": boxes, "scores": scores[keep], "labels": labels[keep]})
    return results


def best_of_levels(scores, location, ends):
    """Scores (S,) of candidates at locations (S,), ascending over all levels, which end at the locations `ends` -> the
    indices of each level's best candidates. It waits for the device once, for how many there are on each level."""
    counts = torch.stack([(location < end).sum() for end in ends]).tolist()
    spans = zip([0, *counts], counts)
    best = [first + scores[first:end].topk(min(end - first, CANDIDATES_PER_LEVEL)).indices for first, end in spans]
    return torch.cat(best).sort().values
