"""What must not leave a machine in a file that is published: tokens, paths, names of users and hosts.

One set of rules for what is written (`without_private`, `public_name`) and for the last look at what goes up
(`PrivateWords.find`): what they have written is never found.
"""

import contextlib
import getpass
import html
import math
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HIDDEN = "(local)"
_SECRET = "(secret)"
# what a place, a secret or a log is called; the method does not depend on any of them
_PRIVATE_FIELD = re.compile(
    r"token(?!s?_(?:length|type))|passw|secret|credential|api_?key|^hub_|push_to_hub|(?:^|_)dirs?$|run_name|"
    r"resume_from|^overwrite_|trackio|^project$|report_to|user_?name|host_?name|^log_level|^local_rank$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(TOKEN|API_KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD)$")
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{13,}|\bhf_(?=[A-Za-z]*\d)[A-Za-z0-9]{6,}|"  # hf_transformers is no token
    r"\bapi_org_\w{13,}|\bgh[oprsu]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|"
    r"\bsk-(?=[\w-]*[A-Z\d])[\w-]{16,}|\bxox[abeprs]-[\w-]{10,}|\bAIza[\w-]{35}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|"
    r"\beyJ[\w-]{8,}\.[\w.-]{8,}|\bBearer\s+[\w.~+/=-]{12,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|"
    r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)|"  # of https://name:password@host
    r"(?i:(?<=[?&])(?:[\w-]*token|sig|[\w-]*signature|[\w-]*credential|[\w-]*key|[\w-]*secret|password)=[^\s&\"'#)]{8,})"
)
_NAME = r"[\w.@+=%-]"
_REST = r"[^\s'\"`,;()<>\[\]{}|]"
_NO_LABEL = r"(?!(?:[mg]/[01]\w{2,8}|t/dd\d+)(?![\w/]))"  # /m/0bt9lr is a class of Open Images
_LATEX = r"(?:to|mapsto|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|phi|psi|omega|ell|hline|infty)\b"
# C:\Users\alice, but no LaTeX (f:\mathbb{R}, f:\alpha\to\beta) and no regex ((?i:\bhead), a:\s*)
_DRIVE = (
    rf"(?<![\w?])[A-Za-z]:(?!\\+[A-Za-z]+[{{^_])(?!(?<=[a-z]:)\\+{_LATEX})"
    r"(?!\\+[sdwbSDWB](?:[*+?{()\[\]|]|$))[\\/]+"
)
# \\server\share, escaped too: twice as many at the start. \\alpha\\beta is escaped LaTeX or a regex
_SERVER = rf"(?<![\w\\)\]}}])(?:\\{{2}}(?!{_LATEX})\w[\w.$-]*\\(?!\\)|\\{{4}}\w[\w.$-]*\\{{2}}(?!\\))"
_PUBLIC_URL = re.compile(rf"(?:git\+)?(?:https?|hf)://{_REST}+", re.IGNORECASE)
_PLACES = (
    re.compile(rf"\b(?!(?:https?|hf)://)[A-Za-z][A-Za-z0-9+.-]+://{_REST}+", re.IGNORECASE),  # s3://bucket/alice
    re.compile(rf"\bfile:/+{_REST}*"),
    re.compile(rf"(?<![\w~/\\])~(?:[A-Za-z_][\w.-]*)?/{_REST}*"),  # ~/x, ~bob/x, but not ~1/3
    re.compile(rf"{_DRIVE}{_REST}+"),
    re.compile(rf"{_SERVER}{_REST}+"),
    # /mnt/alice, but no and/or, </p>, ./a/b, (a)/b/c, **/a/b
    re.compile(rf"(?<![\w/.~)\]}}*\\-])/{_NO_LABEL}(?:{_NAME}+/)+{_NAME}*"),
)
# of a value that is a path as a whole; and besides the above, in a record of ours
_START = (
    rf"(?:[A-Za-z][A-Za-z0-9+.-]*://|file:/|{_DRIVE}|{_SERVER}|\\\\\w[\w.$-]*$|~(?=$|[A-Za-z_/\\])|\.{{1,2}}[\\/]|"
    rf"/{_NO_LABEL}(?=[^\s/]))"
)
_PATH_ALONE = re.compile(rf"{_START}[^\n]*$")
_NEXT_PATH = re.compile(rf"[\s,;:='\"(]{_START}")
_SHORT_PATH = re.compile(rf"(?<![\w.~/\\<)\]}}*-])(?:\.{{1,2}}/{_NAME}|/(?=[A-Za-z]\w\w)){_NAME}*(?:/{_NAME}*)*")
_PART = r"[\w.@+=~:*?\[\]%-]"
_RELATIVE = re.compile(rf"{_PART}+(?:/{_PART}*){{2,}}|\w[\w.-]*(?:\\(?!{_LATEX})\w[\w.-]+){{2,}}\\?")
_NUMBERS = re.compile(r"[\d./ -]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE = re.compile(
    r"\.(?:tar|t?gz|zip|png|jpe?g|json|ya?ml|py|ipynb|pth?|bin|ckpt|safetensors|npy|parquet|txt|csv|log)$"
)
_LOCAL_HOST = re.compile(
    r"localhost|\d+(?:\.\d+){3}|\[.*|.*\.(?:local|localdomain|internal|intranet|lan|corp|home)", re.IGNORECASE
)
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
_ESCAPED = re.compile(r"\\([\\`*_{}\[\]()#|!~$/\"'nrt])")
_HOMES = {"home", "users", "root"}
# names of users and hosts that tell nothing of a person, and words of each recipe and card: as such they stay
_WORDS = frozenset(
    "root user users ubuntu debian centos admin administrator jovyan runner nobody guest home hub data test tests "
    "train localhost default main vagrant docker container jenkins gitlab github circleci colab kaggle sagemaker "
    "azureuser ec2 aws gcp azure nvidia intel amd node worker server host build dev work workspace app www tmp "
    "temp slurm ray spark conda python torch pytorch transformers accelerate datasets dataset timm safetensors "
    "model models vision image images label labels class classes path paths file files folder figures scripts "
    "configs recipe recipes run runs output outputs results checkpoint checkpoints cache shared scratch project "
    "projects src code lib opt usr var mnt srv local cpu gpu cuda float bfloat16 float16 float32 seed epoch "
    "epochs step steps batch base tiny small large huge max min mean sum auto none true false best last final "
    "first start end full all linear cosine constant warmup mask masked adam adamw sgd lars lamb msn paws suncet "
    "slowmo slow gossip sync async ddp fsdp deepspeed vit resnet encoder decoder head heads backbone classifier "
    "pretraining anchor target view views digits mnist cifar cifar10 cifar100 imagenet flowers pets food cars "
    "birds cats dogs split validation top accuracy apache mit license card readme python3 bash demo example "
    "examples release".split()
)


