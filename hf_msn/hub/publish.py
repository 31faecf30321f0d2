"""Publish a checkpoint on the Hub: exactly the listed files, with a card, in one commit."""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from transformers import AutoImageProcessor, AutoModelForPreTraining
from transformers.utils import logging

from ..checks import check_choice
from ..evaluation.weights_hash import file_sha256
from ..files import CHECKSUMS_FILE, format_checksums, public_name, read_checksums, read_json, write_json
from .cards import PRETRAINING_METHODS, card_files, check_repo_id
from .export import export_backbone
from .results import FINETUNING_FILE, WEIGHTS_INDEX, as_paths, count_weights
from .run_record import RUN_FILE, public_run

logger = logging.get_logger(__name__)

FORMS = ("backbone", "classifier", "pretraining")
_IMAGE_PROCESSOR = "preprocessor_config.json"
# The only records that are published, and the only fields of them. Those of run.json are in run_record.py.
_RECORDS: dict[str, tuple[str, ...]] = {
    RUN_FILE: (),
    "conversion.json": (
        *("source", "method", "architecture", "heads_assumed", "num_attention_heads", "epoch", "kept", "left_out"),
        *("made_up", "assumed", "module_prefix", "target_only"),
    ),
    "codistillation.json": ("replicas", "published", "publish", "metric", "values", "checkpoint", "step", "settings"),
    FINETUNING_FILE: (
        *("format", "files", "weights_sha256", "head", "best_epoch", "validation_accuracy", "accuracy_by_epoch"),
        *("test_accuracy", "num_test_images", "test_data", "seed", "num_train_epochs", "validation_fraction", "refit"),
        *("num_labelled_images", "num_trained_images", "num_held_out_images", "classes", "class_names"),
        *("trained_rows", "held_out_rows"),
    ),
}
# A commit removes what it does not replace of these, and no other file of the repo.
_MODEL_FILE = re.compile(
    r"config\.json|preprocessor_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"README\.md|(run|conversion|codistillation|finetune)\.json|\.eval_results/[^/]+\.yaml|figures/[^/]+\.png"
)
# The files from which a run is resumed, besides the model. `training_args.bin` contains paths, and is not needed.
_RESUME_FILE = re.compile(
    r"optimizer\.pt|scheduler\.pt|scaler\.pt|trainer_state\.json|rng_state(_\d+)?\.pth|sync_state_\d+\.pt|"
    r"labelled_images\.json"
)
_FILES_OF_A_NEW_REPO = {".gitattributes", ".gitignore", "README.md", "LICENSE"}


class PublishingError(OSError):
    """Publishing failed on the Hub or on the way to it. The message says why and what to do."""


@dataclass(frozen=True)
class ListedFile:
    """A file of a publication."""

    path: str  # in the repo
    size: int  # bytes
    is_lfs: bool  # whether the Hub keeps it as a large file
    origin: str  # in words
    content: Path | bytes = field(repr=False)


@dataclass(frozen=True)
class Publication:
    """The files that were published, or with `dry_run` would be.

    Args:
        repo_id (`str`): "user/name".
        revision (`str`): The branch.
        files (`list[ListedFile]`): All files, by path.
        url (`str`, *optional*): Address of the commit; `None` after a dry run.
    """

    repo_id: str
    revision: str
    files: list[ListedFile]
    url: str | None = None

    def table(self) -> str:
        """Return one line per file: path, size, LFS or text, origin."""
        rows = [("path", "bytes", "kept as", "from")]
        rows += [(f.path, f"{f.size:,}", "LFS" if f.is_lfs else "text", f.origin) for f in self.files]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{path:<{widths[0]}}  {size:>{widths[1]}}  {kept:<{widths[2]}}  {origin}"
            for path, size, kept, origin in rows
        ]
        total = sum(file.size for file in self.files)
        return "\n".join([*lines, f"{len(self.files)} files, {total:,} bytes, for {self.repo_id} ({self.revision})"])


