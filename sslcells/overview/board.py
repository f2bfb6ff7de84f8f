"""`sslcells board`: the page of all runs, served to this machine alone, or written to a file."""

import os
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from sslcells.errors import ConfigError
from sslcells.overview.found import runs
from sslcells.overview.page import page, reports
from sslcells.storage import write_atomically

REFRESH = 5.0
"""Seconds after which an open page asks for news."""
KEPT = 2.0
"""Seconds for which a page is not made anew, however many windows ask."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_OF_REPORTS = f"{_POLICY}; font-src data:; sandbox allow-scripts"
"""A report may be somebody else's: its scripts run, but cannot ask this server for anything."""


def write(folder: Path, out: Path) -> None:
    """Write the page as it is now; its links to reports are relative to it.

    Raises:
        ConfigError: if there is no such folder, or the file cannot be written.
    """
    beside = out.resolve().parent

    def link(report: Path) -> str:
        return quote(os.path.relpath(report.resolve(), beside))

    text = page(folder, runs(folder), link, refresh=None)
    try:
        write_atomically(out, lambda file: file.write(text.encode()))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None


def serve(folder: Path, port: int) -> None:
    """Serve the page at http://localhost:PORT until Ctrl-C.

    Raises:
        ConfigError: if there is no such folder, or the port is taken.
    """
    with Server(folder, port) as server:
        print(
            f"{folder}: {server.found:,} run{'s' * (server.found != 1)} at {server.address} (Ctrl-C ends it)",
            flush=True,
        )
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Answers this machine alone. Of the folder it shows the page and the runs' reports, and nothing else."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.found = len(runs(folder))
        self._folder, self._lock, self._until, self._page = folder, threading.Lock(), 0.0, ""
        self._reports: dict[str, Path] = {}
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; choose another, or 0 for any that is free") from None
        self.address = f"http://localhost:{self.server_address[1]}/"

    def page(self) -> str:
        """The page, at most KEPT seconds old."""
        with self._lock:
            if time.monotonic() >= self._until:
                found = runs(self._folder)
                self._reports = {self._link(file): file for one in found for file in reports(one.folder)}
                self._page = page(self._folder, found, self._link, REFRESH)
                self._until = time.monotonic() + KEPT
            return self._page

    def report(self, path: str) -> Path | None:
        """The report at a path of this server; only those that the page has links to."""
        self.page()
        return self._reports.get(quote(unquote(path)))

    def _link(self, report: Path) -> str:
        return quote(f"/runs/{report.relative_to(self._folder)}")


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """The page, or a report."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in ("localhost", "127.0.0.1"):  # a page of another site, under a name that leads here
            return self._answer(HTTPStatus.FORBIDDEN, "only for localhost")
        path = urlsplit(self.path).path
        try:
            if path == "/":
                return self._answer(HTTPStatus.OK, self.server.page(), f"{_POLICY}; connect-src 'self'")
            if (report := self.server.report(path)) is not None:
                return self._answer(HTTPStatus.OK, report.read_bytes(), _OF_REPORTS)
        except (ConfigError, OSError) as error:
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        return self._answer(HTTPStatus.NOT_FOUND, "there is no such page")

    def _answer(self, status: HTTPStatus, body: str | bytes, policy: str | None = None) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", f"text/{'html' if policy else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", policy or "default-src 'none'")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: a page that renews itself would fill the terminal."""
