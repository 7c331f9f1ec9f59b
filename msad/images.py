"""Pictures to network input: sizes, resizing, padding, and the forms of a picture that `detect` takes.

Sizes follow the field's rule: the short side is brought to a wanted length unless that makes the long side too long.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def fitted_size(height, width, short_side, long_side):
    """The size (height, width) to which an image is resized: whole pixels, rounded down, at least 1."""
    short, long = sorted((height, width))
    if long * short_side <= long_side * short:
        short, long = short_side, long * short_side // short
    else:
        short, long = max(1, short * long_side // long), long_side
    return (short, long) if height <= width else (long, short)


def resize(image, size, downsample=None):
    """Bring an image (3,h,w), uint8 or float, to `size` (height, width) in H's pixels.

    With `downsample` ("area" or "nearest") the result is L: the image straight at half of `size`. In training L is the
    image at `size`, downsampled. In one step a Hamming filter comes closest to that for "area", or, where H enlarges
    the image by more than a quarter, the bilinear one. The step is Pillow's, so that others can make the same pixels
    without this package. "nearest", the authors' choice, takes two steps.
    """
    if downsample == "nearest":
        return resize(image, size)[:, ::2, ::2]
    kernel = Image.Resampling.BILINEAR if size[0] > 1.25 * image.shape[1] else Image.Resampling.HAMMING
    if downsample == "area":
        size = tuple(-(-side // 2) for side in size)
    if size == tuple(image.shape[1:]):
        return image
    if downsample == "area":
        planes = [Image.fromarray(plane.cpu().numpy()).resize(size[::-1], kernel) for plane in image]
        return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).to(image.device)
    pixels = image.cpu() if image.dtype == torch.uint8 else image  # CUDA cannot resize bytes
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].to(image.device)


def pad_to_multiple(images, multiple):
    """Images [(3,h,w)] -> one tensor (N,3,H,W), zeros to the right and below, sides multiples of `multiple`."""
    height, width = (-(-max(i.shape[d] for i in images) // multiple) * multiple for d in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def list_pictures(pictures):
    """One picture or several, in the forms that `picture_to_tensor` takes -> a list."""
    single = isinstance(pictures, Image.Image) or isinstance(pictures, (np.ndarray, torch.Tensor)) and pictures.ndim < 4
    return [pictures] if single or not hasattr(pictures, "__iter__") else list(pictures)


def picture_to_tensor(picture):
    """A PIL image, an array (h,w,3) or (h,w), a tensor (3,h,w) or (1,h,w), uint8 or floats in 0-1 -> a tensor (3,h,w),
    uint8 or float32. Raises ValueError, naming what came, for anything else."""
    if isinstance(picture, Image.Image):
        picture = np.array(to_rgb(picture))
    came = f"a {type(picture).__name__}"
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        came += f" {tuple(picture.shape)} of {picture.dtype}"
    if isinstance(picture, np.ndarray) and picture.dtype.str[1:] in ("u1", "f2", "f4", "f8") and picture.ndim in (2, 3):
        planes = picture if picture.ndim == 3 else picture[..., None]
        picture = torch.from_numpy(np.array(planes.transpose(2, 0, 1), picture.dtype.newbyteorder("=")))
    fits = torch.is_tensor(picture) and picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.numel()
    if not fits or not (picture.dtype == torch.uint8 or picture.is_floating_point()):
        wanted = "a PIL image, an array (h,w,3) or (h,w), or a tensor (3,h,w) or (1,h,w)"
        raise ValueError(f"{came} is no picture: wanted is {wanted}, not empty, of uint8 or of floats in 0-1")
    if picture.is_floating_point():
        picture = picture.detach().float()
        low, high = picture.min().item(), picture.max().item()
        if not (low > -0.01 and high < 1.01):
            raise ValueError(f"{came} from {low:g} to {high:g}: a picture's floats are in 0-1 (divide by 255?)")
    return picture.expand(3, -1, -1)


def to_rgb(image):
    """A PIL image of any mode -> one of mode RGB. Grey values of more than 8 bits are stretched: a picture's lowest
    becomes 0, its highest 255. Raises ValueError where a value is not finite."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("some of its values are not finite")
        low, high = values.min(), values.max()
        image = Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    return image.convert("RGB")
