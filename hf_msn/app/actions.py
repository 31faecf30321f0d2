"""What each button of the app does: images and texts in, images and HTML out."""

import os
import tempfile

from . import views
from .few_labels import FewLabels, Images


class Actions:
    """The actions on the page of one encoder. What they know of a visitor is in their arguments."""

    def __init__(self, few_labels: FewLabels):
        self.few_labels = few_labels

    def show(self, labelled: Images, unknown: Images, problems: list[str]) -> list:
        """Return both, and the HTML of messages, labelled images, answers, map and accuracy."""
        try:
            answers = views.show_answers(self.few_labels.classify(labelled, unknown), labelled.class_names)
        except ValueError as error:
            answers = views.show_messages([str(error)] if len(labelled) or len(unknown) else [])
        try:
            accuracy = views.show_accuracy(self.few_labels.measure(labelled))
        except ValueError as error:
            accuracy = views.show_messages([str(error)] if len(labelled) else [])
        shown = views.show_labelled(labelled), answers, views.show_map(labelled, unknown), accuracy
        return [labelled, unknown, views.show_messages(problems), *shown]

    def add(self, paths: list[str] | None, name: str, labelled: Images, unknown: Images) -> list:
        """Return `show`, and the paths that stay in the field, as the name of the class was refused."""
        try:
            images, problems = self.few_labels.read(paths or [], name, len(labelled))
            kept = None
            if not paths:
                problems.append("No images were chosen. Drop some into the field first.")
        except ValueError as error:
            images, problems, kept = Images(), [str(error)], paths
        return [*self.show(labelled + images, unknown, problems), kept]

    def classify(self, paths: list[str] | None, labelled: Images) -> list:
        return self.show(labelled, *self.few_labels.read(paths or []))

    def remove(self, name: str, labelled: Images, unknown: Images) -> list:
        name = " ".join(name.split())
        problems = [] if name in labelled.class_names else [f"There is no class '{name}'. Write its name above."]
        return self.show(labelled.without(name), unknown, problems)

    def clear(self) -> list:
        """Return `show` of nothing, and no paths."""
        return [*self.show(Images(), Images(), []), None]

    def example(self) -> list:
        return self.show(*self.few_labels.digits(), [])

    def export(self, labelled: Images) -> tuple[str | None, str]:
        """Return the path of the classifier, and the HTML of the messages."""
        try:
            folder = tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))
            return str(self.few_labels.export(labelled, folder)), views.show_messages([])
        except ValueError as error:
            return None, views.show_messages([str(error)])
