"""A small stand-in for the hub: what an upload asks of it, kept in memory."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_test"


@dataclass
class Hub:
    """Repositories by name: whether each is private, and its files. ``status``: what creating one answers
    instead; ``full``: commits are refused."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    status: int | None = None
    full: bool = False


class Handler(BaseHTTPRequestHandler):
    """The hub's API as far as an upload without Xet goes."""

    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        self.hub.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200, {})

    def do_GET(self):
        self.answer(404, {"error": "not found"})

    def do_POST(self):
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "who are you?"})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self.check_card(json.loads(body)["content"])
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            return self.preupload(json.loads(body))
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self.commit(match[1], body)
        return self.answer(404, {"error": f"no {self.path}"})

    def create(self, request):
        repo = f"{request['organization']}/{request['name']}"
        if self.hub.status is not None:
            return self.answer(self.hub.status, {"error": "no"})
        data = {"url": f"{self.hub.url}/{repo}", "id": repo}
        if repo in self.hub.files:
            return self.answer(409, data | {"error": "You already created this model repo"})
        self.hub.private[repo] = "private" in (
            request.get("visibility"),
            *(k for k, v in request.items() if v is True),
        )
        self.hub.files[repo] = {}
        return self.answer(200, data)

    def check_card(self, content):
        """The card's metadata must be an object, and what it names as its base the id of a model."""
        metadata = yaml.safe_load(content.split("---\n", 2)[1])
        base = metadata.get("base_model", "org/name") if isinstance(metadata, dict) else ""
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", base)
        errors = [] if known else [{"message": f"base_model {base!r} is no id"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, request):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in request["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, request):
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/blob/{each['oid']}"}},
            }
            for each in request["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo, body):
        if self.hub.full:
            return self.answer(507, {"error": "no place"})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.blobs[value["oid"]]
        number = f"{len(self.hub.commits):040x}"
        url = f"{self.hub.url}/{repo}/commit/{number}"
        return self.answer(200, {"success": True, "commitOid": number, "commitUrl": url})


@contextmanager
def serve():
    """The hub, at its ``url`` on this machine."""
    hub = Hub()
    handler = type("OwnHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def in_place_of_the_hub():
    """A hub that this process and those that it starts take for the hub."""
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub
