"""What the Hub of the tests answers over HTTP: accounts, repos, reading, and commits with large files."""

import base64
import hashlib
import json
import re
import socket
from contextlib import suppress
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_state import READ_ONLY_TOKEN, TOKEN, Failure, Repo, Request

if TYPE_CHECKING:
    from hub_server import HubServer

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet")


class HubHandler(BaseHTTPRequestHandler):
    """One connection. A subclass has the [`HubServer`] that it is of as `hub`."""

    hub: "HubServer"
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
