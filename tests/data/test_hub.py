"""The Hub's code path, run for real against a server on this machine."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

NAME = "someone/photos"
REVISION = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import json, sys
from hf_msn.data import decode_image, load_images
answers = {}
for name, settings in json.loads(sys.argv[1]).items():
    try:
        rows = list(load_images("someone/photos", **settings))
        answers[name] = {
            "columns": sorted(rows[0]),
            "labels": [row["label"] for row in rows],
            "paths": [row["image"]["path"] for row in rows],
            "sums": [sum(decode_image(row["image"]).tobytes()) for row in rows],
        }
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


def _handler(files: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    entries = [
        {"type": "file", "path": path, "size": len(data), "oid": f"{number:040x}"}
        for number, (path, data) in enumerate(files.items())
    ]

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def _send(self, status: int, body: bytes = b"", **headers):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value):
            self._send(200, json.dumps(value).encode(), Content_Type="application/json")

        def do_POST(self):
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self._json(
                [entry for entry in entries if entry["path"].replace("/", "%2F") in asked or entry["path"] in asked]
            )

        def do_GET(self):
            path = self.path.split("?")[0].replace("%2F", "/")
            if path.startswith(f"/api/datasets/{NAME}/tree/"):
                folder = path.split("/tree/")[1].partition("/")[2]
                inside = [entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")]
                self._json(inside) if inside else self._missing("EntryNotFound")
            elif path.startswith(f"/api/datasets/{NAME}"):
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": NAME, "sha": REVISION, "private": False, "tags": [], "siblings": siblings})
            elif path.startswith(f"/datasets/{NAME}/resolve/") and path.split("/", 6)[6] in files:
                data = files[path.split("/", 6)[6]]
                self._send(200, data, ETag=f'"{len(data)}"', X_Repo_Commit=REVISION)
            else:
                self._missing("EntryNotFound" if NAME in path else "RepoNotFound")

        def _missing(self, code: str):
            self._send(404, b"{}", X_Error_Code=code, X_Error_Message="not here")

        do_HEAD = do_GET

    return Hub


@pytest.fixture(scope="module")
def answers(image_rows, tmp_path_factory) -> dict:
    """What `load_images` gives, from one process of its own, as the address of the Hub is read on import."""
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    for split, count in (("train", 3), ("test", 2)):
        path = folder / f"{split}.parquet"
        image_rows(count).to_parquet(str(path))
        files[f"{split}-00000-of-00001.parquet"] = path.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "whole": {"split": "test", "revision": REVISION},
        "streamed": {"split": "test", "revision": REVISION, "streaming": True},
        "no split": {"split": "val"},
    }
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "home"),
        "HF_DATASETS_CACHE": str(folder / "home" / "datasets"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["whole", "streamed"])
def test_hub_data_is_loaded(answers, picture, name):
    assert answers[name] == {
        "columns": ["image", "label"],
        "labels": [0, 1],
        "paths": ["photo_0.png", "photo_1.png"],
        "sums": [sum(picture(number).tobytes()) for number in range(2)],
    }


def test_split_that_the_hub_data_lacks_is_named(answers):
    assert answers["no split"].startswith(
        "ValueError: 'someone/photos' has no split 'val'; it has 'train', 'test'. Name one of these"
    )
