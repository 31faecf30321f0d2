"""Files and folders that appear whole or not at all, and JSON files."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "checksums.sha256"  # of a checkpoint, in the format of `sha256sum -c`


@contextmanager
def whole_folder(path: str | Path, name: str = "path") -> Iterator[Path]:
    """Yield a folder beside `path` to write into. It becomes `path` if the block succeeds, and is removed if not.

    Enter it before the work: it finds out whether there is a place to write to.

    Args:
        path (`str` or `Path`): It must not exist, or be an empty folder. Missing parent folders are made.
        name (`str`, *optional*, defaults to `"path"`): The argument, for the error message.

    Raises:
        ValueError: If `path` exists and is not an empty folder, or is not writable.
    """
    path = check_new_folder(path, name)
    with _beside(path, name, Path.mkdir) as staging:
        yield staging
        if path.exists():
            path.rmdir()


@contextmanager
def whole_file(path: str | os.PathLike, name: str = "path", *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to. It becomes `path` if the block succeeds, and is removed if not.

    Args:
        path (`str` or `Path`): The file. Missing parent folders are made.
        name (`str`, *optional*, defaults to `"path"`): The argument, for the error message.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an existing file.

    Raises:
        ValueError: If `path` exists and `overwrite` is false, is a folder, or is not writable.
    """
    path = Path(path).expanduser()
    if path.is_dir() or (not overwrite and os.path.lexists(path)):
        raise ValueError(f"`{name}` must be a new file, but '{path}' exists. Choose another, or remove it first.")
    with _beside(path, name, Path.touch) as staging:
        yield staging


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file. An existing file is replaced as a whole."""
    with whole_file(path, overwrite=True) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON. An existing file is replaced as a whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If there is no such file, or it is not JSON. The message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' must be a JSON file, but cannot be read: {error}.") from error


def format_checksums(checksums: Mapping[str, str]) -> str:
    """Return the content of [`CHECKSUMS_FILE`] for the SHA-256 of files by name."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in checksums.items())


def read_checksums(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a folder by name, from its [`CHECKSUMS_FILE`]. A broken line has no name."""
    file = Path(folder, CHECKSUMS_FILE)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def check_new_folder(path: str | Path, name: str = "path") -> Path:
    """Return `path` with `~` expanded, if a folder can be made there.

    Raises:
        ValueError: If it is a file or a link, or a folder that is not empty.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise ValueError(
                f"`{name}` must be new or empty, but '{path}' is not empty. Choose another, or remove it first."
            )
    elif os.path.lexists(path):
        kind = "link" if path.is_symlink() else "file"
        raise ValueError(
            f"`{name}` must be a folder, new or empty, but '{path}' is a {kind}. Choose another, or remove it first."
        )
    return path


def public_name(source: str | os.PathLike) -> str:
    """Return the name under which a data set, a checkpoint or a file may be published.

    An id of the Hub (`owner/name`) stays as it is, unless it is a path here. A path or an address is reduced to its
    last component; a home folder has none, and is "(local)".
    """
    text = os.fspath(source).strip()
    if not re.search(r"[\\/]|^~", text) or (re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not os.path.exists(text)):
        return text
    no_name = re.compile(r"^\.{0,2}$|^~|[*\[\]]|:$")  # of "", "..", "~", "*.tar" and "C:"
    parts = [part for part in re.split(r"[\\/]+", text.split("?")[0]) if not no_name.search(part)]
    is_home = os.path.abspath(os.path.expanduser(text)) == os.path.expanduser("~")
    return parts[-1] if parts and not is_home else "(local)"


@contextmanager
def _beside(path: Path, name: str, create: Callable[[Path], None]) -> Iterator[Path]:
    """Yield the temporary name, created. Parent folders made for it are removed again if the block fails."""
    if not path.name:
        raise ValueError(f"`{name}` must name a file or folder, but is '{path}'. Choose a new name in it.")
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    staging = path.with_name(f".{path.name}.incomplete")
    done = False
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(staging)  # left by a killed run
            create(staging)
        except OSError as error:
            raise ValueError(
                f"`{name}` must be writable, but '{path}' is not: {error}. Choose another place."
            ) from error
        yield staging
        os.replace(staging, path)
        done = True
    finally:
        if not done:
            _remove(staging)
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # not there, or in no folder
            path.unlink()
