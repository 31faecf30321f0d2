"""Files that `load_images` reads, and the comparison with what was written."""

import io
import tarfile

import numpy as np

from hf_msn.data.decoding import decode_image


def write_tar(path, examples: list[dict[str, bytes]], compression: str = "") -> str:
    with tarfile.open(path, f"w:{compression}") as archive:
        for number, example in enumerate(examples):
            for extension, data in example.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def assert_pictures(dataset, numbers, picture):
    pixels = [np.asarray(decode_image(row["image"])) for row in dataset]
    assert len(pixels) == len(numbers)
    for seen, number in zip(pixels, numbers):
        np.testing.assert_array_equal(seen, np.asarray(picture(number)))
