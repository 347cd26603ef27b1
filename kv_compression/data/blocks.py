"""Text to blocks to batches, in both protocols.

`paper`: spans are drawn on the words of every line, sentinels are put into the text as words, and the tokenized lines
are cut into blocks that count sentinels too. `matched`: the text alone is tokenized and cut into blocks, the same for
every method; spans are drawn on the tokens of a block, and sentinels come on top. Only token ids are stored: the
patched model makes the mask of each batch.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kv_compression.data.asking import Asked, Asking
from kv_compression.io.errors import UsageError
from kv_compression.io.machine import find_spacy_model, installed_spacy
from kv_compression.io.tensor_files import cached_tensors, digest
from kv_compression.methods.sentinels import IGNORED, insert_sentinels, is_text, next_text_token
from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN
from kv_compression.spans.paper import paper_spans
from kv_compression.spans.plan import SpanPlan
from kv_compression.spans.self_information import unit_starts

if TYPE_CHECKING:
    import datasets  # imported where it is used: it takes a second, and the library does not need it

SPLITS = ("train", "validation", "test")
TITLE = re.compile(r" = [^=].*[^=] = \n?| = [^=] = \n?")  # the line that begins an article of WikiText


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
    """All rows as one stream of tokens, cached on disk.

    Returns tensors `(tokens,)`: `input_ids` (long); `documents` (long), the document of each token as numbered by
    `document_numbers`; and, unless `unit` is "token", `unit_starts` (bool), where `spacy_model` finds that a phrase or
    sentence begins. With a `plan` that compresses, the text has sentinels in it as words (protocol `paper`). UsageError
    for `documents` that the text does not have.
    """
    plan = plan if plan and plan.compress else None
    spacy_model = find_spacy_model(unit, spacy_model)
    numbers = document_numbers(rows["text"], documents, split)
    how = {"split": split, "plan": plan, "unit": unit, "spacy_model": spacy_model}

    def compute() -> dict[str, Tensor]:
        import datasets

        features = {"input_ids": datasets.List(datasets.Value("int64"))}
        if unit != "token":
            features["unit_starts"] = datasets.List(datasets.Value("bool"))
        tokenized = rows.map(
            _tokenize_batch,
            batched=True,
            with_indices=True,
            fn_kwargs=how | {"tokenizer": tokenizer},
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
    """The document of each row, from 0: each row is one ("rows"), or rows are lines of WikiText "articles".

    An article begins at its title, a row like " = Title = " between blank rows; text that merely looks like a title has
    no blank neighbours. If no such row has any, the blank rows are missing and all of them are titles. "auto" means
    articles if there is a title. UsageError, naming the `split`, if "articles" finds none.
    """
    if documents == "rows":
        return list(range(len(texts)))
    titles = np.array([TITLE.fullmatch(text) is not None for text in texts])
    blank = np.array([True, *(not text.strip() for text in texts), True])
    apart = titles & blank[:-2] & blank[2:]
    titles = apart if apart.any() else titles
    if titles.any():
        titles[0] = False  # text before the first title is a document of its own
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
    # As in the published code: with the special tokens that the tokenizer adds to every row, end-of-text included.
    if unit == "token":
        return {"input_ids": tokenizer(texts)["input_ids"]}
    encoded = tokenizer(texts, return_offsets_mapping=True)
    starts = unit_starts(texts, encoded["offset_mapping"], unit, spacy_model)
    return {"input_ids": encoded["input_ids"], "unit_starts": starts}


def mark_words(text: str, plan: SpanPlan, rng) -> str:
    """A line of text in which the published sampler's spans are enclosed in sentinels, which are words."""
    words = text.split(" ")
    spans = paper_spans(len(words), plan.ratio, plan.max_span_length, rng)
    return " ".join(insert_sentinels(words, spans, CL_TOKEN, CR_TOKEN))


def cut_blocks(stream: dict[str, Tensor], block_size: int, split: str) -> dict[str, Tensor]:
    """A token stream as blocks `(blocks, block_size)`, without the rest at its end. UsageError if it fills no block."""
    tokens = len(stream["input_ids"])
    num_blocks = tokens // block_size
    if num_blocks == 0:
        raise UsageError(
            f"the {split} split has {tokens} tokens, too few for one block of {block_size}: "
            "give more text or a smaller --block_size"
        )
    return {name: column[: num_blocks * block_size].view(num_blocks, block_size) for name, column in stream.items()}


