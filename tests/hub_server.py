"""A small Hugging Face Hub on the loopback interface: what a push and a load by Hub name ask for, and no more."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id


# Files of these names go through LFS, as the Hub's own .gitattributes have it.
LFS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".parquet")


class HubServer:
    """
    Serve model and data set repositories that are kept in memory, over the Hub's HTTP interface.

    Reading a public repository is open, all else needs the token. The commit hash of a branch is a digest of its
    files; what was committed stays to be had by its hash. Xet is not offered. What is not spoken here is answered with
    501, which huggingface_hub does not try again.

    Args:
        token (`str`, *optional*, defaults to `"hf_test"`):
            The token that may write.

    Attributes:
        endpoint (`str`):
            What `HF_ENDPOINT` should be; known inside the `with` block.
        repos (`dict[str, dict]`):
            `repos[repo_id]["files"][path]` is a file's content on `main`; may be written to directly. `"branches"`
            holds the files of other branches by name, `"private"` whether the repository is; a data set's id is
            `datasets/user/name`.
        failures (`dict[str, int | str]`):
            How requests fail, by the name of the method below that would answer them: a status, or `"cut"`, which
            closes the connection in the middle of what is sent.
        failed (`list[str]`):
            The requests that have failed so.

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
        self.repos: dict[str, dict] = {}
        self.failures: dict[str, int | str] = {}
        self.failed: list[str] = []
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

    def branches(self, repo_id: str) -> dict[str, dict[str, bytes]]:
        """Return the files of each branch."""
        return {"main": self.repos[repo_id]["files"], **self.repos[repo_id].get("branches", {})}

    def commit_hash(self, repo_id: str, revision: str = "main") -> str:
        """Return the 40 hex digits that stand for a branch's files as they are now; of a hash, itself."""
        branches = self.branches(repo_id)
        if revision not in branches:
            return revision
        files = branches[revision]
        listing = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        return hashlib.sha1(json.dumps([repo_id, listing]).encode()).hexdigest()


