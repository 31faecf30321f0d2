"""A Hub on this machine, as far as `huggingface_hub` needs one. It records requests, and fails on demand."""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.utils._http

TOKEN = "hf_" + "aliceSecretToken" * 2
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet")


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Repo:
    """Branches point to commits, and a commit is all files: bytes, by path."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str, sha: str | None = None) -> str:
        sha = sha or hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Runs in threads of this process from `__enter__` to `__exit__`. The user of `TOKEN` is alice."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[dict] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
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
        """As `environment`, which is read on import, does it for others; retries do not wait."""
        constants = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(home / "no_token"),
            "HF_HUB_CACHE": str(home / "cache"),
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        huggingface_hub.utils._http.close_session()  # the client of this process was made offline

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, private: bool = False, sha=None) -> Repo:
        """Make a repo; the `name` of a data set begins with "datasets/"."""
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", sha)
        if files:
            self.repos[name].commit("main", {**files}, "before", sha)
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a branch but `.gitattributes`, which the Hub itself makes."""
        repo = self.repos[name]
        return {path: data for path, data in repo.commits[repo.find(revision)].items() if path != ".gitattributes"}

    def fail(self, method: str, part: str, status: int, skip: int = 0, times: int = 10**9) -> None:
        """Answer with `status` to requests whose path has `part`, but for the first `skip`; at most `times`."""
        self.failures.append({"method": method, "part": part, "status": status, "skip": skip, "times": times})

    def asked(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def sent_bytes(self) -> bytes:
        """All that was sent but weights and the header of authorization; what is base64 in a commit is decoded."""
        parts = []
        for request in self.requests:
            parts.append(f"{request.method} {unquote(request.path)}".encode())
            parts += [f"{k}: {v}".encode() for k, v in request.headers.items() if k.lower() != "authorization"]
            if request.method != "PUT":
                parts.append(request.body)
                samples = re.findall(rb'"(?:sample|content)": ?"([A-Za-z0-9+/=]*)"', request.body)
                parts += map(base64.b64decode, samples)
        for repo in self.repos.values():
            for files in repo.commits.values():
                parts += [data for path, data in files.items() if not path.endswith(".safetensors")]
        return b"\n".join(parts)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *arguments):
        pass

    def handle(self):
        with suppress(ConnectionError):  # the client may go away
            super().handle()

    def send(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200, **headers) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def error(self, status: int, message: str, code: str = "Refused", **headers) -> None:
        self.json({"error": message}, status, X_Error_Code=code, X_Error_Message=message, **headers)

    def do_GET(self):
        body = b""
        if "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        elif self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
            for failure in self.hub.failures:
                if failure["method"] == self.command and failure["part"] in self.path:
                    which = "skip" if failure["skip"] > 0 else "times"
                    failure[which] -= 1
                    if which == "times" and failure["times"] >= 0:
                        return self.error(failure["status"], "refused")
            self.route(body)

    do_HEAD = do_POST = do_PUT = do_GET

    def user(self) -> str | None:
        return "alice" if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    def route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        path = url.path
        if found := re.fullmatch(r"/lfs/(.+)/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != found[2]:
                return self.error(400, "The bytes are not those that were announced")
            self.hub.repos[found[1]].lfs[found[2]] = body
            return self.send(200)
        if self.headers.get("Authorization") and self.user() is None:
            return self.error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            role = {"accessToken": {"role": "write"}}
            return self.json({"type": "user", "name": "alice", "orgs": [], "auth": role})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(**json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/(objects/batch|verify)", path):
            action = self.lfs_batch if found[2] == "objects/batch" else self.lfs_verify
            return self.in_repo(found[1], action, json.loads(body), write=True)
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.in_repo(found[1], self.resolve, unquote(found[2]), unquote(found[3]))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+))?(?:/(.+))?)?", path):
            kind, name, action, revision, rest = found.groups()
            name = name if kind == "models" else f"datasets/{name}"
            revision, rest = unquote(revision or "main"), unquote(rest or "")
            if action in (None, "revision"):
                return self.in_repo(name, self.info, revision)
            if action == "tree":
                return self.in_repo(name, self.tree, revision, rest, "recursive" in parse_qs(url.query))
            if action == "paths-info":
                return self.in_repo(name, self.paths_info, revision, body)
            if action in ("branch", "preupload", "commit"):
                return self.in_repo(name, getattr(self, action), revision, body, write=True)
        return self.error(404, f"the test's Hub has no {self.command} {path}")

    def in_repo(self, name: str, action, *arguments, write: bool = False) -> None:
        """Call `action` with the repo, if it exists and the user may do that."""
        repo = self.hub.repos.get(name)
        is_owner = name.removeprefix("datasets/").split("/")[0] == self.user()
        if repo is None or (repo.private and not is_owner):
            return self.error(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        if write and not is_owner:
            return self.error(403, "You don't have the rights to write here")
        self.name = name
        return action(repo, *arguments)

    def create(self, name: str, organization: str = "alice", visibility="public", private=False, **others) -> None:
        name = f"{organization}/{name}"
        if name in self.hub.repos:
            return self.json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        if organization != self.user():
            return self.error(403, f"No rights to create {name}")
        self.hub.add_repo(name, private=visibility == "private" or bool(private))
        return self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, repo: Repo, name: str, body: bytes) -> None:
        if name in repo.branches:
            return self.error(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.find("main")
        return self.json({})

    def info(self, repo: Repo, revision: str) -> None:
        if (sha := self.find(repo, revision)) is None:
            return None
        name, siblings = self.name.removeprefix("datasets/"), [{"rfilename": path} for path in repo.commits[sha]]
        names = {"id": name, "modelId": name, "sha": sha}
        return self.json({**names, "private": repo.private, "tags": [], "siblings": siblings})

    def find(self, repo: Repo, revision: str) -> str | None:
        if (sha := repo.find(revision)) is None:
            self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def content_hash(self, path: str, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else git_oid(data)

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> None:
        if (sha := self.find(repo, revision)) is None:
            return None
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in repo.commits[sha].items() if path.startswith(prefix)}
        if folder and not inside:
            return self.error(404, f"{folder} does not exist", "EntryNotFound")
        entries, folders = [], {}
        for path, data in inside.items():
            first, _, deeper = path[len(prefix) :].partition("/")
            if deeper:
                folders[prefix + first] = {"type": "directory", "path": prefix + first, "oid": git_oid(b""), "size": 0}
            if recursive or not deeper:
                entries.append(self.entry(path, data))
        return self.json([*folders.values(), *entries])

    def paths_info(self, repo: Repo, revision: str, body: bytes) -> None:
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        files = repo.commits[repo.find(revision)]
        self.json([self.entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        if (sha := self.find(repo, revision)) is None:
            return None
        if path not in repo.commits[sha]:
            return self.error(404, f"{path} does not exist", "EntryNotFound", X_Repo_Commit=sha)
        data, headers = repo.commits[sha][path], {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        headers["ETag"] = f'"{self.content_hash(path, data)}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], **headers)
        return self.send(200, data, **headers)

    def preupload(self, repo: Repo, revision: str, body: bytes) -> None:
        if (sha := self.find(repo, revision)) is None:
            return None
        files, present = [], repo.commits[sha]
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in present:
                files[-1]["oid"] = self.content_hash(path, present[path])
        return self.json({"files": files})

    def lfs_batch(self, repo: Repo, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repo.lfs:
                verify = {"href": f"{self.hub.url}/{self.name}.git/info/lfs/verify"}
                upload = {"href": f"{self.hub.url}/lfs/{self.name}/{wanted['oid']}"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        self.json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: Repo, asked: dict) -> None:
        self.json({}) if asked["oid"] in repo.lfs else self.error(404, "not uploaded")

    def commit(self, repo: Repo, revision: str, body: bytes) -> None:
        files, message = dict(repo.commits[repo.branches[revision]]), ""
        for line in (json.loads(line) for line in body.splitlines() if line.strip()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = repo.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(revision, files, message)
        return self.json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{self.name}/commit/{sha}"})


def git_oid(data: bytes) -> str:
    """How git names the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
