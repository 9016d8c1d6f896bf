"""A stand-in for W&B's server: it answers what runs, `wandb sync` and wandb-workspaces ask, and keeps what it is sent.

It reads GraphQL by the fields that a document names and does not check it.
"""

import gzip
import json
import sys
import threading
from base64 import b64encode
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import wandb

ME = "someone"
PROJECT = {
    "id": "UHJvamVjdA==",
    "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",
    "entityName": ME,
    "isBenchmark": False,
    "user": None,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections, as W&B's service expects

    def log_message(self, *_):
        """Nothing on the terminal of the tests."""

    def content(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def answer(self, found):
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.server.files[self.path] = self.content()
        self.answer({})

    def do_POST(self):
        content = self.content()
        sent = json.loads(content) if self.path == "/graphql" or self.path.endswith("/file_stream") else {}
        if self.path == "/graphql":
            return self.answer({"data": self.server.graphql(sent["query"], sent.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            run = self.server.runs[self.path.split("/")[-2]]
            for name, part in (sent.get("files") or {}).items():
                if name.endswith("history.jsonl"):
                    run.setdefault("history", []).extend(map(json.loads, part["content"]))
                if name.endswith("summary.json"):
                    run["summary"] = json.loads(part["content"][-1])
        self.answer({"exitcode": None, "limits": {}})


class Server(ThreadingHTTPServer):
    """runs: {id: what was sent of it, history and summary}; views: {id: workspaces and reports}; artifacts: what was
    created; files: {address: content}; unknown: questions that nothing here can answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.views, self.artifacts, self.files, self.unknown = defaultdict(dict), {}, [], {}, []

    def handle_error(self, *about):
        if not isinstance(sys.exception(), ConnectionError):  # W&B's service hangs up when it ends
            super().handle_error(*about)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def graphql(self, query, sent):
        answer = next((answer for field, answer in ANSWERS.items() if field in query), None)
        try:
            return answer(self, sent)
        except (KeyError, TypeError) as error:  # without any answer, W&B would ask again for minutes
            self.unknown.append((repr(error), query, sent))
            return {}


def run(server, sent):
    kept = server.runs[sent["name"]]
    kept |= {key: value for key, value in sent.items() if value is not None}
    bucket = {"id": "UnVu", "name": sent["name"], "displayName": sent.get("displayName"), "historyLineCount": 0}
    project = {**PROJECT, "name": sent["project"], "entity": {"id": "RW50", "name": ME}}
    return {"upsertBucket": {"bucket": {**bucket, "config": "{}", "project": project}, "inserted": True}}


def view(server, sent):
    identity = sent.get("id") or b64encode(f"View:{1000 + len(server.views)}".encode()).decode()
    project = {**PROJECT, "name": sent["projectName"]}
    server.views[identity] = {**sent, "id": identity, "project": project}
    return {"upsertView": {"view": server.views[identity], "inserted": True}}


def views(server, sent):
    nodes = [{"node": kept} for kept in server.views.values() if kept["name"] == sent["viewName"]]
    return {"project": {"allViews": {"edges": nodes}}}


def artifact(server, sent):
    server.artifacts.append(sent.get("input", sent))
    made = {"id": "QXJ0", "state": "PENDING", "artifactSequence": {"id": "U2Vx", "latestArtifact": None}}
    return {"createArtifact": {"artifact": made}}


def manifest(server, sent):
    file = {"name": "wandb_manifest.json", "uploadUrl": f"{server.address}/files/manifest", "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": "TWFu", "file": file}}}


def artifact_files(server, sent):
    fixed = {"uploadHeaders": [], "artifact": {"id": "QXJ0"}, "uploadMultipartUrls": None}
    names = [file["name"] for file in sent["input"]["artifactFiles"]]
    nodes = [
        {"name": n, "displayName": n, "storagePath": n, "uploadUrl": f"{server.address}/files/{n}", **fixed}
        for n in names
    ]
    return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}


def run_files(server, sent):
    files = [{"name": name, "uploadUrl": f"{server.address}/files/{name}"} for name in sent["files"]]
    return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}


def viewer(server, sent):
    teams = {"edges": [{"node": {"name": ME}}]}
    flags = {"id": "VXNlcjox", "entity": ME, "username": ME, "email": "", "admin": False, "flags": "{}"}
    return {"viewer": {**flags, "teams": teams, "apiKeys": {"edges": []}}, **info(server, sent)}


def info(server, sent):
    return {
        "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.0"}, "features": [], "latestLocalVersionInfo": None}
    }


def projects(server, sent):
    names = {kept["project"] for kept in server.runs.values()}
    edges = [{"node": {**PROJECT, "name": name, "createdAt": "2026-01-01T00:00:00Z"}, "cursor": ""} for name in names]
    return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}


def project(server, sent):
    known = sent["projectName"] in {kept["project"] for kept in server.runs.values()}
    return {"project": PROJECT if known else None}


# By a field that the document names: what answers it. The first that is found, so wider words come later.
ANSWERS = {
    "RunResumeStatus": lambda server, sent: {"model": None},
    "coreWeaveOrganizationId": lambda server, sent: {"entity": None},
    "ArtifactType(": lambda server, sent: {"project": {"artifact": None}},
    "upsertBucket": run,
    "upsertView": view,
    "allViews": views,
    "view(id:": lambda server, sent: {"view": server.views[sent["reportId"]]},
    "createArtifactManifest": manifest,
    "createArtifactFiles": artifact_files,
    "commitArtifact": lambda server, sent: {"commitArtifact": {"artifact": {"id": "QXJ0", "digest": ""}}},
    "createArtifact(": artifact,
    "createRunFiles": run_files,
    "internalId": project,
    "models(": projects,
    "viewer": viewer,
    "serverInfo": info,
}


@contextmanager
def served(folder: Path, patch):
    """A server that this process is logged in to, with W&B's own files in `folder`. W&B's service ends with it."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    places = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    for name, value in {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "k" * 40, **places}.items():
        patch.setenv(name, value)
    wandb.teardown()  # a service of an earlier test knows another address
    try:
        yield server
    finally:
        wandb.teardown()
        server.shutdown()
        server.server_close()
        thread.join()
