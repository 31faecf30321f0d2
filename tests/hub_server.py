"""A Hub on this machine, as far as `huggingface_hub` asks for one: it records what reaches it, and fails on request.

with HubServer() as hub:
    hub.fail("PUT", "/lfs/", status=500, skip=1)  # from the second LFS file on
    subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})
    hub.files("someone/model")  # path -> bytes, at the head of a branch
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.utils._http
import yaml

TOKEN = "hf_" + "aliceSecretToken" * 2
READ_ONLY_TOKEN = "hf_" + "aliceReadsOnly" * 2
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet")


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


class HubServer:
    """Runs in threads of this process from `__enter__` to `__exit__`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
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


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *arguments):
        pass

    def handle(self):
        with suppress(ConnectionError):  # the client may go away
            super().handle()

    # Answers

    def send(self, status: int, body: bytes = b"", **headers) -> None:
        self.request_record.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def error(self, status: int, message: str, code: str | None = None, **headers) -> None:
        if code is not None:
            headers["X_Error_Code"] = code
        body = json.dumps({"error": message}).encode()
        self.send(status, body, Content_Type="application/json", X_Error_Message=message, **headers)

    # One door for all requests

    def do_GET(self):
        length = self.headers.get("Content-Length")
        record = Request(self.command, self.path, dict(self.headers), b"")
        self.request_record = record
        with self.hub.lock:
            self.hub.requests.append(record)
            failure = self.next_failure()
        if failure is not None and failure.cut_after is not None:
            record.body = self.rfile.read(failure.cut_after)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if length is not None:
            record.body = self.rfile.read(int(length))
        elif self.headers.get("Transfer-Encoding") == "chunked":
            record.body = self.read_chunks()
        if failure is not None:
            self.error(failure.status, failure.message, **failure.headers)
            return
        with self.hub.lock:
            self.route(record.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def next_failure(self) -> Failure | None:
        for failure in self.hub.failures:
            if failure.method == self.command and failure.part in self.path:
                if failure.skip > 0:
                    failure.skip -= 1
                elif failure.times > 0:
                    failure.times -= 1
                    return failure
        return None

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return "alice" if token in (TOKEN, READ_ONLY_TOKEN) else None

    def route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        if self.headers.get("Authorization") and self.user() is None and not path.startswith("/lfs/"):
            return self.error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/validate-yaml":
            return self.validate_yaml(json.loads(body))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/lfs/(.+)/([0-9a-f]{64})", path):
            return self.take_lfs(self.hub.repos[found[1]], found[2], body)
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
                return self.in_repo(name, self.info, name, revision)
            if action == "tree":
                return self.in_repo(name, self.tree, revision, rest, "recursive" in query)
            if action == "paths-info":
                return self.in_repo(name, self.paths_info, revision, body)
            if action == "refs":
                return self.in_repo(name, self.refs)
            if action == "branch":
                return self.in_repo(name, self.branch, revision, json.loads(body), write=True)
            if action == "preupload":
                return self.in_repo(name, self.preupload, revision, json.loads(body), write=True)
            if action == "commit":
                return self.in_repo(name, self.commit, name, revision, body, write=True)
            if action == "settings":
                return self.in_repo(name, self.settings, json.loads(body), write=True)
        return self.error(404, f"the test's Hub has no {self.command} {path}")

    def in_repo(self, name: str, action, *arguments, write: bool = False) -> None:
        """Calls `action` with the repo's name kept for it, once it is there and the user may do that."""
        repo = self.hub.repos.get(name)
        owner = name.removeprefix("datasets/").split("/")[0] == self.user()
        if repo is None or (repo.private and not owner):
            return self.error(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        if write and not (owner and self.may_write()):
            return self.error(403, "You don't have the rights to write here")
        self.name = name
        return action(repo, *arguments)

    def may_write(self) -> bool:
        return READ_ONLY_TOKEN not in self.headers.get("Authorization", "")

    # Accounts and repos

    def whoami(self) -> None:
        if self.user() is None:
            return self.error(401, "Invalid username or password.")
        role = "write" if self.may_write() else "read"
        return self.json({"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate_yaml(self, asked: dict) -> None:
        found = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if not isinstance(metadata, dict):
            return self.json({"errors": [{"message": "no mapping"}], "warnings": []}, 400)
        return self.json({"errors": [], "warnings": []})

    def create(self, asked: dict) -> None:
        owner = asked.get("organization") or self.user()
        if self.user() is None:
            return self.error(401, "Invalid username or password.")
        if owner != self.user() or not self.may_write():
            return self.error(403, f"You don't have the rights to create a model under the namespace '{owner}'")
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.add_repo(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return self.json({"url": url, "name": name})

    def settings(self, repo: Repo, asked: dict) -> None:
        if "private" in asked or "visibility" in asked:
            repo.private = asked.get("private") is True or asked.get("visibility") == "private"
        self.json({"private": repo.private})

    def refs(self, repo: Repo) -> None:
        def listed(kind, names):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        self.json({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})

    def branch(self, repo: Repo, name: str, asked: dict) -> None:
        if name in repo.branches:
            return self.error(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.find(asked.get("startingPoint", "main"))
        return self.json({})

    def info(self, repo: Repo, name: str, revision: str) -> None:
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        name = name.removeprefix("datasets/")
        return self.json(
            {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
        )

    # Reading

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> None:
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
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
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = parse_qs(body.decode())["paths"]
        files = repo.commits[repo.find(revision)]
        self.json([self.entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if path not in repo.commits[sha]:
            return self.error(404, f"{path} does not exist", "EntryNotFound", X_Repo_Commit=sha)
        data, headers = repo.commits[sha][path], {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        headers["ETag"] = f'"{self.entry(path, data).get("lfs", {}).get("oid", git_oid(data))}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], **headers)
        return self.send(200, data, **headers)

    # Writing

    def preupload(self, repo: Repo, revision: str, asked: dict) -> None:
        if revision not in repo.branches:
            return self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        there = repo.commits[repo.branches[revision]]
        ignored = asked.get("gitIgnore", there.get(".gitignore", b"").decode()).split()
        files = []
        for file in asked["files"]:
            path, is_lfs = file["path"], file["path"].endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular"}
            answer["shouldIgnore"] = any(fnmatch(path, pattern) for pattern in ignored)
            if path in there:
                data = there[path]
                answer["oid"] = hashlib.sha256(data).hexdigest() if is_lfs else git_oid(data)
            files.append(answer)
        return self.json({"files": files})

    def lfs_batch(self, repo: Repo, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.lfs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{self.name}/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{self.name}.git/info/lfs/verify"},
                }
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def take_lfs(self, repo: Repo, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "The bytes are not what was announced")
        repo.lfs[oid] = body
        return self.send(200)

    def lfs_verify(self, repo: Repo, asked: dict) -> None:
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            return self.error(404, "not uploaded")
        return self.json({})

    def commit(self, repo: Repo, name: str, revision: str, body: bytes) -> None:
        if revision not in repo.branches:
            return self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files, message = dict(repo.commits[repo.branches[revision]]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.lfs:
                    return self.error(400, f"{value['path']} was not uploaded")
                files[value["path"]] = repo.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    return self.error(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                return self.error(400, f"the test's Hub knows no {line['key']}")
        sha = repo.commit(revision, files, message)
        return self.json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""})


def git_oid(data: bytes) -> str:
    """How git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
