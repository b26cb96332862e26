"""The answers of the loopback Hub, one function per kind of request."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.hub.card_rules import SDKS, card_problems
from tests.hub.storage import LFS_SUFFIXES, Commit, File, Repository

NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
KIND = r"/api/(?P<kind>models|datasets|spaces)"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer.

    Args:
        status: Status code.
        body: Content.
        headers: Headers beyond length and JSON type.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """An HTTP request.

    Args:
        method: `GET`, `POST`, ...
        path: Path with query.
        body: Content.
        user: Whose token came with it; None without a valid one.
        range: The `Range` header.
        endpoint: Address of the server.
    """

    method: str
    path: str
    body: bytes
    user: str | None
    range: str | None
    endpoint: str

    @property
    def data(self) -> Any:
        """The content as JSON."""
        return json.loads(self.body)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    """A JSON answer; underscores of header names become dashes."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, json.dumps(value).encode(), named)


def refusal(status: int, message: str, code: str = "") -> Answer:
    """An error as the Hub words it for its client."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), headers)


def create(hub: Any, request: Request) -> Answer:
    """POST /api/repos/create."""
    if request.user is None:
        return refusal(401, "Invalid username or password.")
    data = request.data
    owner = data.get("organization") or request.user
    if owner != request.user:
        return refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    key, url = (data.get("type", "model"), f"{owner}/{data['name']}"), f"{request.endpoint}/{owner}/{data['name']}"
    if key in hub.repositories:
        return as_json({"error": "You already created this model repo", "url": url}, 409)
    if key[0] == "space" and data.get("sdk") not in SDKS:
        return refusal(400, f'"sdk" must be one of {sorted(SDKS)}')
    private = data.get("visibility") == "private" or bool(data.get("private"))
    hub.repositories[key] = Repository(key[1], private=private)
    return as_json({"url": url})


def validate(hub: Any, request: Request) -> Answer:
    """POST /api/validate-yaml."""
    problems = card_problems(request.data["content"], kind=request.data["repoType"])
    return as_json({"errors": [{"message": text} for text in problems], "warnings": []}, 400 if problems else 200)


def whoami(hub: Any, request: Request) -> Answer:
    """GET /api/whoami-v2."""
    if request.user is None:
        return refusal(401, "Invalid username or password.")
    return as_json({"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def preupload(hub: Any, request: Request, repo: Repository, rev: str) -> Answer:
    """POST /api/models/<id>/preupload/<rev>: how each file is to be sent, and what is stored already."""
    stored = repo.branches[rev][-1].files if rev in repo.branches else {}
    files = []
    for entry in request.data["files"]:
        path, old = entry["path"], stored.get(entry["path"])
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | ({"oid": old.etag} if old else {}))
    return as_json({"files": files})


def lfs_batch(hub: Any, request: Request, repo: Repository) -> Answer:
    """POST /<id>.git/info/lfs/objects/batch: where to put the objects that are not there yet."""
    objects = []
    for entry in request.data["objects"]:
        known = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in hub.objects:
            known["actions"] = {"upload": {"href": f"{request.endpoint}/lfs/{entry['oid']}"}}
        objects.append(known)
    return as_json({"transfer": "basic", "objects": objects})


def lfs_put(hub: Any, request: Request, oid: str) -> Answer:
    """PUT /lfs/<sha256>."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        return refusal(400, "The content does not have the announced SHA-256.")
    hub.objects[oid] = request.body
    return Answer()


