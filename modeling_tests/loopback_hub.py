# Copyright 2026 The miras-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A Hugging Face Hub on the loopback address, in memory: what pushing and pulling models asks of the real one.

    with LoopbackHub() as hub:
        subprocess.run(command, env=os.environ | hub.env)
        hub.files("me/model")["config.json"]

`huggingface_hub` reads its settings when it is imported, so clients are processes of their own. No package offers such
a server; this one follows the requests that `huggingface_hub` 2.4 makes: repositories, preupload, LFS, commits, resolve.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


USER = "me"
LFS_ENDINGS = (".safetensors", ".png")


class LoopbackHub:
    """Repositories as `{repo_id: {path: bytes}}`; every commit replaces the head."""

    def __enter__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.lfs: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repos[repo_id]

    def sha(self, repo_id: str) -> str:
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in self.repos[repo_id].items()})
        return hashlib.sha1(content.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.answer(json.dumps, {
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": self.validate_card,
            r"/api/models/(.+)/preupload/.+": self.preupload,
            r"/(.+)\.git/info/lfs/objects/batch": self.lfs_batch,
            r"/lfs-verify/(.+)": lambda oid: (200, {}) if oid in self.hub.lfs else (404, {"error": "no such object"}),
            r"/api/models/(.+)/commit/.+": self.commit,
        })  # fmt: skip

    def do_PUT(self):
        self.answer(json.dumps, {r"/lfs/(.+)": self.lfs_put})

    def do_GET(self):
        self.answer(json.dumps, {
            r"/api/whoami-v2": lambda: (200, {"type": "user", "name": USER, "orgs": [], "auth": {}}),
            r"/api/models/(.+)/tree/([^/]+)(?:/(.*))?": self.tree,
            r"/api/models/(.+)/revision/.+": self.info,
            r"/api/models/(.+)": self.info,
            r"/(.+)/resolve/[^/]+/(.+)": self.resolve,
        })  # fmt: skip

    do_HEAD = do_GET

    def answer(self, encode, routes) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, action in routes.items():
            if match := re.fullmatch(pattern, path):
                status, content, *headers = action(*match.groups())
                break
        else:
            status, content, headers = 404, {"error": f"no route {self.command} {path}"}, []
        data = content if isinstance(content, bytes) else encode(content).encode()
        self.send_response(status)
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing_repo(self):
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        exists = repo_id in self.hub.repos
        self.hub.repos.setdefault(repo_id, {})
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        return (409, answer | {"error": "exists"}) if exists else (200, answer)

    def validate_card(self):
        self.hub.cards.append(json.loads(self.body)["content"])
        return 200, {"errors": [], "warnings": []}

    def preupload(self, repo_id):
        files = json.loads(self.body)["files"]
        mode = {True: "lfs", False: "regular"}
        return 200, {
            "files": [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(LFS_ENDINGS)], "shouldIgnore": False}
                for f in files
            ]
        }

    def lfs_batch(self, repo_id):
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify/{item['oid']}"},
            }
            objects.append(item | ({} if item["oid"] in self.hub.lfs else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return 400, {"error": "the bytes are not those of the object"}
        self.hub.lfs[oid] = self.body
        return 200, {}

    def commit(self, repo_id):
        if repo_id not in self.hub.repos:
            return self.missing_repo()
        files = self.hub.repos[repo_id]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.sha(repo_id)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}

    def info(self, repo_id):
        if repo_id not in self.hub.repos:
            return self.missing_repo()
        siblings = [{"rfilename": path} for path in sorted(self.hub.repos[repo_id])]
        return 200, {"id": repo_id, "modelId": repo_id, "sha": self.hub.sha(repo_id), "siblings": siblings, "tags": []}

    def tree(self, repo_id, revision, folder):
        if repo_id not in self.hub.repos:
            return self.missing_repo()
        recursive = "recursive" in parse_qs(urlsplit(self.path).query)
        prefix = f"{folder}/" if folder else ""
        files = {path: data for path, data in self.hub.repos[repo_id].items() if path.startswith(prefix)}
        if folder and not files:
            return 404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"}
        return 200, [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(files.items())
            if recursive or "/" not in path.removeprefix(prefix)
        ]

    def resolve(self, repo_id, path):
        if repo_id not in self.hub.repos:
            return self.missing_repo()
        if path not in self.hub.repos[repo_id]:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        data = self.hub.repos[repo_id][path]
        headers = {"X-Repo-Commit": self.hub.sha(repo_id), "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, data, headers
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    def log_message(self, *_):
        pass
