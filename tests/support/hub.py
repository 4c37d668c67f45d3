"""A Hugging Face Hub on the loopback interface, for tests that push and load with the real clients.

Everything lives in memory and only the standard library is used. The clients read `HF_ENDPOINT`, `HF_HOME` and
`HF_TOKEN` when they are imported, so code that is to talk to this hub has to run in a fresh process:

    with LoopbackHub() as hub:
        hub.run("from huggingface_hub import create_repo; create_repo('tester/model')", home=tmp_path)
        assert hub.repos["model", "tester/model"].head.tree.keys() == {".gitattributes"}
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote


USER = "tester"
TOKEN = "hf_loopback"
URL_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
# `datasets` deletes a shard once it is uploaded, before the commit: it counts on parquet being in git-lfs.
LFS_SUFFIXES = (".arrow", ".bin", ".parquet", ".safetensors")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    date: str
    tree: Mapping[str, bytes]


@dataclass
class Repo:
    """A repository that never forgets a tree, so every revision stays readable."""

    repo_type: str
    repo_id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.resolve("main")

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch or a full commit oid names; `KeyError` if there is none."""
        return self.commits[self.branches.get(revision, revision)]

    def commit(
        self, changes: Mapping[str, bytes | None], title: str = "Upload", description: str = "", branch: str = "main"
    ) -> Commit:
        """Write files on top of a branch; a file whose new content is `None` is deleted."""
        parent = self.branches.get(branch)
        tree = {**(self.commits[parent].tree if parent else {}), **changes}
        tree = {path: tree[path] for path in sorted(tree) if tree[path] is not None}
        blobs = [(path, git_oid(content)) for path, content in tree.items()]
        oid = hashlib.sha1(repr((self.repo_type, self.repo_id, parent, title, blobs)).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.commits[oid] = Commit(oid, parent, title, description, date, tree)
        self.branches[branch] = oid
        return self.commits[oid]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and path.endswith(LFS_SUFFIXES)


def describe(path: str, content: bytes) -> dict[str, Any]:
    info = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path, len(content)):
        info["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return info


def entries(commit: Commit) -> dict[str, dict[str, Any]]:
    folders = {str(parent) for path in commit.tree for parent in PurePosixPath(path).parents} - {"."}
    found = {path: {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders}
    found |= {path: describe(path, content) for path, content in commit.tree.items()}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Reply:
    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)


class HubError(Exception):
    """A refusal; clients tell its kind from the `X-Error-Code` header rather than from the status."""

    def __init__(
        self, status: int, message: str, code: str = "", commit: Commit | None = None, **details: Any
    ) -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit.oid if commit else ""}
        headers = {name: value for name, value in headers.items() if value}
        self.reply = Reply(status, {"error": message, **details}, headers)


# What may happen to a request, by name: how it is refused, or "cut": the line goes down before there is an answer.
FAULTS = {
    "gated": HubError(403, "Access to this repository is restricted and you are not in its list", "GatedRepo").reply,
    "private": HubError(401, "Repository not found", "RepoNotFound").reply,
    "forbidden": HubError(403, "You don't have the rights to write here").reply,
    "missing": HubError(404, "Repository not found", "RepoNotFound").reply,
    "broken": HubError(500, "Internal Server Error").reply,
}


class Request(BaseHTTPRequestHandler):
    # Clients expect connections to stay open, which takes HTTP/1.1.
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes, and the second would wait for the acknowledgement of the first.
    disable_nagle_algorithm = True
    server: "LoopbackHub"
    body: bytes

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def handle(self) -> None:
        # A client that streams may leave once it has read enough.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def serve(self) -> None:
        # The body has to be read even if it is not wanted, or it would be taken for the next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.fault(self) or self.server.answer(self)
        while reply == "silent" and self.server.is_silent:
            time.sleep(0.02)
        if reply in ("cut", "silent"):
            self.close_connection = True
            return
        body = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        kind = "application/octet-stream" if body is reply.content else "application/json"
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_CONNECT = do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, format: str, *args: object) -> None:
        pass


# (methods, pattern of the path, whether anonymous requests are refused, handler)
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], bool, Callable[..., Any]]] = []
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<repo_type>model|dataset|space)s/{REPO}"
WEB = rf"/(?:(?P<repo_type>dataset|space)s/)?{REPO}"
REVISION = "(?P<revision>[^/]+)"


def route(method: str, pattern: str, needs_token: bool | None = None) -> Callable[[Callable], Callable]:
    """Register a handler, which is called with the named groups of the path, the repo and the commit looked up.

    Its result is sent as JSON unless it is a `Reply`. Without a word on `needs_token` reading is free.
    """
    methods = ("GET", "HEAD") if method == "GET" else (method,)
    needs_token = method != "GET" if needs_token is None else needs_token

    def register(handler: Callable) -> Callable:
        ROUTES.append((methods, re.compile(pattern), needs_token, handler))
        return handler

    return register


