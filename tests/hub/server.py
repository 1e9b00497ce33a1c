"""A Hub on the loopback interface: the requests of the real `huggingface_hub` client that the tests need, over HTTP.

It keeps models and data sets with their commits, checks sizes and SHA-256 as the Hub does, checks tokens, and fails on
demand:

    with Hub(folder) as hub:
        hub.faults.append(Fault("PUT /_lfs/", status=503, times=2))
        subprocess.run([...], env=hub.environment(home, WRITE_TOKEN))
        assert hub.log[-1].path.endswith("/commit/main")

All state lies in `folder` and is complete after every request, so a server that was killed can start again.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_loopbackMayWrite", "hf_loopbackMayRead", "hf_loopbackSomeoneElse"
ACCOUNTS = {
    WRITE_TOKEN: {"name": "me", "role": "write"},
    READ_TOKEN: {"name": "me", "role": "read"},
    OTHER_TOKEN: {"name": "other", "role": "write"},
}
# What a new repository's .gitattributes names on the Hub, and what it adds for the media of data sets.
LARGE = """
    *.7z *.arrow *.avro *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.lz4 *.mds *.mlmodel *.model *.msgpack
    *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/* *.tar.* *.tar
    *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents* *.pcm *.sam *.raw *.aac *.flac *.mp3 *.ogg *.wav *.bmp *.gif
    *.png *.tiff *.jpg *.jpeg *.webp *.mp4 *.webm
"""
LFS_PATTERNS = LARGE.split()
LARGEST_REGULAR = 10_000_000
CHUNK = 1 << 16


@dataclass
class Fault:
    """One way to fail, for the next requests that match.

    Attributes:
        match: Regular expression, searched in "METHOD /path?query".
        status: Answer with this code; left out, the request is served (and perhaps cut).
        message: What the answer says in X-Error-Message and in its body.
        headers: More headers of the answer, such as {"Retry-After": "0"} or {"X-Error-Code": "GatedRepo"}.
        cut_after: Cut the connection after so many bytes of the upload's or the download's body; 0: at once, whatever
            the request.
        down: Take the whole server down with it, as a kill would; `Hub.start` brings it back.
        skip: Let so many matching requests pass first.
        times: How many requests fail.
    """

    match: str
    status: int | None = None
    message: str = "Failed on demand."
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    down: bool = False
    skip: int = 0
    times: float = 1


@dataclass
class Logged:
    """One request; `received` and `sent` count the bytes of its body and of the answer's."""

    method: str
    path: str
    user: str | None = None
    status: int | None = None
    received: int = 0
    sent: int = 0
    cut: bool = False


class HubError(Exception):
    """An answer that is no success, in the Hub's words."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Cut(Exception):
    """The connection was cut on purpose."""


@dataclass
class Answer:
    """Status, headers, and as the body bytes, something for JSON, or (file, first byte, byte count)."""

    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


@dataclass
class Request:
    """What a route gets to see."""

    hub: "Hub"
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    account: dict[str, str] | None
    chunks: Iterator[bytes]

    def json(self) -> Any:
        return json.loads(b"".join(self.chunks) or b"{}")


class Hub:
    """The server, and the same state from inside the process.

    Args:
        folder: Where the state lies; another `Hub` on the same folder continues it.
        port: 0 takes a free one, and keeps it over `stop` and `start`.

    Attributes:
        url: The endpoint, for HF_ENDPOINT.
        faults: What shall fail; see `Fault`.
        log: All requests so far.
    """

    def __init__(self, folder: str | Path, port: int = 0):
        self.folder, self.port = Path(folder), port
        self.accounts = dict(ACCOUNTS)
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.server: ThreadingHTTPServer | None = None
        for name in ("repos", "blobs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Go away at once, as a kill would: running transfers are cut."""
        server, self.server = self.server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        with self.lock:
            for connection in self.connections:
                _shut(connection)

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def environment(self, home: str | Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process whose Hub is this one, with its caches below `home` and no other setting."""
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return outside | ours | ({"HF_TOKEN": token} if token else {}) | more

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path],
        repo_type: str = "model",
        private: bool = False,
        oid: str | None = None,
        branch: str = "main",
    ) -> str:
        """Put files into a repository, which is created where needed, without any request.

        Args:
            repo_id: owner/name.
            files: Content, or the file to copy, by path in the repository.
            oid: Commit id wanted; left out: derived from the content.
            branch: Where to; a new one starts empty.

        Returns:
            The commit id.
        """
        with self.lock:
            if not self._repo_file(repo_type, repo_id).is_file():
                self.create(repo_type, repo_id, private)
            repo = self.load(repo_type, repo_id)
            entries = {}
            for path, content in files.items():
                content = content.read_bytes() if isinstance(content, Path) else content
                content = content.encode() if isinstance(content, str) else content
                entries[path] = self.store(content, lfs=is_lfs(path, len(content), content[:512]))
            tree = (self.tree(repo, branch) if branch in repo["branches"] else {}) | entries
            return self.add_commit(repo, branch, tree, "Add files", oid=oid)

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, .gitattributes left out."""
        tree = self.tree(self.load(repo_type, repo_id), revision)
        return {path: self.blob(entry).read_bytes() for path, entry in tree.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[str]:
        """Commit ids, newest first."""
        repo = self.load(repo_type, repo_id)
        found, oid = [], self.resolve(repo, revision)
        while oid:
            found.append(oid)
            oid = repo["commits"][oid]["parent"]
        return found

    # What the routes below are made of.

    def create(self, repo_type: str, repo_id: str, private: bool) -> None:
        repo = {"type": repo_type, "id": repo_id, "private": private, "created": _now()}
        repo |= {"branches": {}, "commits": {}}
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        tree = {".gitattributes": self.store(attributes.encode(), lfs=False)}
        self.add_commit(repo, "main", tree, "initial commit")

    def load(self, repo_type: str, repo_id: str) -> dict[str, Any]:
        return json.loads(self._repo_file(repo_type, repo_id).read_text())

    def save(self, repo: dict[str, Any]) -> None:
        _write_whole(self._repo_file(repo["type"], repo["id"]), json.dumps(repo).encode())

    def add_commit(
        self, repo: dict[str, Any], branch: str, tree: dict, title: str, description: str = "", oid: str | None = None
    ) -> str:
        parent = repo["branches"].get(branch)
        commit = {"parent": parent, "title": title, "message": description, "date": _now(), "tree": tree}
        oid = oid or hashlib.sha1(json.dumps([repo["id"], commit]).encode()).hexdigest()
        repo["commits"][oid] = commit
        repo["branches"][branch] = oid
        self.save(repo)
        return oid

    def store(self, content: bytes, lfs: bool) -> dict[str, Any]:
        """Keep content; what a tree says of it."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not (self.folder / "blobs" / sha256).is_file():
            _write_whole(self.folder / "blobs" / sha256, content)
        if lfs:
            return lfs_entry(sha256, len(content))
        return {"sha256": sha256, "size": len(content), "oid": git_oid(content), "lfs": False}

    def blob(self, entry: dict[str, Any]) -> Path:
        return self.folder / "blobs" / entry["sha256"]

    def has_object(self, sha256: str, size: int) -> bool:
        blob = self.folder / "blobs" / sha256
        return blob.is_file() and blob.stat().st_size == size

    def resolve(self, repo: dict[str, Any], revision: str) -> str:
        """The commit id of a branch or a commit."""
        oid = repo["branches"].get(revision, revision)
        if oid not in repo["commits"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def tree(self, repo: dict[str, Any], revision: str) -> dict[str, dict[str, Any]]:
        return repo["commits"][self.resolve(repo, revision)]["tree"]

    def _repo_file(self, repo_type: str, repo_id: str) -> Path:
        return self.folder / "repos" / f"{repo_type}--{repo_id.replace('/', '--')}.json"

    def readable(self, request: Request, repo_type: str, repo_id: str) -> dict[str, Any]:
        """The repository, if the account may see it; to others a private one does not exist."""
        account = request.account
        if self._repo_file(repo_type, repo_id).is_file():
            repo = self.load(repo_type, repo_id)
            if not repo["private"] or (account and account["name"] == repo["id"].split("/")[0]):
                return repo
        if account is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def writable(self, request: Request, repo_type: str, repo_id: str) -> dict[str, Any]:
        if request.account is None:
            raise HubError(401, "Invalid username or password.")
        repo = self.readable(request, repo_type, repo_id)
        check_role(request.account, repo_id.split("/")[0])
        return repo

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file in its large file storage: by name, by size, or because it is no text."""
    name = path.rsplit("/", 1)[-1]
    if any(fnmatch(name, pattern) or fnmatch(path, pattern) for pattern in LFS_PATTERNS) or size > LARGEST_REGULAR:
        return True
    return b"\0" in sample


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int) -> dict[str, Any]:
    return {"sha256": sha256, "size": size, "oid": git_oid(lfs_pointer(sha256, size)), "lfs": True}


def check_role(account: dict[str, str], owner: str) -> None:
    if account["role"] != "write":
        raise HubError(403, "You must use a write token to upload to a repository.")
    if account["name"] != owner:
        raise HubError(403, f'You don\'t have the rights to write under the namespace "{owner}"')


def describe_path(path: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    """A file or (no entry) a folder, as tree listings have it."""
    if entry is None:
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    return {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path} | (
        {"lfs": {"oid": entry["sha256"], "size": entry["size"], "pointerSize": _pointer_size(entry)}}
        if entry["lfs"]
        else {}
    )


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        HubError: It is no mapping in YAML.
    """
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if not found:
        return {}
    try:
        metadata = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from error
    if not isinstance(metadata, dict):
        raise HubError(400, "Invalid metadata", errors=[{"message": "must be a mapping"}], warnings=[])
    return metadata


# Routes. A function takes the request and the groups of its pattern.


def whoami(request: Request) -> Answer:
    if request.account is None:
        raise HubError(401, "Invalid user token.")
    token = {"displayName": "loopback", "role": request.account["role"]}
    auth = {"type": "access_token", "accessToken": token}
    return Answer({"type": "user", "name": request.account["name"], "fullname": "", "orgs": [], "auth": auth})


def create_repo(request: Request) -> Answer:
    if request.account is None:
        raise HubError(401, "Invalid username or password.")
    asked = request.json()
    owner, repo_type = asked.get("organization") or request.account["name"], asked.get("type") or "model"
    repo_id = f"{owner}/{asked['name']}"
    url = f"{request.hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
    check_role(request.account, owner)
    with request.hub.lock:
        if request.hub._repo_file(repo_type, repo_id).is_file():
            raise HubError(409, f"You already created this {repo_type} repo", url=url, name=repo_id)
        request.hub.create(repo_type, repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
    return Answer({"url": url, "name": repo_id, "id": repo_id})


def validate_yaml(request: Request) -> Answer:
    metadata = front_matter(request.json()["content"])
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer({"errors": [], "warnings": warnings})


def repo_info(request: Request, kind: str, repo_id: str, revision: str = "main") -> Answer:
    hub = request.hub
    repo = hub.readable(request, kind, repo_id)
    sha = hub.resolve(repo, revision)
    tree = repo["commits"][sha]["tree"]
    card = front_matter(hub.blob(tree["README.md"]).read_text("utf-8")) if "README.md" in tree else {}
    siblings = [{"rfilename": path} for path in sorted(tree)]
    if "blobs" in request.query:
        for sibling in siblings:
            entry = tree[sibling["rfilename"]]
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if entry["lfs"]:
                sibling["lfs"] = {
                    "sha256": entry["sha256"],
                    "size": entry["size"],
                    "pointerSize": _pointer_size(entry),
                }
    info = {
        "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
        "id": repo_id,
        "author": repo_id.split("/")[0],
        "sha": sha,
        "private": repo["private"],
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": repo["created"],
        "lastModified": repo["commits"][sha]["date"],
        "cardData": card,
        "tags": list(card.get("tags") or []),
        "siblings": siblings,
    }
    if kind == "model":
        info |= {"modelId": repo_id, "model-index": card.get("model-index")}
        info |= {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
    return Answer(info)


def list_tree(request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Answer:
    repo = request.hub.readable(request, kind, repo_id)
    sha = request.hub.resolve(repo, revision)
    tree = repo["commits"][sha]["tree"]
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    inside = {path: entry for path, entry in tree.items() if path.startswith(prefix)}
    if not inside and folder:
        raise HubError(404, f'"{folder}" does not exist on "{revision}"', "EntryNotFound")
    for path in list(inside):
        parts = path.removeprefix(prefix).split("/")
        inside |= {prefix + "/".join(parts[:depth]): None for depth in range(1, len(parts))}
    if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
        inside = {path: entry for path, entry in inside.items() if "/" not in path.removeprefix(prefix)}
    last = repo["commits"][sha]
    told = {"lastCommit": {"id": sha, "title": last["title"], "date": last["date"]}}
    return Answer([describe_path(path, inside[path]) | told for path in sorted(inside)])


def list_commits(request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repo = request.hub.readable(request, kind, repo_id)
    commits = []
    for oid in request.hub.commits(repo_id, kind, revision):
        told = {name: repo["commits"][oid][name] for name in ("title", "message", "date")}
        commits.append(told | {"id": oid, "authors": [{"user": repo_id.split("/")[0]}]})
    return Answer(commits)


def create_branch(request: Request, kind: str, repo_id: str, name: str) -> Answer:
    with request.hub.lock:
        repo = request.hub.writable(request, kind, repo_id)
        if name in repo["branches"]:
            raise HubError(409, f"Reference already exists: {name}")
        repo["branches"][name] = request.hub.resolve(repo, request.json().get("startingPoint", "main"))
        request.hub.save(repo)
    return Answer({})


def preupload(request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repo = request.hub.writable(request, kind, repo_id)
    tree = request.hub.tree(repo, revision)
    files = []
    for asked in request.json()["files"]:
        path, lfs = asked["path"], is_lfs(asked["path"], asked["size"], base64.b64decode(asked["sample"]))
        present = tree.get(path)
        oid = None if present is None else present["sha256" if present["lfs"] else "oid"]
        mode = "lfs" if lfs else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer({"files": files})


def lfs_batch(request: Request, kind: str | None, repo_id: str) -> Answer:
    hub, kind = request.hub, (kind or "models")[:-1]
    repo = hub.writable(request, kind, repo_id)
    objects = []
    for asked in request.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        objects.append({"oid": oid, "size": size})
        if hub.has_object(oid, size):
            continue
        verify = {"href": f"{hub.url}/api/{kind}s/{repo['id']}/lfs/verify"}
        objects[-1]["actions"] = {"upload": {"href": f"{hub.url}/_lfs/{oid}/{size}", "header": {}}, "verify": verify}
    return Answer({"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})


def lfs_put(request: Request, oid: str, size: str) -> Answer:
    """Like the storage behind the Hub, this trusts the address alone, and takes nothing but the promised bytes."""
    _receive(request.chunks, request.hub.folder / "blobs" / oid, int(size), oid)
    return Answer()


def lfs_verify(request: Request, kind: str, repo_id: str) -> Answer:
    request.hub.writable(request, kind, repo_id)
    asked = request.json()
    if not request.hub.has_object(asked["oid"], asked["size"]):
        raise HubError(404, f"Object {asked['oid']} of {asked['size']} bytes was not uploaded")
    return Answer({})


def commit(request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    hub = request.hub
    lines = [json.loads(line) for line in b"".join(request.chunks).splitlines()]
    with hub.lock:
        repo = hub.writable(request, kind, repo_id)
        if revision not in repo["branches"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, tree = {}, dict(hub.tree(repo, revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                head = value
            elif line["key"] == "file":
                tree[value["path"]] = hub.store(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                size = value.get("size")  # a copy names the object alone
                blob = hub.folder / "blobs" / value["oid"]
                if not blob.is_file() or size not in (None, blob.stat().st_size):
                    raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                tree[value["path"]] = lfs_entry(value["oid"], blob.stat().st_size)
            elif line["key"] == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            else:
                raise HubError(400, f"Unknown operation {line['key']!r}")
        if head.get("parentCommit") not in (None, repo["branches"][revision]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        oid = hub.add_commit(repo, revision, tree, head.get("summary", ""), head.get("description", ""))
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}/commit/{oid}"
    return Answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def resolve_file(request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Answer:
    hub = request.hub
    repo = hub.readable(request, (kind or "models")[:-1], repo_id)
    sha = hub.resolve(repo, revision)
    entry = repo["commits"][sha]["tree"].get(path)
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "none"}
    if entry is None:
        error = HubError(404, "Entry not found", "EntryNotFound")
        error.headers |= headers
        raise error
    headers |= {"ETag": f'"{entry["sha256" if entry["lfs"] else "oid"]}"', "Content-Type": "application/octet-stream"}
    if entry["lfs"]:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry["size"])}
    return Answer((hub.blob(entry), entry["size"]), headers)


ID = r"(?P<repo_id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>model|dataset)s/{ID}"
ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = [
    (methods, re.compile(pattern), route)
    for methods, pattern, route in (
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/repos/create", create_repo),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("GET", API, repo_info),
        ("GET", rf"{API}/revision/(?P<revision>[^/]+)", repo_info),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", list_tree),
        ("GET", rf"{API}/commits/(?P<revision>[^/]+)", list_commits),
        ("POST", rf"{API}/branch/(?P<name>[^/]+)", create_branch),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"{API}/lfs/verify", lfs_verify),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
        ("POST", rf"/((?P<kind>datasets)/)?{ID}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)", lfs_put),
        ("GET HEAD", rf"/((?P<kind>datasets)/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve_file),
    )
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self):
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # between two requests
            return

    def log_message(self, *_):
        """The log is `Hub.log`."""

    def serve(self):
        self.entry = Logged(self.command, self.path)
        self.hub.log.append(self.entry)
        self.fault = self.hub.fault(f"{self.command} {self.path}")
        try:
            if self.fault and self.fault.cut_after == 0:
                self.cut()
            chunks = self.body()
            answer = self.answer(chunks)
            for _ in chunks:  # a body that nobody read would be taken for the next request
                pass
            self.send(answer)
        except (Cut, ConnectionError):
            self.entry.cut = self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def answer(self, chunks: Iterator[bytes]) -> Answer:
        url = urlsplit(self.path)
        try:
            if self.fault and self.fault.status:
                error = HubError(self.fault.status, self.fault.message)
                error.headers |= self.fault.headers
                raise error
            request = Request(
                self.hub, self.command, url.path, parse_qs(url.query), self.headers, self.account(), chunks
            )
            for methods, pattern, route in ROUTES:
                if self.command in methods.split() and (found := pattern.fullmatch(url.path)):
                    groups = {name: value and unquote(value) for name, value in found.groupdict().items()}
                    return route(request, **groups)
            raise HubError(404, f"No such page: {self.command} {url.path}")
        except HubError as error:
            return Answer(error.body, error.headers, error.status)

    def account(self) -> dict[str, str] | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        account = self.hub.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.entry.user = account["name"]
        return account

    def body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self.exactly(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self.exactly(int(self.headers.get("Content-Length") or 0))

    def exactly(self, size: int) -> Iterator[bytes]:
        while size:
            chunk = self.rfile.read(min(size, self.allowance(self.entry.received)))
            if not chunk:
                raise ConnectionError("the client went away")
            size -= len(chunk)
            self.entry.received += len(chunk)
            yield chunk

    def send(self, answer: Answer) -> None:
        body = answer.body
        file, size = body if isinstance(body, tuple) else (None, 0)
        if file is None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            size = len(body)
        self.entry.status = answer.status
        self.send_response(answer.status)
        for name, value in ({"Content-Type": "application/json"} | answer.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            for chunk in [body] if file is None else _read(file):
                while chunk:
                    part = chunk[: self.allowance(self.entry.sent)]
                    self.wfile.write(part)
                    self.entry.sent += len(part)
                    chunk = chunk[len(part) :]

    def allowance(self, done: int) -> int:
        """How many bytes may pass now; where a fault says that none may, the connection ends here."""
        if self.fault is None or self.fault.cut_after is None:
            return CHUNK
        if done < self.fault.cut_after:
            return min(CHUNK, self.fault.cut_after - done)
        self.cut()

    def cut(self) -> NoReturn:
        if self.fault.down:
            self.hub.stop()
        _shut(self.connection)
        raise Cut


def _receive(chunks: Iterator[bytes], path: Path, size: int, sha256: str | None = None) -> str:
    """Write chunks to a file that appears only if they are what was promised; their SHA-256."""
    beside = path.with_name(f".{path.name}.{threading.get_ident()}")
    found, received = hashlib.sha256(), 0
    try:
        with open(beside, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                found.update(chunk)
                received += len(chunk)
        if received != size:
            raise HubError(400, f"Received {received} bytes instead of {size}")
        if sha256 not in (None, found.hexdigest()):
            raise HubError(400, f"The SHA-256 is {found.hexdigest()} instead of {sha256}")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return found.hexdigest()


def _read(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{threading.get_ident()}")
    beside.write_bytes(content)
    os.replace(beside, path)


def _pointer_size(entry: dict[str, Any]) -> int:
    return len(lfs_pointer(entry["sha256"], entry["size"]))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other end was faster
        return
