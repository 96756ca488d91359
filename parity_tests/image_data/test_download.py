"""The download against a real HTTP server that breaks off, lies, refuses ranges and is not there."""

import contextlib
import fcntl
import hashlib
import http.server
import importlib
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from image_data.dataset import is_complete
from image_data.download import SHA256, download
from image_data.sources import DEBIAN_FOLDER

download_module = importlib.import_module("image_data.download")

CONTENT = {
    "train-images-idx3-ubyte.gz": np.random.default_rng(0).bytes(300_000),
    "train-labels-idx1-ubyte.gz": b"labels" * 100,
}
CHECKSUMS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT below any folder; `requests` are (path, Range header)."""

    daemon_threads = True

    def __init__(self, *, breaks_after=None, ranges=True, content=CONTENT, status=None, drops=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.drops = drops
        self.breaks_after, self.ranges, self.content, self.status = breaks_after, ranges, content, status
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name, wanted = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.requests.append((name, wanted))
        if self.server.status or name not in self.server.content:
            self.send_error(self.server.status or 404)
            return
        content, first = self.server.content[name], 0
        if wanted and self.server.ranges:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_error(416)
                return
        if self.server.drops == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self.drop(b"x: y\r\n")
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.server.drops == "content":
            self.drop(content[:1])
        self.wfile.write(content[first:][: self.server.breaks_after])

    def drop(self, content):
        """By drops, each well before any time-out, until the other side has had enough."""
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(content)
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(**options):
    with Server(**options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def assert_whole(folder):
    for name, content in CONTENT.items():
        assert (folder / name).read_bytes() == content
    assert not list(folder.glob("*.part"))


def test_download(tmp_path):
    seen = []
    with serving() as server:
        download(
            tmp_path / "new" / "folder", progress=lambda *a: seen.append(a), mirrors=[server.url], sha256=CHECKSUMS
        )
        assert_whole(tmp_path / "new" / "folder")
        name = "train-images-idx3-ubyte.gz"
        of_images = [(done, total) for n, done, total in seen if n == name]
        assert of_images == sorted(of_images)
        assert of_images[-1] == (300_000, 300_000)
        asked = len(server.requests)
        download(tmp_path / "new" / "folder", mirrors=[server.url], sha256=CHECKSUMS)
        assert len(server.requests) == asked, "nothing is downloaded twice"


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_off_and_resumed(tmp_path, ranges):
    name = "train-images-idx3-ubyte.gz"
    with serving(breaks_after=100_000) as server, pytest.raises(OSError, match="after 100000 of 300000 bytes"):
        download(tmp_path, mirrors=[server.url], sha256=CHECKSUMS)
    assert not (tmp_path / name).exists()
    assert (tmp_path / f"{name}.part").stat().st_size == 100_000
    with serving(ranges=ranges) as server:
        download(tmp_path, mirrors=[server.url], sha256=CHECKSUMS)
        assert server.requests[0] == (name, "bytes=100000-")
    assert_whole(tmp_path)


def test_part_that_is_whole_already(tmp_path):
    """Killed between the last byte and the new name."""
    (tmp_path / "train-images-idx3-ubyte.gz.part").write_bytes(CONTENT["train-images-idx3-ubyte.gz"])
    with serving() as server:
        download(tmp_path, mirrors=[server.url], sha256=CHECKSUMS)
    assert_whole(tmp_path)


def test_wrong_checksum(tmp_path):
    """A wrong file never gets its name, and is not resumed from."""
    lies = CONTENT | {"train-labels-idx1-ubyte.gz": b"other labels"}
    with serving(content=lies) as server, pytest.raises(OSError, match="SHA-256"):
        download(tmp_path, mirrors=[server.url], sha256=CHECKSUMS)
    assert [p.name for p in tmp_path.iterdir() if "labels" in p.name] == []
    with serving(content=lies) as liar, serving() as honest:
        download(tmp_path, mirrors=[liar.url, honest.url], sha256=CHECKSUMS)
    assert_whole(tmp_path)


def test_damaged_part(tmp_path):
    """A part with wrong bytes: resumed, found wrong, deleted; the next mirror gives the whole file."""
    (tmp_path / "train-images-idx3-ubyte.gz.part").write_bytes(b"not the first bytes")
    with serving() as first, serving() as second:
        download(tmp_path, mirrors=[first.url, second.url], sha256=CHECKSUMS)
    assert_whole(tmp_path)


@pytest.mark.parametrize("drops", ["headers", "content"])
def test_a_server_that_sends_by_drops(tmp_path, drops):
    """No longer than the time for all of it."""
    message = r"time for the download is over|not finished after 0\.5 seconds"
    with serving(drops=drops) as server, pytest.raises(OSError, match=message):
        download(tmp_path, mirrors=[server.url, server.url], sha256=CHECKSUMS, seconds=0.5)


def test_a_lock_that_is_not_let_go(tmp_path):
    """Of a process that has been stopped, say."""
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="time for the download is over"):
            download(tmp_path, mirrors=["http://127.0.0.1:9"], sha256=CHECKSUMS, seconds=0.1)


def test_a_file_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "LARGEST_FILE", 200_000)
    with serving() as server, pytest.raises(OSError, match="found more than 200000 bytes"):
        download(tmp_path, mirrors=[server.url], sha256=CHECKSUMS)
    assert [p.name for p in tmp_path.iterdir() if "images" in p.name] == []


def test_anew(tmp_path):
    """What is whole stays, what is damaged is replaced."""
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    with serving() as server:
        download(tmp_path, mirrors=[server.url], sha256=CHECKSUMS, anew=True)
        assert [name for name, _ in server.requests] == ["train-labels-idx1-ubyte.gz"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_next_mirror(tmp_path, status):
    with serving(status=status) as refusing, serving() as server:
        download(tmp_path, mirrors=["http://127.0.0.1:9", refusing.url, server.url], sha256=CHECKSUMS)
    assert_whole(tmp_path)


def test_no_mirror_left(tmp_path):
    with serving(status=404) as server, pytest.raises(OSError, match=r"refused.*404"):
        download(tmp_path, mirrors=["http://127.0.0.1:9", server.url], sha256=CHECKSUMS)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        download(tmp_path / "file" / "folder")


def test_several_at_once(tmp_path):
    """Many processes start together on a shared home folder: one downloads, the others find the files."""
    with serving() as server, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(download, tmp_path, mirrors=[server.url], sha256=CHECKSUMS) for _ in range(8)]
        for call in calls:
            call.result()
        assert len(server.requests) == len(CONTENT)
    assert_whole(tmp_path)


@pytest.mark.skipif(not is_complete(DEBIAN_FOLDER), reason="the package dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("name", SHA256)
def test_the_official_checksums(name):
    """Debian took name and time (August 2017) out of the gzip headers: put back, the checksums hold."""
    modified = 1504176606 if name.startswith("train") else 1504176627
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", modified) + b"\x00\x03" + name.removesuffix(".gz").encode() + b"\0"
    body = (DEBIAN_FOLDER / name).read_bytes()[10:]
    assert hashlib.sha256(header + body).hexdigest() == SHA256[name]