class Blocks(torch.utils.data.Dataset):
    """The blocks of one split; item i is the list of token ids of block i, with its sentinels.

    With a `plan` (protocol `matched`) spans are drawn on the tokens of a block; they follow from seed, split, block and
    `epoch`. Without a plan blocks stay as they are. `information` and `unit_starts`, `(blocks, block_size)`, are for
    the sampler "self_information". With `documents`, `(blocks, block_size)`, the attention mask of a batch numbers the
    documents, and no span crosses from one to another. With `asking` some blocks ask for what they said: spans then lie
    before the questions, and `answer_weight` is what an answer's token weighs in the loss, where any other weighs 1.
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
        seed: int = 0,
        asking: Asking | None = None,
        answer_weight: float = 1.0,
    ):
        self.tokens = tokens
        self.split = split
        self.plan = plan if plan and plan.compress else None
        self.cl_id, self.cr_id = cl_id, cr_id
        self.documents = documents
        self.information, self.unit_starts = information, unit_starts
        self.seed, self.asking, self.answer_weight = seed, asking, answer_weight
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> list[int]:
        asked = self.asked(index)
        tokens = self.tokens[index].tolist() if asked is None else asked.tokens
        if self.plan is None:
            return tokens
        spans = self._spans(index, None if asked is None else asked.context)
        return insert_sentinels(tokens, spans, self.cl_id, self.cr_id, self.plan.cr_tokens)

    def asked(self, index: int) -> Asked | None:
        """The block as it asks for what it said, None if it does not. The same for every method."""
        if self.asking is None:
            return None
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), self.epoch, index, 1])
        return self.asking.ask(self.tokens[index].tolist(), rng)

    def weight(self, index: int) -> float:
        """What the targets of a block weigh in the loss."""
        asked = self.asked(index)
        more = 0 if asked is None else (self.answer_weight - 1) * int(asked.answers.sum())
        return self.num_targets(index) + more

    def _spans(self, index: int, context: int | None) -> list[tuple[int, int]]:
        """The spans of a block, in its first `context` tokens if it asks."""
        rng = np.random.default_rng([self.plan.seed, SPLITS.index(self.split), self.epoch, index])
        plan = self.plan.drawn(rng) if self.split == "train" else self.plan
        if context is not None:
            return plan.within(context).spans(context, rng)
        information, starts = (
            None if column is None else column[index].numpy() for column in (self.information, self.unit_starts)
        )
        if self.documents is not None:
            return plan.spans_by_document(self.documents[index].numpy(), rng, information, starts)
        return plan.spans(self.tokens.shape[1], rng, information, starts)

    def collate(self, blocks: Sequence[list[int]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` (0 for padding, on the right) and `labels`, long `(batch, length)`."""
        length = max(map(len, blocks))
        input_ids = torch.zeros(len(blocks), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for row, block in enumerate(blocks):
            ids = torch.tensor(block)
            input_ids[row, : len(block)] = ids
            attention_mask[row, : len(block)] = 1
            labels[row, : len(block)] = next_text_token(ids[None], self.cl_id, self.cr_id)[0]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def num_targets(self, index: int) -> int:
        """How many targets a block has, whatever its spans: one for each text token but the last."""
        return max(int(is_text(self.tokens[index], self.cl_id, self.cr_id).sum()) - 1, 0)

    def batch(self, indices: Sequence[int], drawn: Mapping[int, list[int]] | None = None) -> dict[str, Tensor]:
        """The blocks `indices` as a batch (see `collate`); `drawn` holds those drawn already, by index.

        If answers weigh more than other targets, float `weights` `(batch, length)` say what each target weighs.
        """
        batch = self.collate([self[index] if drawn is None else drawn[index] for index in indices])
        if self.asking is not None and self.answer_weight != 1:
            batch["weights"] = self._weights(indices, batch["labels"])
        if self.documents is not None:
            numbers = [self._documents(index, ids) for index, ids in zip(indices, batch["input_ids"])]
            batch["attention_mask"] *= torch.stack(numbers)
        return batch

    def _weights(self, indices: Sequence[int], labels: Tensor) -> Tensor:
        """What each target weighs, float `(batch, length)`. The n-th target of a block is its n-th text token."""
        weights = torch.ones(labels.shape)
        for row, index in enumerate(indices):
            if (asked := self.asked(index)) is not None:
                targets = labels[row] != IGNORED
                weights[row, targets] += (self.answer_weight - 1) * torch.from_numpy(asked.answers[1:]).float()
        return weights

    def _documents(self, index: int, ids: Tensor) -> Tensor:
        """The document of every token, from 1: of its span for a <CL>, of the token before it for a <CR>."""
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
