"""The contents of the app as HTML, in which every text is escaped."""

from collections.abc import Sequence

import numpy as np

from ..evaluation.charts import accuracy_chart, environment, hue, map_chart, project, styles
from .few_labels import Accuracy, Answer, Images

_TEMPLATES = "hf_msn.app"


def style_sheet() -> str:
    """Return the styles of everything below."""
    return f"<style>{styles('hf_msn.evaluation', 'charts.css')}{styles(_TEMPLATES, 'app.css')}</style>"


def show_messages(messages: Sequence[str]) -> str:
    """Return what went wrong, or was left out."""
    return _render("messages", messages=messages)


def show_labelled(labelled: Images) -> str:
    """Return the labelled images by class."""
    groups = []
    for number, name in enumerate(labelled.class_names):
        rows = [row for row, of_row in enumerate(labelled.classes) if of_row == name]
        pictures = [(labelled.names[row], labelled.pictures[row]) for row in rows]
        groups.append({"name": name, "hue": hue(number), "pictures": pictures})
    return _render("labelled", groups=groups)


def show_answers(answers: Sequence[Answer], class_names: Sequence[str]) -> str:
    """Return each image with the likeliest classes and the nearest labelled images."""
    hues = {name: hue(number) for number, name in enumerate(class_names)}
    return _render("answers", answers=answers, hues=hues)


def show_accuracy(measured: Sequence[Accuracy], num_splits: int = 10) -> str:
    """Return accuracy against the number of labels; bars are one standard deviation over the draws."""
    points = [(a.images_per_class, a.mean, max(0.0, a.mean - a.std), min(100.0, a.mean + a.std)) for a in measured]
    said = ", ".join(f"{a.mean:.1f} ± {a.std:.1f} with {a.images_per_class}" for a in measured)
    description = f"Accuracy in percent on the other labelled images, by labelled images per class: {said}."
    chart = accuracy_chart({"other images": points}, description, "labelled images per class")
    return _render("accuracy", chart=chart, said=said, num_splits=num_splits)


def show_map(labelled: Images, unknown: Images) -> str:
    """Return a map of the features: labelled images as points, others as rings."""
    both = labelled + unknown
    if len(both) < 3:
        return ""
    points, method = project(both.features)
    numbers: list[int | None] = [*labelled.labels.tolist(), *[None] * len(unknown)]
    titles = [name if of is None else f"{of}: {name}" for name, of in zip(both.names, both.classes)]
    description = f"{method} map of the features of {len(labelled)} labelled and {len(unknown)} new images."
    chart = map_chart(np.asarray(points), numbers, titles, dict(enumerate(labelled.class_names)), description)
    return _render("map", chart=chart, method=method)


def _render(name: str, **values: object) -> str:
    return str(getattr(environment(_TEMPLATES).get_template("app.html").module, name)(**values))
