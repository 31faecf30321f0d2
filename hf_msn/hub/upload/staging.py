"""Which files of a checkpoint go to the Hub: a list by name, laid out in a folder as they will lie there."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModelForPreTraining
from transformers.utils import logging

from ...models.configuration_msn import MSNConfig
from ...models.configuration_paws import PAWSConfig
from ...models.configuration_suncet import SuNCEtConfig
from ...privacy import without_private
from ..cards import save_model_card
from ..checkpoint_files import IMAGE_PROCESSOR, INDEX, find_replicas, find_weights, model_files, read_json
from ..export import export_backbone
from .private_data import PrivateData

logger = logging.get_logger(__name__)

_FINETUNED = "finetune.json"
_RECORDS = ("run.json", "conversion.json", "codistillation.json", _FINETUNED)
# What may lie in a repo by our hand: what a push no longer has of these is removed, the rest is left alone.
_OURS = re.compile(
    r"(replica_[0-9]+/)?"
    r"(config\.json|preprocessor_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json)|"
    r"README\.md|(run|conversion|codistillation|finetune)\.json|\.eval_results/[^/]+\.yaml|figures/[^/]+\.png"
)
# What a run needs to go on, besides the above: no training_args.bin, which nothing reads and which holds paths.
_RESUME = re.compile(
    r"optimizer\.pt|scheduler\.pt|scaler\.pt|trainer_state\.json|rng_state(_\d+)?\.pth|sync_state_\d+\.pt|"
    r"labelled_images\.json"
)
_PRETRAINING_TYPES = (MSNConfig.model_type, PAWSConfig.model_type, SuNCEtConfig.model_type)
_LFS_SUFFIXES = (".safetensors", ".png", ".pt", ".pth")
FORMS = ("backbone", "classifier", "pretraining")


@dataclass(frozen=True)
class PlannedFile:
    """A file that goes up.

    Args:
        path (`str`): In the repo.
        source (`Path`): The bytes.
        origin (`str`): Where they are from, in words.
    """

    path: str
    source: Path
    origin: str

    @property
    def size(self) -> int:
        """In bytes."""
        return self.source.stat().st_size

    @property
    def is_lfs(self) -> bool:
        """Whether the Hub keeps it as a large file; in the end the Hub decides."""
        return self.source.suffix in _LFS_SUFFIXES


def is_ours(path: str, folder: str = "") -> bool:
    """Whether a push could have put the file there: `folder` is that of a checkpoint to resume from, or the root."""
    if not folder:
        return _OURS.fullmatch(path) is not None
    name = path.removeprefix(f"{folder}/")
    return name != path and bool(_OURS.fullmatch(name) or _RESUME.fullmatch(name))


def read_checkpoint(checkpoint: str | Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, its configuration and the names of its weight files, once all of them are whole.

    Raises:
        ValueError: Something is missing or damaged, or a link that leads out of the folder.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"`checkpoint` must be a folder with a trained model, but there is no folder '{checkpoint}'.")
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
        raise ValueError(
            f"'{checkpoint}' has no 'config.json', so it is no checkpoint of `save_pretrained`. "
            + (f"Did you mean '{inside[-1]}'?" if inside else "Give the folder that the model was saved to.")
        )
    _check_links(folder)
    config, names = read_json(folder / "config.json"), find_weights(folder)
    find_replicas(folder)
    return folder, config, names


def stage_checkpoint(
    checkpoint: str | Path,
    staging: Path,
    *,
    what: str | None,
    private: PrivateData,
    results: Sequence = (),
    figures: Sequence[str | Path] = (),
    repo_id: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    without_results: bool = False,
    link: Callable[[Path, Path], None] | None = None,
) -> list[PlannedFile]:
    """Lays out in `staging` (an empty folder) what is to be published of a checkpoint, with its card.

    Raises:
        ValueError: For a checkpoint, form, figure or result that cannot be published, each before anything is sent.
    """
    folder, config, weights = read_checkpoint(checkpoint)
    link = link or link_or_point
    is_pretraining = config.get("model_type") in _PRETRAINING_TYPES
    if what is None and is_pretraining and not (folder / _FINETUNED).is_file():
        what = "backbone"
    _check_form(what, config, is_pretraining, checkpoint)
    origins: dict[str, str] = {}
    is_exported = is_pretraining and what == "backbone"
    replicas = find_replicas(folder)
    if is_exported and replicas:
        raise ValueError(
            f"'{checkpoint}' holds an average of {len(replicas)} replicas, but `what` is 'backbone', which exports "
            "one model. Publish it whole: `what='pretraining'`."
        )
    if is_exported:
        _export(folder, staging, origins)
    else:
        names = model_files(folder, weights)
        for replica, files in replicas.items():
            (staging / replica).mkdir()
            names += [f"{replica}/{name}" for name in files]
        for name in names:
            link(folder / name, staging / name)
            origins[name] = f"{name} of the checkpoint"
    for name in _RECORDS:
        # What fine-tuning measured is of the model with its head.
        if (folder / name).is_file() and not (is_exported and name == _FINETUNED):
            link(folder / name, staging / name)
            origins[name] = f"{name} of the checkpoint"
    if IMAGE_PROCESSOR not in origins and config.get("model_type") is not None:
        logger.warning_once(
            "The checkpoint has no 'preprocessor_config.json': AutoImageProcessor will not load, and images that are "
            "normalised in another way than in training give wrong features. Write one by "
            "`evaluation_image_processor(image_size).save_pretrained(folder)`."
        )
    for name in list(origins):
        if name.endswith(".json") and Path(name).name != INDEX:
            _clean_json(staging / name, name, origins, private)
    _check_private(staging, origins, private)
    _add_card(staging, origins, folder, results, figures, repo_id, license, tags, without_results)
    return _planned(staging, origins, private)


def stage_resumable(
    checkpoint: Path, staging: Path, path_in_repo: str, *, private: PrivateData, link: Callable[[Path, Path], None]
) -> list[PlannedFile]:
    """Lays out what a run needs to go on from a checkpoint of a trainer, for `path_in_repo` of the repo."""
    _check_links(checkpoint)
    origins: dict[str, str] = {}
    for file in sorted(checkpoint.iterdir()):
        if file.is_file() and (_OURS.fullmatch(file.name) or _RESUME.fullmatch(file.name)):
            link(file, staging / file.name)
            origins[file.name] = f"{file.name} of {checkpoint.name}"
            if file.suffix == ".json" and file.name != INDEX:
                _clean_json(staging / file.name, file.name, origins, private)
    planned = _planned(staging, origins, private)
    return [PlannedFile(f"{path_in_repo}/{file.path}", file.source, file.origin) for file in planned]


def link_or_point(source: Path, target: Path) -> None:
    """The same file under another name, without a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk
        os.symlink(source.resolve(), target)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, which stays when `source` is removed."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def _check_form(what: str | None, config: dict, is_pretraining: bool, checkpoint) -> None:
    if what is None:
        return
    if what not in FORMS:
        raise ValueError(f"`what` must be one of {', '.join(FORMS)}, but is '{what}'. Leave it out to have it chosen.")
    is_classifier = any(name.endswith("ForImageClassification") for name in config.get("architectures") or [])
    found = "pretraining" if is_pretraining else "classifier" if is_classifier else "backbone"
    if what != found and not (what == "backbone" and is_pretraining):
        remedy = {
            "backbone": "Publish it as it is: leave out `what`.",
            "classifier": "Train one by `scripts/finetune.py`, and give its folder.",
            "pretraining": "Give the folder of the pretraining run.",
        }[what]
        raise ValueError(f"`what` is '{what}', but '{checkpoint}' holds a {found} model. {remedy}")