class LoopbackHub(ThreadingHTTPServer):
    """Serve repositories of the user `tester` at `url` while used as a context manager."""

    # Clients open many connections at once, and one that is refused costs them a second.
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[str] = []
        self.faults: tuple[str, str] | None = None  # what happens, and to which paths: those with this text in them
        self._lfs_objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo_id: str, files: Mapping[str, bytes] | None = None, repo_type: str = "model") -> Repo:
        """Put a repository on the hub without a client, in any namespace."""
        repo = self.repos[repo_type, repo_id] = Repo(repo_type, repo_id)
        repo.commit({".gitattributes": GITATTRIBUTES}, "initial commit")
        if files:
            repo.commit(files)
        return repo

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a process whose clients know this hub alone and keep their caches under `home`."""
        foreign = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS)_|.*_PROXY$", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        env |= {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        env["HF_DATASETS_CACHE"] = str(Path(home, "datasets"))
        quiet = ["HUB_DISABLE_XET", "HUB_DISABLE_TELEMETRY"]
        quiet += ["HUB_DISABLE_PROGRESS_BARS", "DATASETS_DISABLE_PROGRESS_BARS"]
        env |= {f"HF_{name}": "1" for name in quiet}
        # `datasets` counts downloads with a request to a host outside of the endpoint.
        env["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
        # Any other stray request to the outside lands here too, where it is logged and refused.
        env |= {"ALL_PROXY": self.url, "HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "NO_PROXY": "127.0.0.1"}
        # The child imports whatever the test can, installed or not; but not the remote code of another hub, whose
        # folder transformers puts into sys.path and where it would look for the code of this one.
        folders = (folder for folder in sys.path if folder and not Path(folder, "transformers_modules").is_dir())
        return env | {"PYTHONPATH": os.pathsep.join(folders)}

    def run(self, code: str, home: Path, timeout: float = 180) -> str:
        """Run Python code in a fresh process, in the directory `home`, and return what it printed."""
        home = Path(home).resolve()
        home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", textwrap.dedent(code)]
        seen = len(self.log)
        done = subprocess.run(command, env=self.env(home), cwd=home, timeout=timeout, capture_output=True, text=True)
        if done.returncode != 0:
            requests = "\n".join(self.log[seen:][-20:])
            raise AssertionError(f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}, after\n{requests}")
        return done.stdout

    @property
    def is_silent(self) -> bool:
        """Whether requests are taken and not answered."""
        return self.faults is not None and self.faults[0] == "silent"

    def fault(self, request: Request) -> Reply | str | None:
        """What happens in the place of an answer; children ask for it by `GET /fault/<name>/<text>`."""
        if request.path.startswith("/fault"):
            name, text = (request.path + "//").split("/")[2:4]
            self.faults = (name, text) if name else None
            return Reply(200, {})
        if self.faults is None or self.faults[1] not in request.path:
            return None
        self.log.append(f"{request.command} {request.path} {self.faults[0]}")
        return FAULTS.get(self.faults[0], self.faults[0])

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.log.append(f"{request.command} {request.path}")
            try:
                reply = self._dispatch(request)
            except HubError as refusal:
                reply = refusal.reply
            except Exception:
                # Clients retry for a while after a server error, but show a bad request at once.
                reply = Reply(400, {"error": traceback.format_exc()})
        return reply if isinstance(reply, Reply) else Reply(200, reply)

    def _dispatch(self, request: Request) -> Any:
        path = request.path.partition("?")[0]
        for methods, pattern, needs_token, handler in ROUTES:
            if request.command in methods and (match := pattern.fullmatch(path)):
                break
        else:
            raise HubError(404, "No such endpoint")
        if request.token and request.token != TOKEN:
            raise HubError(401, "Invalid credentials in Authorization header")
        if needs_token and not request.token:
            raise HubError(401, "Invalid username or password.")
        arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
        if "repo_id" in arguments:
            repo = self._find(request, arguments.pop("repo_type"), arguments.pop("repo_id"))
            arguments["repo"] = repo
            if "revision" in arguments:
                arguments["commit"] = self._resolve(repo, arguments.pop("revision") or "main")
        return handler(self, request, **arguments)

    def _find(self, request: Request, repo_type: str, repo_id: str) -> Repo:
        repo = self.repos.get((repo_type or "model", repo_id))
        if repo is None or (repo.private and not request.token):
            raise HubError(404 if request.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _resolve(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.resolve(revision)
        except KeyError:
            raise HubError(404, "Invalid rev id", "RevisionNotFound") from None

    def _web_url(self, repo: Repo) -> str:
        return f"{self.url}/{URL_PREFIXES[repo.repo_type]}{repo.repo_id}"

    @route("GET", "/api/whoami-v2", needs_token=True)
    def _whoami(self, request: Request) -> Any:
        token = {"displayName": "loopback", "role": "write"}
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}}

    @route("POST", "/api/validate-yaml", needs_token=False)
    def _validate_yaml(self, request: Request) -> Any:
        content = request.json()["content"]
        if not content.startswith("---"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if "\n---" not in content:
            raise HubError(400, "Invalid metadata", errors=[{"message": "The yaml metadata is never closed"}])
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Any:
        asked = request.json()
        owner, repo_type = asked.get("organization") or USER, asked.get("type") or "model"
        if owner != USER:
            raise HubError(403, "You don't have the rights to create a repository under this namespace")
        repo_id = f"{owner}/{asked['name']}"
        if known := self.repos.get((repo_type, repo_id)):
            raise HubError(409, "You already created this repository", url=self._web_url(known))
        repo = self.add(repo_id, repo_type=repo_type)
        repo.private = asked.get("private", False) or asked.get("visibility") == "private"
        return {"url": self._web_url(repo), "name": repo_id, "id": repo_id}

    @route("GET", rf"{API}(?:/revision/{REVISION})?")
    def _info(self, request: Request, repo: Repo, commit: Commit) -> Any:
        facts = {"id": repo.repo_id, "author": repo.repo_id.partition("/")[0], "sha": commit.oid, "tags": []}
        facts |= {"lastModified": commit.date, "private": repo.private, "gated": False, "disabled": False}
        return facts | {"siblings": [{"rfilename": path} for path in commit.tree]}

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.*))?")
    def _tree(self, request: Request, repo: Repo, commit: Commit, path: str) -> Any:
        prefix = f"{path}/" if path else ""
        inside = [entry for name, entry in entries(commit).items() if name.startswith(prefix)]
        if path and not inside:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        recursive = parse_qs(request.path.partition("?")[2]).get("recursive", ["false"])[0].lower() in ("true", "1")
        return [entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(prefix)]

    @route("POST", rf"{API}/paths-info/{REVISION}", needs_token=False)
    def _paths_info(self, request: Request, repo: Repo, commit: Commit) -> Any:
        known = entries(commit)
        return [known[path] for path in parse_qs(request.body.decode()).get("paths", []) if path in known]

    @route("POST", rf"{API}/preupload/{REVISION}")
    def _preupload(self, request: Request, repo: Repo, commit: Commit) -> Any:
        files = []
        for asked in request.json()["files"]:
            path = asked["path"]
            known = describe(path, commit.tree[path]) if path in commit.tree else {}
            # The client leaves a file out of the commit if its content already has this oid.
            oid = known.get("lfs", known).get("oid")
            mode = "lfs" if is_lfs(path, asked["size"]) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo: Repo) -> Any:
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in request.json()["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self._lfs_objects:
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", needs_token=False)
    def _lfs_upload(self, request: Request, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self._lfs_objects[oid] = request.body
        return {}

    @route("POST", rf"{API}/commit/(?P<branch>[^/]+)")
    def _commit(self, request: Request, repo: Repo, branch: str) -> Any:
        if "create_pr" in request.path:
            raise HubError(400, "Pull requests are not supported")
        if branch not in repo.branches:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        header, *operations = map(json.loads, request.body.splitlines())
        parent, header = repo.resolve(branch), header["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        deleted: dict[str, None] = {}
        written: dict[str, bytes] = {}
        for operation in operations:
            path = operation["value"]["path"]
            match operation["key"]:
                case "file":
                    written[path] = base64.b64decode(operation["value"]["content"])
                case "lfsFile":
                    written[path] = self._lfs_objects[operation["value"]["oid"]]
                case "deletedFile" | "deletedFolder":
                    folder = f"{path.rstrip('/')}/"
                    doomed = [known for known in parent.tree if known == path or known.startswith(folder)]
                    if not doomed:
                        raise HubError(404, "Entry not found", "EntryNotFound", parent)
                    deleted |= dict.fromkeys(doomed)
                case unknown:
                    raise HubError(400, f"Unknown operation {unknown}")
        commit = repo.commit(deleted | written, header["summary"], header["description"], branch)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self._web_url(repo)}/commit/{commit.oid}"}

    @route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
    def _branch(self, request: Request, repo: Repo, branch: str) -> Any:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.head.oid
        return {}

    @route("GET", rf"{WEB}/resolve/{REVISION}/(?P<path>.+)")
    def _download(self, request: Request, repo: Repo, commit: Commit, path: str) -> Any:
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        content = commit.tree[path]
        info = describe(path, content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{info["oid"]}"', "Accept-Ranges": "bytes"}
        if lfs := info.get("lfs"):
            headers |= {"X-Linked-ETag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"])}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return Reply(200, content, headers)
        first, last = asked.groups()
        # "-5" asks for the last five bytes, not for the bytes up to the fifth.
        start = int(first) if first else max(0, len(content) - int(last))
        part = content[start : int(last) + 1] if first and last else content[start:]
        if not part:
            return Reply(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        return Reply(206, part, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"})
