"""Reading a picture file, one way everywhere: in training, evaluation and drawings."""

import errno
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from ..images import to_rgb
from .errors import InputError

# A long text or colour profile is no reason to refuse a picture.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def read_image(path, size=None):
    """A file of any kind PIL knows -> uint8 (3,h,w) RGB, turned upright as its EXIF says, where that can be read.

    With `size` (height, width), which its annotations give, it stays as it is stored where only that has this size.
    Grey values of more than 8 bits are stretched (see `to_rgb`); of 16-bit colours the upper 8 bits are read. Raises
    InputError if the file cannot be read, or is not of that size.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            stored = load(file)
            try:
                image = ImageOps.exif_transpose(stored)
            except Exception:  # PIL answers damaged EXIF with almost any exception
                image = stored
            if size is not None and image.size != size[::-1] == stored.size:
                image = stored
            pixels = to_rgb(image)
    except Exception as error:  # PIL answers damaged files with almost any exception
        if getattr(error, "errno", 0) == errno.EMFILE:  # too many open files: no fault of this one
            raise
        raise InputError(f"{path}: not readable as an image ({error}); replace it or remove its entry") from None
    if size is not None and pixels.size != size[::-1]:
        found, wanted = f"{pixels.width}x{pixels.height}", f"{size[1]}x{size[0]}"
        raise InputError(f"{path}: is {found}, but its annotations say {wanted}; correct one")
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def load(file):
    """An open picture file -> PIL image with its pixels. A JPEG may lack the mark at its end."""
    image = Image.open(file)
    try:
        image.load()
        return image
    except OSError:
        if image.format != "JPEG":
            raise
        # Perhaps only that mark is missing. Then other bytes before it change no pixel.
        file.seek(0)
        data = file.read().rstrip(b"\xff")
        image, other = (Image.open(io.BytesIO(data + more + b"\xff\xd9")) for more in (b"", b"\x5a\xa5" * 99))
        if not np.array_equal(np.array(image), np.array(other)):
            raise
        return image
