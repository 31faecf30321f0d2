"""What the Hub or the network answered, in one line with a remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

SETTINGS_URL = "https://huggingface.co/settings/tokens"
_AGAIN = "Then run the same command again: what is there already is not sent again."


class PublishingError(OSError):
    """Something could not be published; the message says why, what is on the Hub now, and what to do."""


@contextmanager
def in_plain_words(repo_id: str, endpoint: str, state: str = "Nothing was sent.") -> Iterator[None]:
    """Turns what `huggingface_hub` raises inside into a [`PublishingError`].

    Args:
        repo_id (`str`): The repo that is spoken of.
        endpoint (`str`): The Hub's address.
        state (`str`, *optional*): What of the upload is there when something inside fails.
    """
    try:
        yield
    except PublishingError:
        raise
    except Exception as error:
        explained = _explain(error, repo_id, endpoint)
        if explained is None:
            raise
        # Without the cause: its text has addresses that are signed for the upload.
        raise PublishingError(f"{explained} {state}") from None


def _explain(error: BaseException, repo_id: str, endpoint: str) -> str | None:
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return _explain_status(cause, repo_id)
        if isinstance(cause, OfflineModeIsEnabled):
            return "The Hub cannot be asked, as HF_HUB_OFFLINE is set. Unset it to publish."
        if _is_of_network(cause):
            return (
                f"The connection to {endpoint} was cut, or there is none ({type(cause).__name__}). Look at the "
                f"network. {_AGAIN}"
            )
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return f"The Hub does not accept the card of '{repo_id}': {_one_line(str(error))}."
    if type(error).__module__.split(".")[0] == "hf_xet" or isinstance(error, RuntimeError | ValueError):
        return f"The upload to '{repo_id}' failed: {_one_line(str(error))}. {_AGAIN}"
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = _one_line(error.server_message or error.response.headers.get("X-Error-Message") or "no reason given")
    namespace = repo_id.split("/")[0]
    if status == 401 and not (isinstance(error, RepositoryNotFoundError) and "not found" in said.lower()):
        return (
            f"The Hub does not accept the token (401: {said}). Log in anew by `hf auth login`, or set HF_TOKEN to one "
            f"of {SETTINGS_URL}."
        )
    if status == 403:
        return (
            f"The token may not write to '{repo_id}' (403: {said}). Give one with write access to '{namespace}', from "
            f"{SETTINGS_URL}, or another `repo_id`."
        )
    if status in (401, 404):
        return f"The Hub has no '{repo_id}' that this token sees ({status}: {said}). Check `repo_id` and `revision`."
    if status in (409, 412):
        return f"'{repo_id}' was changed by another at the same time ({status}: {said}). Look what is there. {_AGAIN}"
    if status == 429:
        return f"The Hub takes no more requests for now (429: {said}). Wait some minutes. {_AGAIN}"
    if status >= 500:
        return f"The Hub failed (HTTP {status}: {said}), also when asked again. Wait some minutes. {_AGAIN}"
    return f"The Hub refused (HTTP {status}: {said})."


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0].startswith(
        "httpx"
    )


def _one_line(text: str) -> str:
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_...", text)
    return " ".join(re.sub(r"https?://\S+\?\S+", "...", text).split())[:300].rstrip(". ")
