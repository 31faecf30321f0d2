"""Infer from the names in a folder of images which folders are splits and which are classes."""

import glob
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from .splits import first_few

logger = logging.get_logger(__name__)

# by the words that mark them in the names of folders and files
SPLIT_NAMES = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
_EXTENSIONS = frozenset(ImageFolder.EXTENSIONS)
_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass
class FolderSplit:
    """One split of a folder of images."""

    files: list[str]
    classes: list[str] | None  # of each file; `None` if this split has no labels
    class_names: list[str]  # over all labelled splits, sorted; empty if this split has no labels
    metadata_files: list[str]

    def load(self, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
        """Return the images as rows, unread."""
        if not self.metadata_files:
            return image_files(self.files, self.classes, self.class_names)
        # without the images beside them: a metadata file names its own
        files = [glob.escape(path) for path in self.metadata_files]
        try:
            return datasets.load_dataset("imagefolder", data_files=files, split="train", streaming=streaming)
        except (ValueError, IndexError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                "Metadata files must name images in a column `file_name`, but one of "
                f"{first_few(self.metadata_files)} cannot be read: {error.__cause__ or error}. Mend it, or remove it."
            ) from error


def image_files(
    files: Sequence[str], classes: Sequence[str] | None = None, class_names: Sequence[str] = ()
) -> datasets.Dataset:
    """Return image files as rows, unread. The fingerprint depends on their time stamps, as in `datasets`."""
    check_file_names(files)
    columns = {"image": [{"bytes": None, "path": path} for path in files]}
    features = datasets.Features(image=datasets.Image(decode=False))
    if classes is not None:
        features["label"] = datasets.ClassLabel(names=list(class_names))
        columns["label"] = classes
    dataset = datasets.Dataset.from_dict(columns, features)
    stamps = [os.path.getmtime(path) if os.path.exists(path) else None for path in files]
    fingerprint = hashlib.sha256(repr((columns, class_names, stamps)).encode()).hexdigest()[:16]
    return datasets.Dataset(dataset.data, info=dataset.info, fingerprint=fingerprint)


def is_image_file(path: str | os.PathLike) -> bool:
    """Return whether `datasets`' image folders read files with this extension, in any letter case."""
    return os.path.splitext(path)[1].lower() in _EXTENSIONS


def read_folder(root: str, shard_extensions: Collection[str]) -> tuple[dict[str, FolderSplit], list[str]]:
    """Return the splits of images by name (`val` as `val` and as `validation`), and the shards in a folder.

    The folders directly under `root` are splits if all of those with images are named like splits (`train`, `val`,
    `test` and the other names that `datasets` knows), or at least two are: a class may be named `train` as well.
    Otherwise there is one split, `train`. For the classes see [`_class_levels`].
    """
    folders = _without_hidden(_walk(root, (), ()))
    shards = [shard for folder in folders for shard in folder.ending_with(shard_extensions)]
    archives = [archive for folder in folders for archive in folder.ending_with(_ARCHIVES)]
    folders = [folder for folder in folders if folder.images or folder.metadata]
    if not any(folder.images for folder in folders):
        return {}, shards
    if archives:
        logger.warning("Archives beside the images are not read (%d, such as '%s').", len(archives), archives[0])
    tops = {folder.parts[0] for folder in folders if folder.parts and folder.images}
    named = [top for top in sorted(tops) if top.lower() in SPLIT_NAMES]
    flat = any(not folder.parts for folder in folders if folder.images)
    has_splits = not flat and bool(named) and (len(named) == len(tops) or len(named) > 1)
    by_split: dict[str, list[_Folder]] = {}
    for folder in sorted(folders, key=lambda folder: folder.path):
        if has_splits and not folder.parts:
            raise ValueError(
                f"A metadata file must lie in the folder of its split, but '{folder.metadata[0]}' of '{root}' lies "
                f"beside the splits {first_few(named)}. Put one into each split, with the file names relative to it."
            )
        by_split.setdefault(folder.parts[0] if has_splits else "train", []).append(folder)
    by_split = {name: parts for name, parts in by_split.items() if any(part.images for part in parts)}

    levels = _class_levels(by_split, begin=1 if has_splits else 0)
    class_names = sorted(
        {part.parts[level] for name, level in levels.items() for part in by_split[name] if part.images}
    )
    layout = {
        name: FolderSplit(
            files=[os.path.join(part.path, image) for part in parts for image in part.images],
            classes=[part.parts[levels[name]] for part in parts for _ in part.images] if name in levels else None,
            class_names=class_names if name in levels else [],
            metadata_files=[os.path.join(part.path, entry) for part in parts for entry in part.metadata],
        )
        for name, parts in by_split.items()
    }
    for name in list(layout):
        layout.setdefault(SPLIT_NAMES.get(name.lower(), name), layout[name])
    return layout, shards


def check_file_names(names: Iterable[str]) -> None:
    """Check that names can be stored as text: those of files that are not UTF-8 cannot."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"Names of image files must be UTF-8, but {os.fsencode(name)} is not. Rename the file."
            ) from None


@dataclass
class _Folder:
    path: str
    parts: tuple[str, ...]
    names: list[str]  # of its files, sorted
    images: list[str] = field(init=False)
    metadata: list[str] = field(init=False)

    def __post_init__(self):
        self.images = [name for name in self.names if is_image_file(name)]
        self.metadata = [name for name in self.names if name in ImageFolder.METADATA_FILENAMES]

    def ending_with(self, extensions: Collection[str]) -> list[str]:
        found = [name for name in self.names if os.path.splitext(name)[1].lower() in extensions]
        return [os.path.join(self.path, name) for name in found if name not in self.metadata]


def _walk(path: str, parts: tuple[str, ...], above: tuple[str, ...]) -> Iterator[_Folder]:
    # links are followed, as datasets are often linked into place, but not those that lead back up
    real = os.path.realpath(path)
    if real in above:
        return
    try:
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except PermissionError as error:
        logger.warning("A folder is left out: %s.", error)
        return
    folders = [entry.name for entry in entries if entry.is_dir()]
    yield _Folder(path, parts, [entry.name for entry in entries if not entry.is_dir()])
    for name in folders:
        yield from _walk(os.path.join(path, name), (*parts, name), (*above, real))


def _without_hidden(folders: Iterable[_Folder]) -> list[_Folder]:
    kept, hidden = [], []
    for folder in folders:
        is_hidden = any(part[0] == "." for part in folder.parts)
        names = [] if is_hidden else [name for name in folder.names if name[0] != "."]
        kept.append(_Folder(folder.path, folder.parts, names))
        left_out = [name for name in folder.images if name not in names and not name.startswith("._")]  # macOS' own
        hidden += [os.path.join(folder.path, name) for name in left_out]
    if hidden:
        logger.warning("Hidden images are not read (%d, such as '%s').", len(hidden), hidden[0])
    return kept


def _class_levels(by_split: dict[str, list[_Folder]], begin: int) -> dict[str, int]:
    """Return for each labelled split the place in a folder's `parts` that names the class.

    A split is labelled if all of its images are at one depth. The class is the first level at which its folders
    differ in any split of this depth, as in torchvision's `ImageFolder`: `<class>/images` is a class, not `images`. If
    no level differs, there is one class, at the first level, or none if the classes of all other splits lie at other
    depths.
    """
    differing: dict[str, list[int]] = {}
    depths: dict[str, int] = {}
    for name, folders in by_split.items():
        paths = sorted({folder.parts for folder in folders if folder.images}, key=lambda parts: (len(parts), parts))
        depth = len(paths[0])
        if any(folder.metadata for folder in folders):
            continue
        if depth < len(paths[-1]):
            logger.warning(
                "Images of '%s' have no labels, as they lie at different depths, such as in '%s' and in '%s'.",
                *(name, "/".join(paths[0]) or ".", "/".join(paths[-1])),
            )
        elif depth > begin:
            depths[name] = depth
            differing[name] = [level for level in range(begin, depth) if len({path[level] for path in paths}) > 1]
    first_levels: dict[int, int] = {}  # by depth: the same for all splits of one depth
    for name, levels in differing.items():
        if levels:
            first_levels[depths[name]] = min(levels[0], first_levels.get(depths[name], levels[0]))
    chosen: dict[str, int] = {}
    for name, levels in differing.items():
        if depths[name] in first_levels or not first_levels:
            chosen[name] = first_levels.get(depths[name], begin)
        if len(levels) > 1:
            logger.warning(
                "Folders of '%s' differ at levels %s below the split. The classes are those of level %d.",
                *(name, " and ".join(str(level - begin + 1) for level in levels), chosen[name] - begin + 1),
            )
    return chosen
