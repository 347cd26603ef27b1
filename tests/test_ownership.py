"""Lists of what the scripts have written: what they prove, and what is never touched."""

import json
import os

import pytest

from kv_compression.io import ownership
from kv_compression.io.errors import UsageError


def lines(folder) -> list[bytes]:
    return (folder / ownership.LIST).read_bytes().splitlines()


def test_what_was_written_is_ours_until_it_is_changed(tmp_path):
    path = tmp_path / "new" / "table.csv"
    ownership.write(path, b"1,2\n")
    ownership.write(path, b"1,2,3\n")
    assert ownership.is_ours(path)
    path.write_bytes(b"1,2,3\nmy own line\n")
    assert not ownership.is_ours(path)
    assert list(ownership.others(path.parent)) == ["table.csv"]
    with pytest.raises(UsageError, match=r"table\.csv is not what these scripts have written there, or was changed"):
        ownership.write(path, b"4\n")
    ownership.remove(path.parent)
    assert path.read_bytes() == b"1,2,3\nmy own line\n"
    path.write_bytes(b"1,2\n")  # as it was written once
    assert ownership.is_ours(path)


def test_files_of_others_are_neither_replaced_nor_removed(tmp_path):
    mine = tmp_path / "report.md"
    mine.write_text("years of work")
    (tmp_path / "link.csv").symlink_to(mine)
    (tmp_path / "folder.csv").mkdir()
    for name in ("report.md", "link.csv", "folder.csv"):
        with pytest.raises(UsageError, match=name):
            ownership.write(tmp_path / name, b"new")
    ownership.write(mine, b"years of work")  # nothing is to do, and nothing is proven by it
    assert not ownership.is_ours(mine)
    ownership.write(tmp_path / "ours.csv", b"1")
    (tmp_path / "other.csv").symlink_to(tmp_path / "ours.csv")
    ownership.announce(tmp_path, {"other.csv": ownership.sha256(b"1"), "link.csv": ownership.ANYTHING})
    ownership.remove(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(ownership.LIST, "folder.csv", "link.csv", "other.csv", "report.md")
    ]
    assert mine.read_text() == "years of work"


def test_a_list_that_somebody_else_has_written_reaches_nothing_outside(tmp_path):
    (tmp_path / "mine").mkdir()
    mine = tmp_path / "mine" / "step_00000001.safetensors"
    mine.write_bytes(b"weights")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(tmp_path / "mine")
    names = [
        "../mine/step_00000001.safetensors",
        str(mine),
        "checkpoints/step_00000001.safetensors",
        ".",
        "",
        "..",
        "/",
    ]
    entries = [{"file": name, "holds": ownership.ANYTHING} for name in names]
    entries += [{"file": 1, "holds": "anything"}, {"file": "a"}, [], "a", {"file": "a", "holds": {}}]
    (folder / ownership.LIST).write_text("\n".join(map(json.dumps, entries)) + '\n\xff\n{"file": "half')
    ownership.remove(folder)
    assert mine.read_bytes() == b"weights"
    assert list(ownership.others(folder)) == ["checkpoints"]


def test_a_line_that_is_half_there_spoils_no_other(tmp_path):
    ownership.write(tmp_path / "a", b"1")
    with (tmp_path / ownership.LIST).open("ab") as file:
        file.write(b'{"file": "b", "ho')
    ownership.write(tmp_path / "c", b"3")
    assert list(ownership.others(tmp_path)) == []
    assert set(ownership.listed(tmp_path)) >= {"a", "c"}


def test_a_list_does_not_grow_for_ever(tmp_path):
    ownership.announce(tmp_path, {"log": ownership.LOG, "late": ownership.sha256(b"")})
    for number in range(400):
        ownership.write(tmp_path / "table.csv", b"%d" % number)
        ownership.write(tmp_path / "checkpoints" / "step", b"%d" % number, folder=tmp_path, holds=ownership.ANYTHING)
    assert (tmp_path / ownership.LIST).stat().st_size < 1.1 * ownership.LONGEST_LIST
    for path in (tmp_path / "log", tmp_path / "late"):
        path.touch()
    assert list(ownership.others(tmp_path)) == []
    ownership.remove(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [ownership.LIST, "log"]


def test_a_name_that_was_given_up_is_anybodys(tmp_path):
    ownership.announce(tmp_path, {"checkpoints/step_1": ownership.ANYTHING, "log": ownership.LOG})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1").write_bytes(b"damaged")
    (tmp_path / "log").write_text("a line")
    assert list(ownership.others(tmp_path)) == []
    ownership.remove(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [ownership.LIST, "log"]  # of which nobody knows who has written it all
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1").write_bytes(b"mine")
    assert list(ownership.others(tmp_path)) == ["checkpoints/"]
    ownership.announce(tmp_path, {"log": ownership.sha256(b"a line")})
    ownership.remove(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_what_is_hidden_or_empty_is_left_alone(tmp_path):
    ownership.write(tmp_path / "tensorboard" / "a", b"1", folder=tmp_path)
    for path in (".git/config", ".x.12345678.partial", "tensorboard/.DS_Store"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    (tmp_path / "empty").mkdir()
    assert list(ownership.others(tmp_path)) == []
    ownership.remove(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *(".DS_Store", ".git", ".x.12345678.partial", "config", "empty", "tensorboard")
    ]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_what_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        ownership.write(tmp_path / "a", b"1")
        staged = ownership.stage(tmp_path)
        (staged / "b").write_bytes(b"2")
        (staged / "b").chmod(0o600)
        ownership.move_in(staged, tmp_path)
    finally:
        os.umask(before)
    assert [os.stat(tmp_path / name).st_mode & 0o777 for name in "ab"] == [0o666 & ~umask] * 2


def test_staged_files_come_into_their_places_all_or_none(tmp_path):
    (tmp_path / "b").write_text("mine")
    staged = ownership.stage(tmp_path)
    (staged / "a").write_bytes(b"1")
    (staged / "b").write_bytes(b"2")
    with pytest.raises(UsageError, match="b is not what"):
        ownership.move_in(staged, tmp_path)
    assert not (tmp_path / "a").exists()
    ownership.remove(tmp_path, ownership.is_partial)  # as after a kill
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
