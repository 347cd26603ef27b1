import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from kv_compression.io import tensor_files
from kv_compression.io.tensor_files import cached_tensors, digest

KEY = {"model": "tiny", "tokens": "abc"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Counted:
    """A computation that counts how often it was asked for."""

    def __init__(self, **tensors):
        self.tensors = tensors
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.tensors


def files(tmp_path):
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def only_file(tmp_path):
    (path,) = files(tmp_path)
    return path


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_cached_is_computed_once(tmp_path):
    compute = Counted(scores=torch.randn(4, 6)[:, ::2], starts=torch.tensor([True, False]))
    first, second = (cached_tensors("scores", KEY, compute) for _ in range(2))
    assert compute.calls == 1
    assert same(first, compute.tensors) and same(second, compute.tensors)
    assert second["starts"].dtype == torch.bool
    assert only_file(tmp_path).parent == tmp_path / "kv_compression" / "scores"
    assert cached_tensors("scores", dict(reversed(KEY.items())), compute) and compute.calls == 1  # in whatever order


def test_a_process_waits_for_another_that_computes_the_same(tmp_path):
    """Processes are told apart by their open files: two threads do as well."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly():
        begun.set()
        assert go_on.wait(60)
        return {"n": torch.ones(2)}

    second = Counted(n=torch.zeros(2))
    with ThreadPoolExecutor() as pool:
        one = pool.submit(cached_tensors, "scores", KEY, slowly)
        assert begun.wait(60)
        other = pool.submit(cached_tensors, "scores", KEY, second)
        with pytest.raises(TimeoutError):
            other.result(0.2)
        go_on.set()
        assert same(one.result(60), other.result(60))
    assert second.calls == 0
    assert only_file(tmp_path).suffix == ".safetensors"


def test_other_keys_and_kinds_are_others():
    keys = [KEY, KEY | {"tokens": "abd"}, {"model": "tinyabc", "tokens": ""}, {"a": ["x", "y"]}, {"a": ["x,y"]}]
    for number, key in enumerate(keys):
        assert cached_tensors("scores", key, Counted(n=torch.tensor(number)))["n"] == number
    assert cached_tensors("other", KEY, Counted(n=torch.tensor(-1)))["n"] == -1
    assert [cached_tensors("scores", key, Counted(n=torch.tensor(-1)))["n"] for key in keys] == [0, 1, 2, 3, 4]


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_another_key(path):
    safetensors.torch.save_file({"n": torch.zeros(3)}, path, {"key": "{}", "content": digest("n", torch.zeros(3))})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_text("not a tensor in sight"),
        lambda path: safetensors.torch.save_file({"n": torch.zeros(3)}, path),
        flip_last_byte,
        of_another_key,
    ],
    ids=["empty", "cut", "foreign", "no key", "one bit", "another key"],
)
def test_damaged_files_are_made_again(tmp_path, damage):
    compute = Counted(n=torch.tensor([1.0, 2.0, 3.0]))
    cached_tensors("scores", KEY, compute)
    damage(only_file(tmp_path))
    assert same(cached_tensors("scores", KEY, compute), compute.tensors)
    assert compute.calls == 2
    assert same(cached_tensors("scores", KEY, compute), compute.tensors)
    assert compute.calls == 2  # the damaged file was replaced
    assert only_file(tmp_path)


def test_nothing_is_kept_where_the_disk_refuses(tmp_path, caplog):
    (tmp_path / "kv_compression").write_text("a file where the folder should be")
    compute = Counted(n=torch.ones(2))
    for _ in range(2):
        assert same(cached_tensors("scores", KEY, compute), compute.tensors)
    assert compute.calls == 2
    assert "could not be kept" in caplog.text
    assert len(files(tmp_path)) == 1


def test_a_write_that_breaks_leaves_the_good_file_alone(tmp_path, monkeypatch):
    cached_tensors("scores", KEY, Counted(n=torch.ones(2)))
    good = only_file(tmp_path).read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "read_tensors", lambda *_: None)
    monkeypatch.setattr(os, "replace", refuse)
    assert same(cached_tensors("scores", KEY, Counted(n=torch.zeros(2))), {"n": torch.zeros(2)})
    assert only_file(tmp_path).read_bytes() == good  # nor is half a file left beside it


def test_failed_computations_are_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_tensors("scores", KEY, lambda: 1 / 0)
    assert not files(tmp_path)


def test_digests_tell_apart_what_differs():
    ones = torch.ones(2, 3, dtype=torch.int64)
    different = [
        ("ab",),
        ("a", "b"),
        ("", "ab"),
        ("astr:b",),
        ("astr:1:b",),
        (b"ab",),
        (),
        ("",),
        (ones,),
        (ones.T,),
        (ones.int(),),
        (ones.flatten(),),
        (ones, ones),
        (torch.ones(2, dtype=torch.bfloat16),),
        (torch.tensor(True),),
        (torch.zeros(0),),
    ]
    assert len({digest(*parts) for parts in different}) == len(different)
    assert digest(ones.T) == digest(torch.ones(3, 2, dtype=torch.int64))  # the layout in memory does not count
    assert len(digest("ab")) == 64
