"""A server of this machine in place of the hub: it takes a login, repositories, commits and LFS files, and gives their bytes."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

TOKEN = "hf_writes"
COMMIT = "0" * 40


class Hub:
    """What has been pushed.

    Attributes:
        repos: by name, whether each is private.
        files: by repository and path, the bytes.
        lfs: endings of files that go by LFS; what comes so is in `blobs` until its commit.
    """

    def __init__(self, *, lfs: tuple[str, ...] = ()) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.lfs, self.blobs = lfs, {}
        self.url = ""

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        handler = type("Handler", (_Handler,), {"hub": self})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield
            server.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client that is logged in; Xet has a protocol of its own."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def commit(self, repo: str, lines: list[dict]) -> None:
        files = self.files.setdefault(repo, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, content: object, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _file(self, *, whole: bool) -> None:
        """A file of a repository, or what a client asks of it first."""
        repo, _, path = re.fullmatch(r"/(.*)/resolve/(main|0+)/(.*)", self.path).groups()
        content = self.hub.files.get(repo, {}).get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repo in self.hub.files else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def do_HEAD(self):
        self._file(whole=False)

    def do_GET(self):
        if "/resolve/" in self.path:
            return self._file(whole=True)
        if at := re.fullmatch(r"/api/models/(.*)/(revision/main|tree/0+)", self.path.partition("?")[0]):
            files = self.hub.files[at[1]]
            tree = [{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in files.items()]
            return self._answer(tree if at[2] != "revision/main" else {"id": at[1], "sha": COMMIT})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": "me"})
        repo = self.path.removeprefix("/api/models/")
        return self._answer({"id": repo, "private": self.hub.repos[repo], "sha": COMMIT})

    def do_PUT(self):
        self.hub.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self):
        body, hub = self._body(), self.hub
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            code = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, asked.get("visibility") == "private")
            return self._answer({"url": f"{hub.url}/{repo}"}, code)
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if at := re.fullmatch(r"/api/models/(.*)/preupload/main", self.path):
            files = [file["path"] for file in json.loads(body)["files"]]
            kinds = ["lfs" if path.endswith(hub.lfs) else "regular" for path in files]
            entries = [{"path": p, "uploadMode": kind, "shouldIgnore": False} for p, kind in zip(files, kinds)]
            return self._answer({"files": entries})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            sent = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]
            return self._answer({"transfer": "basic", "objects": sent})
        if at := re.fullmatch(r"/api/models/(.*)/commit/main", self.path):
            hub.commit(at[1], [json.loads(line) for line in body.splitlines()])
            return self._answer({"commitUrl": f"{hub.url}/{at[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._answer({"error": self.path}, 404)
