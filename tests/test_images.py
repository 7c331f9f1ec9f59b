"""Image files of every kind against the pixels written into them, and files that are none."""

import io
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from msad.files import InputError
from msad.data import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 18, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
BLOCKS = PIXELS[:2, :3].repeat(16, 0).repeat(16, 1)  # even blocks of 16 pixels, which JPEG keeps
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def read(path):
    """(h,w,3) integers."""
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(int)


UPRIGHT = {  # EXIF orientation -> what turns the stored pixels into those to be seen
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientations_are_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert (read(tmp_path / "a.png") == UPRIGHT[orientation](PIXELS)).all()
    Image.fromarray(BLOCKS).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert np.abs(read(tmp_path / "a.jpg") - UPRIGHT[orientation](BLOCKS).astype(int)).max() <= 3


def palette_image():
    image = Image.fromarray(GREY % 4)
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 250, 5, 77, 88, 99])
    return image, np.array([[10, 20, 30], [200, 0, 0], [0, 250, 5], [77, 88, 99]])[GREY % 4]


def three(grey):
    return np.stack([grey] * 3, -1)


KINDS = {
    "grey": lambda: (Image.fromarray(GREY), three(GREY)),
    "1 bit": lambda: (Image.fromarray(GREY > 99), three(np.where(GREY > 99, 255, 0))),
    "palette": palette_image,
    "grey with alpha": lambda: (Image.merge("LA", [Image.fromarray(PIXELS[..., c]) for c in (0, 1)]), three(GREY)),
    "RGBA": lambda: (Image.fromarray(np.concatenate([PIXELS, PIXELS[..., :1] // 2], -1)), PIXELS),
    "16 bit grey": lambda: (Image.fromarray(GREY.astype(np.uint16) * 256 + 200), three(GREY)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_png_of_any_kind_gives_the_pixels_written(tmp_path, kind):
    image, expected = KINDS[kind]()
    image.save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == expected).all()
    image.save(tmp_path / "b.png", exif=ROTATED)
    assert (read(tmp_path / "b.png") == np.rot90(expected, -1)).all()


def test_cmyk_and_grey_jpeg(tmp_path):
    ink = np.concatenate([BLOCKS, BLOCKS[::-1, :, :1]], -1)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.jpg", quality=98)
    c, m, y, k = ink.astype(float).transpose(2, 0, 1)
    expected = np.stack([(255 - part) * (255 - k) / 255 for part in (c, m, y)], -1)
    assert np.abs(read(tmp_path / "a.jpg") - expected).max() <= 6
    Image.fromarray(BLOCKS[..., 0]).save(tmp_path / "b.jpg", quality=98)
    assert np.abs(read(tmp_path / "b.jpg") - three(BLOCKS[..., 0].astype(int))).max() <= 3


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_refused(path, expected="as an image"):
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    whole = encoded(Image.fromarray(BLOCKS), "JPEG")
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:20], b"\x89PNG\r\n\x1a\n" + whole):
        path.write_bytes(content)
        assert_refused(path)
    assert_refused(tmp_path)
    assert_refused(tmp_path / "absent.png")
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_refused(path, "decompression bomb")


def test_a_size_other_than_the_annotations_is_refused_with_both(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (13, 18)).shape == (3, 13, 18)
    for size in ((18, 13), (13, 17)):
        with pytest.raises(InputError, match=f"a.png: is 18x13, but its annotations say {size[1]}x{size[0]}"):
            read_image(tmp_path / "a.png", size)
    Image.fromarray(PIXELS).save(tmp_path / "b.png", exif=ROTATED)
    assert read_image(tmp_path / "b.png", (18, 13)).shape == (3, 18, 13), "the annotations speak of the upright picture"


@pytest.mark.parametrize("tag, kind", [(0x0100, 1), (0x0128, 7), (0x011A, 2), (0x010F, 11)])
def test_a_rotated_photo_with_a_malformed_exif_entry_is_read_or_refused(tmp_path, tag, kind):
    entries = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0") + struct.pack("<HHI4s", tag, kind, 1, b"a\0\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.fromarray(BLOCKS).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    try:
        pixels = read(tmp_path / "a.jpg")
    except InputError as error:
        assert "a.jpg" in str(error)
    else:
        assert np.abs(pixels - np.rot90(BLOCKS, -1).astype(int)).max() <= 3


def test_random_damage_to_files_never_gives_anything_but_pixels_or_a_clear_error(tmp_path):
    rng = random.Random(0)
    image, path = Image.fromarray(PIXELS), tmp_path / "a"
    originals = [
        encoded(image, "JPEG", exif=ROTATED), encoded(image, "PNG", exif=ROTATED), encoded(image.convert("P"), "PNG"),
        encoded(image, "BMP"), encoded(image.convert("P"), "GIF"), encoded(image, "WEBP"),
    ]  # fmt: skip
    outcomes = {True: 0, False: 0}
    for _ in range(500):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 2, 5))):
            content[rng.randrange(min(len(content), rng.choice((60, 10**6))))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            outcomes[read_image(path).shape[0] == 3] += 1
        except InputError as error:
            assert str(path) in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 50, outcomes
