"""Files of `torch.save` from strangers: tensors and plain values are read, all else is refused, never unpickled."""

import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

_ZIP = b"PK\x03\x04"
_FORBIDDEN = re.compile(r"GLOBAL (\S+) was not an allowed|unrecognized function (.+)|GLOBAL (\S+) whose module")
# struct's letters for numpy's scalars; what is not here (objects, strings, records) is refused
_SCALARS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_SCALARS.update({"f2": "e", "f4": "f", "f8": "d"})
# (offset, bytes there, what such a file is and what to do): what is downloaded in place of a checkpoint, or around it
_OTHER_FILES = [
    (0, b"\x1f\x8b", "it is packed by gzip. Unpack it: `gunzip`"),
    (257, b"ustar", "it is a tar archive, in spite of the name that checkpoints have. Unpack it: `tar -xf`"),
    (0, b"version https://git-lfs", "it is a pointer of Git LFS to the file. Fetch the file: `git lfs pull`"),
    (0, b"<", "it is a web page or XML. Download the file itself"),
    (0, bytes(512), "it begins with nothing but zeros, as a download that broke off. Get it again"),
]
_NEWER_PICKLE = "Unsupported operand 149"


def load_safely(path: str | Path) -> Any:
    """Reads a file of `torch.save` (or safetensors) whose origin is unknown, onto the CPU.

    `torch.load(weights_only=True)`, so that no code of the file can run, memory-mapped where the file is of the newer,
    zip form. A numpy scalar, as older training loops saved in a loss or an epoch, becomes a Python number: it is
    decoded here from its bytes, and no function of numpy is called.

    Args:
        path (`str` or `Path`): The file. It is not changed; mapped tensors are views of it.

    Raises:
        ValueError: If there is no such file, it is no such file or damaged (also by a single bit, where it has
            checksums), it holds anything but tensors and plain values, or a tensor claims to be larger than the file.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is a device or a pipe" if path.exists() else "does not exist"
        raise ValueError(f"The checkpoint must be a file, such as 'checkpoint.pth.tar', but '{path}' {kind}.")
    try:
        mapped = _is_whole_zip(path)
        with warnings.catch_warnings(), _only_numpy_scalars():
            warnings.simplefilter("ignore")  # about the pickle's protocol; what cannot be read is an error below
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the readers fail in many ways on bytes that are not theirs
        raise ValueError(_refusal(path, error)) from None


def check_tensor(name: str, tensor: torch.Tensor, file_size: int) -> None:
    """Raises a `ValueError` unless `tensor` is a plain dense one, of finite numbers, and not larger than its file."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise ValueError(
            f"'{name}' must be a dense tensor of real numbers, but is {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}. Save it as `tensor.float().cpu()`."
        )
    if tensor.numel() * tensor.element_size() > file_size:
        raise ValueError(
            f"'{name}' claims {tensor.numel() * tensor.element_size()} bytes in a file of {file_size}. The file is "
            "damaged, or made to fill the memory."
        )
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise ValueError(
            f"'{name}' has NaN or Inf in {int((~torch.isfinite(tensor.float())).sum())} of {tensor.numel()} values, "
            "so that the model computes nothing. Take an earlier checkpoint of this run."
        )


def _refusal(path: Path, error: Exception) -> str:
    found = _FORBIDDEN.search(str(error))
    if found:
        name = next(group for group in found.groups() if group)
        return (
            f"'{path}' holds more than tensors and plain values: it asks for '{name}', which could run code. Nothing "
            "was executed. Ask its authors for a file of tensors alone, "
            "`torch.save({'target_encoder': ..., 'prototypes': ...}, path)`."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1024)
    kind = next((kind for at, sign, kind in _OTHER_FILES if start[at:].startswith(sign)), None)
    if kind is None and _NEWER_PICKLE in str(error):
        kind = (
            "it was saved with a newer pickle protocol, of which torch reads nothing safely. Ask its authors for a "
            "file of `torch.save(checkpoint, path)`, without `pickle_protocol`"
        )
    if kind is not None:
        return f"'{path}' ({size} bytes) cannot be read as a checkpoint of torch: {kind}. Nothing of it was executed."
    first_line = (str(error).strip().splitlines() or [""])[0]
    if first_line.startswith("Weights only load failed"):  # torch's advice that follows is to load it unsafely
        first_line = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()[0]
    first_line = first_line[:200].rstrip(".")
    return (
        f"'{path}' ({size} bytes) cannot be read as a checkpoint of torch: {type(error).__name__}"
        f"{': ' if first_line else ''}{first_line}. It is truncated, of another form, or needs more than tensors "
        "and plain values; nothing of it was executed. Compare its size and hash with the source's, and get it again."
    )


def _is_whole_zip(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    with zipfile.ZipFile(path) as archive:
        if any("/code/" in name for name in archive.namelist()):
            raise ValueError("it is a program of TorchScript, which holds code, and no file of torch.save")
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch.save compresses nothing: mapped, these bytes would be read as weights
            raise ValueError(f"'{packed[0]}' in it is compressed, which torch.save never does")
        damaged = archive.testzip()  # torch does not look at the checksums of what it maps
        if damaged is not None:
            raise ValueError(f"'{damaged}' in it does not have the checksum that it was saved with")
    return True


class _NumpyType:
    """Stands for `numpy.dtype` while a file is read: the letters alone, of a type that `_SCALARS` knows."""

    def __init__(self, letters: str, *_):
        if not isinstance(letters, str) or letters.lstrip("<>=|") not in _SCALARS:
            raise ValueError(f"a numpy value of type {letters!r}, which is no plain number")
        self.code, self.order = _SCALARS[letters.lstrip("<>=|")], "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"a numpy type of byte order {state[1]!r}")
        self.order = ">" if state[1] == ">" else "<"


def _number(dtype: _NumpyType, data: bytes) -> bool | int | float:
    """Stands for the function that makes a numpy scalar from its bytes."""
    if type(dtype) is not _NumpyType or type(data) is not bytes:
        raise ValueError("a numpy scalar that is not made of a type and bytes")
    return struct.unpack(dtype.order + dtype.code, data)[0]


@contextmanager
def _only_numpy_scalars() -> Iterator[None]:
    """What other code in this process told torch to trust, is not trusted meanwhile."""
    trusted = get_safe_globals()
    clear_safe_globals()
    try:
        add_safe_globals(
            [
                (_NumpyType, "numpy.dtype"),
                (_number, "numpy.core.multiarray.scalar"),
                (_number, "numpy._core.multiarray.scalar"),
            ]
        )
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(trusted)
