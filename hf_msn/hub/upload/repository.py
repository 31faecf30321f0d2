"""A repo on the Hub that a checkpoint goes to: what must hold before, and one commit that brings all or nothing."""

from collections.abc import Callable, Sequence

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors import SETTINGS_URL, PublishingError, in_plain_words
from .staging import PlannedFile, is_ours

# What a new repo may have before a model lies in it.
_NO_MODEL = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
_MAIN = "main"


class HubRepository:
    """A repo of models, at a branch.

    Args:
        repo_id (`str`): "user/name"; with `complete` also "name" alone, of the user whom the token names.
        revision (`str`, *optional*): The branch; by default main. It is made where it is not there.
        private (`bool`, *optional*): Who sees a new repo; by default as the account has it. Never changes one.
        token (`str`, *optional*): By default HF_TOKEN or what `hf auth login` has stored.

    Raises:
        ValueError: If `repo_id` or `revision` cannot be one.
    """

    def __init__(
        self, repo_id: str, revision: str | None = None, private: bool | None = None, token: str | None = None
    ):
        check_repo_id(repo_id, complete="/" not in str(repo_id))
        self.repo_id, self.revision, self.private = repo_id, check_revision(revision), private
        self.token = token or get_token()
        self.api = HfApi(library_name="hf_msn")

    def check_token(self) -> None:
        """Raises a [`PublishingError`] if there is no token, the Hub does not know it, or it can only read."""
        if not self.token:
            raise PublishingError(
                f"There is no token, which publishing needs. Log in by `hf auth login`, or set HF_TOKEN to a token "
                f"with write access, from {SETTINGS_URL}. Nothing was sent."
            )
        with in_plain_words(self.repo_id, self.api.endpoint):
            account = self.api.whoami(token=self.token)
        if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise PublishingError(
                f"The token of '{account['name']}' can only read. Publishing needs one with write access, from "
                f"{SETTINGS_URL}. Nothing was sent."
            )
        if "/" not in self.repo_id:
            self.repo_id = f"{account['name']}/{self.repo_id}"
            check_repo_id(self.repo_id)

    def prepare(self, fits: Callable[[dict[str, RepoFile]], None]) -> None:
        """Makes repo and branch where they are not there; a branch that holds files of its own must pass `fits`.

        Args:
            fits (`Callable`): Gets the files of the branch, by path, if there are any that a new repo does not have.
                Raises where they must stay.

        Raises:
            PublishingError: If the repo must not be used, or the Hub refuses.
        """
        with in_plain_words(self.repo_id, self.api.endpoint):
            try:
                info = self.api.model_info(self.repo_id, token=self.token)
            except RepositoryNotFoundError:
                self.api.create_repo(self.repo_id, private=self.private, token=self.token)
                info = self.api.model_info(self.repo_id, token=self.token)
            if self.private is not None and bool(info.private) != self.private:
                raise PublishingError(
                    f"`private` is {self.private}, but '{self.repo_id}' is there already and is "
                    f"{'private' if info.private else 'public'}. Leave `private` out, or change it in the settings of "
                    "the repo. Nothing was sent."
                )
            refs = self.api.list_repo_refs(self.repo_id, token=self.token)
            if self.revision in {tag.name for tag in refs.tags}:
                raise PublishingError(
                    f"`revision` must be a branch, but '{self.revision}' is a tag of '{self.repo_id}'. Give a branch, "
                    "a new one or one that is there. Nothing was sent."
                )
            branches = {branch.name: branch.target_commit for branch in refs.branches}
            has_own_files = self.revision == _MAIN or branches.get(self.revision) not in (None, branches.get(_MAIN))
            present = self.list_files() if has_own_files and self.revision in branches else {}
            if set(present) - _NO_MODEL:
                fits(present)
            if self.revision not in branches:
                self.api.create_branch(self.repo_id, branch=self.revision, token=self.token, exist_ok=True)

    def list_files(self) -> dict[str, RepoFile]:
        """The files of the branch by path."""
        entries = self.api.list_repo_tree(
            self.repo_id, revision=self.revision, recursive=True, token=self.token, repo_type="model"
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def upload(self, files: Sequence[PlannedFile], message: str, folders: Sequence[str] = ("",)) -> CommitInfo:
        """Sends the files and makes them visible in one commit, which also removes what they replace.

        Args:
            files (`Sequence[PlannedFile]`): All that `folders` hold afterwards of what publishing puts there. Files of
                other names stay.
            message (`str`): Of the commit.
            folders (`Sequence[str]`, *optional*): Of the repo; by default its root.

        Raises:
            PublishingError: If it failed. The branch then is as it was, and what was sent need not be sent again.
        """
        state = f"Nothing of this upload is visible in '{self.repo_id}': it is as it was before."
        with in_plain_words(self.repo_id, self.api.endpoint, state):
            wanted = {file.path for file in files}
            # Weights or numbers of another model must not lie beside these.
            replaced = [
                path
                for path in self.list_files()
                if path not in wanted and any(is_ours(path, folder) for folder in folders)
            ]
            added = [CommitOperationAdd(file.path, str(file.source)) for file in files]
            where = {"revision": self.revision, "token": self.token}
            # A '.gitignore' of the repo would leave out files without a word.
            self.api.preupload_lfs_files(
                self.repo_id, added, free_memory=False, gitignore_content="# nothing\n", **where
            )
            operations = [*(CommitOperationDelete(path) for path in replaced), *added]
            return self.api.create_commit(self.repo_id, operations, commit_message=message, **where)


def check_repo_id(repo_id: str, complete: bool = False) -> None:
    """Raises a `ValueError` if `repo_id` cannot be the name of a repo; `complete`: the user will be put before it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be 'user/name', but is {repo_id!r}: {error}") from None
    if repo_id.count("/") != 1 and not (complete and repo_id):
        raise ValueError(f"`repo_id` must be 'user/name', but is {repo_id!r}. Put the user or organisation before it.")


def check_revision(revision: str | None) -> str:
    """The branch, or main.

    Raises:
        ValueError: If git could not have a branch of that name.
    """
    revision = _MAIN if revision is None else revision
    parts = revision.split("/")
    bad = not revision.isprintable() or any(
        sign in revision for sign in (" ", "~", "^", ":", "?", "*", "[", "\\", "..")
    )
    if bad or not all(parts) or any(p.startswith((".", "-")) or p.endswith((".", ".lock")) for p in parts):
        raise ValueError(
            f"`revision` must be the name of a branch, but is {revision!r}. Use letters, digits, '-', '_' and '.'."
        )
    return revision
