"""A checkpoint to the Hub: exactly the listed files, with a card, in one commit."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers.utils import logging

from .upload.errors import PublishingError
from .upload.private_data import PrivateData
from .upload.repository import HubRepository, check_repo_id
from .upload.staging import PlannedFile, read_checkpoint, stage_checkpoint

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ListedFile:
    """A file of a publication.

    Args:
        path (`str`): In the repo.
        size (`int`): In bytes.
        is_lfs (`bool`): Whether the Hub keeps it as a large file.
        origin (`str`): Where it is from, in words.
    """

    path: str
    size: int
    is_lfs: bool
    origin: str


@dataclass(frozen=True)
class Publication:
    """What went up, or with `dry_run` would go up.

    Args:
        repo_id (`str`): "user/name".
        revision (`str`): The branch.
        files (`list[ListedFile]`): All of them, by path.
        url (`str`, *optional*): Of the commit; `None` after a dry run.
    """

    repo_id: str
    revision: str
    files: list[ListedFile]
    url: str | None = None

    def table(self) -> str:
        """One line a file: path, size, LFS or not, and where it is from."""
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
    results: Sequence = (),
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
    """Puts a checkpoint on the Hub, so that `from_pretrained("user/name")` loads it.

    Only these go up: `config.json`, `model.safetensors` (or its shards with their index), `preprocessor_config.json`,
    `README.md`, `.eval_results/*.yaml`, `figures/*.png` of the card, and `run.json`, `conversion.json`,
    `codistillation.json`, `finetune.json` where the checkpoint has them; and where that says that the average of
    replicas is published, model and image processor of each in `replica_<r>/`. Paths of this machine are taken out of
    JSON files; a token anywhere, or such a path in another file, is an error.

    All is checked, exported and written in a temporary folder before the Hub is asked. The upload is one commit: what
    was there stays as it was until all is there. After an interrupted one the same call goes on.

    Args:
        checkpoint (`str` or `Path`): Folder of a pretraining, fine-tuned, converted or exported model.
        repo_id (`str`): "user/name". Made if it is not there.
        what (`str`, *optional*): The form. `"backbone"`: the evaluated encoder, which plain transformers loads by
            `AutoModel` (or timm, a network of timm) where hf_msn is not installed: the default for a pretraining
            checkpoint that is not fine-tuned. `"pretraining"`: that checkpoint itself with heads and prototypes, to
            go on from with hf_msn. `"classifier"`: a fine-tuned one. Without it all else goes up as it is.
        results (`Sequence`, *optional*): Result files of the evaluator, measured on this very model.
        figures (`Sequence[str]`, *optional*): PNG files for the card.
        private (`bool`, *optional*): Who sees a new repo. One that is there must fit, and is never changed.
        revision (`str`, *optional*): The branch, by default main. Made if it is not there.
        token (`str`, *optional*): With write access; by default HF_TOKEN or what `hf auth login` has stored.
        license (`str`, *optional*): Of the weights, as the card says it.
        tags (`Sequence[str]`, *optional*): For the card, besides its own.
        dry_run (`bool`, *optional*, defaults to `False`): Only list what would go up. The Hub is not asked.
        without_results (`bool`, *optional*, defaults to `False`): Publish without measured numbers; the card says so.
        update (`bool`, *optional*, defaults to `False`): Replace another model that the branch holds.
        commit_message (`str`, *optional*): Of the commit.

    Returns:
        [`Publication`]: The files, and the address of the commit.

    Raises:
        ValueError: For what is wrong with the arguments or the checkpoint.
        PublishingError: No or a wrong token, a repo that holds another model, or the Hub or the network failed.
    """
    check_repo_id(repo_id)
    read_checkpoint(checkpoint)
    repository = HubRepository(repo_id, revision, private, token)
    if not dry_run:
        repository.check_token()
    guard = PrivateData([repository.token], [Path(checkpoint)], namespace=repo_id.split("/")[0])
    with tempfile.TemporaryDirectory(prefix="hf_msn_publish_") as staging:
        files = stage_checkpoint(
            checkpoint,
            Path(staging),
            what=what,
            private=guard,
            results=results,
            figures=figures,
            repo_id=repo_id,
            license=license,
            tags=tags,
            without_results=without_results,
        )
        listed = [ListedFile(file.path, file.size, file.is_lfs, file.origin) for file in files]
        publication = Publication(repo_id, repository.revision, listed)
        if dry_run:
            return publication
        logger.info(publication.table())

        def fits(present: dict[str, RepoFile]) -> None:
            if not update and not holds(present, files):
                raise _name_clash(repository, present)

        repository.prepare(fits)
        commit = repository.upload(files, commit_message or "Publish with hf_msn")
    return Publication(repo_id, repository.revision, listed, commit.commit_url)


def holds(present: dict[str, RepoFile], files: Sequence[PlannedFile]) -> bool:
    """Whether a branch holds the very model of `files` already: configuration and weights, byte by byte."""
    model = [file for file in files if Path(file.path).name == "config.json" or file.path.endswith(".safetensors")]
    for file in model:
        there = present.get(file.path)
        if there is None or there.size != file.size:
            return False
        with open(file.source, "rb") as opened:
            if there.lfs is not None:
                same = sha_fileobj(opened).hex() == there.lfs.sha256
            else:
                same = git_hash(opened.read()) == there.blob_id
        if not same:
            return False
    return True


def _name_clash(repository: HubRepository, present: dict[str, RepoFile]) -> PublishingError:
    names = [path for path in sorted(present) if not path.startswith(".")]
    return PublishingError(
        f"'{repository.repo_id}' ({repository.revision}) holds another model already: {', '.join(names[:4])}"
        f"{' ...' if len(names) > 4 else ''}. Choose another `repo_id` or `revision`, or replace it by "
        "`--update true`; its history keeps what is there now. Nothing was sent."
    )