def publish_checkpoint(
    checkpoint: str | Path,
    repo_id: str,
    *,
    what: Literal["backbone", "classifier", "pretraining"] | None = None,
    results: str | os.PathLike | Sequence[str | os.PathLike] = (),
    figures: Sequence[str | Path] = (),
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    dry_run: bool = False,
    without_results: bool = False,
    update: bool = False,
    commit_message: str | None = None,
) -> Publication:
    """Publish a checkpoint on the Hub, so that `from_pretrained("user/name")` loads it.

    Only configuration, weights, image processor, card and figures are published, and known fields of the records of
    training, conversion and fine-tuning. The upload is one commit: the branch stays as it was until all files have
    arrived. After an interruption the same call continues it.

    Args:
        checkpoint (`str` or `Path`): Folder of a pretraining, fine-tuned, converted or exported model.
        repo_id (`str`): "user/name". The repo is created if it does not exist.
        what (`str`, *optional*): The form. `"backbone"`: the evaluated encoder, which plain transformers loads by
            `AutoModel` (or timm, for a network of timm): the default for a pretraining checkpoint that is not
            fine-tuned. `"pretraining"`: that checkpoint itself with heads and prototypes, to continue training with
            hf_msn. `"classifier"`: a fine-tuned one. By default any other checkpoint is published as it is.
        results (path or `Sequence[path]`, *optional*): Result files of the evaluator, measured on this very model.
        figures (`Sequence[str]`, *optional*): PNG files for the card.
        private (`bool`, *optional*): Visibility of a new repo. An existing repo must match, and is never changed.
        revision (`str`, *optional*): The branch, by default main. It is created if it does not exist.
        token (`str`, *optional*): With write access; by default HF_TOKEN or the token that `hf auth login` stored.
        license (`str`, *optional*): Licence of the weights, for the card.
        tags (`Sequence[str]`, *optional*): Further tags for the card.
        dry_run (`bool`, *optional*, defaults to `False`): Only list the files, without token and connection.
        without_results (`bool`, *optional*, defaults to `False`): Publish without measured numbers; the card says so.
        update (`bool`, *optional*, defaults to `False`): Replace another model in the branch.
        commit_message (`str`, *optional*): Message of the commit.

    Returns:
        [`Publication`]: The files, and the address of the commit.

    Raises:
        ValueError: If an argument or the checkpoint is not valid.
        PublishingError: If there is no token, the repo holds another model, or the Hub or the network failed.
    """
    check_repo_id(repo_id)
    repository = None if dry_run else HubRepository(repo_id, revision, private, token)
    card = {"results": as_paths(results), "figures": figures, "license": license, "tags": tags, "repo_id": repo_id}
    with tempfile.TemporaryDirectory() as folder:
        files = list_files(checkpoint, Path(folder), what=what, without_results=without_results, **card)
        publication = Publication(repo_id, revision or "main", files)
        if repository is None:
            return publication
        logger.info(publication.table())
        repository.open()
        if not update:
            repository.check_same_model(files)
        commit = repository.commit(files, commit_message or "Publish with hf_msn")
    return dataclasses.replace(publication, url=commit.commit_url)


