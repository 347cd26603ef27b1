"""Text to blocks to batches, in both protocols.

`paper`: spans are drawn on the words of every line, sentinels are put into the text as words, and the tokenized lines
are cut into blocks that count sentinels too. `matched`: the text alone is tokenized and cut into blocks, the same for
every method; spans are drawn on a block's tokens, and sentinels come on top. Only token ids are ever stored: masks are
made per batch by the patched model.
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from torch import Tensor

from kv_compression.errors import RunError, UsageError, one_line
from kv_compression.sentinels import CL_TOKEN, CR_TOKEN, insert_sentinels, next_text_token
from kv_compression.spans import exact_spans, paper_spans

SPLITS = ("train", "validation", "test")
OFFLINE = "--preset embedded, which needs no network, or local files"
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}


def load_file(path: str, split: str, flag: str | None = None) -> datasets.Dataset:
    """The rows of a local .jsonl, .json, .txt (a row a line) or .csv file; all but .txt need a column "text".

    `flag` is the one that named the file, for error messages (`<split>_file`).
    """
    file, source = Path(path), f"--{flag or f'{split}_file'} {path}"
    if file.suffix not in READERS:
        raise UsageError(f"{source} cannot be read: expected a file that ends in {', '.join(READERS)}")
    if not file.is_file():
        raise UsageError(f"{source}: no such file")
    if not file.stat().st_size:
        raise UsageError(f"{source} is empty")
    options = {"keep_linebreaks": True} if file.suffix == ".txt" else {}
    try:
        rows = datasets.load_dataset(
            READERS[file.suffix], data_files={split: glob.escape(str(file))}, split=split, **options
        )
    except Exception as error:  # the readers raise whatever their parsers do
        reason = one_line(error.__cause__ or error)
        if "no data" in reason:
            raise UsageError(f"{source} holds no text") from error
        raise RunError(f"{source} cannot be read as {file.suffix}: {reason}") from error
    return with_text(rows, path)


def check_hub(name: str, kind: str, instead: str) -> None:
    """Raise RunError unless the hub answers for a "model" or "dataset"; says nothing where the user works offline.

    Asked once and briefly: the libraries' own downloads try again for a minute before they give up. `instead` says
    which flags take something local.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)
    except Exception as error:
        raise RunError(
            f"the {kind} {name} could not be reached on the Hugging Face hub ({one_line(error)}): use {instead}; "
            "HF_HUB_OFFLINE=1 uses what was downloaded before"
        ) from error


def load_hub_split(name: str, config: str | None, split: str) -> datasets.Dataset | None:
    """One split of a dataset on the Hugging Face hub, or in a local folder, None if it has no such split."""
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
    check_hub("allenai/c4", "dataset", "local documents with --docs_file")
    try:
        rows = datasets.load_dataset("allenai/c4", "en", split="validation", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=10_000):
            yield row["text"]
    except Exception as error:
        raise RunError(
            f"allenai/c4 cannot be read ({one_line(error)}): give local documents with --docs_file"
        ) from error


def with_text(rows: datasets.Dataset, source: str) -> datasets.Dataset:
    """`rows` with its column "text" alone, without missing values; UsageError if there is no such text."""
    if "text" not in rows.column_names:
        raise UsageError(f'{source} has no column "text" (it has: {", ".join(rows.column_names) or "none"})')
    rows = rows.select_columns("text").filter(_present, batched=True)
    if len(rows) == 0:
        raise UsageError(f"{source} holds no text")
    if not isinstance(rows[0]["text"], str):
        raise UsageError(f'the column "text" of {source} holds {type(rows[0]["text"]).__name__} values, not text')
    return rows


def _present(batch: dict) -> list[bool]:
    return [text is not None for text in batch["text"]]


@dataclass(frozen=True)
class SpanPlan:
    """How spans are drawn: for `compress` (is the method KV compression?) at `ratio`, fixed by `seed`."""

    compress: bool
    ratio: float
    max_span_length: int
    seed: int


def tokenize(rows: datasets.Dataset, tokenizer, split: str, plan: SpanPlan | None, num_workers: int | None) -> Tensor:
    """All rows as one stream of token ids, long `(tokens,)`.

    With a `plan` that compresses, sentinels stand in the text as words (protocol `paper`).
    """
    arguments = {"tokenizer": tokenizer, "split": split, "plan": plan if plan and plan.compress else None}
    tokenized = rows.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs=arguments,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))}),
        remove_columns=rows.column_names,
        num_proc=num_workers if num_workers and num_workers > 1 else None,
        desc=f"tokenizing {split}",
    )
    flat = tokenized.data.column("input_ids").combine_chunks().flatten()
    return torch.from_numpy(np.array(flat, dtype=np.int64))


def _tokenize_batch(batch: dict, indices: list[int], tokenizer, split: str, plan: SpanPlan | None) -> dict:
    texts = batch["text"]
    for index, text in zip(indices, texts):
        if CL_TOKEN in text or CR_TOKEN in text:
            raise UsageError(f"row {index} of the {split} split holds {CL_TOKEN} or {CR_TOKEN}, which are reserved")
    if plan is not None:
        texts = [
            mark_words(text, plan, np.random.default_rng([plan.seed, SPLITS.index(split), index]))
            for index, text in zip(indices, texts)
        ]
    return {"input_ids": tokenizer(texts)["input_ids"]}


def mark_words(text: str, plan: SpanPlan, rng) -> str:
    """A line of text with the published sampler's spans marked by sentinels as words of their own."""
    words = text.split(" ")
    spans = paper_spans(len(words), plan.ratio, plan.max_span_length, rng)
    return " ".join(insert_sentinels(words, spans, CL_TOKEN, CR_TOKEN))


def cut_blocks(stream: Tensor, block_size: int, split: str) -> Tensor:
    """A token stream as blocks `(blocks, block_size)`; what does not fill a block is dropped."""
    num_blocks = len(stream) // block_size
    if num_blocks == 0:
        raise UsageError(
            f"the {split} split has {len(stream)} tokens, too few for one block of {block_size}: "
            "give more text or a smaller --block_size"
        )
    return stream[: num_blocks * block_size].view(num_blocks, block_size)


class Blocks(torch.utils.data.Dataset):
    """The blocks of one split; item i is the list of token ids of block i, sentinels in it.

    With a `plan` (protocol `matched`) an item's spans are an exact draw on its tokens, a fixed function of the seed,
    the split, the block and the `epoch`; without one the blocks are as they are.
    """

    def __init__(self, tokens: Tensor, split: str, plan: SpanPlan | None, cl_id: int, cr_id: int):
        self.tokens = tokens
        self.split = split
        self.plan = plan if plan and plan.compress else None
        self.cl_id, self.cr_id = cl_id, cr_id
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> list[int]:
        tokens = self.tokens[index].tolist()
        if self.plan is None:
            return tokens
        rng = np.random.default_rng([self.plan.seed, SPLITS.index(self.split), self.epoch, index])
        spans = exact_spans(len(tokens), self.plan.ratio, self.plan.max_span_length, rng)
        return insert_sentinels(tokens, spans, self.cl_id, self.cr_id)

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

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The blocks `indices` as a batch."""
        return self.collate([self[index] for index in indices])

    def fingerprint(self) -> str:
        """SHA-256 over the blocks' token ids and shape."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()
