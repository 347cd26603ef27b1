import os

import pytest
from tensorboardX.proto.event_pb2 import Event

from kv_compression.io.errors import RunError
from kv_compression.training.scalars import Scalars


def test_what_was_added_can_be_read_back(tmp_path):
    scalars = Scalars(tmp_path / "tensorboard")
    scalars.add("train/loss", 2.5, 7)
    scalars.add("train/loss", 2.25, 8)
    scalars.flush()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    content, events = path.read_bytes(), []
    while content:  # a length, its checksum, an event, its checksum
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [(7, "train/loss", 2.5), (8, "train/loss", 2.25)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_takes_one_line(tmp_path):
    scalars = Scalars(tmp_path / "tensorboard")
    scalars._file._writer = open("/dev/full", "wb")  # noqa: SIM115 - closing it fails, too
    scalars.add("train/loss", 2.5, 7)
    with pytest.raises(RunError, match="cannot write to .*tensorboard: No space left on device"):
        scalars.flush()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to"):
        Scalars(tmp_path / "file" / "tensorboard")
