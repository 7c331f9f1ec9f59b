"""Reading a picture file, one way everywhere: in training, evaluation and drawings."""

import errno
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
        # Given a name, PIL would map some TIFFs into memory, and mix up the pixels of those that are turned.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            image = Image.open(file)
            image.load()
            pixels = to_rgb(turn(image, size))
    except Exception as error:  # PIL answers damaged files with almost any exception
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.EMFILE:  # too many open files
            raise  # no fault of this file
        mend = "save it anew, smaller if it is too large, remove its entry, or run git lfs pull if it is a pointer"
        raise InputError(f"{path}: not readable as an image ({error}); {mend}") from None
    if size not in (None, (pixels.height, pixels.width)):
        found, wanted = f"{pixels.width}x{pixels.height}", f"{size[1]}x{size[0]}"
        raise InputError(f"{path}: is {found}, but its annotations say {wanted}; correct one")
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def turn(stored, size):
    """A PIL image -> upright as its EXIF says, or as it is stored where that cannot be read or only that fits `size`.

    PIL turns a TIFF itself while it reads it, so a TIFF is upright whatever its size.
    """
    try:
        stored.getexif()  # PIL remembers it
        stored.info.pop("exif", None)  # else PIL would write it anew, and fail where any other entry is damaged
        upright = ImageOps.exif_transpose(stored)
    except Exception:  # almost any, of damaged EXIF
        return stored
    fits = lambda image: size in (None, (image.height, image.width))
    return stored if fits(stored) and not fits(upright) else upright
