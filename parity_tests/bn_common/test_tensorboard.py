"""--tensorboard: each epoch's scalars in event files; without tensorboardX a line that says how to install it."""

import errno
import importlib.util
import json
import os
import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from bn_common import command_line, tensorboard
from bn_common.tensorboard import SCALARS
from parity_tests.test_checkpoint import LOOPS, trained


def events(folder):
    """Of all files there, the oldest first; every record's length and content are as their checksums say."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            for part, digest in (
                (content[:8], content[8:12]),
                (content[12 : 12 + size], content[12 + size : 16 + size]),
            ):
                crc = crc32c(part)
                assert struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32) == digest
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def shown(folder):
    """(name, step) -> value, as TensorBoard shows them: what was there from the step on where a process begins goes."""
    values = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            values = {at: v for at, v in values.items() if at[1] < event.step}
        for value in event.summary.value:
            assert (value.tag, event.step) not in values
            values[value.tag, event.step] = value.simple_value
    return values


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_scalars(loop, tmp_path, monkeypatch):
    """The numbers of metrics.jsonl, in float32; killed and given again, each of them once. Without it, nothing."""
    monkeypatch.setattr("bn_common.run_folder.draw_curves", lambda *_: b"")
    trained(loop, tmp_path / "run", after=12, tensorboard=True)
    trained(loop, tmp_path / "run", after=2, tensorboard=True)
    trained(loop, tmp_path / "run", tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = shown(tmp_path / "run")
    assert set(values) == {(name, step) for name in SCALARS for step in (8, 16)}
    for line in lines:
        for name, key in SCALARS.items():
            assert values[name, line["step"]] == pytest.approx(line[key], rel=2**-23)
    trained(loop, tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    """Is an error of the run's, which ends it in one line; not of a thread's, which nobody waits for."""
    monkeypatch.setattr("bn_common.run_folder.draw_curves", lambda *_: b"")

    def full(self, event, write=EventsWriter.write_event):
        if event.HasField("summary"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.raises(OSError, match="No space left"):
        trained("torch", tmp_path / "run", tensorboard=True)


def test_not_installed(tmp_path, monkeypatch, capsys):
    """One line, status 2, before any work."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tensorboard.importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else find(name)
    )
    monkeypatch.chdir(tmp_path)
    for out in ([], ["--out", "run"]):
        with pytest.raises(SystemExit) as stop:
            command_line.read_config(["--tensorboard", *out], prog="p", description="", framework="jax")
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "--tensorboard is True; allowed: with tensorboardX (pip install tensorboardX" in said
    assert not list(tmp_path.iterdir())
    assert not command_line.read_config([], prog="p", description="", framework="jax").tensorboard
