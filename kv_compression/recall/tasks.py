"""What is asked of a compressed document: texts with something in them, and the questions whose answers need it.

Everything follows from a seed and a text. Names, numbers and wordings are none of those that
`kv_compression.data.asking` trains on. (This project; passkey after Mohtashami and Jaggi 2023, variables after RULER,
Hsieh et al. 2024.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kv_compression.data.asking import HELD_OUT

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PASSAGE, GIVEN = 48, 4  # tokens of a repeated passage, and of those how many the question gives
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karin", "Louis")
SURNAMES = ("Adler", "Brandt", "Carver", "Dalton", "Ellis", "Foster", "Graham", "Hobbs", "Irwin", "Keller", "Lowell")
WORDS = ("river", "copper", "winter", "ladle", "meadow", "parrot", "silver", "tunnel", "walnut", "zebra", "lantern")
WORDS += ("blanket", "cotton", "dolphin", "emerald", "forest", "granite", "harbor", "ivory", "jungle")
FACTS_OF_A_DOCUMENT, FACTS_ASKED_TOGETHER, LIST_LENGTH, CHAIN = 4, 6, 8, 3
START = 2  # tokens of the text that stand before anything else: what all methods may keep as sinks


class Question(NamedTuple):
    """A question about a document, its answer, and the first and last of the document's tokens that answer it."""

    ids: list[int]
    answer: list[int]
    needed: tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A `document` (token ids), the same with something else in place of what is asked (`without`), and `questions`.

    `depth` is where the asked text lies, from 0 (the document's beginning) to 1.
    """

    document: list[int]
    without: list[int]
    questions: list[Question]
    depth: float


@dataclass(frozen=True)
class Source:
    """Where documents come from: a stream of token ids and a tokenizer."""

    text: Sequence[int]
    tokenizer: object

    def ids(self, words: str) -> list[int]:
        """Words as token ids, without special tokens."""
        return self.tokenizer(words, add_special_tokens=False)["input_ids"]

    def stretch(self, length: int, rng: np.random.Generator) -> list[int]:
        """So many tokens of the text, from a random place on."""
        start = int(rng.integers(0, len(self.text) - length + 1))
        return list(self.text[start : start + length])


def number(rng: np.random.Generator, digits: int = 5) -> str:
    """A number that training never asks for."""
    low, high = -(-(10 ** (digits - 1)) // HELD_OUT), 10**digits // HELD_OUT
    return str(HELD_OUT * int(rng.integers(low, high)))


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """So many different numbers."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[number(rng)] = None
    return list(found)


def placed(source: Source, length: int, parts: list[list[int]], at: list[float], rng) -> tuple[list[int], list[int]]:
    """A document of `length` tokens with `parts` at these depths (rising, 0 to 1), and where each part begins.

    ValueError if the parts fill the document.
    """
    room = length - sum(map(len, parts))
    if room <= START:
        raise ValueError(f"a document of {length} tokens is too short for what it is to say")
    filler = source.stretch(length, rng)[:room]  # the same, however long the parts are
    tokens, begins, taken = [], [], 0
    for depth, part in zip(at, parts):
        place = START + round(depth * (room - START))
        tokens += filler[taken:place]
        begins.append(len(tokens))
        tokens += part
        taken = place
    return tokens + filler[taken:], begins


def repeat(source: Source, length: int, depth: float, rng) -> Example:
    """A passage, filler, and the passage again: all but its first tokens are the answer."""
    passage, other = source.stretch(PASSAGE, rng), source.stretch(PASSAGE, rng)
    state = rng.bit_generator.state
    document, (begin,) = placed(source, length, [passage], [depth], rng)
    rng.bit_generator.state = state
    without, _ = placed(source, length, [other], [depth], rng)
    question = Question(source.ids("\n\n") + passage[:GIVEN], passage[GIVEN:], (begin + GIVEN, begin + PASSAGE - 1))
    return Example(document, without, [question], depth)


def passkey(source: Source, length: int, depth: float, rng) -> Example:
    """A code at some depth of a text."""
    key, other = numbers(rng, 2)
    said = [source.ids(" Remember the access code:"), source.ids(f" {key}"), source.ids(".")]
    return _one_of(source, length, [said], [depth], 0, f" {other}", "\nThe access code to remember:", rng)


def key_value(source: Source, length: int, depth: float, rng) -> Example:
    """Four people with a locker each, at random places; one is asked for."""
    return _about_people(source, length, FACTS_OF_A_DOCUMENT, rng, asked=1)


def ask_many(source: Source, length: int, depth: float, rng) -> Example:
    """Six people with a locker each, all asked for."""
    return _about_people(source, length, FACTS_ASKED_TOGETHER, rng, asked=FACTS_ASKED_TOGETHER)


def variables(source: Source, length: int, depth: float, rng) -> Example:
    """A chain of assignments through the text, of which the end is asked for."""
    key, other = numbers(rng, 2)
    names = [f"{letter}{rng.integers(10, 99)}" for letter in rng.permutation(list("XYZW"))[:CHAIN]]
    said = [[source.ids(f" Let {names[0]} be"), source.ids(f" {key}"), source.ids(".")]]
    said += [[source.ids(f" Let {new} be {old}."), [], []] for old, new in zip(names, names[1:])]
    at = sorted(rng.uniform(0, 0.8, CHAIN).tolist())
    return _one_of(source, length, said, at, 0, f" {other}", f"\nThe value of {names[-1]}:", rng)


def copy(source: Source, length: int, depth: float, rng) -> Example:
    """A list of words, asked for in order."""
    words, others = (rng.choice(WORDS, LIST_LENGTH, replace=False) for _ in range(2))
    said = [source.ids(" The list is:"), source.ids(" " + ", ".join(words)), source.ids(".")]
    return _one_of(source, length, [said], [depth], 0, " " + ", ".join(others), "\nThe whole list:", rng)


def _about_people(source: Source, length: int, count: int, rng, asked: int) -> Example:
    firsts, lasts = (rng.choice(pool, count, replace=False) for pool in (NAMES, SURNAMES))
    people = [f"{first} {last}" for first, last in zip(firsts, lasts)]
    drawn = numbers(rng, 2 * count)
    keys, others = drawn[:count], drawn[count:]
    before, after = " The locker of {} opens with", "."
    said = [
        [source.ids(before.format(who)), source.ids(f" {key}"), source.ids(after)] for who, key in zip(people, keys)
    ]
    at = sorted(rng.uniform(0, 1, count).tolist())
    chosen = rng.permutation(count)[:asked].tolist()
    state = rng.bit_generator.state
    examples = []
    for who in chosen:  # the same filler for all
        rng.bit_generator.state = state
        ask = f"\nThe locker of {people[who]} opens with"
        examples.append(_one_of(source, length, said, at, who, f" {others[who]}", ask, rng))
    questions = [example.questions[0] for example in examples]
    return Example(examples[0].document, examples[0].without, questions, at[chosen[0]])


def _one_of(source: Source, length: int, said, at, which: int, other: str, ask: str, rng) -> Example:
    """A document that says all of `said` (before, value, after), of which the value of one is asked for.

    Without it, `other` stands in its place.
    """
    parts = [[token for piece in pieces for token in piece] for pieces in said]
    state = rng.bit_generator.state
    document, begins = placed(source, length, parts, at, rng)
    before, value, after = said[which]
    changed = list(parts)
    changed[which] = before + source.ids(other) + after
    rng.bit_generator.state = state
    without, _ = placed(source, length, changed, at, rng)
    begin = begins[which] + len(before)
    return Example(document, without, [Question(source.ids(ask), value, (begin, begin + len(value) - 1))], at[which])


TASKS: dict[str, Callable[..., Example]] = {
    task.__name__: task for task in (repeat, passkey, key_value, variables, copy, ask_many)
}


def examples(task: str, source: Source, lengths: Sequence[int], count: int, seed: int) -> Iterator[tuple[int, Example]]:
    """`count` examples of each length that a task is asked at, with their length; depths take turns.

    passkey is asked at all lengths, every other task at the first.
    """
    for length in lengths if task == "passkey" else lengths[:1]:
        for index in range(count):
            rng = np.random.default_rng([seed, list(TASKS).index(task), length, index])
            yield length, TASKS[task](source, length, DEPTHS[index % len(DEPTHS)], rng)
