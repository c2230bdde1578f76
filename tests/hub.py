"""A local Hugging Face hub: a server that answers the requests of `huggingface_hub` and `datasets` from a folder."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`/models/OWNER/NAME/... and `root`/datasets/OWNER/NAME/...; yield the address, and "METHOD PATH" of each request."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

        def answer(self, form: str = "") -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            for pattern in (self.api, self.file):
                if (found := pattern(path.strip("/").split("/"), form)) is not None:
                    return self.send(*found)
            # How the hub says that there is no such repository, or no such file in it.
            code = "EntryNotFound" if "resolve" in path else "RepoNotFound"
            return self.send(b"not found", "text/plain", status=404, **{"X-Error-Code": code})

        def api(self, parts: list[str], form: str) -> tuple[bytes, str] | None:
            """/api/KIND/OWNER/NAME[/revision|tree|paths-info/REVISION[/FOLDER]]."""
            if parts[0] != "api" or len(parts) < 4 or not (folder := root.joinpath(*parts[1:4])).is_dir():
                return None
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [path.relative_to(folder).as_posix() for path in files]
            contents = [path.read_bytes() for path in files]
            entries = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in zip(names, contents, strict=True)]
            match parts[4:]:
                case [] | ["revision", *_]:
                    about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                    return json.dumps(about).encode(), "application/json"
                case ["tree", _, *below]:
                    inside = [entry for entry in entries if not below or entry["path"].startswith("/".join(below) + "/")]
                    return json.dumps(inside).encode(), "application/json"
                case ["paths-info", *_]:
                    asked = parse_qs(form)["paths"]
                    return json.dumps([entry for entry in entries if entry["path"] in asked]).encode(), "application/json"
            return None

        def file(self, parts: list[str], form: str) -> tuple[bytes, str] | None:
            """/[datasets/]OWNER/NAME/resolve/REVISION/FILE."""
            parts = parts if parts[0] == "datasets" else ["models", *parts]
            if parts[3:4] != ["resolve"] or not (path := root.joinpath(*parts[:3], *parts[5:])).is_file():
                return None
            return path.read_bytes(), "application/octet-stream"

        def send(self, body: bytes, kind: str, *, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            about = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            for name, value in (about | {"ETag": f'"{etag(body)}"'} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def etag(content: bytes) -> str:
    """Return the hash that identifies a file."""
    return hashlib.sha1(content).hexdigest()
