"""A Hub on the loopback interface for the tests. It speaks real HTTP with the real `huggingface_hub` client.

It keeps models and data sets with their commits, checks tokens, sizes and SHA-256 as the Hub does, and fails on demand:

    with Hub() as hub:
        hub.faults.append(Fault("PUT /_lfs/", status=503, times=2))
        subprocess.run([...], env=hub.environment(home, WRITE_TOKEN))
        assert hub.log[-1].path.endswith("/commit/main")
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_loopbackMayWrite", "hf_loopbackMayRead", "hf_loopbackSomeoneElse"
ACCOUNTS = {WRITE_TOKEN: ("me", "write"), READ_TOKEN: ("me", "read"), OTHER_TOKEN: ("other", "write")}
LARGE = ("*.safetensors", "*.parquet", "*.png", "*.bin", "*.pt", "*.pth")  # a part of the Hub's list
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """A failure of the next requests that match."""

    match: str  # regular expression, searched in "METHOD /path?query"
    status: int | None = None  # of the answer
    message: str = "Failed on demand."
    cut_after: int | None = None  # cut the connection without an answer, after this number of bytes of the body
    down: bool = False  # then also stop the server; `Hub.start` brings it back
    times: float = 1  # number of requests that fail


@dataclass
class Logged:
    """A request. `status` is None if it was cut, and `sent` counts the bytes of the answer's body."""

    method: str
    path: str
    status: int | None = None
    sent: int = 0


@dataclass(frozen=True)
class File:
    """The content of a file, and whether the Hub keeps it in its storage for large files (LFS)."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What the Hub compares files by: the SHA-256 of a large file, the id that git gives any other file."""
        return self.sha256 if self.is_lfs else hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit with all files of its tree."""

    oid: str
    parent: "Commit | None"
    title: str
    tree: dict[str, File]


@dataclass
class Repo:
    """A repository. `commits` has every commit by its id, and `branches` the newest one of each branch."""

    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, changes: Mapping[str, File | None], title: str, oid: str | None = None) -> Commit:
        """Commit changed files to a branch, which is created if it does not exist. None deletes a file."""
        parent = self.branches.get(branch)
        tree = {path: file for path, file in {**(parent.tree if parent else {}), **changes}.items() if file is not None}
        oid = oid or hashlib.sha1(f"{self.id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = self.branches[branch] = Commit(oid, parent, title, tree)
        return self.branches[branch]

    def at(self, revision: str) -> Commit:
        """The commit of a branch or an id."""
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, revision: str) -> list[Commit]:
        """A commit and those before it, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(commits[-1].parent)
        return commits


class HubError(Exception):
    """An answer that is not a success, in the Hub's words. `more` belongs to its body."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.status, self.body = status, json.dumps({"error": message} | more).encode()


@dataclass
class Request:
    """What a route gets. `account` is the name and the role of the token's owner."""

    hub: "Hub"
    query: dict[str, list[str]]
    account: tuple[str, str] | None
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, kind: str, repo_id: str) -> Repo:
        """A repository that the account may read. To others, a private one does not exist."""
        repo = self.hub.repos.get(f"{kind}s/{repo_id}")
        if repo is None or (repo.private and (self.account is None or self.account[0] != repo_id.split("/")[0])):
            raise HubError(401 if self.account is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def check_may_write(self, repo_id: str) -> None:
        if self.account is None:
            raise HubError(401, "Invalid username or password.")
        name, role = self.account
        if role != "write":
            raise HubError(403, "You must use a write token to upload to a repository.")
        if name != repo_id.split("/")[0]:
            raise HubError(403, f'You don\'t have the rights to write under the namespace of "{repo_id}"')


class Hub:
    """The server, with its state in memory.

    Attributes:
        url: The endpoint, for HF_ENDPOINT.
        repos: The repositories, by "models/<owner>/<name>" or "datasets/<owner>/<name>".
        large: The content of every large file that was uploaded, by SHA-256.
        faults: Failures to come.
        log: All requests so far.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.lock = threading.RLock()
        self.port = 0  # the first start chooses one
        self.server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop at once, as if the process were killed. Open connections get no more answers."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def environment(self, home: str | Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process that uses this Hub only, with its caches in the folder `home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        ours["HF_HUB_DISABLE_TELEMETRY"] = "1"
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return outside | ours | ({"HF_TOKEN": token} if token else {}) | more

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[f"{kind}s/{repo_id}"] = Repo(repo_id, private)
        repo.add("main", {".gitattributes": File(b"", is_lfs=False)}, "initial commit")
        return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path],
        kind: str = "model",
        private: bool = False,
        oid: str | None = None,
        branch: str = "main",
    ) -> str:
        """Put content, or files to copy, into a repository without a request. Returns the id of the commit."""
        repo, changes = self.repos.get(f"{kind}s/{repo_id}") or self.create(kind, repo_id, private), {}
        for path, content in files.items():
            content = content.read_bytes() if isinstance(content, Path) else content
            content = content.encode() if isinstance(content, str) else content
            changes[path] = File(content, is_large(path, content))
        return repo.add(branch, changes, "Add files", oid).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a model's files, by path, without .gitattributes."""
        tree = self.repos[f"models/{repo_id}"].at(revision).tree
        return {path: file.content for path, file in tree.items() if path != ".gitattributes"}

    def commits(self, repo_id: str) -> list[str]:
        """The ids of the commits of a model's main branch, newest first."""
        return [commit.oid for commit in self.repos[f"models/{repo_id}"].history("main")]

    def next_fault(self, line: str) -> Fault | None:
        fault = next((one for one in self.faults if one.times > 0 and re.search(one.match, line)), None)
        if fault is not None:
            fault.times -= 1
        return fault


def is_large(path: str, sample: bytes) -> bool:
    """Whether the Hub keeps a file in LFS: because of its name, or because it is not text."""
    return b"\0" in sample or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LARGE)


