"""Image files of every kind against the pixels written into them, files whose metadata are damaged, and files that are
no images."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from msad.data.errors import InputError
from msad.data.reading import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 18, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
BLOCKS = PIXELS[:2, :3].repeat(16, 0).repeat(16, 1)  # even blocks of 16 pixels, which JPEG keeps
ROTATED = Image.Exif()  # by EXIF's orientation 6
ROTATED[0x0112] = 6


def read(path, size=None):
    """(h,w,3) integers."""
    image = read_image(path, size)
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
    packet = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    Image.fromarray(PIXELS).save(tmp_path / "b.webp", xmp=packet.encode(), lossless=True)
    for name in ("a.png", "b.webp"):
        assert (read(tmp_path / name) == UPRIGHT[orientation](PIXELS)).all()
    Image.fromarray(BLOCKS).save(tmp_path / "c.jpg", exif=exif, quality=95, subsampling=0)
    assert np.abs(read(tmp_path / "c.jpg") - UPRIGHT[orientation](BLOCKS).astype(int)).max() <= 3


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
}


@pytest.mark.parametrize("kind", KINDS)
def test_png_of_any_kind_gives_the_pixels_written(tmp_path, kind):
    image, expected = KINDS[kind]()
    image.save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == expected).all()
    image.save(tmp_path / "b.png", exif=ROTATED)
    assert (read(tmp_path / "b.png") == np.rot90(expected, -1)).all()


RAMP = np.linspace(0, 1, 13 * 18).reshape(13, 18)
DEPTHS = {  # values of more than 8 bits
    "16 bits": (RAMP * 65535).astype(np.uint16),
    "12 of 16 bits, upside down": (RAMP[::-1] * 4095).astype(np.uint16),
    "big-endian": (RAMP * 4095).astype(">u2"),
    "floats, 0 to 1": RAMP.astype(np.float32),
    "floats, degrees": (RAMP * 60 - 20).astype(np.float32),
}


def assert_stretched(path, values):
    """The lowest value is 0, the highest 255, what lies between in proportion, in whole numbers."""
    low, high = float(values.min()), float(values.max())
    exact = three((values.astype(float) - low) * 255 / (high - low))
    assert np.abs(read(path) - exact).max() <= 0.5 + 1e-4


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", DEPTHS)
def test_more_than_8_bits_are_stretched_to_the_whole_range(tmp_path, kind):
    values = DEPTHS[kind]
    for ending in ("tif", "png") if values.dtype == np.uint16 else ("tif",):
        Image.fromarray(values).save(tmp_path / f"a.{ending}")
        assert_stretched(tmp_path / f"a.{ending}", values)
        Image.fromarray(values).save(tmp_path / f"b.{ending}", exif=ROTATED)
        assert_stretched(tmp_path / f"b.{ending}", np.rot90(values, -1))
        Image.fromarray(np.full_like(values, 7)).save(tmp_path / f"c.{ending}")
        assert (read(tmp_path / f"c.{ending}") == 0).all(), "a picture of one value"


@pytest.mark.parametrize("kind", ["L", "P", "RGB", "I;16", "F"])
def test_a_tiff_is_turned_upright_however_it_is_stored(tmp_path, kind):
    """Pillow would map plain ones of one channel into memory, and mix up their pixels."""
    image = Image.fromarray(GREY.astype(np.uint16)) if kind == "I;16" else Image.fromarray(PIXELS).convert(kind)
    image.save(tmp_path / "a.tif")
    upright = read(tmp_path / "a.tif")
    for orientation, turn in UPRIGHT.items():
        image.save(tmp_path / "b.tif", tiffinfo={0x0112: orientation})
        assert (read(tmp_path / "b.tif") == turn(upright)).all(), orientation


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_refused(path, expected="as an image", size=None):
    with pytest.raises(InputError) as caught:
        read_image(path, size)
    assert str(path) in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    whole = encoded(Image.fromarray(BLOCKS), "JPEG")
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:20], b"\x89PNG\r\n\x1a\n" + whole):
        path.write_bytes(content)
        assert_refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert_refused(path, "run git lfs pull")
    assert_refused(tmp_path)
    assert_refused(tmp_path / "absent.png")
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_refused(path, "exceeds limit of 200 pixels, could be decompression bomb DOS attack.); save it anew, smaller")
    for value in (np.nan, np.inf):
        Image.fromarray(np.array([[0, 1, value]], np.float32)).save(tmp_path / "a.tif")
        assert_refused(tmp_path / "a.tif", "not finite")


def entry(tag, kind, count, value):
    """An entry of EXIF: kind 1 bytes, 2 text, 3 16 bits, 4 32 bits, 5 fraction, 7 anything, 11 float."""
    return struct.pack("<HHI4s", tag, kind, count, value)


def exif(*entries, tail=b""):
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + tail


def after(entries):
    """Where what follows so many entries begins."""
    return struct.pack("<I", 8 + 2 + 12 * entries + 4)


TURNED = entry(0x0112, 3, 1, b"\6\0\0\0")
DAMAGED_EXIF = {  # -> whether the orientation, 6 in all of them, is still to be had
    "cut off": (exif(TURNED, entry(0x010F, 2, 40, after(2)))[:-3], True),
    "an IFD that follows itself": (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + TURNED + struct.pack("<I", 8), True),
    "resolution n/0": (exif(TURNED, entry(0x011A, 5, 1, after(2)), tail=struct.pack("<II", 72, 0)), True),
    "an IFD outside": (exif(TURNED, entry(0x8769, 4, 1, struct.pack("<I", 99_999))), True),
    "a pair of orientations": (exif(entry(0x0112, 3, 2, b"\6\0\6\0")), True),
    "orientation as text": (exif(entry(0x0112, 2, 2, b"6\0\0\0")), False),
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("case", DAMAGED_EXIF)
def test_pixels_are_read_under_damaged_exif_and_turned_where_it_tells(tmp_path, case, kind):
    block, turned = DAMAGED_EXIF[case]
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    Image.fromarray(BLOCKS).save(tmp_path / "a", kind, exif=block, **options)
    expected = np.rot90(BLOCKS, -1) if turned else BLOCKS
    assert np.abs(read(tmp_path / "a") - expected.astype(int)).max() <= (3 if kind == "JPEG" else 0)


def test_a_png_with_large_texts_and_a_large_profile_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(32, 127, 1_500_000, dtype=np.uint8).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("one", noise.decode(), zip=True)
    info.add_text("two", "x" * 70_000_000, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info, icc_profile=bytes(1_500_000) + noise)
    assert (read(tmp_path / "a.png") == PIXELS).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6])
def test_a_picture_stays_as_stored_where_only_that_has_the_annotated_size(tmp_path, orientation, kind):
    """But not a TIFF, which Pillow turns while it reads it: then one line gives both sizes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, pixels in {"oblong": PIXELS, "square": PIXELS[:, :13]}.items():
        Image.fromarray(pixels).save(tmp_path / name, kind, exif=exif, **{"WEBP": {"lossless": True}}.get(kind, {}))
    turn, across = UPRIGHT[orientation], orientation > 4
    assert (read(tmp_path / "oblong", (18, 13) if across else (13, 18)) == turn(PIXELS)).all()
    assert (read(tmp_path / "square", (13, 13)) == turn(PIXELS[:, :13])).all(), "where both fit, upright"
    other = (13, 18) if across else (18, 13)
    if across and kind != "TIFF":
        assert (read(tmp_path / "oblong", other) == PIXELS).all()
    else:
        assert_refused(
            tmp_path / "oblong", f"is {other[0]}x{other[1]}, but its annotations say {other[1]}x{other[0]}", other
        )
