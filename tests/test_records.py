import json

import pytest

from kv_compression.generation import records
from kv_compression.io.errors import RunError, UsageError

RECORD = {"index": 0, "continuations": ["a"], "prefix_tokens": 4, "cache_length": 2}
ABOUT = {"method": "kv_compression", "seed": 0}


def test_records_are_appended_and_continued(tmp_path):
    path = tmp_path / "new" / "generation.jsonl"
    assert records.continue_file(path, ABOUT, overwrite=False) == set()
    records.append(path, [RECORD | {"text": "é\n"}, RECORD | {"index": 3}])
    records.append(path, [{"index": 4}])  # nothing was continued: it is made again
    records.append(path, [])
    assert records.continue_file(path, ABOUT, overwrite=False) == {0, 3}
    assert records.read(path) == ([RECORD | {"text": "é\n"}, RECORD | {"index": 3}, {"index": 4}], [])
    assert records.read_about(path) == ABOUT


def test_a_half_written_line_is_cut_off_and_made_again(tmp_path):
    path = tmp_path / "generation.jsonl"
    records.continue_file(path, ABOUT, overwrite=False)
    whole = json.dumps(RECORD).encode() + b"\n"
    path.write_bytes(whole + b'{"index": 1, "te')
    assert len(records.read(path)[1]) == 1
    assert records.continue_file(path, ABOUT, overwrite=False) == {0}
    assert path.read_bytes() == whole


def test_a_last_line_that_lost_its_end_is_kept(tmp_path):
    path = tmp_path / "generation.jsonl"
    records.continue_file(path, ABOUT, overwrite=False)
    path.write_text(json.dumps(RECORD))
    assert records.continue_file(path, ABOUT, overwrite=False) == {0}
    assert path.read_text() == json.dumps(RECORD) + "\n"


def test_only_what_was_appended_is_overwritten(tmp_path):
    path = tmp_path / "generation.jsonl"
    for made in (lambda: path.write_text("mine\n"), lambda: records.about_path(path).write_text("{}")):
        made()
        with pytest.raises(UsageError, match="is not what these scripts have written|by something else"):
            records.continue_file(path, ABOUT, overwrite=True)
        for mine in tmp_path.iterdir():
            mine.unlink()
    records.continue_file(path, ABOUT, overwrite=False)
    records.append(path, [RECORD])
    path.write_text(path.read_text() + '{"a note": "of mine"}\n')
    records.append(path, [RECORD | {"index": 1}])  # it goes on, and what is not ours is not taken for ours
    with pytest.raises(UsageError, match="is not what these scripts have written"):
        records.continue_file(path, ABOUT, overwrite=True)
    assert "of mine" in path.read_text()


def test_a_file_of_other_settings_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "generation.jsonl"
    records.continue_file(path, ABOUT, overwrite=False)
    records.append(path, [{"index": 0}])
    with pytest.raises(UsageError, match="--overwrite"):
        records.continue_file(path, ABOUT | {"seed": 1}, overwrite=False)
    assert path.read_text() == '{"index": 0}\n'
    assert records.continue_file(path, ABOUT | {"seed": 1}, overwrite=True) == set()
    assert path.read_text() == ""


def test_records_that_serve_nobody_are_not_usable():
    wrong = [{"prefix_tokens": 0}, {"cache_length": -1}, {"index": True}, {"index": "0"}, {"continuations": "a"}]
    assert records.usable([RECORD, *(RECORD | change for change in wrong)]) == [RECORD]


def test_wrong_fields_are_named(tmp_path):
    for wrong in ({"method": ["x"]}, {"bound_ratio": "0.5"}, {"preset": {}}, {"documents_sha256": 1}):
        (tmp_path / "x.about.json").write_text(json.dumps(ABOUT | wrong))
        with pytest.raises(RunError, match=f"x.about.json is damaged: {next(iter(wrong))}"):
            records.read_about(tmp_path / "x.jsonl")


def test_damaged_lines_are_named(tmp_path):
    path = tmp_path / "generation.jsonl"
    path.write_bytes(b'{"index": 0}\n\n{"index"\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"index": 1}')
    found, problems = records.read(path)
    assert [record["index"] for record in found] == [0, 1]
    assert [problem.split(":")[0] for problem in problems] == ["line 3", "line 4", "line 5", "line 6"]


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(RunError, match="missing"):
        records.read(tmp_path / "missing")
    with pytest.raises(UsageError, match="folder"):
        records.continue_file(tmp_path, ABOUT, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        records.continue_file(tmp_path / "file" / "below.jsonl", ABOUT, overwrite=False)
    (tmp_path / "x.about.json").write_text("{")
    with pytest.raises(RunError, match="x.about.json"):
        records.read_about(tmp_path / "x.jsonl")
