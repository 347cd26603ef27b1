"""Text to blocks to batches, in both protocols.

`paper`: spans are drawn on the words of every line, sentinels are put into the text as words, and the tokenized lines
are cut into blocks that count sentinels too. `matched`: the text alone is tokenized and cut into blocks, the same for
every method; spans are drawn on a block's tokens, and sentinels come on top. Only token ids are ever stored: masks are
made per batch by the patched model.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kv_compression.disk_cache import cached_tensors
from kv_compression.errors import RunError, UsageError, is_main_process, one_line, printable
from kv_compression.hub import check_hub
from kv_compression.information import find_spacy_model, installed_spacy, unit_starts
from kv_compression.sentinels import CL_TOKEN, CR_TOKEN, insert_sentinels, is_text, next_text_token
from kv_compression.spans import exact_spans, most_removable, paper_spans, share_to_remove, widest_window
from kv_compression.strategic import cheapest_spans, fixed_spans
from kv_compression.tensor_files import digest

if TYPE_CHECKING:
    import datasets  # else where it is used: it takes a second, and the library does without

SPLITS = ("train", "validation", "test")
OFFLINE = "--preset embedded, which needs no network, or local files"
TITLE = re.compile(r" = [^=].*[^=] = \n?| = [^=] = \n?")  # the line that begins an article of WikiText
BLANKS = re.compile(r"\s*")
NUMERAL = re.compile(r"[\s\d.,:+-]*")
SAMPLE = 1000  # texts that are looked at to see what a column holds


def load_file(path: str, split: str) -> "datasets.Dataset":
    """The rows of the local file that --<split>_file names, as `read_texts` reads it."""
    import datasets

    features = datasets.Features({"text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"text": read_texts(path, f"{split}_file")}, features)


def read_texts(path: str, flag: str) -> list[str]:
    """The texts in a local .jsonl, .json, .txt (a line is one) or .csv file, of its `text_column`.

    Rows without a text are left out. UsageError or RunError, naming the `flag` that named the file, if it is no such
    file. Read by Python's own parsers: those of `datasets` would unpack an archive, whatever its name ends in, and take
    a text like "NA" for a missing one.
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
            "".join(texts).encode()  # JSON can tell of lone surrogates, which are no text
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise RunError(f"{source} cannot be read as {file.suffix}: {one_line(error)}") from error
    if wrong:
        raise UsageError(f'the column "{column}" of {source} holds {type(wrong[0]).__name__} values, not text')
    if not texts:
        raise UsageError(f"{source} holds no text")
    _tell_column(column, names, texts, source)
    return texts


def _json_rows(text: str) -> list[dict]:
    """The objects that stand one behind another, as in JSON lines, or in a list."""
    decoder, place, rows = json.JSONDecoder(), 0, []
    while (place := BLANKS.match(text, place).end()) < len(text):
        value, place = decoder.raw_decode(text, place)
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object, but {type(row).__name__}")
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
    """One split of a dataset on the Hugging Face hub, or in a local folder, None if it has no such split."""
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
    """`rows` with their `text_column` alone, as "text", without missing values; UsageError if there is no such text."""
    column = text_column(rows.column_names, source)
    names, rows = rows.column_names, rows.select_columns(column)
    if column != "text":
        rows = rows.rename_column(column, "text")
    rows = rows.filter(_present, batched=True)
    if len(rows) == 0:
        raise UsageError(f"{source} holds no text")
    if not isinstance(rows[0]["text"], str):
        raise UsageError(f'the column "{column}" of {source} holds {type(rows[0]["text"]).__name__} values, not text')
    _tell_column(column, names, rows[:SAMPLE]["text"], source)
    return rows


def text_column(names: Sequence[str], source: str) -> str:
    """The column that holds the text: "text", or else the first, as the published scripts choose.

    UsageError if there is none.
    """
    if not names:
        raise UsageError(f'{source} has no column "text", nor any other')
    return "text" if "text" in names else names[0]


