"""Blocks that ask for what they said: their length, their answers, their spans and their weights."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_compression.data.asking import HELD_OUT, Asking
from kv_compression.data.blocks import IGNORED, Blocks
from kv_compression.methods.ratio import entries_to_remove, shortest_spans
from kv_compression.spans.plan import SpanPlan

CL, CR = 1, 2


class Letters:
    """A tokenizer of letters: ids from 100 on, so that no text token is a sentinel."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [100 + ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(chr(token - 100) for token in ids)


def blocks(echo: float, facts: float, size: int = 256, count: int = 12, **options) -> Blocks:
    text = torch.from_numpy(np.random.default_rng(3).integers(10, 90, (count, size)))
    plan = options.pop("plan", SpanPlan(True, 0.75, 25, 0, "shortest", sink_tokens=1, recent_tokens=4))
    return Blocks(text, "train", plan, CL, CR, asking=Asking(Letters(), echo, facts), **options)


@given(st.integers(0, 10_000), st.integers(64, 400))
def test_an_echo_repeats_what_stands_in_its_context(seed, size):
    text = np.random.default_rng(seed).integers(10, 10**6, size).tolist()
    asked = Asking(Letters(), 1.0, 0.0).ask(text, np.random.default_rng(seed))
    assert len(asked.tokens) == len(asked.answers) == size and not asked.answers[: asked.context].any()
    assert asked.tokens[: asked.context] == text[: asked.context]
    answer = [token for token, is_answer in zip(asked.tokens, asked.answers) if is_answer]
    begins = [at for at in range(asked.context) if text[at : at + len(answer)] == answer]
    assert len(begins) == 1 and begins[0] + len(answer) <= asked.context


@given(st.integers(0, 10_000))
def test_every_answer_about_facts_was_said_and_no_number_is_held_out(seed):
    tokenizer = Letters()
    text = np.random.default_rng(seed).integers(10, 90, 512).tolist()
    asked = Asking(tokenizer, 0.0, 1.0).ask(text, np.random.default_rng(seed))
    assert len(asked.tokens) == len(asked.answers) == 512
    said = tokenizer.decode([token for token in asked.tokens[: asked.context] if token >= 100])
    tail = zip(asked.tokens[asked.context :], asked.answers[asked.context :])
    answers = tokenizer.decode([token if is_answer else 100 + ord("\n") for token, is_answer in tail]).split()
    assert answers
    for answer in answers:
        assert f" {answer}" in said
        assert not answer.isdigit() or int(answer) % HELD_OUT


def test_shares_decide_how_many_blocks_ask_and_text_stays_text():
    made = blocks(0.5, 0.25, count=400)
    kinds = [made.asked(index) for index in range(400)]
    assert 0.68 < np.mean([asked is not None for asked in kinds]) < 0.82
    plain = next(index for index, asked in enumerate(kinds) if asked is None)
    assert [token for token in made[plain] if token not in (CL, CR)] == made.tokens[plain].tolist()


def test_spans_lie_before_the_question_and_remove_the_share_of_the_context():
    made = blocks(0.5, 0.5)
    for index in range(len(made)):
        asked, ids = made.asked(index), made[index]
        text = [token for token in ids if token not in (CL, CR)]
        assert text == asked.tokens
        last = max(at for at, token in enumerate(ids) if token == CR)
        before = [token for token in ids[:last] if token not in (CL, CR)]
        assert len(before) <= asked.context
        inside = sum(1 for at, token in enumerate(ids) if token not in (CL, CR) and _in_span(ids, at))
        assert inside - ids.count(CR) == round(0.75 * asked.context)


def _in_span(ids: list[int], at: int) -> bool:
    opened = [token for token in ids[:at] if token in (CL, CR)]
    return bool(opened) and opened[-1] == CL


def test_all_methods_are_asked_the_same():
    compressed, plain = blocks(0.4, 0.4), blocks(0.4, 0.4, plan=None)
    for index in range(len(plain)):
        assert plain[index] == [token for token in compressed[index] if token not in (CL, CR)]
    other = blocks(0.4, 0.4, plan=None)
    other.epoch = 1
    assert any(plain[index] != other[index] for index in range(len(plain)))


def test_answers_weigh_more_and_nothing_else_does():
    made = blocks(0.5, 0.5, answer_weight=5.0)
    batch = made.batch(range(len(made)))
    for index in range(len(made)):
        targets = batch["labels"][index] != IGNORED
        weights, labels = batch["weights"][index][targets], batch["labels"][index][targets]
        answers = torch.from_numpy(made.asked(index).answers)
        assert labels.tolist() == made.asked(index).tokens[1:]
        assert weights.tolist() == [5.0 if is_answer else 1.0 for is_answer in answers[1:]]
        assert made.weight(index) == float(weights.sum())
    assert "weights" not in blocks(0.5, 0.5).batch([0, 1])


def test_a_block_that_is_too_short_for_a_fact_is_refused():
    with pytest.raises(ValueError, match="do not fit a block of 32"):
        Asking(Letters(), 0.0, 1.0).ask(list(range(10, 42)), np.random.default_rng(0))


@given(st.integers(10, 300), st.floats(0.01, 0.9), st.integers(2, 40), st.integers(0, 4))
def test_shortest_spans_are_the_least_that_fit(num_tokens, ratio, longest, first):
    def fits(length):
        try:
            return entries_to_remove(num_tokens, ratio, length, first=first) >= 0
        except ValueError:
            return False

    expected = [length for length in range(2, longest + 1) if fits(length)]
    if not expected:
        with pytest.raises(ValueError):
            shortest_spans(num_tokens, ratio, longest, first=first)
    else:
        assert shortest_spans(num_tokens, ratio, longest, first=first) == expected[0]


def test_a_range_gives_every_training_block_a_ratio_of_its_own():
    plan = SpanPlan(True, 0.9, 25, 0, "shortest", lowest_ratio=0.5)
    text = torch.arange(10, 266).expand(40, 256)
    train, test = (Blocks(text, split, plan, CL, CR) for split in ("train", "test"))
    removed = [_removed(train[index]) / 256 for index in range(40)]
    assert 0.49 < min(removed) < 0.6 and 0.8 < max(removed) < 0.91
    assert {_removed(test[index]) for index in range(40)} == {round(0.9 * 256)}


def _removed(ids: list[int]) -> int:
    return sum(1 for at, token in enumerate(ids) if token not in (CL, CR) and _in_span(ids, at)) - ids.count(CR)
