"""Decode an image of any kind to 8-bit RGB."""

import io
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

_WIDE_GRAY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_HIGHEST_FLOAT = 2.0
_ORIENTATION = 0x0112  # EXIF's tag, and what each of its values asks for
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_FOLDERS_OF_TAGS = (0x8769, 0x8825, 0xA005)  # EXIF, GPS and interoperability
_START_OF_SCAN, _NEEDED_MARKERS = b"\xff\xda", (b"\xff\xe1", b"\xff\xee")  # EXIF; Adobe's colour transform
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"

Decoded = tuple[Image.Image, tuple[int, int]]  # with its width and height before it was reduced


class BrokenImageError(ValueError):
    """An image that cannot be read: its `reason`, the `row` of the dataset and its `path`, if they are known.

    A DataLoader passes an error of a worker on as text alone; row, path and reason are parsed from that text again.
    """

    _FORM = re.compile(r"The image in row (None|\d+) \(path (None|'.*?')\) cannot be read: (.*)", re.DOTALL)

    def __init__(self, reason: str, *, row: int | None = None, path: str | None = None):
        from_worker = self._FORM.search(reason)
        if from_worker:
            row_text, path_text, reason = from_worker.groups()
            row = None if row_text == "None" else int(row_text)
            path = None if path_text == "None" else path_text[1:-1]
        self.reason = reason.strip()
        self.row = row
        self.path = path
        quoted = None if path is None else f"'{path}'"
        super().__init__(f"The image in row {row} (path {quoted}) cannot be read: {self.reason}")

    def __reduce__(self):
        return partial(BrokenImageError, row=self.row, path=self.path), (self.reason,)


def decode_image(value: Any, *, row: int | None = None) -> Image.Image:
    """Decode an image of any kind to 8-bit RGB.

    The rule, by Pillow's mode or the array's type:

    | image | conversion to RGB |
    |---|---|
    | RGB | unchanged (16-bit RGB files: the high byte, which Pillow takes on opening) |
    | gray (`L`, `1`) | the gray value in all three channels |
    | 16-bit gray (`I;16`, `I;16B`, `uint16` arrays) | value / 257, rounded, in all three channels |
    | 32-bit gray (`I`) | read as 16-bit gray: clipped to 0..65535, then value / 257 |
    | float gray (`F`, float arrays) | 0..1 to 0..255, clipped, NaN as 0; a value above 2 is an error |
    | palette (`P`) | the palette's colours |
    | transparency of any kind (`RGBA`, `LA`, `PA`, a transparent colour) | composited over white |
    | `CMYK`, `YCbCr`, `LAB`, `HSV` | Pillow's `convert("RGB")` |
    | several frames | the first one |
    | EXIF orientation | applied, as in `datasets.Image`; other metadata is never interpreted, and may be damaged |

    Args:
        value (`dict`, `PIL.Image.Image`, `str`, `os.PathLike` or `numpy.ndarray`):
            A `{"bytes", "path"}` row of `datasets.Image(decode=False)` (the bytes take precedence), an image, a file,
            or an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in `uint8`, `uint16`, `bool` or float.
        row (`int`, *optional*): Row of the dataset, for the error.

    Returns:
        `PIL.Image.Image`: the image in mode RGB, its pixels loaded.

    Raises:
        BrokenImageError: If the file is absent, empty, truncated, not an image, too large (Pillow's decompression bomb
            limit), or of a type that the rule does not cover.
    """
    return decode_reduced_image(value, row=row)[0]


def decode_reduced_image(
    value: Any, reduction: Callable[[tuple[int, int]], int] | None = None, *, row: int | None = None
) -> Decoded:
    """Decode an image as [`decode_image`] does, but a JPEG file no larger than needed, which is much faster.

    `reduction` returns for the displayed width and height the number by which the sides may be divided: 1, 2, 4 or 8.
    It is called only for JPEG files that are not open yet. Returns the image and its unreduced width and height.
    """
    try:
        is_encoded = isinstance(value, (dict, str, os.PathLike))
        encoded = _encoded(value) if is_encoded else value
        try:
            return _decode(encoded, reduction)
        except Exception:
            if not (is_encoded and encoded.startswith((_PNG, _JPEG))):
                raise
            return _decode(_without_metadata(encoded), reduction)
    except Exception as error:  # Pillow raises nearly every built-in error on broken bytes
        raise BrokenImageError(_reason(error), row=row, path=_path_of(value)) from error


