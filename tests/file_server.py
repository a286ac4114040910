"""A real HTTP server of a directory, with byte ranges, that can be told what to do wrong."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves a directory.

    Attributes:
        directory: Which.
        faults: What to do wrong, one after another, for a path: answer with a code, or cut the
            answer by so many bytes (a negative number), or none for some seconds (a float).
        ranges: Whether it sends parts of files.
        asked: What it was asked for: method, path, first byte.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.faults: dict[str, list[int | float]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.asked.append((self.command, path, start))
        file = self.server.directory / path.lstrip("/")
        faults = self.server.faults.get(path, []) if self.command == "GET" else []
        fault = faults.pop(0) if faults else 0
        if isinstance(fault, float):
            time.sleep(fault)
            return
        if not file.is_file() or fault > 0:
            self.send_error(fault or 404)
            return
        content = file.read_bytes()
        part = content[start:] if self.server.ranges else content
        self.send_response(206 if start and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[:-fault] if fault else part)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(directory: Path) -> Iterator[FileServer]:
    """Serve a directory."""
    with FileServer(directory) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
