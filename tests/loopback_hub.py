"""A small Hub on 127.0.0.1 for the real `huggingface_hub` client: repositories in memory, and the rules for cards.

    python tests/loopback_hub.py        prints its address, and serves until its standard input is closed

It answers what the client asks to create a repository, to upload files, to open a pull request and to read all of it
back. It refuses what huggingface.co refuses in a card: metadata that is no YAML, a `base_model` that is no id of a
repository, a wrong licence field. It does not imitate Xet (`HF_HUB_DISABLE_XET=1`), access rights, and discussions.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_USER = "tester"
_DATE = "2026-01-01T00:00:00.000Z"
_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
#: Endings of files that are uploaded apart from the commit, by their hash, as on huggingface.co.
_LARGE = (".safetensors", ".bin", ".pt", ".png")


@dataclass
class Repository:
    """Files by revision. A branch is the name of a commit, and a commit is all files that it has."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision)
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The state of the server, for all its requests."""

    address = ""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def create(self, asked: dict[str, Any]) -> tuple[int, dict]:
        name = f"{asked.get('organization') or _USER}/{asked['name']}" if "/" not in asked["name"] else asked["name"]
        answer = {"name": name, "id": name, "url": f"{asked.get('type', 'model')}s/{name}"}
        if name in self.repositories:
            return 409, answer | {"error": "You already created this repository"}
        repository = self.repositories[name] = Repository(private=bool(asked.get("private")))
        repository.commit("main", {".gitattributes": b""})
        return 200, answer

    def commit(self, name: str, branch: str, lines: list[dict], pull: bool) -> tuple[int, dict]:
        repository, page = self.repositories[name], f"{self.address}/{name}"
        files = dict(repository.commits[repository.resolve(branch) or ""])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {path: held for path, held in files.items() if not path.startswith(f"{value['path']}/")}
        if "README.md" in files and (errors := card_errors(files["README.md"].decode())):
            return 400, {"error": "Invalid metadata in README.md: " + "; ".join(errors)}
        repository.requests += pull
        oid = repository.commit(f"refs/pr/{repository.requests}" if pull else branch, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "hookOutput": ""}
        return 200, answer | ({"pullRequestUrl": f"{page}/discussions/{repository.requests}"} if pull else {})


def card_errors(content: str) -> list[str]:
    """What huggingface.co refuses in the metadata of a model's card."""
    match = re.match(r"\A---\n(.*?)\n---", content, re.DOTALL)
    if match is None:
        return []
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata must be an object"]
    errors = []
    bases = metadata.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not _ID.fullmatch(base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(value, str) for value in _listed(metadata.get(key))):
            errors.append(f'"{key}" must be an array of strings')
    for key in ("license", "pipeline_tag", "library_name"):
        if not isinstance(metadata.get(key, ""), str) or not re.fullmatch(r"[\w.-]*", metadata.get(key, "")):
            errors.append(f'"{key}" is not valid')
    for result in _listed(metadata.get("model-index")):
        if not isinstance(result, dict) or not result.get("name") or "results" not in result:
            errors.append('"model-index[0]" must have a name and results')
            continue
        for each in result["results"]:
            if not (each.get("task") or {}).get("type") or not each.get("dataset") or not each.get("metrics"):
                errors.append('"model-index[0].results[0]" must have a task, a dataset and metrics')
    return errors


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