def describe(path: str, file: File) -> dict[str, Any]:
    """A file, as tree listings show it."""
    size = len(file.content)
    lfs = {"lfs": {"oid": file.sha256, "sha256": file.sha256, "size": size, "pointerSize": 130}} if file.is_lfs else {}
    return {"type": "file", "path": path, "size": size, "oid": file.oid} | lfs


# The routes. Each takes the request and the groups of its pattern, and returns what the body has as JSON.


def whoami(request: Request) -> dict:
    if request.account is None:
        raise HubError(401, "Invalid user token.")
    return {"type": "user", "name": request.account[0], "orgs": []}


def create_repo(request: Request) -> dict:
    asked = request.json()
    kind, owner = asked.get("type") or "model", asked.get("organization") or (request.account or ("nobody",))[0]
    repo_id = f"{owner}/{asked['name']}"
    request.check_may_write(repo_id)
    if kind == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
        raise HubError(400, '"sdk" must be one of [gradio, docker, static]')
    url = f"{request.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
    if f"{kind}s/{repo_id}" in request.hub.repos:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    request.hub.create(kind, repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
    return {"url": url}


def validate_yaml(request: Request) -> dict:
    """Check that the metadata of a card are a mapping in YAML."""
    found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
    if not isinstance(metadata, dict):
        raise HubError(400, "Invalid metadata", errors=[{"message": "must be a mapping"}])
    return {"errors": [], "warnings": []}


def repo_info(request: Request, kind: str, repo_id: str, revision: str | None) -> dict:
    repo = request.repo(kind, repo_id)
    commit, siblings = repo.at(revision or "main"), []
    for path, file in sorted(commit.tree.items()):
        about = describe(path, file) if "blobs" in request.query else {}
        siblings.append({"rfilename": path} | {name: about[name] for name in ("size", "lfs") if name in about})
    return {"id": repo_id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}


def list_tree(request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> list:
    tree, prefix = request.repo(kind, repo_id).at(revision).tree, f"{folder}/" if folder else ""
    entries = {}
    for path, file in tree.items():
        if path.startswith(prefix):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": parent}
            entries[path] = describe(path, file)
    if folder and not entries:
        raise HubError(404, f'"{folder}" does not exist on "{revision}"', "EntryNotFound")
    is_deep = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    return [entries[path] for path in sorted(entries) if is_deep or "/" not in path.removeprefix(prefix)]


def list_commits(request: Request, kind: str, repo_id: str, revision: str) -> list:
    history = request.repo(kind, repo_id).history(revision)
    return [{"id": one.oid, "title": one.title, "message": "", "date": DATE, "authors": []} for one in history]


def create_branch(request: Request, kind: str, repo_id: str, branch: str) -> dict:
    request.check_may_write(repo_id)
    repo = request.repo(kind, repo_id)
    if branch in repo.branches:
        raise HubError(409, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.at("main")
    return {}


def preupload(request: Request, kind: str, repo_id: str, revision: str) -> dict:
    """Tell which files are large, and which content the repository has."""
    request.check_may_write(repo_id)
    tree, files = request.repo(kind, repo_id).at(revision).tree, []
    for asked in request.json()["files"]:
        path = asked["path"]
        mode = "lfs" if is_large(path, base64.b64decode(asked["sample"])) else "regular"
        oid = tree[path].oid if path in tree else None
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


def start_large_uploads(request: Request, repo_id: str) -> dict:
    """Tell where to upload the large files that the Hub does not have."""
    request.check_may_write(repo_id)
    objects = []
    for asked in request.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        upload = {"upload": {"href": f"{request.hub.url}/_lfs/{oid}/{size}"}}
        objects.append({"oid": oid, "size": size} | ({} if oid in request.hub.large else {"actions": upload}))
    return {"transfer": "basic", "objects": objects}


def upload_large(request: Request, oid: str, size: str) -> dict:
    """Keep a large file. Like the storage of the Hub, this needs no token and takes the promised bytes only."""
    if (len(request.body), hashlib.sha256(request.body).hexdigest()) != (int(size), oid):
        raise HubError(400, f"Received {len(request.body)} bytes that are not the promised ones")
    request.hub.large[oid] = request.body
    return {}


def commit(request: Request, kind: str, repo_id: str, revision: str) -> dict:
    request.check_may_write(repo_id)
    repo, changes, title = request.repo(kind, repo_id), {}, ""
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    for key, value in ((line["key"], line["value"]) for line in map(json.loads, request.body.splitlines())):
        if key == "header":
            title = value["summary"]
        elif key == "file":
            changes[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile" and value["oid"] in request.hub.large:
            changes[value["path"]] = File(request.hub.large[value["oid"]], is_lfs=True)
        elif key == "deletedFile" and value["path"] in repo.at(revision).tree:
            changes[value["path"]] = None
        else:
            raise HubError(400, f"{key} is not possible: the Hub does not have the file {value['path']}")
    oid = repo.add(revision, changes, title).oid
    return {"success": True, "commitOid": oid, "commitUrl": f"{request.hub.url}/{repo_id}/commit/{oid}"}


def download(request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> tuple[bytes, dict]:
    """The content of a file, and its headers."""
    commit = request.repo((kind or "models")[:-1], repo_id).at(revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.tree:
        error = HubError(404, "Entry not found", "EntryNotFound")
        error.headers |= headers
        raise error
    return commit.tree[path].content, headers | {"ETag": f'"{commit.tree[path].oid}"'}


ID = r"(?P<repo_id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{ID}"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", repo_info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", list_tree),
    ("GET", rf"{API}/commits/(?P<revision>[^/]+)", list_commits),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", create_branch),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", start_large_uploads),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)", upload_large),
    ("GET|HEAD", rf"/((?P<kind>datasets|spaces)/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", download),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self):
        with suppress(ConnectionError):  # the client went away between two requests
            super().handle()

    def log_message(self, *_):
        """The log is `Hub.log`."""

    def serve(self):
        line = f"{self.command} {self.path}"
        with self.hub.lock:
            fault = self.hub.next_fault(line)
            logged = Logged(self.command, self.path)
            self.hub.log.append(logged)
        if self.hub.server is None or (fault and fault.cut_after is not None):
            return self.cut(fault)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if fault and fault.status:
                raise HubError(fault.status, fault.message)
            with self.hub.lock:
                content, headers = self.answer(body)
            status = 200
        except HubError as error:
            status, content, headers = error.status, error.body, error.headers
        logged.status, logged.sent = status, len(content) * (self.command != "HEAD")
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def answer(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        url, token = urlsplit(self.path), self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ACCOUNTS:
            raise HubError(401, "Invalid credentials in Authorization header")
        request = Request(self.hub, parse_qs(url.query), ACCOUNTS.get(token), body)
        for method, pattern, route in ROUTES:
            if re.fullmatch(method, self.command) and (found := re.fullmatch(pattern, url.path)):
                groups = {name: value and unquote(value) for name, value in found.groupdict().items()}
                answer = route(request, **groups)
                return answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        raise HubError(404, f"No such page: {self.command} {url.path}")

    def cut(self, fault: Fault | None) -> None:
        """Read a part of the body and close the connection without an answer."""
        self.close_connection = True
        if fault is not None:
            self.rfile.read(fault.cut_after)
            if fault.down:
                self.hub.stop()
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)
