import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hf_msn.data.decoding import BrokenImageError, decode_image, decode_reduced_image
from hf_msn.data.transforms import MultiViewTransform


def _row(image: Image.Image, kind: str, **settings) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return {"bytes": buffer.getvalue(), "path": f"some/image.{kind.lower()}"}


def _pixels(value) -> np.ndarray:
    image = decode_image(value)
    assert image.mode == "RGB"
    return np.asarray(image)


GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
WIDE, NARROW = np.array([[0, 128, 129], [257, 32768, 65535]], np.uint16), [[0, 0, 1], [1, 128, 255]]
UNIT, BYTES = np.array([[-0.1, 0.0, np.nan], [0.5, 1.0, 1.1]], np.float32), [[0, 0, 0], [128, 255, 255]]
BITS = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
LONG = Image.fromarray(np.array([[-5, 257], [65535, 70000]], np.int32))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (_row(Image.fromarray(GRAY), "PNG"), GRAY),
        (GRAY, GRAY),
        (GRAY[:, :, None], GRAY),
        (_row(BITS, "PNG"), [[0, 255], [255, 0]]),
        (_row(Image.fromarray(WIDE), "TIFF"), NARROW),
        (WIDE, NARROW),
        (Image.frombytes("I;16B", (3, 2), WIDE.astype(">u2").tobytes()), NARROW),
        (_row(LONG, "TIFF"), [[0, 1], [255, 255]]),
        (_row(Image.fromarray(UNIT), "TIFF"), BYTES),
        (UNIT.astype(np.float64), BYTES),
    ],
)
def test_gray_of_any_depth_is_scaled_to_8_bits_in_all_channels(value, expected):
    np.testing.assert_array_equal(_pixels(value), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_over_white(mode):
    alpha = np.array([[0, 51, 255]], np.uint8)
    gray = np.array([[100, 100, 100]], np.uint8)
    bands = [gray] * (len(mode) - 1) + [alpha]
    image = Image.merge(mode, [Image.fromarray(band) for band in bands])
    expected = [255, round(0.2 * 100 + 0.8 * 255), 100]
    np.testing.assert_allclose(_pixels(_row(image, "PNG"))[0, :, 0], expected, atol=1)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _wide_png() -> dict:
    """A 1 x 1 RGB PNG with 16 bits per channel, which Pillow can read but not write."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF))
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    return {"bytes": png, "path": None}


PALETTE = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
PALETTE.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
COLOUR = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
FRAMES = [Image.fromarray(GRAY), Image.fromarray(GRAY + 1)]
WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("value", "first_row"),
    [
        (_row(PALETTE, "PNG"), [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
        (_row(PALETTE, "PNG", transparency=1), [[10, 20, 30], WHITE, [70, 80, 90]]),
        (_row(Image.fromarray(np.array([[7, 9]], np.uint8)), "PNG", transparency=7), [WHITE, [9, 9, 9]]),
        (_row(COLOUR, "PNG", transparency=(4, 5, 6)), [[1, 2, 3], WHITE]),
        (_wide_png(), [[0x12, 0x80, 0xFF]]),  # the high bytes
        (_row(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), np.stack([GRAY[0]] * 3, axis=-1)),
    ],
)
def test_palettes_transparent_colours_wide_colours_and_animations_are_read(value, first_row):
    np.testing.assert_array_equal(_pixels(value)[0], first_row)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_are_converted_back(mode, picture):
    image = picture(3).convert(mode)
    np.testing.assert_array_equal(_pixels(image), np.asarray(image.convert("RGB")))
    np.testing.assert_allclose(_pixels(image), np.asarray(picture(3)), atol=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(picture(4))
    flipped = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    np.testing.assert_array_equal(_pixels(_row(picture(4), "PNG", exif=exif)), np.rot90(flipped, quarters))


_TYPES = {1: "B", 2: "c", 3: "H", 5: "I", 11: "f", 12: "d"}


def _exif(tag: int, kind: int, orientation: int = 6) -> bytes:
    """EXIF with an orientation and one tag of nine values of any type, which Pillow would not write."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), (tag, kind, 9, struct.pack("<I", 38))])
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + body + bytes(4) + b"text, not numbers" * 5


@pytest.mark.parametrize("kind", _TYPES)
@pytest.mark.parametrize("tag", [0x011A, 0x0128, 0x0100, 0x010F, 0x8769])  # resolution, unit, width, maker, folder
def test_image_with_a_tag_of_unexpected_type_is_turned(picture, tag, kind):
    exif = _exif(tag, kind)
    for row in (_row(picture(4), "JPEG", exif=exif), _row(picture(4), "WEBP", exif=exif, lossless=True)):
        plain = np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        np.testing.assert_array_equal(_pixels(row), np.rot90(plain, -1))
        reduced, size = decode_reduced_image(row, lambda size: 1)
        assert size == reduced.size == (6, 8)


@pytest.mark.parametrize(("tag", "kind"), [(700, 5), (40965, 2), (34665, 1)])  # XMP, interoperability, EXIF
def test_tiff_with_a_damaged_tag_is_turned(picture, tag, kind):
    row = _row(picture(4), "TIFF", tiffinfo={0x0112: 6, 305: "maker"})
    row["bytes"] = row["bytes"].replace(struct.pack("<HH", 305, 2), struct.pack("<HH", tag, kind), 1)
    np.testing.assert_array_equal(_pixels(row), np.rot90(np.asarray(picture(4)), -1))


KEYWORD, PROFILE = b"Raw profile type exif\0", b"\nexif\n      20\nnot hexadecimal\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"tEXt", KEYWORD + PROFILE),
        (b"zTXt", KEYWORD + b"\0" + zlib.compress(PROFILE)),
        (b"pHYs", b"a"),
        (b"gAMA", b""),
        (b"eXIf", b""),
    ],
)
def test_png_with_damaged_metadata_is_read(encoded, picture, name, data):
    chunk = _chunk(name, data)
    for damaged in (chunk, chunk[:-1] + bytes([chunk[-1] ^ 1])):  # the checksum is wrong, too
        png = encoded(4)[:33] + damaged + encoded(4)[33:]
        np.testing.assert_array_equal(_pixels({"bytes": png, "path": None}), np.asarray(picture(4)))


