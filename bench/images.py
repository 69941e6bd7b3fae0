"""Real photographs as the ``pixel_values`` that a vision-language server moves between its processes.

The preprocessing is that of Qwen2-VL: P. Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of
the World at Any Resolution", arXiv:2409.12191, in the form of ``Qwen2VLImageProcessor`` of the transformers library
with its default settings. In order:

1. ``smart_resize``: both sides become multiples of 28 (patch 14 x merge 2), the area stays between 56 x 56 and
   28 x 28 x 1280 pixels, the aspect ratio is kept as closely as these two allow; bicubic.
2. Rescale by 1/255, normalise with the mean and the standard deviation of CLIP.
3. The still image is repeated to fill one temporal patch of 2 frames.
4. Cut into patches. Rows are ordered (t, h // 2, w // 2, 2, 2): the four patches that the model merges into one
   token are neighbours. Columns are ordered (channel, frame, y, x).

The default photographs are files inside the installed scikit-image package; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

__all__ = [
    "MAX_IMAGES",
    "ImageSourceError",
    "PatchedImage",
    "image_files",
    "load_directory",
    "load_photographs",
    "patch_image",
    "smart_resize",
]

PATCH = 14
MERGE = 2
TEMPORAL_PATCH = 2
CHANNELS = 3
FACTOR = PATCH * MERGE
MIN_PIXELS = 56 * 56
MAX_PIXELS = 28 * 28 * 1280
MAX_ASPECT = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_IMAGES = 32
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# The large photographs come first: they meet the large sizes below and are scaled up the least.
PHOTOGRAPHS = (
    "retina.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
    "coffee.png",
    "astronaut.png",
    "ihc.png",
    "chelsea.png",
    "camera.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "clock_motion.png",
    "coins.png",
)

# (width, height) of what users upload: 32 images, 184 MiB of pixel_values in all.
SIZES = (
    (1280, 720), (768, 1024), (1024, 768), (800, 600), (640, 480), (600, 800), (512, 512), (512, 512),
    (448, 336), (480, 640), (448, 448), (480, 360), (336, 448), (512, 512), (480, 360), (320, 240),
    (640, 480), (448, 448), (480, 360), (640, 480), (320, 240), (480, 360), (224, 224), (336, 336),
    (360, 360), (224, 224), (336, 336), (320, 240), (448, 448), (240, 320), (360, 480), (224, 224),
)  # fmt: skip


class ImageSourceError(Exception):
    """There are no usable images where they were looked for; the message says where and what to do."""


@dataclass
class PatchedImage:
    """One preprocessed image.

    Attributes
    ----------
    pixel_values : torch.Tensor
        float32 of shape ``[grid_t * grid_h * grid_w, 3 * 2 * 14 * 14]``.
    image_grid_thw : torch.Tensor
        int64 of shape ``[1, 3]``: the number of patches along time, height and width.
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = FACTOR,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Return the size that Qwen2-VL resizes an image to.

    Parameters
    ----------
    height, width : int
        Size of the image in pixels.
    factor : int
        Both sides of the result are multiples of it.
    min_pixels, max_pixels : int
        Bounds of the area of the result.

    Returns
    -------
    tuple of int
        Height and width in pixels.

    Raises
    ------
    ValueError
        If one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other")
    rounded = round(height / factor) * factor, round(width / factor) * factor
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def patch_image(image: Image.Image) -> PatchedImage:
    """Preprocess one image as Qwen2-VL does.

    Parameters
    ----------
    image : PIL.Image.Image
        Any mode; it is converted to RGB.

    Returns
    -------
    PatchedImage
        Tensors that own their memory.

    Raises
    ------
    ValueError
        If the image is too narrow, see `smart_resize`.
    """
    height, width = smart_resize(image.height, image.width)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    # np.array, not asarray: torch wants memory that it may write to.
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(torch.float32) * (1 / 255)
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    rows, columns = height // PATCH, width // PATCH
    frames = pixels.expand(TEMPORAL_PATCH, 3, height, width)
    split = frames.reshape(TEMPORAL_PATCH, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    # (frame, channel, H, mh, y, W, mw, x) -> (H, W, mh, mw | channel, frame, y, x)
    patches = split.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, CHANNELS * TEMPORAL_PATCH * PATCH * PATCH)
    return PatchedImage(patches, torch.tensor([[1, rows, columns]], dtype=torch.int64))


def load_photographs() -> list[Image.Image]:
    """Cut 32 different images of varied size out of the photographs that scikit-image ships.

    The result depends on nothing but the installed files.

    Returns
    -------
    list of PIL.Image.Image
        32 images, of the sizes in ``SIZES``.

    Raises
    ------
    ImageSourceError
        If scikit-image is not installed or its package lacks one of the files.
    """
    # Importing skimage would load scipy; its files are all that is wanted.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImageSourceError("scikit-image is not installed: pip install 'torch-shmx[demo]', or use --images DIR")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        raise ImageSourceError(
            f"the installed scikit-image lacks {', '.join(missing)} in {folder}: "
            "pip install 'torch-shmx[demo]', or use --images DIR"
        )
    photographs = [_decode(folder / name) for name in PHOTOGRAPHS]
    images = []
    for index, size in enumerate(SIZES):
        image = photographs[index % len(photographs)]
        if index >= len(photographs):
            # The second time round, a closer look at the upper left part, so that no image repeats another.
            image = image.crop((0, 0, image.width * 7 // 10, image.height * 7 // 10))
        images.append(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
    return images


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder that `load_directory` would load.

    Parameters
    ----------
    folder : pathlib.Path
        Where to look; sub-folders are not searched.

    Returns
    -------
    list of pathlib.Path
        At most ``MAX_IMAGES`` jpg, png and webp files, the first by name.

    Raises
    ------
    ImageSourceError
        If `folder` is not a readable directory or holds no such file.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise ImageSourceError(f"cannot read the image directory {folder}: {error.strerror}") from error
    if not files:
        raise ImageSourceError(f"no images in {folder}: it must hold at least one of *{', *'.join(SUFFIXES)}")
    return files[:MAX_IMAGES]


def load_directory(folder: Path) -> list[Image.Image]:
    """Decode the images of a folder, see `image_files`.

    Parameters
    ----------
    folder : pathlib.Path
        Where to look.

    Returns
    -------
    list of PIL.Image.Image
        RGB images, turned upright as their EXIF orientation says.

    Raises
    ------
    ImageSourceError
        If there are none, or if one of them cannot be decoded or is too narrow for Qwen2-VL.
    """
    files = image_files(folder)
    images = [_decode(path) for path in files]
    _check_sizes(files, images)
    return images


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's decoders report broken files by all of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageSourceError(f"cannot decode {path}: {error}") from error


def _check_sizes(files: Sequence[Path], images: Sequence[Image.Image]) -> None:
    for path, image in zip(files, images, strict=True):
        try:
            smart_resize(image.height, image.width)
        except ValueError as error:
            raise ImageSourceError(f"cannot use {path}: {error}") from error
