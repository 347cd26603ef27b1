"""Figures over steps, for tensorboard.

tensorboardX's own `SummaryWriter` hands them to a thread; if that cannot write, the process hangs. Here the calling
thread writes them, and a disk that refuses ends the run.
"""

import secrets
import socket
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from kv_compression.io import ownership
from kv_compression.io.errors import RunError

SECONDS = 30.0  # between two flushes


class Scalars:
    """A tensorboard file in `folder`, listed as ours in the parent folder.

    All methods raise RunError if the disk refuses.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._flushed = time.monotonic()
        self._file = self._try(self._open)

    def _open(self) -> RecordWriter:
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{secrets.token_hex(4)}"
        ownership.announce(self.folder.parent, {f"{self.folder.name}/{name}": ownership.ANYTHING})
        self.folder.mkdir(parents=True, exist_ok=True)
        file = RecordWriter(str(self.folder / name))
        file.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        return file

    def add(self, name: str, value: float, step: int) -> None:
        """Write one figure of one step."""
        event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._try(lambda: self._file.write(event.SerializeToString()))
        if time.monotonic() - self._flushed > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write everything added so far to the disk."""
        self._flushed = time.monotonic()
        self._try(self._file.flush)

    def _try(self, action):
        try:
            return action()
        except OSError as error:
            raise RunError(f"cannot write to {self.folder}: {error.strerror or error}") from error
