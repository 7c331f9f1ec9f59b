"""Files: what the user gave and cannot be used, tensors and pictures nobody vouches for, and writing without a loss."""

import contextlib
import errno
import io
import os
import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# How EXIF's orientations bring a stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
# A long text or colour profile is no reason to refuse a picture.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and the mend."""


def read_tensors(path):
    """Whatever a PyTorch file holds, loaded without running its code. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused: not a file of plain tensors (damaged, or it carries code)") from None
    except Exception as error:  # the unpickler answers damaged bytes with almost any exception
        raise InputError(f"{path}: not a PyTorch file, or damaged ({type(error).__name__})") from None


def read_image(path, size=None, remarks=None):
    """A file of any kind PIL knows -> uint8 (3,h,w) RGB, turned upright as its EXIF says, where that can be read.

    Grey values of more than 8 bits (16- and 32-bit integers, floats) are stretched: a picture's lowest becomes 0, its
    highest 255. Of 16-bit colours the upper 8 bits are read. Raises InputError if the file cannot be read, or is not of
    `size` (height, width), upright or as it is stored. What was noticed is added to the list `remarks`.
    """
    remarks = [] if remarks is None else remarks
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            image, orientation = decode(path, remarks)
        pixels = to_rgb(image)
    except Exception as error:  # PIL answers damaged files with almost any exception
        if getattr(error, "errno", 0) == errno.EMFILE:  # too many open files: no fault of this one
            raise
        raise InputError(f"{path}: not readable as an image ({error}); replace it or remove its entry") from None
    upright = pixels.transpose(TURNS[orientation]) if orientation in TURNS else pixels
    if size is not None and orientation in TURNS:
        if pixels.size == upright.size == size[::-1]:
            remarks.append("turned as their EXIF says; their boxes would fit the picture as it is stored, too")
        elif pixels.size == size[::-1]:
            upright = pixels
            remarks.append("left as they are stored: their annotations have that size, and not the one EXIF says")
    if size is not None and upright.size != size[::-1]:
        raise InputError(
            f"{path}: is {upright.width}x{upright.height}, but its annotations say {size[1]}x{size[0]}; correct one"
        )
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def decode(path, remarks):
    """A picture file -> PIL image as it is stored, with its pixels, and its orientation as from `read_orientation`."""
    with open(path, "rb") as file:  # given a name, Pillow maps some into memory, and mixes up turned TIFFs
        try:
            return load(file, remarks)
        except Exception:  # almost any, also where nothing but metadata is damaged
            file.seek(0)
            if not file.read(8).startswith((b"\xff\xd8", PNG)):
                raise
            file.seek(0)
            loaded = load(io.BytesIO(strip_metadata(file.read())), remarks)
    remarks.append("with damaged metadata, so perhaps not turned")
    return loaded


def load(file, remarks):
    """As `decode`, of an open file."""
    image = Image.open(file)
    turned = image.getexif().get(0x0112) if image.format == "TIFF" else None
    wide = ";16" in str(image.tile)
    try:
        image.load()
    except OSError:
        if image.format != "JPEG":
            raise
        # Perhaps only the mark at its end is missing. Then bytes more before that mark change no pixel.
        file.seek(0)
        data = file.read().rstrip(b"\xff")
        image, other = (Image.open(io.BytesIO(data + more + b"\xff\xd9")) for more in (b"", b"\x5a\xa5" * 99))
        if not np.array_equal(np.array(image), np.array(other)):
            raise
        remarks.append("without the mark at the end of their file, so perhaps not in their full quality")
    # Of colours Pillow reads the upper 8 bits. Where values leave these out, hardly anything would be seen.
    if wide and len(image.getbands()) > 1 and max(high for _, high in image.getextrema()[:3]) < 64:
        raise ValueError("its 16-bit colours use the lower bits only, which are not read: save 8 bits per colour")
    if turned in TURNS:  # Pillow turns a TIFF itself, and forgets that it did: back to how it is stored
        return image.transpose(TURNS[{6: 8, 8: 6}.get(turned, turned)]), turned
    return image, read_orientation(image, remarks)


def strip_metadata(data):
    """The bytes of a JPEG or PNG without what no pixel needs: profiles, texts, comments, and EXIF, unless that of a PNG
    is sound."""
    if data.startswith(PNG):
        kept, at = bytearray(PNG), len(PNG)
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kind, checksum = data[at + 4 : at + 8], zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big")
            if kind[:1].isupper() or kind == b"eXIf" and checksum == data[end - 4 : end]:  # capital: no metadata
                kept += data[at:end]
            at = end
        return kept
    kept, at = data[:2], 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:  # until the pixels begin
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):
            kept += data[at:end]
        at = end
    return kept + data[at:]


def read_orientation(image, remarks):
    """EXIF's orientation, 1 to 8, or None where there is none to be had."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception as error:  # PIL answers damaged metadata with almost any exception
        remarks.append(f"with damaged EXIF, so not turned ({type(error).__name__})")
        return None
    return orientation[0] if isinstance(orientation, tuple) and orientation else orientation


def to_rgb(image):
    """A PIL image of any mode -> one of mode RGB. See `read_image`."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("some of its values are not finite")
        low, high = values.min(), values.max()
        image = Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    return image.convert("RGB")


def write_tensors(path, content):
    """Save to a file that is replaced in one step, so a crash or a full disk leaves the previous one whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); what stood there before is untouched") from None


def open_locked(path):
    """A run's file opened for appending, and locked until this process ends, however it ends.

    Read it through what is returned only: opening and closing it once more in this process would release the lock.
    Raises InputError if another process has it locked, or if it cannot be written. On Windows nothing is locked.
    """
    mend = "choose another --out"
    with writing(path, mend):
        file = open(path, "a+b")
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{path.parent}: in use by another run; {mend}") from None
    return file


@contextlib.contextmanager
def blamed(path, fault="a damaged checkpoint"):
    """What goes wrong with values that were read from a file is that file's fault: InputError, one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: {fault} ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def accessing(path, fault, mend=""):
    """What the system refuses with a file or folder of the user's is one line, an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {fault} ({error.strerror or error}){mend}") from None


def writing(path, mend="choose another place"):
    """The same, of what the user asked to be written."""
    return accessing(path, "cannot be written", f"; {mend}")
