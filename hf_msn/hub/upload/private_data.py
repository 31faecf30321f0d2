"""The last look at the files of an upload: tokens, paths of this machine and user names, by the rules of `privacy`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from ...privacy import PrivateWords

_TOKEN_IN_BYTES = re.compile(rb"\bhf_[A-Za-z0-9]{30,}|\bgh[oprsu]_[A-Za-z0-9]{36}|\bgithub_pat_\w{40,}")
_LONGEST_TOKEN = 256
_CHUNK = 1 << 22


class PrivateData(PrivateWords):
    """What must not be published, of this machine and in general, in texts and in files.

    Args:
        tokens (`Iterable[str]`, *optional*): Secrets besides those of the environment, such as the token in use.
        folders (`Iterable[Path]`, *optional*): Places whose absolute path must not be told.
        namespace (`str`, *optional*): The user of the Hub who publishes: that name is public.
    """

    def find_in_file(self, path: Path) -> str | None:
        """As `find`: texts as they are, weights by the metadata beside the tensors, others byte by byte."""
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            # each text by itself, of a key that is there twice too: a path behind an escaped new line is seen
            inside = _texts(json.loads(text, object_pairs_hook=list))
            return next((found for found in map(self.find, inside) if found), None)
        if path.suffix in (".md", ".yaml"):
            return self.find(path.read_text(encoding="utf-8"))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                return self.find("\n".join(f"{key} {value}" for key, value in (weights.metadata() or {}).items()))
        if path.suffix == ".png":
            return self.find("\n".join(_texts_of_png(path))) or self._find_bytes(path)
        return self._find_bytes(path)

    def clean(self, value: Any) -> Any:
        """A JSON value in which each path of a machine is its last part alone. Tokens stay, to be refused."""
        if isinstance(value, dict):
            return {self.clean(key): self.clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.clean(inner) for inner in value]
        return self.without_paths(value) if isinstance(value, str) else value

    def _find_bytes(self, path: Path) -> str | None:
        wanted = [text.encode() for text in (*self.secrets, *self.places)]
        keep = max(_LONGEST_TOKEN, *map(len, wanted)) if wanted else _LONGEST_TOKEN
        with open(path, "rb") as file:
            before = b""
            while chunk := file.read(_CHUNK):
                seen = before + chunk
                if any(text in seen for text in wanted) or _TOKEN_IN_BYTES.search(seen):
                    return "a token or password, or a path of this machine"
                before = seen[-keep:]
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _texts_of_png(path: Path) -> list[str]:
    try:
        with Image.open(path) as image:
            image.load()  # texts may stand behind the pixels
            said = [item for pair in image.info.items() for item in pair]
    except (OSError, SyntaxError) as error:
        raise ValueError(f"'{path.name}' is damaged ({error}), and is not published. Save it anew as PNG.") from error
    return [item.decode("latin-1") if isinstance(item, bytes) else str(item) for item in said]
