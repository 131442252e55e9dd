"""A small server that speaks the Hugging Face Hub's HTTP protocol, as far as files of models go."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"


class Handler(BaseHTTPRequestHandler):
    """Repositories in the server's dictionary `repos`: name -> path -> content; tokens 'hf_good'."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code, text):
        self.answer(status, {"error": text}, X_Error_Code=code, X_Error_Message=text)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)(/revision/(.+))?", path):
            if match[1] not in self.server.repos:
                return self.refuse(404, "RepoNotFound", "Repository not found")
            names = [{"rfilename": name} for name in self.server.repos[match[1]]]
            return self.answer(200, {"id": match[1], "sha": COMMIT, "siblings": names})
        if (match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)", path)) and (
            match[1] in self.server.repos
        ):
            items = self.server.repos[match[1]].items()
            found = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in items]
            return self.answer(200, found)
        match = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        if not match or match[1] not in self.server.repos:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if match[2] not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound", "Revision not found")
        content = self.server.repos[match[1]].get(match[3])
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)

    def do_POST(self):  # noqa: N802
        path, body = self.path.partition("?")[0], self.body()
        self.server.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.private[name] = asked.get("visibility") == "private" or asked.get("private")
            self.server.repos.setdefault(name, {})
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/main", path):
            found = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": found})
        if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.server.repos[match[1]][value["path"]] = content
            url = f"{self.server.url}/{match[1]}/commit/{COMMIT}"
            return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        return self.answer(404, {"error": "unknown"})


@contextlib.contextmanager
def serve() -> Iterator[ThreadingHTTPServer]:
    """Runs a server with `repos`, `requests` and `url` while inside."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.private, server.requests = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