@pytest.mark.parametrize("marker", [0xE0, 0xE2, 0xED, 0xFE])
@pytest.mark.parametrize("data", [b"JFIF\0", b"Exif\0\0II*\0", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM", b""])
def test_jpeg_with_damaged_metadata_is_turned(picture, marker, data):
    jpeg = _row(picture(4), "JPEG", exif=_exif(0x010F, 2))["bytes"]
    expected = _pixels({"bytes": jpeg, "path": None})
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    place = 2 + 2 + int.from_bytes(jpeg[4:6])  # after the first segment
    damaged = jpeg[:place] + segment + jpeg[place:]
    np.testing.assert_array_equal(_pixels({"bytes": damaged, "path": None}), expected)


def test_files_and_arrays_with_alpha_are_read(tmp_path, picture):
    np.testing.assert_array_equal(_pixels(_row(picture(1), "PNG")), np.asarray(picture(1)))
    picture(7).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), np.asarray(picture(7)))
    np.testing.assert_array_equal(_pixels({"bytes": None, "path": str(tmp_path / "a.png")}), np.asarray(picture(7)))
    clear = np.zeros((2, 2, 4), np.uint8)
    np.testing.assert_array_equal(_pixels(clear), np.full((2, 2, 3), 255))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"this is text", "no image format"),
        ("truncated", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "."),
    ],
)
def test_broken_bytes_raise_with_row_path_and_reason(data, reason, encoded):
    if data == "truncated":
        data = encoded(0, "JPEG", (64, 64))[:-300]
    with pytest.raises(BrokenImageError, match=reason) as caught:
        decode_image({"bytes": data, "path": "photos/it's (1).jpg"}, row=17)
    error = caught.value
    assert (error.row, error.path) == (17, "photos/it's (1).jpg")
    assert "row 17" in str(error) and "photos/it's (1).jpg" in str(error) and error.reason in str(error)


def test_missing_file_and_empty_row_raise():
    with pytest.raises(BrokenImageError, match="not there"):
        decode_image({"bytes": None, "path": "/nowhere/a.png"}, row=1)
    with pytest.raises(BrokenImageError, match="neither bytes nor a path"):
        decode_image({"bytes": None, "path": None}, row=1)
    with pytest.raises(BrokenImageError, match="not NoneType"):
        decode_image(None, row=1)


def test_decompression_bomb_raises(encoded, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BrokenImageError, match="too many pixels"):
        decode_image({"bytes": encoded(0), "path": "bomb.png"})


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((2, 2, 2), np.uint8), r"\(2, 2, 2\)"),
        (np.zeros((0, 2), np.uint8), r"\(0, 2\)"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.full((2, 2), 254.0), "254"),
    ],
)
def test_arrays_of_other_shapes_types_and_ranges_raise(array, named):
    with pytest.raises(BrokenImageError, match=named):
        decode_image(array)


def test_error_keeps_its_fields_through_pickle_and_as_the_text_of_a_worker():
    error = BrokenImageError("truncated", row=3, path="it's (1).png")
    text = f"Caught BrokenImageError in DataLoader worker process 0.\nTraceback:\n  raise BrokenImageError: {error}\n"
    for copy in (pickle.loads(pickle.dumps(error)), BrokenImageError(text)):
        assert (copy.reason, copy.row, copy.path) == ("truncated", 3, "it's (1).png")
        assert str(copy) == str(error)


def _photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with some texture."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray(np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_smaller_with_the_same_views(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    value = _row(_photograph(1600, 1200), "JPEG", quality=92, exif=exif)
    transform = MultiViewTransform(image_size=64, focal_size=32, focal_views=4)
    torch.manual_seed(0)
    drawn = transform.draw()
    image, full_size = decode_reduced_image(value, drawn.reduction)
    whole = decode_image(value)
    assert full_size == whole.size == ((1600, 1200) if orientation == 1 else (1200, 1600))
    assert image.size == tuple(side // drawn.reduction(full_size) for side in full_size) and image.size != whole.size
    reduced, expected = drawn.crops(image, full_size), drawn.crops(whole)
    assert torch.equal(reduced["view_parameters"], expected["view_parameters"])
    for name in ("pixel_values", "anchor_pixel_values", "focal_pixel_values"):
        difference = (reduced[name].int() - expected[name].int()).abs().float()
        assert difference.mean() < 1.0 and difference.max() < 12


def test_only_jpeg_files_are_reduced():
    photograph = _photograph(160, 120)
    for value in (_row(photograph, "PNG"), photograph, np.asarray(photograph)):
        image, full_size = decode_reduced_image(value, lambda size: 8)
        assert image.size == full_size == (160, 120)
    file = Image.open(io.BytesIO(_row(photograph, "JPEG")["bytes"]))
    assert decode_reduced_image(file, lambda size: 8)[0].size == (160, 120)  # an open image is not changed
