"""Infer from the names in a folder of images which folders are splits and which are classes."""

import os
from collections.abc import Collection
from dataclasses import dataclass

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

_SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
_EXTENSIONS = frozenset(ImageFolder.EXTENSIONS)


@dataclass
class FolderSplit:
    """One split of a folder of images."""

    folders: list[str]  # that directly hold images or metadata, sorted
    class_names: list[str]  # over all labelled splits, sorted; empty if this split has no labels
    has_metadata: bool


def is_image_file(path: str | os.PathLike) -> bool:
    """Return whether `datasets`' image folders read files with this extension, in any letter case."""
    return os.path.splitext(path)[1].lower() in _EXTENSIONS


def read_folder(root: str, shard_extensions: Collection[str]) -> tuple[dict[str, FolderSplit], list[str]]:
    """Return the splits of images by name (`val` as `val` and as `validation`), and the shards in a folder.

    The folders directly under `root` are splits if all of those with images are named like splits (`train`, `val`,
    `test` and the other names that `datasets` knows), or at least two are: a class may be named `train` as well.
    Otherwise there is one split, `train`.
    """
    folders = _walk(root, shard_extensions)
    shards = [shard for folder in folders for shard in folder.shards]
    folders = [folder for folder in folders if folder.num_images or folder.has_metadata]
    if not any(folder.num_images for folder in folders):
        return {}, shards
    tops = {folder.parts[0] for folder in folders if folder.parts and folder.num_images}
    named = [top for top in sorted(tops) if top.lower() in _SPLIT_NAMES]
    flat = any(not folder.parts for folder in folders if folder.num_images)
    has_splits = not flat and bool(named) and (len(named) == len(tops) or len(named) > 1)
    by_split: dict[str, list[_Folder]] = {}
    for folder in folders:
        if has_splits and not folder.parts:
            continue
        by_split.setdefault(folder.parts[0] if has_splits else "train", []).append(folder)
    by_split = {name: parts for name, parts in by_split.items() if any(part.num_images for part in parts)}

    depth_of_split = 1 if has_splits else 0
    labelled = {name for name, parts in by_split.items() if _is_labelled(parts, depth_of_split)}
    class_names = sorted({part.parts[-1] for name in labelled for part in by_split[name] if part.num_images})
    layout = {
        name: FolderSplit(
            folders=sorted(part.path for part in parts),
            class_names=class_names if name in labelled else [],
            has_metadata=any(part.has_metadata for part in parts),
        )
        for name, parts in by_split.items()
    }
    for name in list(layout):
        layout.setdefault(_SPLIT_NAMES.get(name.lower(), name), layout[name])
    return layout, shards


@dataclass
class _Folder:
    path: str
    parts: tuple[str, ...]
    num_images: int
    has_metadata: bool
    shards: list[str]


def _walk(root: str, shard_extensions: Collection[str]) -> list[_Folder]:
    found, seen = [], set()
    # links are followed, as datasets are often linked into place; `seen` stops at a link that leads back up
    for path, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith((".", "__")))
        relative = os.path.relpath(path, root)
        files = [name for name in files if not name.startswith(".")]
        metadata = [name for name in files if name in ImageFolder.METADATA_FILENAMES]
        found.append(
            _Folder(
                path=path,
                parts=() if relative == "." else tuple(relative.split(os.sep)),
                num_images=sum(is_image_file(name) for name in files),
                has_metadata=bool(metadata),
                shards=[
                    os.path.join(path, name)
                    for name in files
                    if os.path.splitext(name)[1].lower() in shard_extensions and name not in metadata
                ],
            )
        )
    return found


def _is_labelled(folders: list[_Folder], depth_of_split: int) -> bool:
    depths = {len(folder.parts) for folder in folders if folder.num_images}
    return len(depths) == 1 and depths.pop() > depth_of_split and not any(folder.has_metadata for folder in folders)
