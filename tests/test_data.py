import gzip
import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_compression import settings as run_settings
from kv_compression.data import blocks as data_blocks
from kv_compression.data import reading
from kv_compression.io import machine
from kv_compression.io.errors import RunError, UsageError
from kv_compression.model.vocabulary import add_sentinels
from kv_compression.spans import plan as span_plan
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
    rows = reading.load_file(write(tmp_path / f"rows{suffix}", ROWS[:2]), "train")
    assert rows["text"][:] == ROWS[:2]
    assert rows.column_names == ["text"]


def test_text_files_are_read_line_by_line(tmp_path):
    rows = reading.load_file(write(tmp_path / "rows.txt", ROWS), "train")
    assert rows["text"][:] == ["one line \n", "another, with a , comma\n", "\n"]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.jsonl", None, UsageError, "no such file"),
        ("empty.jsonl", "", UsageError, "is empty"),
        ("rows.parquet", "x", UsageError, "expected a file that ends in"),
        ("ids.csv", "id,body\n1,a\n2,b\n", UsageError, 'its first, "id", holds numbers .it has: id, body'),
        ("counts.jsonl", '{"n": 1, "body": "x"}\n', UsageError, 'column "n" of .* holds int values, not text'),
        ("nothing.jsonl", "{}\n", UsageError, 'no column "text", nor any other'),
        ("broken.jsonl", '{"text": "x"\n{', RunError, "cannot be read"),
        ("numbers.jsonl", '{"text": 1}\n', UsageError, "not text"),
        ("nulls.jsonl", '{"text": null}\n', UsageError, "holds no text"),
        ("binary.csv", b"\xff\xfe\x00\x01", RunError, "cannot be read"),
        ("archive.jsonl", gzip.compress(b'{"text": "x"}\n'), RunError, "cannot be read"),
        ("surrogates.json", '[{"text": "\\ud800"}]', RunError, "surrogates not allowed"),
        ("deep.json", "[" * 100_000, RunError, "recursion"),
        ("list.json", '["a"]', RunError, "row 1 is not an object, but str"),
        ("wide.csv", 'text,id\na,1\n"b\nb",c,2\n', RunError, "line 4 has more fields"),
        ("open.csv", 'text\n"a\n', RunError, "unexpected end of data"),
        ("head.csv", "text\n", UsageError, "holds no text"),
        ("control.jsonl", '{"a\\n\\u001b": "1"}', UsageError, "it has: a "),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, error, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=words) as caught:
        reading.load_file(str(path), "train")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("marked.txt", b"\xef\xbb\xbfa\r\nb\n", ["a\n", "b\n"]),
        ("marked.jsonl", b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\n\n{"text": null}\n{"id": 1}', ["a\u2028b"]),
        ("pretty.json", b'{\n "text": "a"\n}\n', ["a"]),
        ("table.csv", b'text\nNA\n""\n1\n"a ""b"", c\nd"\n', ["NA", "", "1", 'a "b", c\nd']),
        ("long.csv", b"text\n" + b"x" * 200_000, ["x" * 200_000]),
    ],
)
def test_texts_are_read_as_they_stand(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert reading.read_texts(str(tmp_path / name), "docs_file") == texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"body": "a 1", "id": 7}\n{"body": null}\n{"id": 1, "body": "b"}'),
        ("rows.csv", "body,id\na 1,7\nb,1\n"),
    ],
)
def test_without_a_column_text_the_first_is_read_and_named(tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert reading.read_texts(str(tmp_path / name), "docs_file") == ["a 1", "b"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f'--docs_file {tmp_path / name} has no column "text": its first, "body", is read'
    rows = reading.with_text(datasets.Dataset.from_dict({"body": ["a", None], "id": [1, 2]}), "owner/name")
    assert (rows.column_names, rows["text"][:]) == (["text"], ["a"])
    assert 'owner/name has no column "text"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    add_sentinels(tokenizer)
    return tokenizer


def sentinel_ids(tokenizer):
    return tokenizer.convert_tokens_to_ids(["<CL>", "<CR>"])


def plan(ratio=0.5, seed=0, compress=True):
    return span_plan.SpanPlan(compress, ratio, 10, seed)


def rows_of(texts):
    return datasets.Dataset.from_dict({"text": texts})


def test_matched_blocks_hold_the_same_text_for_every_method(tokenizer):
    cl, cr = sentinel_ids(tokenizer)
    stream = data_blocks.tokenize(rows_of(sentences(20, 0)), tokenizer, "test", None, None)
    assert stream["input_ids"].tolist() == [
        token for text in sentences(20, 0) for token in tokenizer(text)["input_ids"]
    ]
    tokens = data_blocks.cut_blocks(stream, 64, "test")["input_ids"]
    stream = stream["input_ids"]
    assert tokens.flatten().tolist() == stream[: len(stream) // 64 * 64].tolist()
    plain = data_blocks.Blocks(tokens, "test", plan(compress=False), cl, cr)
    marked = data_blocks.Blocks(tokens, "test", plan(), cl, cr)
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
        blocks = data_blocks.Blocks(tokens, split, plan(seed=seed), cl, cr)
        blocks.epoch = epoch
        return blocks[index]

    others = [block(split="test"), block(seed=1), block(epoch=1), block(index=1)]
    assert block() == block()
    assert all(other != block() for other in others)


def test_a_batch_is_padded_on_the_right():
    blocks = data_blocks.Blocks(torch.arange(3, 11)[None], "test", None, 1, 2)
    batch = blocks.collate([[3, 4, 1, 5, 6, 2, 7], [8, 9, 10]])
    assert batch["input_ids"].tolist() == [[3, 4, 1, 5, 6, 2, 7], [8, 9, 10, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[4, 5, -100, 6, 7, -100, -100], [9, 10] + [-100] * 5]


def test_paper_protocol_puts_sentinels_into_the_text_as_words(tokenizer, monkeypatch):
    cl, cr = sentinel_ids(tokenizer)
    texts = sentences(10, 0) + [" too short to touch \n"]
    stream = data_blocks.tokenize(rows_of(texts), tokenizer, "train", plan(0.6), None)["input_ids"].tolist()
    assert stream.count(cl) == stream.count(cr) > 0
    before = [tokenizer.decode(stream[i - 1]) for i, token in enumerate(stream) if token in (cl, cr)]
    within_a_line = [text for text in before if not text.endswith("\n")]
    assert set(within_a_line) == {" "}  # the lone space token of the published way
    assert len(within_a_line) > len(before) - len(texts)
    short = tokenizer(texts[-1])["input_ids"]
    assert stream[-len(short) :] == short
    monkeypatch.setattr(data_blocks, "cached_tensors", lambda kind, key, compute: compute())
    again = data_blocks.tokenize(rows_of(texts), tokenizer, "train", plan(0.6), 2)["input_ids"].tolist()
    assert again == stream  # whatever the number of workers
    assert (
        data_blocks.tokenize(rows_of(texts), tokenizer, "train", plan(0.6, seed=1), None)["input_ids"].tolist()
        != stream
    )


def test_marked_words_are_the_sampled_spans():
    words = [str(number) for number in range(60)]
    marked = data_blocks.mark_words(" ".join(words), plan(0.5), np.random.default_rng(0)).split(" ")
    assert [word for word in marked if word not in ("<CL>", "<CR>")] == words
    assert marked.count("<CL>") == marked.count("<CR>") > 0


def test_reserved_words_and_short_splits_are_refused(tokenizer):
    with pytest.raises(UsageError, match="row 1 of the train split"):
        data_blocks.tokenize(rows_of(["fine", "a <CR> b"]), tokenizer, "train", None, None)
    with pytest.raises(UsageError, match="too few for one block of 64"):
        data_blocks.cut_blocks({"input_ids": torch.arange(63)}, 64, "test")


def test_a_text_is_tokenized_once(tokenizer, monkeypatch):
    rows = rows_of(sentences(5, seed=77))
    first = data_blocks.tokenize(rows, tokenizer, "train", plan(0.6), None)
    monkeypatch.setattr(data_blocks, "_tokenize_batch", None)
    again = data_blocks.tokenize(rows_of(sentences(5, seed=77)), tokenizer, "train", plan(0.6), None)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):  # other spans, other tokens
        data_blocks.tokenize(rows, tokenizer, "train", plan(0.6, seed=1), None)


def test_units_are_found_once_with_each_spacy_and_model(tokenizer, monkeypatch):
    versions = {"spacy": "3.8.0", "en_core_web_sm": "3.8.0", "en_core_web_sm_other": "3.8.0"}
    asked = []

    def every_token(texts, offsets, unit, spacy_model):
        asked.append(spacy_model)
        return [[True] * len(own) for own in offsets]

    monkeypatch.setattr(machine, "installed_spacy", lambda: versions)
    monkeypatch.setattr(data_blocks, "installed_spacy", lambda: versions)
    monkeypatch.setattr(data_blocks, "unit_starts", every_token)

    def tokenize(model):
        rows = rows_of(sentences(5, seed=78))
        return data_blocks.tokenize(rows, tokenizer, "train", None, None, "phrase", model)["unit_starts"]

    assert all(tokenize(None)) and all(tokenize("en_core_web_sm"))
    assert asked == ["en_core_web_sm"]
    tokenize("en_core_web_sm_other")
    versions["en_core_web_sm"] = "3.9.0"
    tokenize("en_core_web_sm")
    assert asked == ["en_core_web_sm", "en_core_web_sm_other", "en_core_web_sm"]


WIKITEXT = ["", " = Anaximander = \n", " He lived . \n", " = = Life = = \n", " In Miletus . \n", " = X = \n", " Y . \n"]


def test_an_article_of_wikitext_is_a_document_and_any_other_row_is_one():
    assert data_blocks.document_numbers(WIKITEXT) == [0, 1, 1, 1, 1, 2, 2]
    assert data_blocks.document_numbers([" = X = \n", "a"]) == [0, 0]
    assert data_blocks.document_numbers(["a", " = = b = = \n", "c = d"]) == [0, 1, 2]


def test_a_document_is_a_row_or_an_article_as_asked(tokenizer):
    assert data_blocks.document_numbers(WIKITEXT, "articles") == data_blocks.document_numbers(WIKITEXT)
    assert data_blocks.document_numbers(WIKITEXT, "rows") == list(range(len(WIKITEXT)))
    assert data_blocks.document_numbers(["a", "b"], "rows") == data_blocks.document_numbers(["a", "b"])
    with pytest.raises(UsageError, match="--documents articles: the test split has no title line"):
        data_blocks.document_numbers(["a", "b"], "articles", "test")

    def numbers(documents):
        how = ("train", None, None, "token", None, documents)
        return data_blocks.tokenize(rows_of(WIKITEXT), tokenizer, *how)["documents"].unique().tolist()

    filled = [number for number, text in enumerate(WIKITEXT) if text]
    assert numbers("auto") == numbers("articles") == [1, 2] and numbers("rows") == filled
    identities = [
        run_settings.Settings(isolate_documents=True, documents=name).identity()
        for name in run_settings.ABOUT["documents"].choices
    ]
    assert [identity["documents"] for identity in identities] == ["auto", "rows", "articles"]


def test_a_title_stands_between_blank_rows():
    rows = [" = Anaximander = \n", "", " The step is \n", " = 1 rad / s = \n", " in all . \n", "\n", " = X = \n"]
    assert data_blocks.document_numbers(rows) == [0, 0, 0, 0, 0, 0, 1]
    assert data_blocks.document_numbers(["", " = X = \n", "", " Y . \n", " = Z = \n"]) == [0, 1, 1, 1, 1]
    assert data_blocks.document_numbers([row for row in rows if row.strip()]) == [0, 0, 1, 1, 2]  # no blank row to tell


def test_every_token_knows_its_document(tokenizer):
    stream = data_blocks.tokenize(rows_of(WIKITEXT), tokenizer, "train", None, None)
    text = {number: "" for number in range(3)}
    for token, number in zip(stream["input_ids"].tolist(), stream["documents"].tolist()):
        text[number] += tokenizer.decode(token)
    assert text == {0: "", 1: "".join(WIKITEXT[1:5]), 2: "".join(WIKITEXT[5:])}


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0, 0.8), st.integers(0, 4), st.integers(0, 5))
def test_spans_within_documents(lengths, ratio, sinks, recent):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    wanted = span_plan.SpanPlan(True, ratio, 8, 0, sink_tokens=sinks, recent_tokens=recent)
    try:
        exact = wanted.spans_by_document(documents, np.random.default_rng(0))
    except ValueError as error:
        assert "ratio" in str(error)
        return
    assert sum(last - first for first, last in exact) == round(ratio * len(documents))
    assert all(documents[first] == documents[last] and last - first < 8 for first, last in exact)
    assert all(sinks <= first and last < len(documents) - recent for first, last in exact)
    assert all(one[1] < other[0] for one, other in zip(exact, exact[1:]))


@pytest.mark.parametrize("sampler", run_settings.SPAN_SAMPLERS)
def test_every_sampler_keeps_sinks_and_recent_tokens_out_of_spans(sampler):
    tokens = torch.arange(3, 67).repeat(2, 1)
    wanted = span_plan.SpanPlan(True, 0.5, 10, 0, sampler, sink_tokens=3, recent_tokens=6, cr_tokens=2)
    information = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    ids = data_blocks.Blocks(tokens, "test", wanted, 1, 2, information=information)[1]
    exact = slow_rules.spans_of(ids, 1, 2, 2)
    assert slow_rules.removed(ids, 1, 2, cr_tokens=2) == 32
    inside = [token for first, last, _ in exact for token in ids[first + 1 : last]]
    assert min(inside) >= 3 + 3
    assert max(inside) < 67 - 6
    if sampler == "self_information":
        outside = set(range(6, 61)) - set(inside)
        chosen = information[1][torch.tensor(sorted(inside)) - 3].mean()
        assert chosen < information[1][torch.tensor(sorted(outside)) - 3].mean()


@pytest.mark.parametrize("in_plan", [True, False])
def test_the_attention_mask_numbers_documents(in_plan):
    tokens = torch.arange(3, 23)[None]
    documents = torch.tensor([[7] * 9 + [8] * 11])
    wanted = span_plan.SpanPlan(in_plan, 0.5, 5, 0)
    batch = data_blocks.Blocks(tokens, "test", wanted, 1, 2, documents=documents).batch([0])
    ids, mask = batch["input_ids"][0].tolist(), batch["attention_mask"][0].tolist()
    for index, (token, number) in enumerate(zip(ids, mask)):
        own = token
        if token == 1:
            own = next(other for other in ids[index:] if other > 2)
        elif token == 2:
            own = [other for other in ids[:index] if other > 2][-1]
        assert number == (1 if own - 3 < 9 else 2)