def _tell_column(column: str, names: Sequence[str], texts: Sequence[str], source: str) -> None:
    """Say which of the columns `names` is read in place of "text"; UsageError if it holds numbers, as ids are."""
    if column == "text":
        return
    if all(NUMERAL.fullmatch(text) for text in texts[:SAMPLE]):
        there = ", ".join(names)
        raise UsageError(f'{source} has no column "text", and its first, "{column}", holds numbers (it has: {there})')
    if is_main_process():
        print(printable(f'{source} has no column "text": its first, "{column}", is read'), file=sys.stderr, flush=True)


def _present(batch: dict) -> list[bool]:
    return [text is not None for text in batch["text"]]


@dataclass(frozen=True)
class SpanPlan:
    """How spans are drawn: for `compress` (is the method KV compression?) at `ratio`, fixed by `seed`.

    The `sampler` is "random" (the protocol's own), "fixed" (equal chunks) or "self_information" (where the base model
    is surprised least, in whole units). The first `sink_tokens` and the last `recent_tokens` of a block stay out of
    spans; `cr_tokens` <CR> close one.
    """

    compress: bool
    ratio: float
    max_span_length: int
    seed: int
    sampler: str = "random"
    sink_tokens: int = 0
    recent_tokens: int = 0
    cr_tokens: int = 1

    def spans(self, num_tokens: int, rng, information=None, unit_starts=None) -> list[tuple[int, int]]:
        """Spans that remove the exact share of a text of so many tokens; ValueError if that cannot be."""
        last = max(num_tokens - self.recent_tokens, 0)
        region = {"cr_tokens": self.cr_tokens, "first": min(self.sink_tokens, last), "last": last}
        if self.sampler == "fixed":
            return fixed_spans(num_tokens, self.ratio, self.max_span_length, **region)
        if self.sampler == "self_information":
            return cheapest_spans(information, self.ratio, self.max_span_length, unit_starts=unit_starts, **region)
        return exact_spans(num_tokens, self.ratio, self.max_span_length, rng, **region)

    def window(self, num_tokens: int) -> int:
        """The most recent tokens of so long a text that can stay out of spans, if the exact share is to leave it."""
        shape = (self.max_span_length, self.cr_tokens, min(self.sink_tokens, num_tokens))
        return widest_window(num_tokens, self.ratio, *shape)

    def spans_by_document(self, documents, rng, information=None, unit_starts=None) -> list[tuple[int, int]]:
        """As `spans`, no span across two documents; `documents` is the number of every token's document.

        Every document gives up a share that is as equal as spans allow.
        """
        num_tokens = len(documents)
        bounds = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), num_tokens]
        regions = []
        for start, end in zip(bounds, bounds[1:]):
            first, last = max(start, self.sink_tokens), min(end, num_tokens - self.recent_tokens)
            if last > first:
                regions.append((first, last))
        bound = [most_removable(last - first, self.max_span_length, self.cr_tokens) for first, last in regions]
        to_remove = share_to_remove(num_tokens, self.ratio)
        if to_remove > sum(bound):
            raise ValueError(
                f"ratio {self.ratio} asks to remove {to_remove} of {num_tokens} tokens, but spans of at most "
                f"{self.max_span_length} can remove {sum(bound)} from the {len(regions)} documents of a block: "
                "lower the ratio, allow longer spans or do not isolate documents"
            )
        spans = []
        for number, (first, last) in enumerate(regions):
            left = sum(bound[number + 1 :])
            share = round(to_remove * (last - first) / sum(end - start for start, end in regions[number:]))
            share = max(min(share, bound[number]), to_remove - left)
            to_remove -= share
            part = replace(self, ratio=share / (last - first), sink_tokens=0, recent_tokens=0)
            own = (None if column is None else column[first:last] for column in (information, unit_starts))
            spans += [(first + begin, first + end) for begin, end in part.spans(last - first, rng, *own)]
        return spans