def commit(hub: Any, request: Request, repo: Repository, rev: str) -> Answer:
    """POST /api/models/<id>/commit/<rev>: all or nothing."""
    if rev not in repo.branches:
        return refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    files, message = dict(repo.branches[rev][-1].files), ""
    for line in request.body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            message = value["summary"]
            if value.get("parentCommit") not in (None, repo.branches[rev][-1].oid):
                return refusal(412, "A commit has happened since. Please refresh and try again.")
        elif entry["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif entry["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return refusal(400, f"The LFS object {value['oid']} was not uploaded.")
            files[value["path"]] = File(hub.objects[value["oid"]], lfs=True)
        elif entry["key"] == "deletedFile":
            files.pop(value["path"], None)
        else:
            return refusal(400, f"Unknown operation {entry['key']!r}.")
    made = repo.commit(rev, message, files)
    return as_json({"commitUrl": f"{request.endpoint}/{repo.name}/commit/{made.oid}", "commitOid": made.oid})


def branch(hub: Any, request: Request, repo: Repository, rev: str) -> Answer:
    """POST /api/models/<id>/branch/<name>."""
    if rev in repo.branches:
        return refusal(409, "Reference already exists")
    repo.branches[rev] = [repo.branches["main"][-1]]
    return as_json({})


def info(hub: Any, request: Request, repo: Repository, state: Commit) -> Answer:
    """GET /api/models/<id>[/revision/<rev>]."""
    siblings = [{"rfilename": path} for path in sorted(state.files)]
    return as_json({"id": repo.name, "sha": state.oid, "private": repo.private, "tags": [], "siblings": siblings})


def tree(hub: Any, request: Request, repo: Repository, state: Commit, folder: str | None = None) -> Answer:
    """GET /api/models/<id>/tree/<rev>[/<folder>], as if asked for recursively."""
    start = f"{folder}/" if folder else ""
    entries = []
    for path, file in sorted(state.files.items()):
        if path.startswith(start):
            size = len(file.content)
            lfs = {"lfs": {"oid": file.etag, "size": size, "pointerSize": 130}} if file.lfs else {}
            entries.append({"type": "file", "oid": file.blob_id, "size": size, "path": path} | lfs)
    return as_json(entries)


def resolve(hub: Any, request: Request, repo: Repository, state: Commit, path: str) -> Answer:
    """HEAD and GET /<id>/resolve/<rev>/<path>, the latter in parts too."""
    found = state.files.get(unquote(path))
    if found is None:
        missing = refusal(404, "Entry not found", "EntryNotFound")
        return Answer(404, missing.body, missing.headers | {"X-Repo-Commit": state.oid})
    headers = {"X-Repo-Commit": state.oid, "ETag": f'"{found.etag}"', "Content-Type": "application/octet-stream"}
    start = re.fullmatch(r"bytes=(\d+)-", request.range or "")
    if start is None:
        return Answer(200, found.content, headers)
    size = len(found.content)
    headers["Content-Range"] = f"bytes {start[1]}-{size - 1}/{size}"
    return Answer(206, found.content[int(start[1]) :], headers)


#: (method, path, function). A path that names a repository gets it; one with a revision to read gets the commit.
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate),
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", rf"{KIND}/{NAME}/preupload/(?P<rev>[^/]+)", preupload),
    ("POST", rf"{KIND}/{NAME}/commit/(?P<rev>[^/]+)", commit),
    ("POST", rf"{KIND}/{NAME}/branch/(?P<rev>[^/]+)", branch),
    ("POST", rf"/(?P<kind>datasets/|spaces/)?{NAME}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("GET", rf"{KIND}/{NAME}(/revision/(?P<read>[^/]+))?", info),
    ("GET", rf"{KIND}/{NAME}/tree/(?P<read>[^/]+)(/(?P<folder>.+))?", tree),
    ("GET|HEAD", rf"/(?P<kind>datasets/|spaces/)?{NAME}/resolve/(?P<read>[^/]+)/(?P<path>.+)", resolve),
]


def answer(hub: Any, request: Request) -> Answer:
    """Find the function of a request and check that the user may ask.

    Args:
        hub: The server's `LoopbackHub`.
        request: Request.
    """
    path = request.path.partition("?")[0]
    for method, pattern, function in ROUTES:
        match = re.fullmatch(pattern, path) if re.fullmatch(method, request.method) else None
        if match is None:
            continue
        parts = match.groupdict()
        if "name" not in parts:
            return function(hub, request, **parts)
        kind, name = parts.pop("kind"), parts.pop("name")
        stored = {"d": "dataset", "s": "space"}.get((kind or "m")[0], "model")
        repo = hub.repositories.get((stored, name))
        return _for_repository(hub, request, function, repo, parts)
    return refusal(404, f"The loopback Hub does not know {request.method} {path}")


def _for_repository(
    hub: Any, request: Request, function: Callable[..., Answer], repo: Repository | None, parts: dict[str, Any]
) -> Answer:
    if repo is None or (repo.private and request.user is None):
        return refusal(404 if request.user else 401, "Repository not found", "RepoNotFound")
    if "read" not in parts:
        if request.user is None:
            return refusal(401, "Invalid username or password.")
        return function(hub, request, repo, **parts)
    revision = unquote(parts.pop("read") or "main")
    state = repo.find(revision)
    if state is None:
        return refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return function(hub, request, repo, state, **parts)
