"""Tokens, absolute paths and user names: taken out of what is to be published, or found in it."""

import getpass
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET_VARIABLE = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)$")
_PATHS = (
    re.compile(r"file:/+[^\s\"'`]+"),
    re.compile(r"(?<![\w:/.<>~-])/(?:[\w.@+=-]+/)+[\w.@+=-]*"),  # /home/alice/runs, but no https://a/b, and/or, </p>
    re.compile(r"(?<![\w~])~\w*/[\w.@+=/-]+"),
    re.compile(r"\b[A-Za-z]:[\\/]+[^\s\"'`]+"),
    re.compile(r"\\\\[\w.$-]+\\[^\s\"'`]+"),
)
# Names that tell nothing of a person.
_ACCOUNTS_OF_MACHINES = {
    "root",
    "user",
    "users",
    "ubuntu",
    "admin",
    "jovyan",
    "runner",
    "nobody",
    "home",
    "hub",
    "data",
}
_CHUNK = 1 << 22
_SECRET = "a token or password"
_PATH = "a path of this machine or the name of its user"


class PrivateData:
    """What must not be published, of this machine and in general.

    Args:
        tokens (`Iterable[str]`, *optional*): Secrets besides those of the environment, such as the token in use.
        folders (`Iterable[Path]`, *optional*): Places whose absolute path must not be told.
        namespace (`str`, *optional*): The user of the Hub who publishes: that name is public.
    """

    def __init__(self, tokens: Iterable[str | None] = (), folders: Iterable[Path] = (), namespace: str | None = None):
        of_environment = (value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name))
        self.secrets = {secret for secret in (*tokens, *of_environment) if secret and len(secret) >= 12}
        places = {str(Path(folder).absolute().parent) for folder in folders} | {str(Path.home())}
        self.places = sorted((place for place in places if place.count(os.sep) > 1), key=len, reverse=True)
        public = {*_ACCOUNTS_OF_MACHINES, (namespace or "").lower()}
        self.users = {n for n in (Path.home().name, _user_name()) if len(n) > 2 and n.lower() not in public}

    def find_in_text(self, text: str) -> str | None:
        """What kind of private data a text has, or `None`. The data itself is not in the answer."""
        if _HUB_TOKEN.search(text) or any(secret in text for secret in self.secrets):
            return _SECRET
        if self._without_paths(text) != text:
            return _PATH
        return None

    def find_in_file(self, path: Path) -> str | None:
        """As `find_in_text`: texts as they are, weights by the metadata beside the tensors, others byte by byte."""
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            value = json.loads(text)  # a path right behind an escaped newline would be missed in the text
            if any(secret in text for secret in self.secrets) or _HUB_TOKEN.search(text):
                return _SECRET
            return None if self.clean(value) == value else _PATH
        if path.suffix in (".md", ".yaml"):
            return self.find_in_text(path.read_text(encoding="utf-8"))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                return self.find_in_text("\n".join(f"{k} {v}" for k, v in (weights.metadata() or {}).items()))
        if path.suffix == ".png":
            with Image.open(path) as image:
                found = self.find_in_text("\n".join(str(value) for value in image.info.values()))
            return found or self._find_bytes(path)
        return self._find_bytes(path)

    def clean(self, value: Any) -> Any:
        """A JSON value in which each path of a machine is its last part alone. Tokens stay, to be refused."""
        if isinstance(value, dict):
            return {self.clean(key): self.clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.clean(inner) for inner in value]
        return self._without_paths(value) if isinstance(value, str) else value

    def _without_paths(self, text: str) -> str:
        for place in self.places:
            if text.startswith(place + os.sep) and "\n" not in text:  # with blanks in it too
                return _last_part(text)
        for pattern in _PATHS:
            text = pattern.sub(lambda found: _last_part(found[0]), text)
        for user in self.users:
            text = re.sub(rf"(?<![\w-]){re.escape(user)}[/\\](\S*)", lambda found: _last_part(found[1]), text)
        return text

    def _find_bytes(self, path: Path) -> str | None:
        wanted = [text.encode() for text in (*self.secrets, *self.places)]
        keep = max((len(text) for text in wanted), default=1) - 1
        with open(path, "rb") as file:
            before = b""
            while chunk := file.read(_CHUNK):
                seen = before + chunk
                if any(text in seen for text in wanted) or re.search(rb"\bhf_[A-Za-z0-9]{30,}", seen):
                    return "a token, or a path of this machine"
                before = seen[-keep:] if keep else b""
        return None


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".", "..")]
    above = parts[-2].lower() if len(parts) > 1 else ""
    is_home = above in ("home", "users") and len(parts) < 4  # /home/alice, C:\\Users\\alice, file:///home/alice
    return "(local)" if is_home or not parts or parts[-1] == Path.home().name else parts[-1]


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return ""
