"""What evaluate.py --export wrote, run on pictures without the package msad.

    python .github/exported.py student.pt2 PICTURE...    needs torch, torchvision and Pillow

It prints what is found, best first: picture, class, score from 0 to 1, and the box x1 y1 x2 y2 in the pixels of the
upright picture. Copy from here what a program of yours needs: `load` once, then `find` for each picture. It finds what
`model.detect` does, except where a level has more than 1 000 candidates, and refuses more than 8 bits a value.
"""

import json
import sys
from fractions import Fraction

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor


def load(path):
    """A file -> the network, images (N,3,h,w) uint8 to boxes (N,R,4) and scores (N,R,K), and a dict of what it needs:
    "classes", the sizes of its input, "nms_iou" and others, see msad/engine/export.py."""
    extra_files = {"msad.json": ""}
    network = torch.export.load(path, extra_files=extra_files).module()
    return network, json.loads(extra_files["msad.json"])


def resize(picture, about):
    """A PIL image in RGB -> the network's input (1,3,h,w): at the size it was made for, or at half of that."""
    zoom = min(Fraction(about["short_side"], min(picture.size)), Fraction(about["long_side"], max(picture.size)))
    width, height = (max(1, int(side * zoom)) for side in picture.size)
    if about["downsample"] == "area":
        filter = Image.Resampling.HAMMING if height <= 1.25 * picture.height else Image.Resampling.BILINEAR
        return pil_to_tensor(picture.resize((-(-width // 2), -(-height // 2)), filter))[None]
    pixels = F.interpolate(pil_to_tensor(picture)[None], (height, width), mode="bilinear", antialias=True)
    return pixels[..., ::2, ::2] if about["downsample"] == "nearest" else pixels


def find(network, about, picture):
    """The objects in a PIL image in RGB, best first: boxes (D,4) in its pixels, scores (D,), labels (D,)."""
    pixels = resize(picture, about)
    boxes, scores = (output[0] for output in network(pixels))
    inside = clip_boxes_to_image(boxes, pixels.shape[-2:])
    location, label = (scores * (inside[:, 2:] > inside[:, :2]).all(1, keepdim=True)).nonzero(as_tuple=True)
    scores, far = scores[location, label], max(pixels.shape[-2:])  # NMS wants no negative sides, and none too large
    keep = batched_nms(boxes[location].double().clamp(-far, 2 * far) + far, scores.double(), label, about["nms_iou"])
    keep = keep[: about["detections"]]
    zoom = torch.tensor(picture.size) / torch.tensor([pixels.shape[-1], pixels.shape[-2]])
    return inside[location[keep]] * zoom.repeat(2), scores[keep], label[keep]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    network, about = load(sys.argv[1])
    for path in sys.argv[2:]:
        picture = ImageOps.exif_transpose(Image.open(path))  # upright, as a camera's pictures are seen
        if picture.mode[0] in "IF":
            sys.exit(f"{path}: has more than 8 bits a value; stretch them to 0-255 first, as msad does")
        found = find(network, about, picture.convert("RGB"))
        for box, score, label in zip(*(values.tolist() for values in found)):
            print(path, about["classes"][label]["name"], f"{score:.4f}", *(f"{side:.2f}" for side in box))
