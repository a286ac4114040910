"""A file behind a URL, read like a local file, with seeking and reconnection."""

import io
import time
from http.client import HTTPException, HTTPResponse
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from nemo_upcycle import __version__
from nemo_upcycle.errors import UpcyclingError

SCHEMES = ("http", "https")
TIMEOUT_S = 60.0
WAITS_S = (1.0, 4.0, 16.0, 60.0)
"""Waiting times before the retries, in seconds; a successful read resets the count."""

BUFFER_BYTES = 2**20
NOT_NOW = (408, 425, 429)
"""HTTP status codes below 500 after which a retry may succeed."""

PARTIAL_CONTENT = 206


def is_url(source: str) -> bool:
    """Return whether a source is a URL."""
    return urlsplit(source).scheme in SCHEMES


def size_of(url: str) -> int:
    """Return a file's size in bytes.

    Raises:
        UpcyclingError: The file is missing, cannot be reached, or the server gives no length.
    """
    tries = _Tries(url)
    while True:
        try:
            with _request(url, method="HEAD") as response:
                length = response.headers.get("Content-Length")
            break
        except (OSError, HTTPException) as error:
            tries.failed(error)
    if length is None:
        raise _unreadable(url, "its server does not say how long it is")
    return int(length)


def open_url(url: str) -> BinaryIO:
    """Open a file; reading returns the file's contents or raises an error, never partial data.

    Raises:
        UpcyclingError: See `size_of`; also raised while reading.
    """
    return io.BufferedReader(_RemoteFile(url), BUFFER_BYTES)


def read_text(url: str) -> str:
    """Return a small file's text.

    Raises:
        UpcyclingError: See `size_of`.
    """
    with open_url(url) as file:
        return file.read().decode("utf-8")


class _RemoteFile(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self.url = url
        self.size = size_of(url)
        self.at = 0
        self._response: HTTPResponse | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if at != self.at:
            self._disconnect()
        self.at = at
        return at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        tries = _Tries(self.url)
        while self.at < self.size:
            try:
                if self._response is None:
                    self._response = _part(self.url, self.at, self.size)
                if count := self._response.readinto(buffer):
                    self.at += count
                    return count
                raise EOFError(f"it ends after {self.at:,} of {self.size:,} bytes")
            except (OSError, EOFError, HTTPException) as error:
                self._disconnect()
                tries.failed(error)
        return 0

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class _Tries:
    """A counter of failures that waits after each failure and raises after the last."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waits = iter(WAITS_S)

    def failed(self, error: Exception) -> None:
        code = error.code if isinstance(error, HTTPError) else None
        if code == 404:
            raise _unreadable(self._url, "there is no such file (HTTP 404)") from error
        wait = next(self._waits, None)
        if wait is None or (code is not None and code < 500 and code not in NOT_NOW):
            raise _unreadable(self._url, str(error) or type(error).__name__) from error
        time.sleep(wait)


def _request(url: str, method: str = "GET", start: int = 0) -> HTTPResponse:
    # Some servers refuse Python's default user agent. Compressed files must arrive unchanged.
    headers = {"User-Agent": f"nemo-upcycle/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urlopen(Request(url, headers=headers, method=method), timeout=TIMEOUT_S)


def _part(url: str, start: int, size: int) -> HTTPResponse:
    """Return a response with the file's bytes from `start` to the end."""
    response = _request(url, start=start)
    if start and response.status != PARTIAL_CONTENT:
        response.close()
        raise _unreadable(url, "its server cannot begin in the middle of a file")
    length = response.headers.get("Content-Length")
    if length is not None and int(length) != size - start:
        response.close()
        raise _unreadable(
            url, f"it changed while it was read: {start + int(length):,} bytes, not {size:,}"
        )
    return response


def _unreadable(url: str, why: str) -> UpcyclingError:
    return UpcyclingError(
        f"{url} cannot be read: {why}. Parts that are complete are kept, and the same command goes "
        "on; or download it (curl -C - -O) and give the file."
    )
