"""A Hub on this machine, as far as `huggingface_hub` asks for one: it records what reaches it, and fails on request.

with HubServer() as hub:
    hub.fail("PUT", "/lfs/", status=500, skip=1)  # from the second LFS file on
    subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})
    hub.files("someone/model")  # path -> bytes, at the head of a branch
"""

import base64
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.utils._http
from hub_handler import HubHandler
from hub_state import TOKEN, Failure, Repo, Request


class HubServer:
    """Runs in threads of this process from `__enter__` to `__exit__`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """For a process that is to talk to this Hub and to no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home / "hf_home"),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def use_in_this_process(self, monkeypatch, home: Path, token: str | None = TOKEN) -> None:
        """As `environment`, which is read on import, does it for others; waits between retries are left out."""
        constants = huggingface_hub.constants
        for name, value in (
            ("ENDPOINT", self.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_TOKEN_PATH", str(home / "no_token")),
            ("HF_HUB_CACHE", str(home / "cache")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        # The client that others of this process use refuses as it was made offline.
        huggingface_hub.utils._http.close_session()

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, private: bool = False, sha=None) -> Repo:
        """A repo that is there before; a data set's `name` begins with "datasets/"."""
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", sha)
        if files:
            self.repos[name].commit("main", {**files}, "before", sha)
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a branch but `.gitattributes`, which the Hub itself makes."""
        repo = self.repos[name]
        return {path: data for path, data in repo.commits[repo.find(revision)].items() if path != ".gitattributes"}

    def fail(
        self, method, part, status=None, message="refused", skip=0, times=10**9, cut_after=None, headers=None
    ) -> None:
        """Answers with `status`, or reads `cut_after` bytes of the body and cuts the connection."""
        self.failures.append(Failure(method, part, status, message, skip, times, cut_after, headers or {}))

    def asked(self, method: str, part: str) -> list[Request]:
        """The requests with a method whose path has `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def sent_bytes(self) -> bytes:
        """Paths, headers and bodies of all requests but weights, and all files that are there but weights.

        The header of authorization is left out, and what is base64 in a commit is decoded.
        """
        parts = []
        for request in self.requests:
            parts.append(f"{request.method} {unquote(request.path)}".encode())
            parts += [f"{k}: {v}".encode() for k, v in request.headers.items() if k.lower() != "authorization"]
            if request.method != "PUT":
                parts.append(request.body)
                for sample in re.findall(rb'"(?:sample|content)": ?"([A-Za-z0-9+/=]*)"', request.body):
                    parts.append(base64.b64decode(sample))
        for repo in self.repos.values():
            for files in repo.commits.values():
                parts += [data for path, data in files.items() if not path.endswith(".safetensors")]
        return b"\n".join(parts)
