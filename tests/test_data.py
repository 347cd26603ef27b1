import json

import datasets
import numpy as np
import pytest
import torch
import transformers

from kv_compression import data
from kv_compression.errors import RunError, UsageError
from kv_compression.sentinels import add_sentinels
from tests import slow_rules
from tests.conftest import sentences

ROWS = ["one line \n", "another, with a , comma", ""]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row, "id": n}) + "\n" for n, row in enumerate(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": row} for row in rows]))
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{n},"{row}"\n' for n, row in enumerate(rows)))
    else:
        path.write_text("".join(row.rstrip("\n") + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_local_files_keep_their_rows(tmp_path, suffix):
    rows = data.load_file(write(tmp_path / f"rows{suffix}", ROWS[:2]), "train")
    assert rows["text"][:] == ROWS[:2]
    assert rows.column_names == ["text"]


def test_text_files_are_read_line_by_line(tmp_path):
    rows = data.load_file(write(tmp_path / "rows.txt", ROWS), "train")
    assert rows["text"][:] == ["one line \n", "another, with a , comma\n", "\n"]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.jsonl", None, UsageError, "no such file"),
        ("empty.jsonl", "", UsageError, "is empty"),
        ("rows.parquet", "x", UsageError, "expected a file that ends in"),
        ("other.jsonl", '{"body": "x"}\n', UsageError, 'no column "text"'),
        ("broken.jsonl", '{"text": "x"\n{', RunError, "cannot be read"),
        ("numbers.jsonl", '{"text": 1}\n', UsageError, "not text"),
        ("nulls.jsonl", '{"text": null}\n', UsageError, "holds no text"),
        ("binary.csv", b"\xff\xfe\x00\x01", RunError, "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, error, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=words) as caught:
        data.load_file(str(path), "train")
    assert name in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    add_sentinels(tokenizer)
    return tokenizer


def sentinel_ids(tokenizer):
    return tokenizer.convert_tokens_to_ids(["<CL>", "<CR>"])


def plan(ratio=0.5, seed=0, compress=True):
    return data.SpanPlan(compress, ratio, 10, seed)


def rows_of(texts):
    return datasets.Dataset.from_dict({"text": texts})


def test_matched_blocks_hold_the_same_text_for_every_method(tokenizer):
    cl, cr = sentinel_ids(tokenizer)
    stream = data.tokenize(rows_of(sentences(20, 0)), tokenizer, "test", None, None)
    assert stream.tolist() == [token for text in sentences(20, 0) for token in tokenizer(text)["input_ids"]]
    tokens = data.cut_blocks(stream, 64, "test")
    assert tokens.flatten().tolist() == stream[: len(stream) // 64 * 64].tolist()
    plain = data.Blocks(tokens, "test", plan(compress=False), cl, cr)
    marked = data.Blocks(tokens, "test", plan(), cl, cr)
    for index in range(len(tokens)):
        block = marked[index]
        assert [token for token in block if token not in (cl, cr)] == plain[index] == tokens[index].tolist()
        assert slow_rules.removed(block, cl, cr) == 32
        assert [t for t in slow_rules.targets(block, cl, cr) if t >= 0] == plain[index][1:]
    assert plain.fingerprint() == marked.fingerprint()


def test_spans_are_a_function_of_seed_split_epoch_and_block(tokenizer):
    cl, cr = sentinel_ids(tokenizer)
    tokens = torch.arange(3, 67).repeat(2, 1)

    def block(split="train", seed=0, epoch=0, index=0):
        blocks = data.Blocks(tokens, split, plan(seed=seed), cl, cr)
        blocks.epoch = epoch
        return blocks[index]

    others = [block(split="test"), block(seed=1), block(epoch=1), block(index=1)]
    assert block() == block()
    assert all(other != block() for other in others)


def test_a_batch_is_padded_on_the_right():
    blocks = data.Blocks(torch.arange(3, 11)[None], "test", None, 1, 2)
    batch = blocks.collate([[3, 4, 1, 5, 6, 2, 7], [8, 9, 10]])
    assert batch["input_ids"].tolist() == [[3, 4, 1, 5, 6, 2, 7], [8, 9, 10, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[4, 5, -100, 6, 7, -100, -100], [9, 10] + [-100] * 5]


def test_paper_protocol_puts_sentinels_into_the_text_as_words(tokenizer):
    cl, cr = sentinel_ids(tokenizer)
    texts = sentences(10, 0) + [" too short to touch \n"]
    stream = data.tokenize(rows_of(texts), tokenizer, "train", plan(0.6), None).tolist()
    assert stream.count(cl) == stream.count(cr) > 0
    before = [tokenizer.decode(stream[i - 1]) for i, token in enumerate(stream) if token in (cl, cr)]
    within_a_line = [text for text in before if not text.endswith("\n")]
    assert set(within_a_line) == {" "}  # the lone space token of the published way
    assert len(within_a_line) > len(before) - len(texts)
    short = tokenizer(texts[-1])["input_ids"]
    assert stream[-len(short) :] == short
    again = data.tokenize(rows_of(texts), tokenizer, "train", plan(0.6), 2).tolist()
    assert again == stream  # whatever the number of workers
    assert data.tokenize(rows_of(texts), tokenizer, "train", plan(0.6, seed=1), None).tolist() != stream


def test_marked_words_are_the_sampled_spans():
    words = [str(number) for number in range(60)]
    marked = data.mark_words(" ".join(words), plan(0.5), np.random.default_rng(0)).split(" ")
    assert [word for word in marked if word not in ("<CL>", "<CR>")] == words
    assert marked.count("<CL>") == marked.count("<CR>") > 0


def test_reserved_words_and_short_splits_are_refused(tokenizer):
    with pytest.raises(UsageError, match="row 1 of the train split"):
        data.tokenize(rows_of(["fine", "a <CR> b"]), tokenizer, "train", None, None)
    with pytest.raises(UsageError, match="too few for one block of 64"):
        data.cut_blocks(torch.arange(63), 64, "test")
