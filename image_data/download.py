"""The official Fashion-MNIST download: checked, resumable, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

from image_data.dataset import find_file

try:
    import fcntl
except ImportError:  # Windows: two downloads into one folder at once end in a checksum error there.
    fcntl = None  # type: ignore[assignment]

# The same bytes at both addresses: https://github.com/zalandoresearch/fashion-mnist#get-the-data
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
)
SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
TIMEOUT_SECONDS = 15.0
# The whole is 31 MB, its largest file 26: a server that sends more, or by drops, is not waited for.
LARGEST_FILE = 1 << 26
DEADLINE_SECONDS = 600.0
_CHUNK = 1 << 16

Progress = Callable[[str, int, int | None], None]
"""Called with (file name, bytes so far, bytes in all or None) as a download goes on."""


def download(
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    mirrors: Sequence[str] | None = None,
    sha256: Mapping[str, str] = SHA256,
    anew: bool = False,
    seconds: float | None = None,
) -> None:
    """Download what is missing of the four files into `folder`.

    A file in transit is called NAME.part; it gets its name when its SHA-256 is right. Interrupted, it is resumed where
    it stopped by the next call (also by one from another process). A file with a wrong checksum is deleted, and the
    next mirror tried from the start.

    Args:
      folder: created if missing.
      progress: see `Progress`.
      mirrors: addresses that hold the files, tried in order (default: `MIRRORS`).
      sha256: file name -> checksum.
      anew: what is there is damaged, and replaced where its checksum is wrong.
      seconds: for all of it (default: `DEADLINE_SECONDS`); what has come by then is resumed by the next call.

    Raises:
      OSError: no mirror gave a file, a file is larger than `LARGEST_FILE`, the time is over, or the folder can't be
        written; the message holds each reason.
    """
    folder, mirrors = Path(folder), MIRRORS if mirrors is None else mirrors
    seconds = DEADLINE_SECONDS if seconds is None else seconds
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)

    def all_of_it() -> None:
        with _locked(folder, deadline):
            for name, checksum in sha256.items():
                there = find_file(folder, name.removesuffix(".gz"))
                if there is None or (anew and _sha256(there) != checksum):
                    urls = [f"{mirror}/{name}" for mirror in mirrors]
                    _download_from_any(urls, folder / name, checksum, progress, deadline)

    # Beside: looking up a name, connecting and reading a line each may hang for as long as the other side likes.
    error: list[BaseException] = []

    def beside() -> None:
        try:
            all_of_it()
        except BaseException as found:
            error.append(found)

    thread = threading.Thread(target=beside, daemon=True)
    thread.start()
    thread.join(seconds + 1)  # it looks at the clock itself wherever it can
    if thread.is_alive():
        raise OSError(f"{mirrors[0]}: not finished after {seconds:g} seconds")
    if error:
        raise error[0]


def _download_from_any(
    urls: Sequence[str], path: Path, checksum: str, progress: Progress | None, deadline: float
) -> None:
    reasons = []
    for url in urls:
        try:
            return _download_file(url, path, checksum, progress, deadline)
        # urllib: URLError, HTTPError and time-outs are OSErrors; a broken transfer or a bad address is not.
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{url}: {error}")
    raise OSError("; ".join(reasons))


@contextlib.contextmanager
def _locked(folder: Path, deadline: float) -> Iterator[None]:
    """Hold the folder's lock: one process downloads, the others wait and then find the files."""
    with open(folder / ".lock", "w") as lock:
        while fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _check_time(deadline)
                time.sleep(0.05)
        yield


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError("the time for the download is over")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download_file(url: str, path: Path, checksum: str, progress: Progress | None, deadline: float) -> None:
    _check_time(deadline)
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    total = None
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if response.status != 206:  # the whole file: nothing was there, or the server can't resume
                done = 0
            if response.headers.get("Content-Length"):
                total = done + int(response.headers["Content-Length"])
            with open(part, "ab" if done else "wb") as file:
                # What there is, not a whole chunk: by drops that would take longer than any time-out.
                while chunk := response.read1(_CHUNK):
                    _check_time(deadline)
                    done += len(chunk)
                    if done > LARGEST_FILE:
                        break
                    file.write(chunk)
                    if progress:
                        progress(path.name, done, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is as long as the file already, or longer; the checksum tells
            raise
    if done > LARGEST_FILE:
        part.unlink()
        raise OSError(f"found more than {LARGEST_FILE} bytes; expected a file of Fashion-MNIST")
    if total is not None and done < total:
        raise OSError(f"the connection closed after {done} of {total} bytes")
    found = _sha256(part)
    if found != checksum:
        part.unlink()
        raise OSError(f"found SHA-256 {found}; expected {checksum}")
    os.replace(part, path)
