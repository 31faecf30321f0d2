"""Files from strangers: no code of theirs runs, whatever they are."""

import gzip
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from original_reference import msn_checkpoint

from hf_msn import convert_checkpoint
from hf_msn.hub.original.safe_loading import check_tensor, load_safely


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "code_was_run"


def pickled(content, path, how: str) -> None:
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("place", ["alone", "in the optimizer", "as a weight", "as an epoch", "in a set", "as a key"])
def test_a_pickle_with_code_runs_nothing_and_is_refused(tmp_path, trace, how, place, monkeypatch):
    code, content = Code(trace), msn_checkpoint()
    # what a user may have set to load other files is no consent to this
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if place == "alone":
        content = code
    elif place == "in the optimizer":
        content["opt"] = {"state": [1, (code,)]}
    elif place == "as a weight":
        content["target_encoder"]["module.norm.weight"] = code
    elif place == "as an epoch":
        content["epoch"] = code
    elif place == "in a set":
        content["opt"] = {code}
    else:
        content[code] = 1
    file = tmp_path / "original.pth.tar"
    pickled(content, file, how)
    with pytest.raises(ValueError, match=r"more than tensors and plain values|cannot be read as a checkpoint"):
        convert_checkpoint(file, tmp_path / "model", 4)
    assert list(tmp_path.iterdir()) == [file]
    if how != "bare pickle":
        with pytest.raises(ValueError, match=r"it asks for 'posix.mkdir', which could run code. Nothing was executed"):
            load_safely(file)
    torch.load(file, weights_only=False) if how != "bare pickle" else pickle.loads(file.read_bytes())
    assert trace.is_dir(), "the file would not have done anything"


