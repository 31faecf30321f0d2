"""Charts as inline SVG, in the colours of the page around them, and pictures as data URIs: nothing else is loaded."""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image
from sklearn.manifold import TSNE

THUMBNAIL_SIZE = 96  # longest side in pixels
_FEWEST_FOR_TSNE = 10
_PLOT = (52, 14, 470, 280)  # left, top, width and height in units of the drawing
_MAP = (10, 10, 700, 460)


@cache
def environment(package: str = "hf_msn.evaluation") -> Environment:
    """Return the templates of a package, which escape every text."""
    return Environment(loader=PackageLoader(package), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def styles(package: str, name: str) -> Markup:
    """Return a style sheet among the templates of a package."""
    return Markup(environment(package).loader.get_source(environment(package), name)[0])


def accuracy_chart(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]], description: str, x_label: str
) -> Markup:
    """Draw accuracy over a number of labels.

    Args:
        curves (`Mapping[str, Sequence[tuple]]`): By name; each point is the number of labels, and the accuracy, its
            lower and its upper end in percent.
        description (`str`): What a reader hears who does not see the chart.
        x_label (`str`): Of the horizontal axis, which is logarithmic.
    """
    left, top, width, height = _PLOT
    places = sorted({point[0] for points in curves.values() for point in points})
    first, last = np.log2(places[0]), np.log2(places[-1])

    def at(place: float, accuracy: float) -> tuple[float, float]:
        share = 0.5 if first == last else (np.log2(place) - first) / (last - first)
        return round(left + (0.06 + 0.88 * share) * width, 1), round(top + (1 - accuracy / 100) * height, 1)

    drawn = []
    for name, points in curves.items():
        bars = [(*at(x, mean), at(x, low)[1], at(x, high)[1], mean) for x, mean, low, high in sorted(points)]
        drawn.append({"name": name, "bars": bars, "label": bars[-1][1]})
    # the names at the ends of the curves, pushed apart where these end close together
    lowest = -np.inf
    for curve in sorted(drawn, key=lambda curve: curve["label"]):
        lowest = curve["label"] = max(curve["label"], lowest + 17)
    return environment().get_template("charts.html").module.accuracy(
        curves=drawn,
        description=description,
        x_label=x_label,
        x_ticks=[(at(place, 0)[0], f"{place:.3g}") for place in places],
        y_ticks=[(at(places[0], value)[1], value) for value in range(0, 101, 20)],
        frame=_PLOT,
    )  # fmt: skip


def map_chart(
    points: np.ndarray,
    classes: Sequence[int | None],
    titles: Sequence[str],
    names: Mapping[int, str],
    description: str,
) -> Markup:
    """Draw images as points, each in the colour of its class. Images without a class are rings.

    Args:
        points (`np.ndarray` of shape `(N, 2)`): From `project`.
        classes (`Sequence[int | None]`): Class of each point; the number chooses the colour.
        titles (`Sequence[str]`): A text for each point, shown when it is pointed at.
        names (`Mapping[int, str]`): Names of the classes; up to 40 are written at the middle of their points.
        description (`str`): What a reader hears who does not see the chart.
    """
    left, top, width, height = _MAP
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    shares = (points - low) / np.where(span > 0, span, 1)
    places = np.round([left, top] + (0.03 + 0.94 * shares) * [width, height], 1)
    groups = []
    for number, name in names.items():
        rows = [row for row, of_row in enumerate(classes) if of_row == number]
        if rows:
            dots = [(*places[row], titles[row]) for row in rows]
            groups.append(
                {"hue": hue(number), "name": name, "dots": dots, "middle": np.median(places[rows], axis=0) - [0, 8]}
            )
    rings = [(*places[row], titles[row]) for row, of_row in enumerate(classes) if of_row is None]
    chart = environment().get_template("charts.html").module
    return chart.map(groups=groups, rings=rings, with_names=len(groups) <= 40, description=description, frame=_MAP)


def project(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """Return features (N, D) in the plane, (N, 2), and by which method: t-SNE, of fewer than 10 images PCA."""
    if len(features) >= _FEWEST_FOR_TSNE:
        perplexity = min(30.0, (len(features) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
        return tsne.fit_transform(features), "t-SNE"
    centred = features - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(features), 2))
    points[:, : min(2, len(axes))] = centred @ axes[:2].T
    return points, "PCA"


def hue(number: int) -> float:
    """Return the hue of a class in degrees: neighbouring numbers are far apart."""
    return round((210 + 137.508 * number) % 360, 1)


def thumbnail(image: Image.Image) -> str:
    """Return an RGB image of at most 96 x 96 pixels as a data URI: as PNG if it is as small, else as JPEG."""
    file, is_small = io.BytesIO(), max(image.size) <= THUMBNAIL_SIZE
    if not is_small:
        image = image.copy()
        image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.save(file, "PNG" if is_small else "JPEG", quality=85)
    return f"data:image/{'png' if is_small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
