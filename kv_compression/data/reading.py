"""Rows of text from files, datasets and the hub."""

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kv_compression.io.errors import RunError, UsageError, is_main_process, one_line, printable
from kv_compression.io.hub import check_hub

if TYPE_CHECKING:
    import datasets  # imported where it is used: it takes a second, and the library does not need it

OFFLINE = "--preset embedded, which needs no network, or local files"
BLANKS = re.compile(r"\s*")
NUMERAL = re.compile(r"[\s\d.,:+-]*")
SAMPLE = 1000  # texts that show what a column holds


def load_file(path: str, split: str) -> "datasets.Dataset":
    """The rows of the local file named by --<split>_file, read by `read_texts`."""
    import datasets

    features = datasets.Features({"text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"text": read_texts(path, f"{split}_file")}, features)


def read_texts(path: str, flag: str) -> list[str]:
    """The texts in the `text_column` of a local .jsonl, .json or .csv file, or the lines of a .txt file.

    Rows without a text are left out. UsageError or RunError, naming the file and its `flag`, if it cannot be read.
    Python's own parsers read it: those of `datasets` would unpack an archive, whatever its suffix, and take the text
    "NA" for a missing one.
    """
    file, source = Path(path), f"--{flag} {path}"
    if file.suffix not in READERS:
        raise UsageError(f"{source} cannot be read: expected a file that ends in {', '.join(READERS)}")
    if not file.is_file():
        raise UsageError(f"{source}: no such file")
    if not file.stat().st_size:
        raise UsageError(f"{source} is empty")
    try:
        rows = READERS[file.suffix](file.read_text(encoding="utf-8-sig"))
        names = list(dict.fromkeys(itertools.chain(*rows)))
        column = text_column(names, source) if rows else "text"
        texts = [row[column] for row in rows if row.get(column) is not None]
        wrong = [text for text in texts if not isinstance(text, str)]
        if not wrong:
            "".join(texts).encode()  # JSON may hold lone surrogates, which are not text
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise RunError(f"{source} cannot be read as {file.suffix}: {one_line(error)}") from error
    if wrong:
        raise UsageError(f'the column "{column}" of {source} holds {type(wrong[0]).__name__} values, not text')
    if not texts:
        raise UsageError(f"{source} holds no text")
    _report_column(column, names, texts, source)
    return texts


def _json_rows(text: str) -> list[dict]:
    """The objects in a JSON list, or one after another as in JSON lines."""
    decoder, place, rows = json.JSONDecoder(), 0, []
    while (place := BLANKS.match(text, place).end()) < len(text):
        value, place = decoder.raw_decode(text, place)
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object, but {type(row).__name__}")
    return rows


def _csv_rows(text: str) -> list[dict]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a field may be a whole document
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than the first line")
        rows.append(row)
    return rows


def _lines(text: str) -> list[dict]:
    return [{"text": line} for line in io.StringIO(text)]


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".txt": _lines, ".csv": _csv_rows}


def load_hub_split(name: str, config: str | None, split: str) -> "datasets.Dataset | None":
    """One split of a dataset on the Hugging Face hub or in a local folder; None if it has no such split."""
    import datasets

    if not Path(name).exists():
        check_hub(name, "dataset", f"{OFFLINE} with --train_file and --test_file")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the readers raise whatever their parsers do
        if "Unknown split" in str(error):
            return None
        raise RunError(f"the dataset {name} cannot be loaded: {one_line(error)}") from error
    return with_text(rows, name)


def stream_c4(seed: int) -> Iterator[str]:
    """The English validation documents of C4, streamed from the Hugging Face hub in an order fixed by the seed."""
    import datasets

    check_hub("allenai/c4", "dataset", "local documents with --docs_file")
    try:
        rows = datasets.load_dataset("allenai/c4", "en", split="validation", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=10_000):
            yield row["text"]
    except Exception as error:
        raise RunError(
            f"allenai/c4 cannot be read ({one_line(error)}): give local documents with --docs_file"
        ) from error


def with_text(rows: "datasets.Dataset", source: str) -> "datasets.Dataset":
    """The `text_column` of `rows`, named "text" and without missing values. UsageError if it is no text."""
    column = text_column(rows.column_names, source)
    names, rows = rows.column_names, rows.select_columns(column)
    if column != "text":
        rows = rows.rename_column(column, "text")
    rows = rows.filter(lambda batch: [text is not None for text in batch["text"]], batched=True)
    if len(rows) == 0:
        raise UsageError(f"{source} holds no text")
    if not isinstance(rows[0]["text"], str):
        raise UsageError(f'the column "{column}" of {source} holds {type(rows[0]["text"]).__name__} values, not text')
    _report_column(column, names, rows[:SAMPLE]["text"], source)
    return rows


def text_column(names: Sequence[str], source: str) -> str:
    """The column of the text: "text", or else the first, as in the published scripts. UsageError if there is none."""
    if not names:
        raise UsageError(f'{source} has no column "text", nor any other')
    return "text" if "text" in names else names[0]


def _report_column(column: str, names: Sequence[str], texts: Sequence[str], source: str) -> None:
    """Say which of the columns `names` is read instead of "text". UsageError if it holds numbers, as ids are."""
    if column == "text":
        return
    if all(NUMERAL.fullmatch(text) for text in texts[:SAMPLE]):
        there = ", ".join(names)
        raise UsageError(f'{source} has no column "text", and its first, "{column}", holds numbers (it has: {there})')
    if is_main_process():
        print(printable(f'{source} has no column "text": its first, "{column}", is read'), file=sys.stderr, flush=True)
