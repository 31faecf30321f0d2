"""The mean of what several models predict, as one model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..distributed.replicas.peer_checkpoints import logits_of

PUBLISHED_FILE = "codistillation.json"
_FOLDER = re.compile(r"replica_(0|[1-9][0-9]*)")


class PredictionAverage(nn.Module):
    """Predicts the mean of the probabilities of several models for the same classes.

    Example:

    ```python
    model = PredictionAverage.from_pretrained("run")  # a run of CodistillationCallback with publish="average"
    probabilities = model(pixel_values=images).logits.softmax(dim=-1)
    ```

    It costs the time and the memory of all of them. To evaluate it on a `Trainer`, set `remove_unused_columns=False`.

    Args:
        replicas (`Sequence[nn.Module]`): The models. Their outputs have `logits` of shape `(..., C)`.

    Attributes:
        replicas (`nn.ModuleList`): The models, in evaluation mode.
        config (`PreTrainedConfig`, *optional*): Of the first one.

    Raises:
        ValueError: If there is no model, or two have other classes.
    """

    def __init__(self, replicas: Sequence[nn.Module]):
        super().__init__()
        if not replicas:
            raise ValueError("`replicas` must be one model or more to average, but there are 0. Give them in a list.")
        self.replicas = nn.ModuleList(replicas)
        self.config = getattr(self.replicas[0], "config", None)
        classes = [getattr(getattr(model, "config", None), "id2label", None) for model in self.replicas]
        for place, names in enumerate(classes):
            if names != classes[0]:
                raise ValueError(
                    f"All models of an average must have the same classes, but `id2label` is {classes[0]} of model 0 "
                    f"and {names} of model {place}. Give models that were trained for the same ones."
                )
        self.eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | Sequence[str | Path], *, model_class: Any = None, **settings: Any
    ) -> PredictionAverage:
        """Loads what a run with `CodistillationCallback(publish="average")` has published.

        Args:
            folder (`str` or `Path`, or a list of them): The run's `output_dir` or its repository on the Hub, in which
                `codistillation.json` says where the replicas lie; or the models' own folders.
            model_class (`type`, *optional*): Loads one by its `from_pretrained`; by default the class of transformers
                that its `config.json` names.
            settings: Of `from_pretrained`, such as `dtype` or `revision`.

        Raises:
            ValueError: If the run has published no average, `codistillation.json` names other folders than
                `replica_<number>`, or a model's class is not known.
            OSError: If a file is missing.
        """
        if isinstance(folder, (str, Path)):
            names, commit = _published_folders(str(folder), settings)
            places = [(str(folder), {"subfolder": name}) for name in names]
            if commit is not None:  # replicas of one push also where another comes in between
                settings["revision"] = commit
        else:
            places = [(str(place), {}) for place in folder]
        models = []
        for name, place in places:
            loader = model_class or _class_of(name, {**_of_files(settings), **place})
            models.append(loader.from_pretrained(name, **place, **settings))
        return cls(models)

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        """The first model's output with the average in it.

        Args:
            labels (`torch.Tensor`, *optional*): Classes, of shape `(...)`, of causal language models the tokens
                themselves; -100 does not count.
            inputs: Of the models, by name.

        Returns:
            The output with `logits` = log mean_i softmax(logits_i), `(..., C)`, whose softmax is the mean, and with
            labels the cross-entropy of that as `loss`; `None` if there is one label for no or several predictions.
        """
        if labels is not None:
            inputs["labels"] = labels
        output = self.replicas[0](**inputs)
        mean = probabilities_of(output)
        for model in self.replicas[1:]:
            mean = mean + probabilities_of(model(**inputs))
        return with_average(self.replicas[0], output, mean / len(self.replicas), labels)

    def train(self, mode: bool = True) -> PredictionAverage:
        """An average is for evaluation: dropout stays off."""
        return super().train(False)


def probabilities_of(output: Any) -> torch.Tensor:
    """softmax of an output's logits `(..., C)`, in float32 at least."""
    logits = logits_of(output)
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def with_average(model: nn.Module, output: Any, probabilities: torch.Tensor, labels: torch.Tensor | None) -> Any:
    """A model's output with a mean of probabilities in place of its own prediction, and the loss of that."""
    logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    if torch.is_tensor(output):
        return logits
    values = {"logits": logits}
    if labels is not None:
        values["loss"] = _cross_entropy(logits, labels, predicts_next_token(model))
    for name, value in values.items():
        output.update({name: value}) if type(output) is dict else setattr(output, name, value)
    return output


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the predictions at a position are for the label of the one after it."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, is_for_next: bool) -> torch.Tensor | None:
    if is_for_next:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        return None
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().to(logits.device), ignore_index=-100)


def _of_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: settings[name] for name in names if name in settings}


def replica_folders(said: Any, where: str) -> list[str] | None:
    """The names of the folders of an average in a `codistillation.json`, or `None` if it is not of an average.

    Args:
        said: What the file holds. It may be a stranger's.
        where (`str`): The file in words, for errors.

    Raises:
        ValueError: If it is no such file, or a folder is anything but `replica_<number>`.
    """
    if not isinstance(said, dict) or "published" not in said:
        raise ValueError(
            f"{where} must be a JSON object that says what is `published`, but is none. Take the file that the run "
            "wrote."
        )
    if said["published"] != "average":
        return None
    names, count = said.get("folders"), said.get("replicas")
    is_listed = isinstance(names, list) and all(isinstance(name, str) and _FOLDER.fullmatch(name) for name in names)
    if not is_listed or not names or len(set(names)) != len(names):
        raise ValueError(
            f"`folders` of {where} must be the names of the replicas' folders, each `replica_<number>` and once, but "
            f"are {names!r}. Take the file that the run wrote."
        )
    if count not in (None, len(names)):
        raise ValueError(
            f"`folders` of {where} must be one for each of `replicas`, but are {len(names)} of {count!r}. Take the "
            "file that the run wrote."
        )
    return names


def _published_folders(folder: str, settings: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The replicas' folders, and the commit that they are of where they come from the Hub."""
    remedy = "Give the `output_dir` of a run with `publish='average'`, or a list of the models' folders."
    if Path(folder).is_dir() and not Path(folder, PUBLISHED_FILE).is_file():
        raise ValueError(
            f"`folder` must hold a '{PUBLISHED_FILE}' that says where the replicas lie, but '{folder}' has none. "
            f"{remedy}"
        )
    try:
        file = cached_file(folder, PUBLISHED_FILE, **_of_files(settings))
    except OSError as error:
        raise OSError(
            f"`folder` must be a folder, or a repository on the Hub, with a '{PUBLISHED_FILE}', but from '{folder}' "
            f"there is none to be had. {remedy}"
        ) from error
    where = f"'{PUBLISHED_FILE}' of '{folder}'"
    try:
        said = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} does not parse as JSON: {error}. {remedy}") from error
    names = replica_folders(said, where)
    if names is None:
        raise ValueError(
            f"`folder` must be of a run that has published an average, but '{folder}' has published replica "
            f"{said['published']} alone, which its own class loads. {remedy}"
        )
    return names, None if Path(folder).is_dir() else extract_commit_hash(file, None)


def _class_of(folder: str, settings: dict[str, Any]) -> Any:
    fields, _ = PreTrainedConfig.get_config_dict(folder, **settings)
    name = (fields.get("architectures") or [None])[0]
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"The class of the model in '{folder}' must be known to load it, but `architectures` of its config.json "
            f"names {name}, which is no model of transformers. Give `model_class`."
        )
    return found
