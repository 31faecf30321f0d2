"""What the files of a checkpoint folder say of it: its kind, architecture, training and origin."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ...privacy import without_private
from ..checkpoint_files import find_replicas
from ..run_record import read_run
from .measured import FinetuningNumbers, model_argument, read_finetuning

_PRETRAINING_CLASSES = {"msn": "MSNForPreTraining", "paws": "PAWSForPreTraining", "suncet": "SuNCEtForPreTraining"}


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint folder, read once. Made by [`read_checkpoint`]."""

    path: Path
    config: dict[str, Any]
    run: dict[str, Any]
    finetuning: FinetuningNumbers | None
    conversion: dict[str, Any] | None
    codistillation: dict[str, Any] | None
    replicas: list[str]

    @property
    def kind(self) -> Literal["pretrained", "finetuned", "converted"]:
        if self.finetuning is not None:
            return "finetuned"
        return "pretrained" if self.conversion is None else "converted"

    @property
    def model_type(self) -> str:
        """As transformers calls it, or "timm"."""
        return self.config.get("model_type", "timm")

    @property
    def method(self) -> str | None:
        """msn, paws or suncet, if a file says so."""
        said = (self.model_type, (self.conversion or {}).get("method"), self.run.get("method"))
        return next((str(name).lower() for name in said if str(name).lower() in _PRETRAINING_CLASSES), None)

    @property
    def pretraining_class(self) -> str | None:
        """The class of hf_msn that loads it with its heads."""
        return _PRETRAINING_CLASSES.get(self.model_type)

    @property
    def is_classifier(self) -> bool:
        if self.model_type == "timm":
            return bool(self.config.get("num_classes"))
        return any("ForImageClassification" in str(name) for name in self.config.get("architectures") or ())

    @property
    def has_image_processor(self) -> bool:
        return (self.path / "preprocessor_config.json").is_file()

    @property
    def timm_architecture(self) -> str | None:
        name = self.config.get("timm_model") or self.config.get("architecture")
        return None if name is None else re.sub(r"[^\w./-]", "", str(name))

    @cached_property
    def num_weights(self) -> int:
        """Numbers in the safetensors files."""
        count = 0
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, framework="np") as weights:
                    for name in weights.keys():  # noqa: SIM118  a file handle, not a dict
                        count += math.prod(weights.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"'{file}' is damaged ({error}). Save the model again.") from error
        return count

    def describe_architecture(self) -> str:
        """In a few words, without what the configuration does not say."""
        weights = f"{self.num_weights / 1e6:.3g} million weights in its file"
        if self.timm_architecture is not None:
            return f"`{self.timm_architecture}` of timm, {weights}"
        names = {
            "num_hidden_layers": "{} blocks",
            "hidden_size": "width {}",
            "num_attention_heads": "{} heads",
            "patch_size": "patches of {} pixels",
            "image_size": "images of {} pixels",
        }
        known = [said.format(int(self.config[name])) for name, said in names.items() if _is_int(self.config.get(name))]
        return ", ".join(["a vision transformer", *known, weights])


def read_checkpoint(path: str | Path, run: str | Path | None = None) -> CheckpointFacts:
    """Reads what a checkpoint folder says of itself.

    Args:
        path (`str` or `Path`): The folder.
        run (`str` or `Path`, *optional*): Folder whose `run.json` tells of the training; by default the same.

    Raises:
        ValueError: It is no checkpoint, its weights are damaged, one of its JSON files does not parse, or replicas are
            missing whose average it says is published.
    """
    path = Path(path)
    model_argument(path)  # says what is wrong with config.json
    if run is not None and not Path(run, "run.json").is_file():
        raise ValueError(f"`run` must be a folder with the run.json that training wrote, but '{run}' has none.")
    facts = CheckpointFacts(
        path=path,
        config=_object(path / "config.json") or {},
        run=read_run(path if run is None else run) or {},
        finetuning=read_finetuning(path),
        conversion=without_private(_object(path / "conversion.json")),
        codistillation=without_private(_object(path / "codistillation.json")),
        replicas=list(find_replicas(path)),
    )
    if facts.num_weights == 0:
        raise ValueError(f"The checkpoint '{path}' has no weights: no *.safetensors. Save the model again.")
    return facts


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' must be JSON, but is not: {error}. Write the checkpoint again.") from error
    if not isinstance(said, dict):
        raise ValueError(f"'{path}' must be a JSON object, but is a {type(said).__name__}. Write it again.")
    return said


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