def _decode(value: Any, reduction: Callable[[tuple[int, int]], int] | None) -> Decoded:
    image = _open(value)
    if reduction is None or image is value or image.format != "JPEG":
        image = _to_rgb(image)
        return image, image.size
    full_size = image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size
    if (times := reduction(full_size)) > 1:
        image.draft(None, (max(1, image.width // times), max(1, image.height // times)))
    return _to_rgb(image), full_size


def _path_of(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, Image.Image):
        value = getattr(value, "filename", None) or None
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else None


def _encoded(value: dict | str | os.PathLike) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if data is None:
        if path is None:
            raise ValueError("the row holds neither bytes nor a path")
        data = Path(path).read_bytes()
    if not data:
        raise ValueError("it has no bytes")
    return data


def _open(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return _from_array(value)
    if isinstance(value, bytes):
        image = Image.open(io.BytesIO(value))
        if image.format == "TIFF":  # load() reads these, and fails at damaged ones
            image.info.pop("xmp", None)
            exif = image.getexif()
            for tag in _FOLDERS_OF_TAGS:
                exif.pop(tag, None)
        return image
    raise TypeError(
        f"an image must be a dict of bytes and path, a PIL image, a file or an array, not {type(value).__name__}"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an array must have shape (H, W) or (H, W, 1, 3 or 4), but has {array.shape}")
    if array.dtype == np.uint16:
        array = _narrow(array)
    elif array.dtype.kind == "f":
        array = _from_unit_range(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ValueError(f"an array must be of uint8, uint16, bool or float (0..1), but is of {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}")
    # tens of thousands of small images per second: a plain one skips all further look-ups
    if not image.info and image.mode in ("RGB", "L"):
        return image if image.mode == "RGB" else image.convert("RGB")
    if (method := _TRANSPOSITIONS.get(_orientation(image))) is not None:
        # ImageOps.exif_transpose writes all other tags anew, and fails at one of an unexpected type
        image = image.transpose(method)
    if image.mode in _WIDE_GRAY_MODES:
        image = Image.fromarray(_narrow(np.asarray(image)))
    elif image.mode == "F":
        image = Image.fromarray(_from_unit_range(np.asarray(image)))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata, of an image that may be whole
        return None


def _without_metadata(encoded: bytes) -> bytes:
    """Return a PNG or JPEG file without most parts that do not change its pixels: a damaged one hides the image."""
    is_png = encoded.startswith(_PNG)
    place = len(_PNG if is_png else _JPEG)
    kept = [encoded[:place]]
    while place + 4 <= len(encoded):
        if is_png:  # length, name, data, checksum
            name = encoded[place + 4 : place + 8]
            end = place + 12 + int.from_bytes(encoded[place : place + 4])
            is_needed = name[:1].isupper() or name == b"tRNS"
        else:  # marker, length, data
            marker = encoded[place : place + 2]
            end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4])
            is_needed = marker in _NEEDED_MARKERS or not b"\xff\xe0" <= marker <= b"\xff\xef"
            if marker == _START_OF_SCAN:
                end = len(encoded)
        if is_needed:
            kept.append(encoded[place:end])
        place = end
    return b"".join(kept)


def _narrow(values: np.ndarray) -> np.ndarray:
    values = np.clip(values.astype(np.int64), 0, 65535)
    return ((values + 128) // 257).astype(np.uint8)


def _from_unit_range(values: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=0.0)
    if values.max() > _HIGHEST_FLOAT:
        raise ValueError(f"its float values go up to {values.max():g}, but floats are read as 0..1")
    return np.round(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    if isinstance(error, UnidentifiedImageError):
        return "no image format known to Pillow"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error})"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
