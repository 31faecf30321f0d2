"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: str | Path, name: str) -> Iterator[Path]:
    """Yields a folder beside `path` to write into, which becomes `path` if the block ends well, and else goes away.

    Entered before the work, it finds out whether there is a place to write to.

    Args:
        path (`str` or `Path`): It must not exist, or be an empty folder. Folders above it are made.
        name (`str`): The argument, for the message.

    Raises:
        ValueError: If there is something at `path`, or nothing can be written there.
    """
    path = check_new_folder(path, name)
    with _beside(path, name) as staging:
        try:
            staging.mkdir()
        except OSError as error:
            raise _unwritable(path, name, error) from error
        yield staging
        if path.exists():
            path.rmdir()


def check_new_folder(path: str | Path, name: str) -> Path:
    """`path`, with `~` replaced, if a folder can appear there.

    Raises:
        ValueError: If it is a file, or a folder with something in it.
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


@contextmanager
def whole_file(path: str | Path, name: str) -> Iterator[Path]:
    """As `whole_folder`, for a file that does not exist yet."""
    path = Path(path).expanduser()
    if os.path.lexists(path):
        raise ValueError(f"`{name}` must be a new file, but '{path}' exists. Choose another, or remove it first.")
    with _beside(path, name) as staging:
        try:
            staging.touch()
        except OSError as error:
            raise _unwritable(path, name, error) from error
        yield staging


@contextmanager
def _beside(path: Path, name: str) -> Iterator[Path]:
    """The name to write under meanwhile. Folders above that were made for it go away again, if it does."""
    if not path.name:
        raise ValueError(f"`{name}` must be a name of its own, but is '{path}'. Choose a new name in it.")
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, name, error) from error
    staging = path.with_name(f".{path.name}.incomplete")
    _remove(staging)  # of a run that was killed
    done = False
    try:
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
        path.unlink(missing_ok=True)


def _unwritable(path: Path, name: str, error: OSError) -> ValueError:
    return ValueError(f"`{name}` must be writable, but '{path}' is not: {error}. Choose another place.")
