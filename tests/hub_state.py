"""What the Hub of the tests remembers: repos, the requests that reached it, and those that are to fail."""

import hashlib
from dataclasses import dataclass, field

TOKEN = "hf_" + "aliceSecretToken" * 2
READ_ONLY_TOKEN = "hf_" + "aliceReadsOnly" * 2


@dataclass
class Request:
    """What reached the server, and the status that it answered; 0 where it cut the connection."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0


@dataclass
class Failure:
    """The requests with `method` whose path has `part` fail, but for the first `skip`; at most `times` of them."""

    method: str
    part: str
    status: int | None
    message: str
    skip: int
    times: int
    cut_after: int | None
    headers: dict[str, str]


@dataclass
class Repo:
    """Branches point to commits, and a commit is all files: bytes, by path."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str, sha: str | None = None) -> str:
        sha = sha or hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit."""
        known = {**{sha: sha for sha in self.commits}, **self.tags, **self.branches}
        return known.get(revision)