@pytest.mark.parametrize("module", ["builtins", "os", "torch", "functools", "numpy", "hf_msn.hub.convert"])
def test_a_global_of_any_module_is_refused(tmp_path, trace, module):
    name = {"os": "system", "torch": "load", "functools": "partial", "numpy": "load"}.get(module, "eval")
    argument = f"mkdir {trace}"
    script = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + len(argument).to_bytes(4, "little")
    (tmp_path / "plain").write_bytes(script + argument.encode() + b"\x85R.")
    with zipfile.ZipFile(tmp_path / "inside.zip", "w") as archive:
        archive.writestr("archive/data.pkl", (tmp_path / "plain").read_bytes())
        archive.writestr("archive/version", "3\n")
    for file in ("plain", "inside.zip"):
        with pytest.raises(ValueError, match=r"Nothing was executed|nothing of it was executed"):
            load_safely(tmp_path / file)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, zipped):
    torch.save(msn_checkpoint(), tmp_path / "whole", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole").read_bytes()
    for length in (0, 1, 3, 4, 30, 1000, len(data) // 2, len(data) - 4000, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"cut' \({length} bytes\) cannot be read as a checkpoint of torch"):
            convert_checkpoint(tmp_path / "cut", tmp_path / "model", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize("content", [b"<html>404</html>", b"PK\x03\x04 not really", b"\x1f\x8b\x08gzip", bytes(5000)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of torch"):
        load_safely(tmp_path / "file")
    with pytest.raises(ValueError, match=r"must be a file, .* but '.*' is a folder"):
        load_safely(tmp_path)
    with pytest.raises(ValueError, match=r"but '.*nowhere' does not exist"):
        load_safely(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="is a device or a pipe"):
            load_safely(name)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gzip", "packed by gzip. Unpack it"),
        ("tar", "a tar archive, .* Unpack it"),
        ("lfs", "a pointer of Git LFS"),
        ("html", "a web page"),
        ("zeros", "nothing but zeros, .* Get it again"),
        ("protocol", "a newer pickle protocol, .* without `pickle_protocol`"),
        ("torchscript", "a program of TorchScript, which holds code"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_lies_in_place_of_a_checkpoint_is_named_without_advice_to_load_it_unsafely(tmp_path, how, message):
    file, inner = tmp_path / "file.pth.tar", tmp_path / "inner"
    torch.save(msn_checkpoint(), inner, pickle_protocol=4 if how == "protocol" else 2)
    if how == "tar":
        with tarfile.open(file, "w") as archive:
            archive.add(inner, "vits16.pth")
    elif how == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    else:
        data = {
            "gzip": gzip.compress(inner.read_bytes(), 1),
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "html": b"<!doctype html><title>404</title>",
            "zeros": bytes(5000),
        }
        file.write_bytes(data.get(how) or inner.read_bytes())
    with pytest.raises(ValueError, match=message) as caught:
        load_safely(file)
    assert "othing of it was executed" in str(caught.value) and "weights_only" not in str(caught.value)


def test_one_wrong_bit_in_the_weights_is_found(tmp_path):
    torch.save(msn_checkpoint(), tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as archive:
        last = max(archive.infolist(), key=lambda entry: entry.file_size)
        middle = archive.read(last)[100:140]
    data = bytearray((tmp_path / "file").read_bytes())
    data[data.index(middle)] ^= 1
    (tmp_path / "file").write_bytes(data)
    torch.load(tmp_path / "file", mmap=True, weights_only=True)  # does not see it
    with pytest.raises(ValueError, match=r"does not have the checksum .* get it again"):
        convert_checkpoint(tmp_path / "file", tmp_path / "model", 4)


def test_attributes_that_a_file_gives_to_a_tensor_change_nothing(tmp_path):
    content = msn_checkpoint()
    for tensor in (content["target_encoder"]["module.norm.weight"], content["prototypes"]):
        tensor.detach = tensor.numel = tensor.float = "no method"
    torch.save(content, tmp_path / "file")
    assert load_safely(tmp_path / "file")["prototypes"].numel == "no method"
    assert convert_checkpoint(tmp_path / "file", tmp_path / "model", 4).is_dir()


@pytest.mark.parametrize("content", [3, "text", None, [], torch.ones(2, 2), {"encoder": 3}, {}, {1: 2}])
def test_plain_content_that_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=r"must hold named tensors|neither 'encoder' nor|has 1. It is no"):
        convert_checkpoint(tmp_path / "file", tmp_path / "model", 4)


@pytest.mark.parametrize("zipped", [True, False])
def test_scalars_of_numpy_are_read_as_plain_numbers(tmp_path, zipped):
    values = {
        "loss": np.float64(3.25),
        "lr": np.float32(0.1),
        "half": np.float16(0.5),
        "epoch": np.int64(-7),
        "byte": np.uint8(200),
        "flag": np.bool_(True),
        "big_endian": np.array([258], ">i4")[0],
    }
    torch.save(values, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    read = load_safely(tmp_path / "file")
    assert read == {name: value.item() for name, value in values.items()}
    assert {type(value) for value in read.values()} <= {int, float, bool}
    convert_checkpoint_with = msn_checkpoint() | values | {"epoch": np.int64(12)}
    torch.save(convert_checkpoint_with, tmp_path / "whole", _use_new_zipfile_serialization=zipped)
    convert_checkpoint(tmp_path / "whole", tmp_path / "model", 4)
    assert '"epoch": 12' in (tmp_path / "model" / "conversion.json").read_text()


@pytest.mark.parametrize(
    "value", [np.ones(3), np.array(["text"])[0], np.datetime64(1, "D"), np.dtype("O"), np.void(b"12345678")]
)
def test_other_things_of_numpy_are_refused(tmp_path, value):
    torch.save({"epoch": value}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"nothing of it was executed|Nothing was executed"):
        load_safely(tmp_path / "file")


def test_what_other_code_told_torch_to_trust_is_not_trusted(tmp_path, trace):
    torch.save({"epoch": Code(trace)}, tmp_path / "file")
    with torch.serialization.safe_globals([os.mkdir]), pytest.raises(ValueError, match=r"it asks for 'posix.mkdir'"):
        load_safely(tmp_path / "file")
    assert not trace.exists()


def test_reading_leaves_what_torch_allows_as_it_was(tmp_path):
    torch.save({"epoch": np.int64(3)}, tmp_path / "file")
    before = set(torch.serialization.get_safe_globals())
    load_safely(tmp_path / "file")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=True)


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path):
    content = msn_checkpoint()
    content["target_encoder"]["module.norm.weight"] = torch.zeros(1).expand(2**40)
    torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=r"norm.weight' claims 4398046511104 bytes in a file of"):
        convert_checkpoint(tmp_path / "file", tmp_path / "model", 4)
    check_tensor("weight", torch.zeros(4), 16)
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as old, zipfile.ZipFile(tmp_path / "packed", "w", 8) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match=r"is compressed, which torch.save never does"):
        load_safely(tmp_path / "packed")


def test_a_legacy_file_of_a_checkpoint_is_converted_too(tmp_path):
    torch.save(msn_checkpoint(), tmp_path / "file", _use_new_zipfile_serialization=False)
    torch.save(msn_checkpoint(), tmp_path / "new_file")
    for name in ("file", "new_file"):
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}_model", 4)
    one, other = ((tmp_path / f"{name}_model" / "model.safetensors").read_bytes() for name in ("file", "new_file"))
    assert one == other
