"""The Hugging Face hub, as much of it as its client asks for to push a folder and to read it again."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories with a single commit: name → file → content."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def say(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.say({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif path[-2] == "preupload":
            some = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.say({"files": some})
        elif path[-2] == "commit":
            name = "/".join(path[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
            self.say({"success": True, "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:  # such as the check of a model card's head
            self.say({"errors": [], "warnings": []})

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/").split("/")
        api = path[0] == "api"
        name = "/".join(path[2:4] if api else path[:2])
        files = self.server.repositories.get(name)
        if files is None:
            self.say({}, 404, **{"X-Error-Code": "RepoNotFound"})
        elif api:
            self.say({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        elif (content := files.get("/".join(path[4:]))) is None:
            self.say({}, 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            etag = hashlib.sha256(content).hexdigest()
            self.say(content, **{"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET
