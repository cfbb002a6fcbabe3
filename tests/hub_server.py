"""A small Hugging Face Hub on the loopback interface: what a push and a load by Hub name ask for, and no more."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


# Files of these names go through LFS, as the Hub's own .gitattributes have it.
LFS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


class HubServer:
    """
    Serve model repositories that are kept in memory, over the Hub's HTTP interface.

    Reading is open, writing needs the token. A repository has one revision, `main`, whose commit hash is a digest of
    its files: an older hash is unknown. Xet is not offered. What is not spoken here is answered with 501, which
    huggingface_hub does not try again.

    Args:
        token (`str`, *optional*, defaults to `"hf_test"`):
            The token that may write.

    Attributes:
        endpoint (`str`):
            What `HF_ENDPOINT` should be; known inside the `with` block.
        repos (`dict[str, dict[str, dict[str, bytes]]]`):
            `repos[repo_id]["files"][path]` is a file's content; may be written to directly.

    Example:

    ```python
    >>> from urllib.request import urlopen
    >>> with HubServer() as server:
    ...     server.repos["user/model"] = {"files": {"config.json": b"{}"}}
    ...     urlopen(f"{server.endpoint}/user/model/resolve/main/config.json").read()
    b'{}'

    ```
    """

    def __init__(self, token: str = "hf_test"):
        self.token = token
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.endpoint = ""

    def __enter__(self) -> "HubServer":
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit_hash(self, repo_id: str) -> str:
        """Return the 40 hex digits that stand for the repository's files as they are now."""
        files = self.repos[repo_id]["files"]
        listing = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        return hashlib.sha1(json.dumps([repo_id, listing]).encode()).hexdigest()


class _Answer(Exception):
    """End a request with an error, in the headers that huggingface_hub tells its errors apart by."""

    def __init__(self, status: int, error_code: str = "", message: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": error_code, "X-Error-Message": message, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    """Answer one request; the methods of `_ROUTES` get the parts of its path."""

    hub: HubServer

    def _dispatch(self) -> None:
        # The body is read before anything is answered: a connection closed on unread data is reset.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        try:
            for methods, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    getattr(self, name)(**{key: unquote(value) for key, value in match.groupdict().items() if value})
                    return
            raise _Answer(501, "NotImplemented", f"{self.command} {path} is not spoken here")
        except _Answer as answer:
            body = json.dumps({"error": str(answer)}).encode()
            self._send(body, answer.status, {"Content-Type": "application/json", **answer.headers})

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: dict | list, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Answer(401, message="Invalid credentials in Authorization header")

    def _files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        if repo not in self.hub.repos:
            raise _Answer(404, "RepoNotFound", "Repository not found")
        if revision not in ("main", self.hub.commit_hash(repo)):
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.hub.repos[repo]["files"]

    def log_message(self, *args) -> None:
        pass  # quiet

    def resolve(self, repo: str, revision: str, path: str) -> None:
        files = self._files(repo, revision)
        commit = {"X-Repo-Commit": self.hub.commit_hash(repo)}
        if path not in files:
            raise _Answer(404, "EntryNotFound", "Entry not found", commit)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self._send(files[path], 200, {"Content-Type": "application/octet-stream", "ETag": etag, **commit})

    def info(self, repo: str, revision: str = "main") -> None:
        siblings = [{"rfilename": path} for path in self._files(repo, revision)]
        sha = self.hub.commit_hash(repo)
        self._send_json({"id": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def create(self) -> None:
        self._authorize()
        request = json.loads(self.body)
        repo = f"{request['organization'] or 'user'}/{request['name']}"
        status = 409 if repo in self.hub.repos else 200  # a client that does not mind a 409 reads the url from it
        self.hub.repos.setdefault(repo, {"files": {}})
        self._send_json({"url": f"{self.hub.endpoint}/{repo}", "name": repo}, status)

    def validate_yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self._authorize()
        self._files(repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        self._send_json({"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]})

    def lfs_batch(self, repo: str) -> None:
        self._authorize()
        self._files(repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        # No token here: the Hub hands out a signed address.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, message=f"The content is not that of {oid}")
        self.hub.lfs_objects[oid] = self.body
        self._send(b"", 200, {})

    def commit(self, repo: str, revision: str) -> None:
        self._authorize()
        files = dict(self._files(repo, revision))
        for item in map(json.loads, self.body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.lfs_objects:
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif key != "header":
                raise _Answer(400, message=f"Cannot commit {key} {value.get('path')}")
        self.hub.repos[repo]["files"] = files
        sha = self.hub.commit_hash(repo)
        self._send_json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
)