def list_files(checkpoint: str | Path, export_to: Path, *, what: str | None, **card: Any) -> list[ListedFile]:
    """Return the files to publish of a checkpoint, with its card. A backbone is exported into `export_to`."""
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
        remedy = f"Did you mean '{inside[-1]}'?" if inside else "Give the folder that the model was saved to."
        raise ValueError(f"`checkpoint` must be a folder with a config.json, but '{checkpoint}' is not. {remedy}")
    config = read_json(folder / "config.json")
    weights, origin = [*count_weights(folder)], "{} of the checkpoint"
    records = {name: _public_record(folder / name) for name in _RECORDS if (folder / name).is_file()}
    is_pretraining = config.get("model_type") in PRETRAINING_METHODS
    if what is None and is_pretraining and FINETUNING_FILE not in records:
        what = "backbone"
    _check_form(what, config, is_pretraining, checkpoint)
    if is_pretraining and what == "backbone":
        records.pop(FINETUNING_FILE, None)  # it measured the model with its head
        folder, weights, origin = export_to / folder.resolve().name, ["model.safetensors"], "export_backbone"
        has_processor = Path(checkpoint, _IMAGE_PROCESSOR).is_file()
        processor = AutoImageProcessor.from_pretrained(checkpoint) if has_processor else None
        export_backbone(AutoModelForPreTraining.from_pretrained(checkpoint), folder, image_processor=processor)
        for name, record in records.items():
            write_json(folder / name, record)
    if not (folder / _IMAGE_PROCESSOR).is_file() and config.get("model_type") is not None:
        logger.warning_once(
            f"The checkpoint has no '{_IMAGE_PROCESSOR}': AutoImageProcessor will not load, and images that are "
            "normalised in another way than in training give wrong features. Write one with "
            "`evaluation_image_processor(image_size).save_pretrained(folder)`."
        )
    config = {name: value for name, value in read_json(folder / "config.json").items() if name != "_name_or_path"}
    files: dict[str, tuple[Path | bytes, str]] = {"config.json": (_as_json(config), origin.format("config.json"))}
    for name in (_IMAGE_PROCESSOR, WEIGHTS_INDEX, *weights):
        if (folder / name).is_file() and (name != WEIGHTS_INDEX or weights != ["model.safetensors"]):
            files[name] = (folder / name, origin.format(name))
    files |= {name: (_as_json(record), f"{name} of the checkpoint") for name, record in records.items()}
    made_from = f"{len(card['results'])} result files" if card.get("results") else "no results"
    files |= {name: (content, f"the card, from {made_from}") for name, content in card_files(folder, **card).items()}
    return [_listed(name, content, origin) for name, (content, origin) in sorted(files.items())]


def list_resume_files(checkpoint: Path, path_in_repo: str) -> list[ListedFile]:
    """Return the files from which a run is resumed, with their checksums, for a folder of the repo."""
    files, known, checksums = [], read_checksums(checkpoint), {}
    for file in sorted(checkpoint.iterdir()):
        content: Path | bytes = file
        if file.name in _RECORDS:
            content = _as_json(_public_record(file))
        elif file.name == "trainer_state.json":
            state = read_json(file)
            best = state["best_model_checkpoint"]
            content = _as_json({**state, "best_model_checkpoint": None if best is None else public_name(best)})
        elif not (_MODEL_FILE.fullmatch(file.name) or _RESUME_FILE.fullmatch(file.name)):
            continue
        files.append(_listed(f"{path_in_repo}/{file.name}", content, f"{file.name} of {checkpoint.name}"))
        if isinstance(content, bytes):
            checksums[file.name] = hashlib.sha256(content).hexdigest()
        else:
            checksums[file.name] = known.get(file.name) or file_sha256(file)
    content = format_checksums(checksums).encode()
    return [*files, _listed(f"{path_in_repo}/{CHECKSUMS_FILE}", content, "computed")]