def public_name(source: str | os.PathLike) -> str:
    """What a data set or a checkpoint may be called in public.

    Of anything local only the last name; a Hub id (`owner/name`) that is no path here stays as it is. A home folder,
    or what else has no name of its own, is "(local)".
    """
    words, text = PrivateWords(), os.fspath(source).strip()
    is_path = _PATH_ALONE.match(text) is not None or "\\" in text or text.count("/") > 1
    if is_path or ("/" in text and not _is_hub_id(text)):
        text = words.last_name(text)
    elif "/" in text:  # public already, also where its owner has the name of this user
        return words.without_secrets(text)
    return words.without_names(words.without_secrets(text))


def without_private(value: Any) -> Any:
    """The same settings as plain JSON types, without what is private.

    Fields of places, logs and secrets are left out; of a path only the last name stays, also of a relative one;
    tokens, the secrets of the environment, and the names of this user and this host, are hidden. Numbers that are not
    finite become text.
    """
    return _without_private(value, PrivateWords())


def _without_private(value: Any, words: "PrivateWords") -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if not _PRIVATE_FIELD.search(str(key))}
        return {_public_key(key, words): _without_private(item, words) for key, item in kept.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_without_private(item, words) for item in items]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "value") and isinstance(getattr(value, "value", None), str):
        value = value.value  # an enum of transformers
    return _public_text(os.fspath(value) if isinstance(value, os.PathLike) else str(value), words)


def _public_key(key: str, words: "PrivateWords") -> str:
    """A field is called `max_steps` also where the user is max."""
    is_field = re.fullmatch(r"\w+", key) and key.lower() not in words.names
    return words.without_secrets(key) if is_field else _public_text(key, words)


def _public_text(text: str, words: "PrivateWords") -> str:
    text = _ADDRESS.sub(HIDDEN, words.without_secrets(text))
    if _HUB_ID.fullmatch(text):
        text = text if _is_hub_id(text) else words.last_name(text)
    elif _is_one_path(text) or _is_relative_path(text):
        text = words.last_name(text)
    text = words.without_paths(text)
    if not _HUB_ID.fullmatch(text):
        pieces = _split_urls(text)
        for number, piece in enumerate(pieces):
            if number % 2:
                pieces[number] = piece if words.without_names(piece) == piece else words.last_name(piece)
            else:
                pieces[number] = _SHORT_PATH.sub(lambda found: words.last_name(found[0]), piece)
        text = words.without_names("".join(pieces))
    return HIDDEN if words.find(text) else text


