"""Small data sets in COCO layout for the tests, written the plain way."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (210, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220)}


def annotation_path(data, split="train"):
    return Path(data) / "annotations" / f"instances_{split}.json"


def write(data, content, split="train"):
    """Write an annotation file and an empty file for each image that is not there yet -> the path of the former."""
    path = annotation_path(data, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(data) / split
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    for image in content["images"]:
        file = folder / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
    return path


def noise(height, width, seed, low=90, high=160):
    """A grey, noisy picture: uint8 (height,width,3)."""
    return np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)


def random_content(seed, images=6, boxes=25, sides=(40, 120)):
    """COCO content with gaps in the ids, crowd boxes, images without boxes, annotations in no order.

    Coordinates are multiples of 1/4, so that nothing is rounded on the way to float32.
    """
    rng = np.random.default_rng(seed)
    entries = [
        {"id": int(i), "file_name": f"{i}.png", "height": int(h), "width": int(w)}
        for i, h, w in zip(rng.permutation(100)[:images], rng.integers(*sides, images), rng.integers(*sides, images))
    ]
    categories = [{"id": k, "name": f"class {k}"} for k in (17, 3, 90)]
    annotations = []
    for number in range(boxes):
        image = entries[int(rng.integers(0, images - 1))]  # the last one stays without
        x, y = (int(rng.integers(0, 4 * side - 16)) / 4 for side in (image["width"], image["height"]))
        w, h = (int(rng.integers(4, 4 * room + 1)) / 4 for room in (image["width"] - x, image["height"] - y))
        annotations.append({
            "id": 1000 - number, "image_id": image["id"], "category_id": int(rng.choice([3, 17, 90])),
            "bbox": [x, y, w, h], "area": w * h / 2, "iscrowd": int(rng.random() < 0.2),
        })  # fmt: skip
    return {"images": entries, "categories": categories, "annotations": annotations}


def draw_rectangles(data, counts, seed=0, sides=(64, 128)):
    """A set that can be trained on: coloured rectangles on noise, PNG files of `sides`, 1 to 4 boxes each.

    `counts` is {split: number of images}.
    """
    for split, count in counts.items():
        rng = np.random.default_rng([seed, len(split)])
        images, annotations = [], []
        (Path(data) / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            height, width = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
            picture = noise(height, width, [seed, index])
            for _ in range(rng.integers(1, 5)):
                kind = int(rng.integers(0, 3))
                w, h = (int(side) for side in rng.integers(12, 49, 2))
                x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
                picture[y : y + h, x : x + w] = list(COLORS.values())[kind]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": index + 1, "category_id": 5 + 2 * kind,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                })  # fmt: skip
            name = f"{index}.png"
            Image.fromarray(picture).save(Path(data) / split / name)
            images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        categories = [{"id": 5 + 2 * kind, "name": name} for kind, name in enumerate(COLORS)]
        write(data, {"images": images, "annotations": annotations, "categories": categories}, split)
    return Path(data)
