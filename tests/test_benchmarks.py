"""Where the benchmarks' numbers go. What they measure is tested nowhere: it is how fast a machine is."""

import pytest

from benchmarks import architectures, decoding, training


@pytest.mark.parametrize("benchmark", [architectures, decoding, training], ids=lambda module: module.__name__)
@pytest.mark.parametrize(("name", "words"), [("mine.json", "mine.json exists"), ("no/new.json", "no: no such folder")])
def test_numbers_go_to_a_new_file_only(benchmark, name, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.json").write_text("mine")
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--json", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