class PrivateWords:
    """What is private in texts: tokens and paths of any machine; secrets, folders, users and hosts of this one.

    Args:
        tokens (`Iterable[str]`, *optional*): Secrets besides those of the environment, such as the token in use.
        folders (`Iterable[Path]`, *optional*): Places whose absolute path must not be told, besides home and the
            working folder.
        namespace (`str`, *optional*): The user of the Hub who publishes: that name is public.

    Attributes:
        secrets (`set[str]`): Texts that are secret as they are.
        places (`list[str]`): Absolute paths, longest first.
        users (`set[str]`): Names of this user that are no words of a recipe.
        names (`set[str]`): These and the names of this host, in lower case.
    """

    def __init__(self, tokens: Iterable[str | None] = (), folders: Iterable[Path] = (), namespace: str | None = None):
        of_environment = (value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name))
        # shorter ones are words: TOKEN=none
        self.secrets = {secret for secret in (*tokens, *of_environment) if secret and len(secret) >= 8}
        self.home = _home()
        places = {self.home, _working_folder()}
        for folder in folders:
            for path in (Path(folder).absolute(), Path(folder).resolve()):
                places.add(str(path.parent if len(path.parent.parts) > 2 else path))
        places = {str(Path(place)) for place in places if Path(place).is_absolute() and len(Path(place).parts) > 2}
        self.places = sorted(places, key=len, reverse=True)
        host = socket.gethostname()
        self.users = {name for name in _users(self.home) if _tells(name) and name.lower() != (namespace or "").lower()}
        self.names = {name.lower() for name in (*self.users, host, host.split(".")[0]) if _tells(name)}

    def find(self, text: str) -> str | None:
        """What private data a text has, in words, or `None`. A secret is not in the answer, of a path the last name.

        Relative paths and the bare name of a user are not looked for: they may be words.
        """
        for read in _READINGS:
            found = _TOKEN.search(read(text))
            if found:
                return f"what looks like a token or password ('{found[0][:4]}...')"
            if any(secret in read(text) for secret in self.secrets):
                return "a token or password of this machine"
        seen: list[str] = []
        self._without_paths(text, seen)
        return f"a path of this machine or the name of its user ('.../{seen[0]}')" if seen else None

    def without_paths(self, text: str) -> str:
        """The text in which each path of a machine is its last name alone. Secrets stay."""
        return self._without_paths(text, [])

    def without_secrets(self, text: str) -> str:
        """The text with "(secret)" for each token."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, _SECRET)
        return _TOKEN.sub(_SECRET, text)

    def without_names(self, text: str) -> str:
        """The text with "(local)" for each name of this user and this host."""
        for name in self.names:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", HIDDEN, text, flags=re.IGNORECASE)
        return text

    def last_name(self, path: str) -> str:
        """The last part of a path or an address that tells something; "(local)" for a home folder and for none."""
        path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*:/{1,3}(?=[^/\\])", "/", path) if "://" in path else path
        path = re.sub(r"^file:/*", "/", path).split("?")[0]
        parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
        while parts and (re.search(r"[*?\[\]]", parts[-1]) or re.fullmatch(r"[A-Za-z]:", parts[-1])):
            parts.pop()
        if not parts:
            return HIDDEN
        parent = parts[-2].lower() if len(parts) > 1 else ""
        is_home = parts[-1].startswith("~") or (parent in _HOMES and len(parts) <= 3) or path.rstrip("/\\") == "/root"
        is_home = is_home or os.path.abspath(os.path.expanduser(path)) == self.home != os.sep
        return HIDDEN if is_home or parts[-1].lower() in self.names else parts[-1]

    def _without_paths(self, text: str, seen: list[str]) -> str:
        if not _PRIVATE_SIGN.search(text):
            return text
        for _ in range(8):
            before = text
            for read in _READINGS:
                shortened = self._shorten(read(text), seen)
                text = shortened if shortened != read(text) else text
            if text == before:
                return text
        return HIDDEN  # what is still found has no end

    def _shorten(self, text: str, seen: list[str]) -> str:
        def last_name(found: re.Match) -> str:
            seen.append(self.last_name(found[0]))
            return seen[-1]

        pieces = _split_urls(text)
        if len(pieces) == 1 and _is_one_path(text) and self._starts_with_place(text):  # with blanks in it too
            seen.append(self.last_name(text))
            return seen[-1]
        for number, piece in enumerate(pieces):
            if number % 2:
                if self._is_local_url(piece):
                    seen.append(self.last_name(piece))
                    pieces[number] = seen[-1]
                continue
            for place in self.places:
                piece = re.sub(rf"{re.escape(place)}(?![\w-]){_REST}*", last_name, piece)
            for pattern in _PLACES:
                piece = pattern.sub(last_name, piece)
            for user in self.users:
                piece = re.sub(
                    rf"(?<![\w-]){re.escape(user)}(?:/|\\+(?![\\_])){_REST}*", self._of_user(user, seen), piece
                )
                piece = re.sub(
                    rf"(?<![\w.+-]){re.escape(user)}@[\w-]+(?![\w.-])(?::{_REST}*)?", self._of_user(user, seen), piece
                )
            pieces[number] = piece
        return "".join(pieces)

    def _starts_with_place(self, text: str) -> bool:
        return text.startswith(tuple(f"{place}{os.sep}" for place in self.places)) or any(
            pattern.match(text) for pattern in _PLACES
        )

    def _of_user(self, user: str, seen: list[str]):
        def shorten(found: re.Match) -> str:
            starts = found.start() == 0 or found.string[found.start() - 1] not in "/\\"
            if starts and _HUB_ID.fullmatch(found[0].rstrip(".")) and self._may_be_on_hub(found[0].rstrip(".")):
                return found[0]
            rest = re.sub(r"^@[\w-]+:?", "", found[0][len(user) :])
            seen.append(self.last_name(rest))
            return seen[-1]

        return shorten

    def _may_be_on_hub(self, text: str) -> bool:
        """Whether `alice/birds` may be a Hub id of alice rather than a file or a folder of this user alice."""
        near = Path(self.home).parent / text
        return _is_hub_id(text) and not near.exists() and not _FILE.search(text)

    def _is_local_url(self, url: str) -> bool:
        if url.lower().startswith("hf://"):
            return False
        address = re.sub(r"^.*?://", "", url).split("/")[0].split("?")[0]
        host = re.sub(r":\d+$", "", address.rpartition("@")[2]).rstrip(".")
        is_local = "@" in address or _LOCAL_HOST.fullmatch(host) or host.lower() in self.names
        is_local = is_local or ("." not in host and not address.endswith(host))  # gpu7:8888
        return bool(is_local) or any(place in url for place in self.places)


def find_private(text: str, folders: Iterable[Path] = (), namespace: str | None = None) -> str | None:
    """What private data a text has that is to be published, in words, or `None`: see [`PrivateWords.find`]."""
    return PrivateWords(folders=folders, namespace=namespace).find(text)


_PRIVATE_SIGN = re.compile(r"[/\\@%&]")  # also of what is escaped


def _unescaped(text: str) -> str:
    """As JSON and Markdown mean it."""
    text = _ESCAPED.sub(lambda found: "\n" if found[1] in "nrt" else found[1], text)
    return html.unescape(text).replace("\u200b", "")


# as it stands, as it is meant, JSON in JSON too, and as an address has it
_READINGS = (lambda text: text, _unescaped, lambda text: _unescaped(_unescaped(text)), unquote)


def _split_urls(text: str) -> list[str]:
    """The text in pieces, of which each second is a public address."""
    return re.split(f"({_PUBLIC_URL.pattern})", text, flags=re.IGNORECASE)


def _is_one_path(text: str) -> bool:
    """Whether a text is a path from its start to its end, and no sentence with several."""
    return _PATH_ALONE.match(text) is not None and not _NEXT_PATH.search(text) and not _PUBLIC_URL.match(text)


def _is_relative_path(text: str) -> bool:
    return bool(_RELATIVE.fullmatch(text)) and not (_NUMBERS.fullmatch(text) or _PUBLIC_URL.match(text))


def _is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and not os.path.exists(text)


def _tells(name: str) -> bool:
    """Whether a name of a user or a host tells who or where it is."""
    return len(name) > 2 and not name.isdigit() and name.lower() not in _WORDS


def _users(home: str) -> set[str]:
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")} | {Path(home).name}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user id without a name
        names.add(getpass.getuser())
    return names


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:  # no HOME, and a user id without a name
        return ""


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed
        return ""
