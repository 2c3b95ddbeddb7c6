"""A stand-in for the Hub on this machine: as much of its interface as creating, uploading and loading models takes."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from huggingface_hub import close_session, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories as dictionaries of their files whatever the branch, and the requests that changed them."""

    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    sent: dict[str, list[int]] = field(default_factory=dict)  # bytes of each answer, by the path
    head: str = COMMIT
    is_failing: bool = False  # whether it answers that, whatever it is asked
    before: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # files by commit, once it has moved

    def move(self, commit: str, files: dict[str, dict[str, bytes]]) -> None:
        """Let all branches move to a commit with these files in place of those of the same name."""
        self.before[self.head] = self.files
        self.files = {name: {**old, **files.get(name, {})} for name, old in self.files.items()}
        self.head = commit

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        """Create a repository, of the user "me" if no organization is named."""
        self.created.append(request)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        self.files.setdefault(repo_id, {})
        return {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    def preupload(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tell that all files are to come with the commit itself."""
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in request["files"]]
        return {"files": modes}

    def commit(self, repo_id: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Store the files of a commit."""
        for line in lines:
            if line["key"] == "header":
                self.commits.append(line["value"])
            else:
                self.files[repo_id][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}

    def info(self, repo_id: str) -> dict[str, Any]:
        """Describe a repository."""
        return {"id": repo_id, "sha": self.head, "siblings": [{"rfilename": name} for name in self.files[repo_id]]}

    def tree(self, repo_id: str) -> list[dict[str, Any]]:
        """List a repository's files."""
        files = self.files[repo_id].items()
        return [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files]

    def post(self, path: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer a request that changes something."""
        if path == "/api/repos/create":
            return self.create(lines[0])
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        repo_id, action, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^/]+)", path).groups()
        if action == "branch":
            self.branches.append(f"{repo_id}@{branch}")
            return {}
        return self.preupload(lines[0]) if action == "preupload" else self.commit(repo_id, lines)

    def get(self, path: str) -> bytes | None:
        """Return a file, or a description as JSON; None where there is neither."""
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        if found and found[1] in self.files:
            describe = self.tree if "/tree/" in path else self.info
            return json.dumps(describe(found[1])).encode()
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        return self.before.get(found[2], self.files).get(found[1], {}).get(found[3]) if found else None

    def commit_of(self, path: str) -> str:
        """Return the commit that a path asks for."""
        return next((commit for commit in self.before if f"/{commit}" in path), self.head)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a Hub for the time of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = hub.post(urlparse(self.path).path, [json.loads(line) for line in body.splitlines()])
            self.reply(json.dumps(answer).encode())

        def do_GET(self) -> None:
            if hub.is_failing:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.get(urlparse(self.path).path)
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if content is not None and part:
                self.reply(content[int(part[1]) : int(part[2]) + 1], status=206)
            else:
                self.reply(content)

        do_HEAD = do_GET  # noqa: N815

        def reply(self, content: bytes | None, status: int = 200) -> None:
            self.send_response(404 if content is None else status)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            content = content or b""
            self.send_header("X-Repo-Commit", hub.commit_of(self.path))
            self.send_header("ETag", hashlib.sha1(content).hexdigest())
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                hub.sent.setdefault(urlparse(self.path).path, []).append(len(content))
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def here(hub: Hub, home: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process take a Hub for the real one, with an empty cache in `home`, for the time of the block."""
    with patch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", False)
        patched.setattr(constants, "ENDPOINT", hub.endpoint)
        files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patched.setattr(constants, "HF_HUB_CACHE", str(home))
        close_session()
        yield
    close_session()
