"""A classifier from a few labelled images: what `hf-msn app` does, without its interface."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors
from transformers import ViTMSNModel

from ..data.decoding import BrokenImageError, decode_image
from ..data.sources import load_images
from ..data.splits import low_shot_indices
from ..data.transforms import evaluation_image_processor
from ..evaluation.backbones import (
    evaluated_module,
    evaluation_mode,
    load_vision_model,
    resolve_image_processor,
    weights_sha256,
)
from ..evaluation.charts import thumbnail
from ..evaluation.features import Features, process_image
from ..evaluation.probes import LogisticProbe
from ..evaluation.results import mean_std_ci95
from ..files import public_name
from ..hub.export_classifier import export_classifier
from ..models.modeling_pretraining import PretrainingModel

MAX_FILES = 200  # that are read at a time
MAX_IMAGES = 1000  # with a label
MAX_MEGABYTES = 10  # of a file, each 2**20 bytes
MAX_MEGAPIXELS = 50
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others, such as EPS, start programs
_LONGEST_NAME = 100
_BATCH = 32
_COUNTS = (1, 2, 3, 5, 10, 20, 50, 100)  # labelled images per class that accuracy is measured at


@dataclass(frozen=True)
class Images:
    """Images that were read: of each its name, a small picture as data URI, its class or `None`, and its features."""

    names: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    classes: tuple[str | None, ...] = ()
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))  # (N, D)

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: "Images") -> "Images":
        parts = [part for part in (self, other) if len(part)]
        if len(parts) < 2:
            return parts[0] if parts else self
        features = np.concatenate([self.features, other.features])
        return Images(self.names + other.names, self.pictures + other.pictures, self.classes + other.classes, features)

    def without(self, class_name: str) -> "Images":
        """Return the images of the other classes."""
        rows = [row for row, name in enumerate(self.classes) if name != class_name]
        lists = (tuple(values[row] for row in rows) for values in (self.names, self.pictures, self.classes))
        return Images(*lists, self.features[rows])

    @property
    def class_names(self) -> list[str]:
        """The classes in the order in which they were added; their places are the class numbers."""
        return list(dict.fromkeys(self.classes))

    @property
    def labels(self) -> np.ndarray:
        """Class number of each image, (N,)."""
        numbers = {name: number for number, name in enumerate(self.class_names)}
        return np.array([numbers[name] for name in self.classes], dtype=np.int64)


class Neighbour(NamedTuple):
    """A labelled image and its cosine similarity to another one."""

    name: str
    picture: str
    class_name: str
    similarity: float


class Answer(NamedTuple):
    """The classes of an image with their probabilities, the likeliest first."""

    name: str
    picture: str
    classes: list[tuple[str, float]]
    neighbours: list[Neighbour]


class Accuracy(NamedTuple):
    """Accuracy in percent with a number of labelled images per class, over several draws of them."""

    images_per_class: int
    mean: float
    std: float


class FewLabels:
    """An encoder, and the classifiers that a few labelled images make of its features.

    The classifier is a [`LogisticProbe`] on frozen features, as in [`LowShotEvaluator`]. No uploaded file is trusted:
    at most 10 MB and 50 megapixels of PNG, JPEG, WebP, GIF, BMP or TIFF are read, and nothing is kept but features and
    small pictures, in memory.

    Args:
        model (`str`): As for [`load_vision_model`].
        checkpoint, revision (`str`, *optional*): As for [`load_vision_model`].
        image_size (`int`, *optional*): Resize and crop as the paper does, to this size in pixels. By default the image
            processor that is saved with the model does it.

    Raises:
        ValueError: If the model cannot be loaded, or has no image processor.
    """

    def __init__(
        self, model: str, *, checkpoint: str | None = None, revision: str | None = None, image_size: int | None = None
    ):
        self.name = public_name(model)
        self.model = load_vision_model(str(model), checkpoint=checkpoint, revision=revision)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.image_processor = (
            resolve_image_processor(self.model) if image_size is None else evaluation_image_processor(image_size)
        )
        self._module, self._forward = evaluated_module(self.model)

    @property
    def can_export(self) -> bool:
        """Whether [`export_classifier`] takes the model."""
        return isinstance(self.model, (PretrainingModel, ViTMSNModel))

    def read(
        self, paths: Iterable[str | os.PathLike], class_name: str | None = None, known: int = 0
    ) -> tuple[Images, list[str]]:
        """Read uploaded files. Those that cannot be read are left out, with a message for each.

        Args:
            paths (`Iterable[path]`): The files, of which the first 200 are read.
            class_name (`str`, *optional*): Their class.
            known (`int`, *optional*, defaults to 0): Labelled images that there are already, of 1,000 at most.

        Raises:
            ValueError: If `class_name` is empty or too long, or there would be too many labelled images.
        """
        paths = list(paths)
        if class_name is not None:
            class_name = " ".join(class_name.split())
            if not 1 <= len(class_name) <= _LONGEST_NAME:
                raise ValueError(
                    f"The name of a class must have 1 to {_LONGEST_NAME} characters, but has {len(class_name)}. Write "
                    "what the images show."
                )
            if known + min(len(paths), MAX_FILES) > MAX_IMAGES:
                raise ValueError(
                    f"There may be {MAX_IMAGES} labelled images, but these would be {known + len(paths)}. Remove a "
                    "class, or add fewer."
                )
        problems = []

        def opened() -> Iterator[tuple[str, str | None, Image.Image]]:
            for path in paths[:MAX_FILES]:
                try:
                    yield Path(path).name, class_name, open_upload(path)
                except ValueError as error:
                    problems.append(str(error))

        images = self._extract(opened())
        if len(paths) > MAX_FILES:
            problems.append(f"Only the first {MAX_FILES} of {len(paths)} files are read. Add the others afterwards.")
        return images, problems

    def digits(self, images_per_class: int = 5, num_unknown: int = 20) -> tuple[Images, Images]:
        """Return the example: labelled images of scikit-learn's digits, and test images without a label."""
        train, test = load_images("digits"), load_images("digits", split="test")
        names = train.features["label"].names
        labels = np.array(train["label"][:])
        rows = low_shot_indices(labels, images_per_class=images_per_class, seed=0)
        rows = rows[np.argsort(labels[rows], kind="stable")]

        def opened(rows: Dataset, has_label: bool) -> Iterator[tuple[str, str | None, Image.Image]]:
            for row in rows:
                name = names[row["label"]] if has_label else None
                yield Path(row["image"]["path"]).name, name, decode_image(row["image"])

        unknown = test.select(range(num_unknown))
        return self._extract(opened(train.select(rows), True)), self._extract(opened(unknown, False))

    def classify(self, labelled: Images, images: Images, *, num_neighbours: int = 3) -> list[Answer]:
        """Learn from the labelled images and classify others.

        Probabilities are the softmax of the probe's log-odds. They are not calibrated: with few labels they are too
        sure. Neighbours are the labelled images of the highest cosine similarity.

        Raises:
            ValueError: If there are fewer than 2 classes.
        """
        probe = self._fit(labelled)
        if len(images) == 0:
            return []
        names = labelled.class_names
        probabilities = softmax(probe.predict_scores(images.features), axis=1)
        search = NearestNeighbors(n_neighbors=min(num_neighbours, len(labelled)), metric="cosine", algorithm="brute")
        distances, nearest = search.fit(labelled.features).kneighbors(images.features)
        answers = []
        for row in range(len(images)):
            order = np.argsort(-probabilities[row], kind="stable")
            neighbours = [
                Neighbour(
                    labelled.names[place], labelled.pictures[place], labelled.classes[place], 1 - float(distance)
                )
                for place, distance in zip(nearest[row], distances[row])
            ]
            classes = [(names[number], float(probabilities[row, number])) for number in order]
            answers.append(Answer(images.names[row], images.pictures[row], classes, neighbours))
        return answers

    def measure(self, labelled: Images, num_splits: int = 10) -> list[Accuracy]:
        """Measure accuracy against the number of labels on the labelled images themselves.

        The classifier learns from k = 1, 2, 3, 5, ... images per class, drawn with `num_splits` seeds, and is tested
        on all other labelled images. Each class keeps at least one of them.

        Raises:
            ValueError: If there are fewer than 2 classes, or a class has a single image.
        """
        self._check_classes(labelled)
        labels = labelled.labels
        sizes = np.bincount(labels)
        if sizes.min() < 2:
            raise ValueError(
                f"Each class must have at least 2 labelled images, one to learn from and one to test on, but "
                f"'{labelled.class_names[sizes.argmin()]}' has 1. Add more."
            )
        measured = []
        most = int(sizes.min()) - 1
        for count in (*(count for count in _COUNTS if count < most), most):
            accuracies = []
            for seed in range(num_splits):
                learnt = np.isin(np.arange(len(labels)), low_shot_indices(labels, images_per_class=count, seed=seed))
                probe = LogisticProbe().fit(labelled.features[learnt], labels[learnt])
                accuracies.append(100 * float((probe.predict(labelled.features[~learnt]) == labels[~learnt]).mean()))
            mean, std, _ = mean_std_ci95(accuracies)
            measured.append(Accuracy(count, mean, std))
        return measured

    def export(self, labelled: Images, folder: str | os.PathLike) -> Path:
        """Write the classifier as `classifier.zip` into an existing folder: see [`export_classifier`].

        Raises:
            ValueError: If there are fewer than 2 classes, or this model cannot be exported.
        """
        probe = self._fit(labelled)
        features = Features(
            labelled.features, labelled.labels, np.arange(len(labelled)), weights_sha256=weights_sha256(self._module)
        )
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            files = export_classifier(
                self.model,
                probe,
                features,
                Path(unpacked, "classifier"),
                class_names=labelled.class_names,
                image_processor=self.image_processor,
            )
            archive = shutil.make_archive(os.path.join(unpacked, "classifier"), "zip", files)
            return Path(shutil.move(archive, Path(folder, "classifier.zip")))

    def _fit(self, labelled: Images) -> LogisticProbe:
        self._check_classes(labelled)
        return LogisticProbe().fit(labelled.features, labelled.labels)

    def _check_classes(self, labelled: Images) -> None:
        if len(labelled.class_names) < 2:
            raise ValueError(
                f"A classifier needs labelled images of at least 2 classes, but there are {len(labelled.class_names)}."
            )

    def _extract(self, images: Iterable[tuple[str, str | None, Image.Image]]) -> Images:
        """Read names, classes and images. An image is let go before the next one is opened: it may be large."""
        names, classes, pictures, pixels = [], [], [], []
        for name, class_name, image in images:
            names.append(name)
            classes.append(class_name)
            pictures.append(thumbnail(image))
            pixels.append(process_image(self.image_processor, image))
        if not names:
            return Images()
        with evaluation_mode(self._module) as device:
            dtype = next(self._module.parameters()).dtype
            batches = [batch.to(device, dtype) for batch in torch.stack(pixels).split(_BATCH)]
            vectors = torch.cat([self._forward(batch).float().cpu() for batch in batches])
        return Images(tuple(names), tuple(pictures), tuple(classes), vectors.numpy())


def open_upload(path: str | os.PathLike) -> Image.Image:
    """Return the RGB image of an uploaded file, of which no more than 10 MB is read.

    Raises:
        ValueError: If the file is too large, has too many pixels, is broken, or is no image of [`FORMATS`].
    """
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MEGABYTES * 2**20 + 1)
        if len(data) > MAX_MEGABYTES * 2**20:
            raise ValueError(f"at most {MAX_MEGABYTES} MB are read, and it is larger. Save it smaller")
        if not data:
            raise ValueError("the file is empty")
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
        if image.width * image.height > MAX_MEGAPIXELS * 10**6:
            raise ValueError(
                f"at most {MAX_MEGAPIXELS} megapixels are read, and it has {image.width} x {image.height}. "
                "Save it smaller"
            )
        return decode_image(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"'{name}' is left out: it is no image of {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"'{name}' is left out: at most {MAX_MEGAPIXELS} megapixels are read.") from error
    except BrokenImageError as error:
        raise ValueError(f"'{name}' is left out: the image is broken ({error.reason}).") from error
    except Exception as error:  # Pillow raises nearly every built-in error on broken headers
        raise ValueError(f"'{name}' is left out: {error}.") from error