def _export(folder: Path, staging: Path, origins: dict[str, str]) -> None:
    model = AutoModelForPreTraining.from_pretrained(folder)
    processor = None
    if (folder / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(folder)
    exported = export_backbone(model, staging / "backbone", image_processor=processor)
    for file in sorted(exported.iterdir()):
        if _OURS.fullmatch(file.name):
            os.replace(file, staging / file.name)
            origins[file.name] = "made by export_backbone of the checkpoint"
    shutil.rmtree(exported)


def _add_card(staging, origins, folder, results, figures, repo_id, license, tags, without_results) -> None:
    for figure in figures:
        if Path(figure).suffix != ".png":
            raise ValueError(f"Figures are published as PNG, but one is '{figure}'. Save it as .png.")
    settings = {"repo_id": repo_id, "figures": figures, "license": license, "without_results": without_results}
    try:
        save_model_card(staging, results, **settings)
    except ValueError as error:
        raise ValueError(str(error).replace(str(staging), str(folder))) from error
    if tags:
        card = ModelCard.load(staging / "README.md")
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(staging / "README.md")
    made = "made from the checkpoint" + (f" and {len(results)} result files" if results else ", without results")
    origins["README.md"] = made
    for file in sorted(staging.glob(".eval_results/*.yaml")):
        origins[f".eval_results/{file.name}"] = made
    for file in sorted(staging.glob("figures/*.png")):
        origins[f"figures/{file.name}"] = "a figure of the card"


def _planned(staging: Path, origins: dict[str, str], private: PrivateData) -> list[PlannedFile]:
    _check_private(staging, origins, private)
    return [PlannedFile(name, staging / name, origins[name]) for name in sorted(origins)]


def _check_private(staging: Path, origins: dict[str, str], private: PrivateData) -> None:
    for name, origin in origins.items():
        found = private.find_in_file(staging / name)
        if found is not None:
            raise ValueError(
                f"'{name}' ({origin}) has {found}, which must not be published. Nothing was sent. Take it out of the "
                "file, or out of what the file is made from."
            )


def _clean_json(path: Path, name: str, origins: dict[str, str], private: PrivateData) -> None:
    value = read_json(path)
    clean = private.clean(without_private(value) if name == "run.json" else value)
    if Path(name).name == "config.json":
        clean.pop("_name_or_path", None)  # where the weights once were
    if clean != value:
        path.unlink()  # the checkpoint's own file, under a second name
        path.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
        origins[name] += ", less the paths of this machine"


def _check_links(folder: Path) -> None:
    inside = folder.resolve()
    for file in sorted([*folder.iterdir(), *folder.glob("replica_*/*")]):
        name = file.relative_to(folder).as_posix()
        allowed = _OURS.fullmatch(name) or _RESUME.fullmatch(name) or _OURS.fullmatch(f"{name}/config.json")
        if allowed and not file.resolve().is_relative_to(inside):
            raise ValueError(
                f"'{name}' of '{folder}' is a link that leads out of the folder, and is not published. If it is "
                "meant, put the file itself there: `cp -rL` copies a folder with what its links point to."
            )
