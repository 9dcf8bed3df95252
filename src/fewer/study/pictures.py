"""Sheets of pictures: what a trial makes, as many small images side by side as one looks at, in one PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SHOWN = 64  # images of a sheet, eight a row
LEVELS = 16  # of brightness, a channel: enough to look at, and a sheet takes half the bytes
GAP, GREY = 1, 8  # pixels between images, and their level
LARGEST = 64  # pixels of a side; of larger images two, three, ... pixels a side are averaged


def sheet(images: Any, span: tuple[float, float] = (-1.0, 1.0)) -> bytes:
    """The first 64 images, eight a row, as a PNG.

    Args:
        images: [N, H, W], [N, 1, H, W] or [N, 3, H, W], N >= 1, a tensor or an array of numbers.
        span: what is black and what is white; values outside are cut off, NaN is black.

    Raises:
        ValueError: another shape.
    """
    import numpy as np
    from PIL import Image

    shape = tuple(images.shape)
    if not are_pictures(shape):
        raise ValueError(f"images of shape {shape}; expected [N, H, W], [N, 1, H, W] or [N, 3, H, W]")
    shown = images[:SHOWN]
    pixels = np.asarray(shown.detach().cpu().float() if hasattr(shown, "detach") else shown, dtype=np.float32).reshape(
        len(shown), -1, *shape[-2:]
    )
    low, high = span
    scaled = _reduced(np.nan_to_num((pixels - low) / (high - low), nan=0.0).clip(0, 1))
    out = io.BytesIO()
    levels, step = _tiled((scaled * (LEVELS - 1)).round().astype(np.uint8)), 255 // (LEVELS - 1)
    if levels.ndim == 3:
        Image.fromarray(levels * step).save(out, "PNG", optimize=True)
    else:
        picture = Image.fromarray(levels, "P")
        picture.putpalette([step * level for level in range(LEVELS) for _ in range(3)])
        picture.save(out, "PNG", optimize=True, bits=4)
    return out.getvalue()


def are_pictures(shape: tuple[int, ...]) -> bool:
    """Whether something of this shape can be looked at: latents of four channels cannot."""
    return (len(shape) == 3 or (len(shape) == 4 and shape[1] in (1, 3))) and 0 not in shape


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Images [N, C, H, W] with blocks of pixels averaged until no side is longer than 64; what does not fill a block is left out."""
    step = -(-max(pixels.shape[2:]) // LARGEST)
    step = min(step, *pixels.shape[2:])
    height, width = (side // step for side in pixels.shape[2:])
    whole = pixels[..., : height * step, : width * step]
    return whole.reshape(*pixels.shape[:2], height, step, width, step).mean((3, 5))


def _tiled(tiles: np.ndarray) -> np.ndarray:
    """Tiles [N, C, H, W] in rows of eight with a gap between: [rows, columns] where C is 1, else [rows, columns, 3]."""
    import numpy as np

    count, channels, height, width = tiles.shape
    columns = min(8, count)
    rows = -(-count // columns)
    whole = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), GREY, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = (number // columns) * (height + GAP), (number % columns) * (width + GAP)
        whole[top : top + height, left : left + width] = tile.transpose(1, 2, 0)
    return whole[..., 0] if channels == 1 else whole
