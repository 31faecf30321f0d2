"""What must not leave a machine in a file that is published: tokens, paths, names of users and hosts."""

import contextlib
import getpass
import math
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# what a place, a secret or a log is called; the method does not depend on any of them
_PRIVATE_FIELD = re.compile(
    r"token(?!s?_(?:length|type))|passw|secret|credential|api_?key|^hub_|push_to_hub|(?:^|_)dirs?$|run_name|"
    r"resume_from|^overwrite_|trackio|^project$|report_to|user_?name|host_?name|^log_level|^local_rank$",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{5,}|\bapi_org_\w{5,}|\bgh[opsu]_\w{16,}|\bgithub_pat_\w{16,}|\bsk-[\w-]{16,}|\bAKIA[A-Z0-9]{16}\b|"
    r"\beyJ[\w-]{8,}\.[\w.-]{8,}|\bBearer\s+\S+",
)
_START_OF_PATH = r"(?:[A-Za-z][A-Za-z0-9+.-]*://|file:|[A-Za-z]:[\\/]|\\\\|~|\.{1,2}[\\/]|/(?=[^\s/]))"
_PATH_ALONE = re.compile(rf"^{_START_OF_PATH}.*$", re.DOTALL)
_PATH_IN_TEXT = re.compile(rf"(?<![\w.~/\\]){_START_OF_PATH}[^\s'\",;()<>\[\]{{}}|]*")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
_HOMES = {"home", "users", "root"}
# user names of containers and the like that are words of every recipe
_WORDS = {"root", "user", "users", "admin", "test", "train", "data", "localhost", "default", "runner", "main"}
HIDDEN = "(local)"


def public_name(source: str | os.PathLike) -> str:
    """What a data set or a checkpoint may be called in public.

    Of anything local only the last name; a Hub id (`owner/name`) that is no path here stays as it is. A home folder,
    or what else has no name of its own, is "(local)".
    """
    text = os.fspath(source).strip()
    looks_like_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
    is_path = _PATH_ALONE.match(text) is not None or "\\" in text or text.count("/") > 1
    if not is_path and not os.path.exists(text) and looks_like_hub_id:
        return _TOKEN.sub("(secret)", text)  # public already, also where its owner has the name of this user
    if not is_path and "/" not in text:
        return _without_secrets(text)
    return _without_secrets(_last_name(text))


def without_private(value: Any) -> Any:
    """The same settings as plain JSON types, without what is private.

    Fields of places, logs and secrets are left out; of a path only the last name stays; tokens, and the names of this
    user and this host, are hidden. Numbers that are not finite become text.
    """
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if not _PRIVATE_FIELD.search(str(key))}
        return {_public_text(key): without_private(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [without_private(item) for item in items]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "value") and isinstance(getattr(value, "value", None), str):
        value = value.value  # an enum of transformers
    return _public_text(os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def find_private(text: str) -> str | None:
    """A token or a path of this machine in a text that is to be published, or `None`."""
    found = _TOKEN.search(text)
    if found:
        return f"what looks like a token ('{found.group()[:6]}...')"
    for place in (str(Path.home()), os.getcwd()):
        if len(Path(place).parts) > 2 and place in text:
            return f"a path of this machine ('{place}')"
    found = re.search(r"(?<![\w.])(?:/home/|/Users/|[A-Za-z]:\\Users\\|file:/)[^\s'\"`]*", text)
    return f"a path of this machine ('{found.group()}')" if found else None


def _public_text(text: str) -> str:
    if "://" not in text and re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return public_name(text)
    if (_PATH_ALONE.match(text) and not _has_sentence(text)) or _is_relative_path(text):
        return _without_secrets(_last_name(text))
    return _without_secrets(_PATH_IN_TEXT.sub(lambda found: _last_name(found.group()), text))


def _has_sentence(text: str) -> bool:
    """Whether more than one path, or a path and words, are in a text: a space before another path's start."""
    return len(_PATH_IN_TEXT.findall(text)) > 1


def _is_relative_path(text: str) -> bool:
    return not re.search(r"\s", text) and (text.count("/") > 1 or text.count("\\") > 1)


def _last_name(path: str) -> str:
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*:/{1,3}(?=[^/\\])", "/", path) if "://" in path else path
    path = re.sub(r"^file:/*", "/", path).split("?")[0]
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
    while parts and (re.search(r"[*?\[\]]", parts[-1]) or re.fullmatch(r"[A-Za-z]:", parts[-1])):
        parts.pop()
    if not parts:
        return HIDDEN
    parent = parts[-2].lower() if len(parts) > 1 else ""
    is_home = parts[-1].startswith("~") or (parent in _HOMES and len(parts) <= 3) or path.rstrip("/\\") == "/root"
    is_home = is_home or os.path.abspath(os.path.expanduser(path)) == str(Path.home())
    return HIDDEN if is_home else parts[-1]


def _without_secrets(text: str) -> str:
    text = _ADDRESS.sub(HIDDEN, _TOKEN.sub("(secret)", text))
    for name in _own_names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", HIDDEN, text, flags=re.IGNORECASE)
    return text


def _own_names() -> set[str]:
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")} | {Path.home().name}
    host = socket.gethostname()
    names |= {host, host.split(".")[0]}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user id without a name
        names.add(getpass.getuser())
    return {name for name in names if len(name) > 2 and name.lower() not in _WORDS}
