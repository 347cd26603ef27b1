import json

import pytest

from kv_compression.io import strict_json


def test_json_is_read_as_it_is(tmp_path):
    value = {"a": [1, -0.5, None, True, "é\n"], "deep": [[[[]]]], "large": [-(2**63), 2**63 - 1, 1.7e308]}
    path = tmp_path / "x.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(value, ensure_ascii=False), encoding)
        assert strict_json.read(path) == value


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1] 2", b"NaN", b"[-Infinity]", b"1e999", b"\xff", b'"\xed\xa0\x80"', b'"\\ud800"'),
        *(b'{"\\udc00": 1}', b"9223372036854775808", b"1" * 5000, b"[" * 31 + b"]" * 31, b"[" * 100_000),
        "{}".encode("utf-16"),
    ],
)
def test_what_would_surprise_is_refused_in_one_line(content):
    with pytest.raises(ValueError) as caught:
        strict_json.loads(content)
    assert str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not isinstance(caught.value, RecursionError)


def test_what_is_not_there_is_no_value(tmp_path):
    with pytest.raises(FileNotFoundError):
        strict_json.read(tmp_path / "x.json")
