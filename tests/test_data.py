"""From pictures to batches: sizes, resizing, where boxes go, and which images make up a batch."""

import itertools
import math
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import noise, random_content, write
from PIL import Image

from msad.data import annotations
from msad.data.dataset import CocoDataset, collate, eval_batches, loader, open_data, train_batches
from msad.data.errors import InputError
from msad.images import fitted_size, pad_to_multiple, resize


def test_fitted_size_is_the_exact_scale_rounded_down():
    rng = random.Random(0)
    sizes = [(1, 1), (1, 50), (50, 1), (1, 4000), (10, 500), (480, 640), (427, 640), (333, 200), (101, 5050)]
    sizes += [(rng.randint(1, 2000), rng.randint(1, 2000)) for _ in range(500)]
    for height, width in sizes:
        for short_side, long_side in ((800, 1333), (256, 512), (640, 1333), (128, 128), (7, 9)):
            scale = min(Fraction(short_side, min(height, width)), Fraction(long_side, max(height, width)))
            expected = tuple(max(1, math.floor(side * scale)) for side in (height, width))
            assert fitted_size(height, width, short_side, long_side) == expected, (height, width)


def natural_picture(side):
    """(3,side,side) float noise with the spectrum of photographs: amplitude in inverse proportion to frequency."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    noise = np.random.default_rng(0).normal(size=(3, side, side))
    picture = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (side, side))
    return torch.from_numpy((127 + 45 * (picture - picture.mean()) / picture.std()).clip(0, 255)).float()


@pytest.mark.parametrize("scale", [0.4, 0.8, 1, 1.1, 1.8])
def test_half_size_in_one_step_is_close_to_the_mean_of_2x2_pixels(scale):
    picture = natural_picture(160)
    half = (round(80 * scale),) * 2
    full = resize(picture, (2 * half[0],) * 2)
    rms = lambda low: (low - F.avg_pool2d(full[None], 2)[0]).pow(2).mean().sqrt().item()
    bilinear = F.interpolate(picture[None], half, mode="bilinear", antialias=True)[0]
    planes = [Image.fromarray(plane.numpy()).resize(half, Image.Resampling.HAMMING) for plane in picture]
    hamming = torch.from_numpy(np.stack(planes))
    ours = rms(resize(picture, tuple(full.shape[1:]), "area"))
    assert ours < 0.6 * rms(bilinear if scale <= 1.1 else hamming), "the better of the two filters at this scale"
    assert ours < 0.35 * rms(full[:, ::2, ::2])
    assert resize(picture, tuple(full.shape[1:]), "nearest").equal(full[:, ::2, ::2])


def test_padding_is_zero_to_the_right_and_below_up_to_the_multiple():
    images = [torch.full((3, h, w), 7, dtype=torch.uint8) for h, w in ((5, 70), (64, 3), (1, 1))]
    batch = pad_to_multiple(images, 64)
    assert batch.shape == (3, 3, 64, 128) and batch.dtype == torch.uint8
    for row, image in zip(batch, images):
        height, width = image.shape[1:]
        assert (row[:, :height, :width] == 7).all() and row.sum() == 7 * image.numel()


def one_rectangle(data, height, width, box, seed):
    """A data set of one dark picture with one bright box, and a crowd and a partly outside box that are not drawn."""
    picture = noise(height, width, seed, 0, 30)
    x, y, w, h = box
    picture[y : y + h, x : x + w] = (250, 240, 30)
    kinds = [{"bbox": box}, {"bbox": [1, 1, 3, 3], "iscrowd": 1}, {"bbox": [-5, -4, width, height + 100]}]
    content = {
        "images": [{"id": 8, "file_name": "a.png", "height": height, "width": width}],
        "categories": [{"id": 2, "name": "bright"}],
        "annotations": [{"image_id": 8, "category_id": 2} | kind for kind in kinds],
    }
    write(data, content)
    Image.fromarray(picture).save(data / "train" / "a.png")
    return annotations.read(data, "train")


@pytest.mark.parametrize("low", [None, "area", "nearest"])
def test_boxes_follow_the_picture_through_resizing_and_mirroring(tmp_path, low):
    rng = random.Random(0)
    mirrored = 0
    for trial in range(12):
        height, width = rng.randint(60, 200), rng.randint(60, 200)
        w, h = rng.randint(20, width // 2), rng.randint(20, height // 2)
        box = [rng.randint(0, width - w), rng.randint(0, height - h), w, h]
        truth = one_rectangle(tmp_path, height, width, box, trial)
        settings = (truth, (96, 128, 160, 201), 260, low)
        image, boxes, labels, index = CocoDataset(*settings, flip=True)[0, f"seed {trial}"]
        plain, plain_boxes, _, _ = CocoDataset(*settings, flip=False)[0, f"seed {trial}"]
        frame = [side * (2 if low else 1) for side in image.shape[:0:-1]]  # width, height in high-resolution pixels
        expected = [fitted_size(height, width, side, 260) for side in settings[1]]
        expected = [tuple(math.ceil(side / 2) for side in size) for size in expected] if low else expected
        assert tuple(image.shape[1:]) in expected and labels.tolist() == [0, 0] and index == 0

        bright = image[0].float() > 130
        rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
        seen = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * (2 if low else 1)
        assert (boxes[0] - seen).abs().max() <= (2 if low else 1.01)
        cut = [0, 0, (width - 5) / width * frame[0], frame[1]]  # of the box that reaches outside
        if image.equal(plain):
            assert boxes.equal(plain_boxes)
        else:
            mirrored += 1
            assert image.equal(plain.flip(2))
            cut = [frame[0] - cut[2], 0, frame[0], frame[1]]
        assert torch.allclose(boxes[1], torch.tensor(cut, dtype=torch.float32), atol=1e-3)
    assert 2 <= mirrored <= 10


def test_items_are_the_same_whoever_reads_them(tmp_path):
    content = random_content(5)
    write(tmp_path, content)
    for number, image in enumerate(content["images"]):
        picture = noise(image["height"], image["width"], number, 0, 255)
        Image.fromarray(picture).save(tmp_path / "train" / image["file_name"])
    dataset = CocoDataset(annotations.read(tmp_path, "train"), (64, 80, 96), 200, flip=True)
    order = [[(0, "0/0"), (3, "0/1")], [(2, "0/2"), (1, "0/3")], [(0, "0/4"), (4, "0/5")]]
    alone = list(loader(dataset, order, 64, 0, torch.device("cpu")))
    workers = list(loader(dataset, order, 64, 2, torch.device("cpu")))
    # On macOS and Windows all that a worker needs is pickled.
    reader = loader(dataset, order, 64, 1, torch.device("cpu"))
    sent = pickle.loads(pickle.dumps((reader.dataset, reader.collate_fn, reader.worker_init_fn)))
    fresh = [sent[1]([sent[0][item] for item in items]) for items in order]
    backwards = list(loader(dataset, order[::-1], 64, 0, torch.device("cpu")))[::-1]
    for items, one, *others in zip(order, alone, workers, fresh, backwards):
        assert one.images.dtype == torch.uint8 and one.indices == [index for index, _ in items]
        assert one.images.equal(collate([dataset[item] for item in items], 64).images)
        for other in others:
            assert one.images.equal(other.images) and one.sizes == other.sizes and one.indices == other.indices
            assert one.boxes.equal(other.boxes) and one.labels.equal(other.labels) and one.counts == other.counts
    assert not alone[0].images[0].equal(alone[2].images[0]), "another draw of the same picture"


def many_images(data, seed, images=23):
    """Annotations of many sizes, some without boxes and some with crowd boxes only; no pictures."""
    content = random_content(seed, images, boxes=60)
    empty = {image["id"] for image in content["images"][::5]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in empty]
    crowded = {image["id"] for image in content["images"][1::5]}
    for a in content["annotations"]:
        a["iscrowd"] = int(a["image_id"] in crowded)
    write(data, content)
    trainable = {a["image_id"] for a in content["annotations"]} - crowded
    return annotations.read(data, "train"), {i for i, e in enumerate(content["images"]) if e["id"] in trainable}


def first(batches, count):
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("seed", range(2))
def test_training_covers_every_image_with_boxes_once_an_epoch(tmp_path, seed):
    truth, trainable = many_images(tmp_path, seed)
    wide = {i for i in trainable if truth.sizes[i][1] >= truth.sizes[i][0]}
    batches = first(train_batches(truth, 3, seed), 60)
    assert all(len(batch) == 3 for batch in batches)
    for group in (wide, trainable - wide):
        mine = [batch for batch in batches if batch[0][0] in group]
        assert all(index in group for batch in mine for index, _ in batch), "one orientation per batch"
        # Images of an orientation come epoch after epoch, none left out, none twice, across batch borders.
        order = [index for batch in mine for index, _ in batch]
        epochs = [order[i : i + len(group)] for i in range(0, len(order), len(group))]
        assert len(epochs) > 2 and all(set(epoch) == group for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1]) and set(epochs[-1]) <= group
        assert len(set(map(tuple, epochs[:-1]))) > 1, "shuffled anew"
    draws = [draw for batch in batches for _, draw in batch]
    assert len(set(draws)) == len(draws), "each draw of an image has its own seed"


def test_training_batches_are_a_function_of_seed_and_position(tmp_path):
    truth, _ = many_images(tmp_path, 1)
    whole = first(train_batches(truth, 4, seed=5), 40)
    assert first(train_batches(truth, 4, seed=5), 40) == whole
    other = first(train_batches(truth, 4, seed=6), 40)
    assert [[i for i, _ in batch] for batch in other] != [[i for i, _ in batch] for batch in whole]
    for batch, processes in itertools.product((4, 8), (2, 3)):
        parts = [first(train_batches(truth, batch, 5, rank, processes), 20) for rank in range(processes)]
        joined = [sum(pieces, []) for pieces in zip(*parts)]
        assert joined == first(train_batches(truth, batch, 5), 20)
        assert all(len(piece) in (batch // processes, batch // processes + 1) for part in parts for piece in part)


@pytest.mark.parametrize("change, why", [
    ({"iscrowd": 1}, "25 boxes (25 crowd)"),
    ({"bbox": [3, 3, 0, 5]}, "left out: 25 boxes without area"),
    (None, "6 images (6 without boxes), 0 boxes (0 crowd)"),
])  # fmt: skip
def test_a_set_without_a_box_to_learn_from_is_refused_with_the_reason(tmp_path, change, why):
    content = random_content(0)
    content["annotations"] = [a | change for a in content["annotations"]] if change else []
    file = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        open_data(tmp_path, ["train"])
    assert str(caught.value).startswith(f"{file}: no image has a box to learn from: ") and why in str(caught.value)


@pytest.mark.parametrize("low", [None, "area", "nearest"])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_evaluation_covers_every_image_once_in_batches_padded_alike(tmp_path, low, processes):
    truth, _ = many_images(tmp_path, 3)
    multiple = 32 if low else 64
    dataset = CocoDataset(truth, (160,), 300, low)
    parts = [eval_batches(dataset, 4, multiple, rank, processes) for rank in range(processes)]
    assert sorted(index for part in parts for batch in part for index, _ in batch) == list(range(len(truth)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for batch in itertools.chain(*parts):
        padded = set()
        for index, _ in batch:
            size = fitted_size(*map(int, truth.sizes[index]), 160, 300)
            padded.add(tuple(math.ceil(side / (2 if low else 1) / multiple) for side in size))
        assert len(padded) == 1 and 1 <= len(batch) <= 4