def tokenize(
    rows: "datasets.Dataset",
    tokenizer,
    split: str,
    plan: SpanPlan | None,
    num_workers: int | None,
    unit: str = "token",
    spacy_model: str | None = None,
    documents: str = "auto",
) -> dict[str, Tensor]:
    """All rows as one stream of tokens, kept on disk for the next run.

    Returns tensors `(tokens,)`: `input_ids` and, both long, `documents`, the number of the document that a token is of
    (by `document_numbers`). UsageError if the texts have no such `documents`.
    Unless `unit` is "token", `unit_starts` (bool) says where a phrase or sentence begins by `spacy_model`. With a
    `plan` that compresses, sentinels stand in the text as words (protocol `paper`).
    """
    plan = plan if plan and plan.compress else None
    spacy_model = find_spacy_model(unit, spacy_model)
    numbers = document_numbers(rows["text"], documents, split)

    def compute() -> dict[str, Tensor]:
        import datasets

        features = {"input_ids": datasets.List(datasets.Value("int64"))}
        if unit != "token":
            features["unit_starts"] = datasets.List(datasets.Value("bool"))
        tokenized = rows.map(
            _tokenize_batch,
            batched=True,
            with_indices=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "split": split,
                "plan": plan,
                "unit": unit,
                "spacy_model": spacy_model,
            },
            features=datasets.Features(features),
            remove_columns=rows.column_names,
            num_proc=num_workers if num_workers and num_workers > 1 else None,
            desc=f"tokenizing {split}",
        )
        columns = {name: tokenized.data.column(name).combine_chunks() for name in features}
        stream = {name: torch.tensor(np.array(column.flatten())) for name, column in columns.items()}
        counts = torch.tensor(np.array(columns["input_ids"].value_lengths(), dtype=np.int64))
        return stream | {"documents": torch.tensor(numbers).repeat_interleave(counts)}

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return compute()
    key = {
        "text": digest(*rows["text"]),
        "tokenizer": digest(backend.to_str()),
        "split": split,
        "plan": asdict(plan) if plan else None,
        "unit": unit,
        "numbering": 2,  # the version of `document_numbers`
    }
    if unit != "token":
        versions = installed_spacy()
        key["spacy"] = {name: versions[name] for name in ("spacy", spacy_model)}
    if documents != "auto":
        key["of"] = documents
    return cached_tensors("tokens", key, compute)


def document_numbers(texts: Sequence[str], documents: str = "auto", split: str = "") -> list[int]:
    """The number, from 0, of the document that each row is of: "rows" are one each, or lines of WikiText "articles".

    An article begins at its title line. A title stands between blank rows, running text that looks like one does not;
    where no such row has blank neighbours, the blank rows have been left out and all of them count. "auto" takes
    articles where there is a title. UsageError, naming the `split`, if articles are asked for and there is none.
    """
    if documents == "rows":
        return list(range(len(texts)))
    titles = np.array([TITLE.fullmatch(text) is not None for text in texts])
    blank = np.array([True, *(not text.strip() for text in texts), True])
    apart = titles & blank[:-2] & blank[2:]
    titles = apart if apart.any() else titles
    if titles.any():
        titles[0] = False  # what stands before the first title is a document, if there is anything
        return np.cumsum(titles).tolist()
    if documents == "articles":
        raise UsageError(f"--documents articles: the {split} split has no title line of WikiText ( = Title = )")
    return list(range(len(texts)))


def _tokenize_batch(
    batch: dict,
    indices: list[int],
    tokenizer,
    split: str,
    plan: SpanPlan | None,
    unit: str,
    spacy_model: str | None = None,
) -> dict:
    texts = batch["text"]
    for index, text in zip(indices, texts):
        if CL_TOKEN in text or CR_TOKEN in text:
            raise UsageError(f"row {index} of the {split} split holds {CL_TOKEN} or {CR_TOKEN}, which are reserved")
    if plan is not None:
        texts = [
            mark_words(text, plan, np.random.default_rng([plan.seed, SPLITS.index(split), index]))
            for index, text in zip(indices, texts)
        ]
    # As the published code: with the special tokens that the tokenizer puts around every row, end-of-text too.
    if unit == "token":
        return {"input_ids": tokenizer(texts)["input_ids"]}
    encoded = tokenizer(texts, return_offsets_mapping=True)
    starts = unit_starts(texts, encoded["offset_mapping"], unit, spacy_model)
    return {"input_ids": encoded["input_ids"], "unit_starts": starts}


def mark_words(text: str, plan: SpanPlan, rng) -> str:
    """A line of text with the published sampler's spans marked by sentinels as words of their own."""
    words = text.split(" ")
    spans = paper_spans(len(words), plan.ratio, plan.max_span_length, rng)
    return " ".join(insert_sentinels(words, spans, CL_TOKEN, CR_TOKEN))