class _Answer(Exception):
    """End a request with an error, in the headers that huggingface_hub tells its errors apart by."""

    def __init__(
        self,
        status: int,
        error_code: str = "",
        message: str = "",
        headers: dict[str, str] | None = None,
        content: dict | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.content = content or {}
        self.headers = {"X-Error-Code": error_code, "X-Error-Message": message, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    """Answer one request; the methods of `_ROUTES` get the parts of its path."""

    hub: HubServer

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        matches = ((re.fullmatch(pattern, path), methods, name) for methods, pattern, name in _ROUTES)
        match, name = next(
            ((m, name) for m, methods, name in matches if m and self.command in methods.split()), (0, "")
        )
        failure, length = self.hub.failures.get(name), int(self.headers.get("Content-Length", 0))
        if failure is not None:
            self.hub.failed.append(name)
        if failure == "cut":
            self.rfile.read(length // 2)
            # Lingering for no time makes the end a reset, as of a network that is gone.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        # The body is read before anything is answered: a connection closed on unread data is reset.
        self.body = self.rfile.read(length)
        try:
            if failure is not None:
                raise _Answer(failure, message=_MESSAGES.get(failure, "A failure that was asked for"))
            if not match:
                raise _Answer(501, "NotImplemented", f"{self.command} {path} is not spoken here")
            getattr(self, name)(**{key: unquote(value) for key, value in match.groupdict().items() if value})
        except _Answer as answer:
            body = json.dumps({"error": str(answer), **answer.content}).encode()
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
            raise _Answer(401, message=_MESSAGES[401])

    def _files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repo = repo.removeprefix("models/")
        private = repo in self.hub.repos and self.hub.repos[repo].get("private", False)
        if repo not in self.hub.repos or (
            private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):  # the Hub does not tell which
            raise _Answer(401 if private else 404, "RepoNotFound", "Repository not found")
        branches = self.hub.branches(repo)
        states = {**{self.hub.commit_hash(repo, name): files for name, files in branches.items()}, **branches}
        states = {**self.hub.repos[repo].get("history", {}), **states}
        if revision not in states:
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return states[revision]

    def log_message(self, *args) -> None:
        pass  # quiet

    # ---- For clients in other processes; no such thing on the Hub ----

    def set_failures(self) -> None:
        self.hub.failures = json.loads(self.body)
        self._send_json({})

    def listing(self) -> None:
        self._send_json({repo: sorted(content["files"]) for repo, content in self.hub.repos.items()})

    # ---- Reading ----

    def resolve(self, repo: str, revision: str, path: str) -> None:
        files = self._files(repo, revision)
        commit = {"X-Repo-Commit": self.hub.commit_hash(repo, revision)}
        if path not in files:
            raise _Answer(404, "EntryNotFound", "Entry not found", commit)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self._send(files[path], 200, {"Content-Type": "application/octet-stream", "ETag": etag, **commit})

    def info(self, repo: str, revision: str = "main") -> None:
        files, repo = self._files(repo, revision), repo.removeprefix("models/")
        private = self.hub.repos[repo].get("private", False)
        self._send_json(
            {
                "id": repo.removeprefix("datasets/"),
                "sha": self.hub.commit_hash(repo, revision),
                "private": private,
                "tags": self.hub.repos[repo].get("tags", []),
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        entries = self._entries(self._files(repo, revision))
        inside = {name: entry for name, entry in entries.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise _Answer(404, "EntryNotFound", f"{path} does not exist")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
        depth = path.count("/") + bool(path)
        self._send_json([entry for name, entry in inside.items() if recursive or name.count("/") == depth])

    def paths_info(self, repo: str, revision: str) -> None:
        entries = self._entries(self._files(repo, revision))
        self._send_json([entries[path] for path in parse_qs(self.body.decode())["paths"] if path in entries])

    @staticmethod
    def _entries(files: dict[str, bytes]) -> dict[str, dict]:
        entries = {}
        for path, content in sorted(files.items()):
            for end, character in enumerate(path):
                if character == "/":
                    entries[path[:end]] = {"type": "directory", "path": path[:end], "oid": "0" * 40}
            digest = hashlib.sha256(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
            if path.endswith(LFS_SUFFIXES):
                entries[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entries

    # ---- Writing ----

    def create(self) -> None:
        self._authorize()
        request = json.loads(self.body)
        kind = "datasets/" if request.get("type") == "dataset" else ""
        repo = f"{kind}{request['organization'] or 'user'}/{request['name']}"
        status = 409 if repo in self.hub.repos else 200  # a client that does not mind a 409 reads the url from it
        self.hub.repos.setdefault(repo, {"files": {}, "private": request.get("visibility") == "private"})
        self._send_json({"url": f"{self.hub.endpoint}/{repo}", "name": repo.removeprefix(kind)}, status)

    def create_branch(self, repo: str, branch: str) -> None:
        self._authorize()
        files, repo = self._files(repo), repo.removeprefix("models/")
        if branch in self.hub.branches(repo):
            raise _Answer(409, message=f"Reference already exists: {branch}")
        self.hub.repos[repo].setdefault("branches", {})[branch] = dict(files)
        self._send_json({})

    def validate_yaml(self) -> None:
        request = json.loads(self.body)
        if errors := card_errors(request["content"]):
            messages = [{"message": error} for error in errors]
            raise _Answer(400, message="Invalid metadata", content={"errors": messages, "warnings": []})
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
        files, repo = dict(self._files(repo, revision)), repo.removeprefix("models/")
        for item in map(json.loads, self.body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.lfs_objects:
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif key != "header":
                raise _Answer(400, message=f"Cannot commit {key} {value.get('path')}")
        if revision == "main":
            self.hub.repos[repo]["files"] = files
        else:
            self.hub.repos[repo]["branches"][revision] = files
        sha = self.hub.commit_hash(repo, revision)
        self.hub.repos[repo].setdefault("history", {})[sha] = files
        self._send_json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})


def card_errors(content: str) -> list[str]:
    """Return what the Hub would refuse in a model card's metadata."""
    match = REGEX_YAML_BLOCK.search(content)
    data = yaml.safe_load(match[2]) if match else None
    if not isinstance(data, dict):
        return ["metadata is missing or no mapping"]
    errors = []
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            try:
                validate_repo_id(value)
            except HFValidationError:
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co')
    if "base_model_relation" in data and data["base_model_relation"] not in (
        "adapter",
        "finetune",
        "merge",
        "quantized",
    ):
        errors.append('"base_model_relation" is not valid')
    for name in ("library_name", "license", "pipeline_tag"):
        if name in data and not (isinstance(data[name], str) and re.fullmatch(r"[a-z0-9._-]+", data[name])):
            errors.append(f'"{name}" must be a lowercase name')
    for name in ("tags", "metrics"):
        if not all(isinstance(value, str) for value in data.get(name, [])):
            errors.append(f'"{name}" must be an array of strings')
    for i, entry in enumerate(data.get("model-index", [])):
        if not entry.get("name"):
            errors.append(f'"model-index[{i}].name" is required')
        for j, result in enumerate(entry["results"]):
            where = f"model-index[{i}].results[{j}]"
            for part, keys in (("task", ["type"]), ("dataset", ["type", "name"])):
                missing = [key for key in keys if not isinstance(result.get(part, {}).get(key), str)]
                errors += [f'"{where}.{part}.{key}" is required' for key in missing]
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                    errors.append(f'"{where}.metrics" must have a type and a value')
    return errors


# As the Hub words them; huggingface_hub tells a token that is refused from a repository that is hidden by the former.
_MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "You don't have the rights to do that",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
}
_REPO = r"(?P<repo>(datasets/)?[\w.-]+/[\w.-]+)"
_API = r"/api/(?P<repo>(models|datasets)/[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("POST", r"/failures", "set_failures"),
    ("GET", r"/listing", "listing"),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
)