class HubRepository:
    """A repo of models on the Hub, at a branch. For the arguments see [`publish_checkpoint`].

    `repo_id` may also be the "name" of a repo of the user to whom the token belongs.
    """

    def __init__(
        self, repo_id: str, revision: str | None = None, private: bool | None = None, token: str | None = None
    ):
        token = token or get_token()
        if not token:
            raise PublishingError(
                "Publishing needs a token with write access, but there is none. Log in by `hf auth login`, or set "
                "HF_TOKEN. Nothing was sent."
            )
        self.api = HfApi(token=token, library_name="hf_msn")
        self.revision, self.private = revision or "main", private
        with _publishing_errors(repo_id):
            self.repo_id = repo_id if "/" in repo_id else f"{self.api.whoami()['name']}/{repo_id}"
        check_repo_id(self.repo_id)

    def open(self) -> None:
        """Create the repo and the branch if they do not exist."""
        with _publishing_errors(self.repo_id):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            is_private = bool(self.api.model_info(self.repo_id).private)
            if self.private not in (None, is_private):
                raise PublishingError(
                    f"`private` is {self.private}, but '{self.repo_id}' exists and has private={is_private}. Leave "
                    "`private` out, or change the repo in its settings. Nothing was sent."
                )
            if self.revision != "main":
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def files(self) -> dict[str, RepoFile]:
        """Return the files of the branch by path."""
        with _publishing_errors(self.repo_id):
            entries = self.api.list_repo_tree(self.repo_id, revision=self.revision, recursive=True)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def check_same_model(self, files: Sequence[ListedFile]) -> None:
        """Raise a [`PublishingError`] if the branch holds another model, with weights other than those in `files`."""
        present = self.files()
        same = [
            path in present
            and (stored := present[path].lfs) is not None
            and stored.sha256 == CommitOperationAdd(path, str(file.content)).upload_info.sha256.hex()
            for file in files
            if (path := file.path).endswith(".safetensors")
        ]
        others = sorted(set(present) - _FILES_OF_A_NEW_REPO)
        if others and not all(same):
            raise PublishingError(
                f"'{self.repo_id}' ({self.revision}) must be empty or hold this model, but holds "
                f"{', '.join(others[:4])}. Choose another `repo_id` or `revision`, or replace it by `update`; its "
                "history keeps the present model. Nothing was sent."
            )

    def commit(self, files: Sequence[ListedFile], message: str, folders: Sequence[str] = ("",)) -> CommitInfo:
        """Upload files in one commit, which removes the other model files of `folders`, by default of the root."""
        wanted = {file.path for file in files}
        others = [path for path in self.files() if path not in wanted]
        operations: list[Any] = [
            CommitOperationDelete(p) for p in others if any(_is_ours(p, folder) for folder in folders)
        ]
        with _publishing_errors(self.repo_id):
            operations += [CommitOperationAdd(f.path, f.content) for f in files]
            return self.api.create_commit(self.repo_id, operations, commit_message=message, revision=self.revision)


@contextmanager
def _publishing_errors(repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub and of the network as a [`PublishingError`] without addresses and tokens."""
    try:
        yield
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as raised:
        error: BaseException = raised
        if isinstance(raised, RuntimeError) and raised.__cause__ is not None:
            error = raised.__cause__  # huggingface_hub wraps the errors of large files
        if isinstance(error, HfHubHTTPError):
            reason = " ".join(str(error.server_message or "no reason given").split())
            reason = f"was refused with status {error.response.status_code}: {reason}. Check `repo_id` and the token"
        elif isinstance(error, OfflineModeIsEnabled):
            reason = "is not possible with HF_HUB_OFFLINE. Unset it"
        else:
            reason = f"failed ({type(error).__name__}). Check the network"
        raise PublishingError(
            f"Publishing to '{repo_id}' {reason}, and run the same command again. Nothing of this upload is visible "
            "yet; files that have arrived are not sent again."
        ) from None


def _check_form(what: str | None, config: dict[str, Any], is_pretraining: bool, checkpoint: str | Path) -> None:
    if what is None:
        return
    check_choice("what", what, FORMS)
    is_classifier = any(name.endswith("ForImageClassification") for name in config.get("architectures") or [])
    found = "pretraining" if is_pretraining else "classifier" if is_classifier else "backbone"
    if what != found and not (what == "backbone" and is_pretraining):
        raise ValueError(
            f"`what` must be the form of the checkpoint, but is '{what}', and '{checkpoint}' holds a {found} model. "
            "Leave `what` out, or give another checkpoint."
        )


def _public_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if path.name == RUN_FILE:
        return {"format": record.get("format"), **public_run(record)}
    record = {name: record[name] for name in _RECORDS[path.name] if name in record}
    paths = {"checkpoint": record, "file": record.get("source") or {}, "name": record.get("test_data") or {}}
    for name, part in paths.items():
        if part.get(name) is not None:
            part[name] = public_name(part[name])
    return record


def _is_ours(path: str, folder: str) -> bool:
    if not folder:
        return _MODEL_FILE.fullmatch(path) is not None
    name = path.removeprefix(f"{folder}/")
    return name != path and bool(_MODEL_FILE.fullmatch(name) or _RESUME_FILE.fullmatch(name))


def _listed(path: str, content: Path | bytes, origin: str) -> ListedFile:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return ListedFile(path, size, Path(path).suffix in (".safetensors", ".png", ".pt", ".pth"), origin, content)


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