def cut_blocks(stream: dict[str, Tensor], block_size: int, split: str) -> dict[str, Tensor]:
    """A token stream as blocks `(blocks, block_size)`; what does not fill a block is dropped."""
    tokens = len(stream["input_ids"])
    num_blocks = tokens // block_size
    if num_blocks == 0:
        raise UsageError(
            f"the {split} split has {tokens} tokens, too few for one block of {block_size}: "
            "give more text or a smaller --block_size"
        )
    return {name: column[: num_blocks * block_size].view(num_blocks, block_size) for name, column in stream.items()}


class Blocks(torch.utils.data.Dataset):
    """The blocks of one split; item i is the list of token ids of block i, sentinels in it.

    With a `plan` (protocol `matched`) an item's spans are drawn on its tokens, a fixed function of the seed, the split,
    the block and the `epoch`; without one the blocks are as they are. `information` and `unit_starts`,
    `(blocks, block_size)`, are what the sampler "self_information" needs. With `documents`, `(blocks, block_size)`, a
    batch's attention mask numbers the documents, and no span goes across two of them.
    """

    def __init__(
        self,
        tokens: Tensor,
        split: str,
        plan: SpanPlan | None,
        cl_id: int,
        cr_id: int,
        *,
        documents: Tensor | None = None,
        information: Tensor | None = None,
        unit_starts: Tensor | None = None,
    ):
        self.tokens = tokens
        self.split = split
        self.plan = plan if plan and plan.compress else None
        self.cl_id, self.cr_id = cl_id, cr_id
        self.documents = documents
        self.information, self.unit_starts = information, unit_starts
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> list[int]:
        tokens = self.tokens[index].tolist()
        if self.plan is None:
            return tokens
        return insert_sentinels(tokens, self._spans(index), self.cl_id, self.cr_id, self.plan.cr_tokens)

    def _spans(self, index: int) -> list[tuple[int, int]]:
        rng = np.random.default_rng([self.plan.seed, SPLITS.index(self.split), self.epoch, index])
        information, starts = (
            None if column is None else column[index].numpy() for column in (self.information, self.unit_starts)
        )
        if self.documents is not None:
            return self.plan.spans_by_document(self.documents[index].numpy(), rng, information, starts)
        return self.plan.spans(self.tokens.shape[1], rng, information, starts)

    def collate(self, blocks: Sequence[list[int]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` (0 for padding, on the right) and `labels`, long `(batch, length)`."""
        length = max(map(len, blocks))
        input_ids = torch.zeros(len(blocks), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, block in enumerate(blocks):
            ids = torch.tensor(block)
            input_ids[row, : len(block)] = ids
            attention_mask[row, : len(block)] = 1
            labels[row, : len(block)] = next_text_token(ids[None], self.cl_id, self.cr_id)[0]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def num_targets(self, index: int) -> int:
        """How many targets a block has, whatever its spans: all text tokens but the last."""
        return max(int(is_text(self.tokens[index], self.cl_id, self.cr_id).sum()) - 1, 0)

    def batch(self, indices: Sequence[int], drawn: Mapping[int, list[int]] | None = None) -> dict[str, Tensor]:
        """The blocks `indices` as a batch, taken from `drawn` where they have been drawn already."""
        batch = self.collate([self[index] if drawn is None else drawn[index] for index in indices])
        if self.documents is not None:
            numbers = [self._documents(index, ids) for index, ids in zip(indices, batch["input_ids"])]
            batch["attention_mask"] *= torch.stack(numbers)
        return batch

    def _documents(self, index: int, ids: Tensor) -> Tensor:
        """The number, from 1, of the document of every token; a <CL> is of its span's, a <CR> of what is before it."""
        documents = self.documents[index] - self.documents[index, 0] + 1
        if self.plan is None:
            return torch.nn.functional.pad(documents, (0, len(ids) - len(documents)), value=1)
        text = is_text(ids, self.cl_id, self.cr_id)
        place = text.long().cumsum(-1) - (text | (ids == self.cr_id)).long()
        return documents[place.clamp(0, len(documents) - 1)]

    def fingerprint(self) -> str:
        """SHA-256 over the blocks' token ids and shape."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()