class Requests(BaseHTTPRequestHandler):
    """One request of the client."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self._answer(path, query, body)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _answer(self, path: str, query: dict, body: bytes) -> None:
        if path == "api/whoami-v2":
            return self._json(200, {"type": "user", "name": _USER, "orgs": [], "auth": {"type": "access_token"}})
        if path == "api/agent-harnesses":
            return self._json(200, {"standardEnvVars": [], "harnesses": {}})
        if path == "api/validate-yaml":
            errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
            return self._json(400 if errors else 200, {"errors": errors, "warnings": []})
        if path == "api/repos/create":
            return self._json(*self.hub.create(json.loads(body)))
        if path == "test/state":
            names = {name: dict(repo.branches) for name, repo in self.hub.repositories.items()}
            return self._json(200, names)
        if match := re.fullmatch(r"_lfs/put/(\w+)", path):
            self.hub.large[match[1]] = body
            return self._json(200, {})
        if path == "_lfs/verify":
            return self._json(200, {})
        if match := re.fullmatch(r"(?:datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            return self._json(
                200, {"transfer": "basic", "objects": list(map(self._slot, json.loads(body)["objects"]))}
            )
        if match := re.fullmatch(r"api/(?:model|dataset)s/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path):
            return self._api(match[1], match[2] or "", match[3] or "main", query, body)
        if match := re.fullmatch(r"(?:datasets/)?([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._missing("RepoNotFound")

    def _slot(self, asked: dict) -> dict:
        actions = {
            "upload": {"href": f"{self.hub.address}/_lfs/put/{asked['oid']}", "header": {}},
            "verify": {"href": f"{self.hub.address}/_lfs/verify", "header": {}},
        }
        held = asked["oid"] in self.hub.large
        return {"oid": asked["oid"], "size": asked["size"]} | ({} if held else {"actions": actions})

    def _api(self, name: str, verb: str, rest: str, query: dict, body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound")
        if verb == "preupload":
            held = repository.commits[repository.resolve(rest) or repository.branches["main"]]
            files = [
                {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False,
                 "oid": _entry(path, held[path])["oid"] if path in held else None}
                for path in (file["path"] for file in json.loads(body)["files"])
            ]  # fmt: skip
            return self._json(200, {"files": files})
        if verb == "branch":
            if rest in repository.branches:
                return self._json(409, {"error": "Reference already exists"})
            repository.branches[rest] = repository.branches["main"]
            return self._json(200, {})
        if verb == "commit" and self.command == "POST":
            if repository.resolve(rest) is None:
                return self._missing("RevisionNotFound")
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            return self._json(*self.hub.commit(name, rest, lines, "create_pr" in query))
        if verb == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
                for branch, oid in repository.branches.items()
            ]
            return self._json(200, {"branches": branches, "converts": [], "tags": []})
        revision, _, folder = (rest if verb in ("revision", "tree") else "main").partition("/")
        if revision == "refs":
            number, _, folder = folder.removeprefix("pr/").partition("/")
            revision = f"refs/pr/{number}"
        commit = repository.resolve(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        files = repository.commits[commit]
        if verb == "tree":
            inside = {path: held for path, held in files.items() if not folder or path.startswith(f"{folder}/")}
            if folder and not inside:
                return self._missing("EntryNotFound")
            return self._json(200, [_entry(path, held) for path, held in inside.items()])
        return self._json(200, {
            "id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": [], "downloads": 0,
            "likes": 0, "lastModified": _DATE, "siblings": [{"rfilename": path} for path in files],
        })  # fmt: skip

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound")
        commit = repository.resolve(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        held = repository.commits[commit].get(path)
        if held is None:
            return self._missing("EntryNotFound", {"X-Repo-Commit": commit})
        entry = _entry(path, held)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Content-Type": "application/octet-stream"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["oid"]}"', "X-Linked-Size": str(len(held))}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(held) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(held) - 1)}/{len(held)}"
            status, held = 206, held[first : last + 1]
        self._send(status, held, headers)

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, headers: dict | None = None) -> None:
        self._send(404, json.dumps({"error": code}).encode(), {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, held: bytes) -> dict[str, Any]:
    """A file as the tree of a repository lists it. The name of a large one is the hash of its content."""
    if path.endswith(_LARGE):
        oid = hashlib.sha256(held).hexdigest()
        large = {"lfs": {"oid": oid, "size": len(held), "pointerSize": 130}}
    else:
        oid, large = hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest(), {}
    return {"type": "file", "path": path, "size": len(held), "oid": oid} | large


def serve() -> None:
    """Print the address, and serve until standard input ends: the server does not outlive what has started it."""
    hub = Hub()
    Requests.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    print(hub.address, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    serve()
