"""Training blocks that ask for what they said: a stretch of their text again, or facts put into it.

A model learns to remember only if something later depends on it, which plain text seldom asks for. All of it is made
from the training text itself, a seed and the wordings below; those of `kv_compression.recall` are others. (This
project.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CUES = ("\n\nAgain:", "\n\nOnce more:", "\n\nTo repeat:", "\n\nThe text said:", "")
SYLLABLES = (
    "ba",
    "den",
    "dor",
    "fal",
    "gri",
    "hol",
    "jes",
    "kam",
    "lor",
    "mir",
    "nel",
    "pos",
    "quin",
    "ras",
    "tun",
    "vel",
)
FACTS = (  # what is said, what is asked
    (" The number of {name} is{value}.", "\nThe number of {name}?"),
    (" {name} has the number{value}.", "\nWhich number has {name}?"),
    (" Ticket{value} was sold to {name}.", "\nWhich ticket was sold to {name}?"),
    (" The room of {name} is room{value}.", "\nIn which room is {name}?"),
    (" {name} paid{value} in all.", "\nWhat did {name} pay?"),
)
THINGS = ("apple", "bridge", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle")
THINGS += ("ladder", "mirror", "needle", "orange", "pencil", "ribbon", "saddle", "temple", "violin", "window")
THING_FACTS = (
    (" {name} carried the{value}.", "\nWhat did {name} carry?"),
    (" The gift of {name} was the{value}.", "\nWhat was the gift of {name}?"),
)
HELD_OUT = 7  # numbers that this divides are left to the evaluation
SHORTEST_ECHO, LONGEST_CUE = 8, 6  # tokens


class Asked(NamedTuple):
    """A block that asks: its `tokens`, how many of the first are `context`, and which tokens are `answers` (bool)."""

    tokens: list[int]
    context: int
    answers: np.ndarray


@dataclass(frozen=True)
class Asking:
    """Which share of blocks repeats a stretch of text (`echo_share`) or asks for facts (`fact_share`).

    A block keeps its length: questions and answers take the place of its last tokens, facts that of others.
    """

    tokenizer: object
    echo_share: float
    fact_share: float

    def ask(self, text: list[int], rng: np.random.Generator) -> Asked | None:
        """The block `text` as one that asks, None for one that stays as it is. `rng` decides."""
        kind = rng.random()
        if kind < self.echo_share:
            return self.echo(text, rng)
        return self.facts(text, rng) if kind < self.echo_share + self.fact_share else None

    def echo(self, text: list[int], rng: np.random.Generator) -> Asked:
        """Text, a cue, and a stretch of the text again, of which the first tokens belong to the cue."""
        words = self._ids(CUES[rng.integers(len(CUES))])
        room = len(text) - len(words)
        length = int(rng.integers(SHORTEST_ECHO, max(room // 2, SHORTEST_ECHO + 1)))
        context = room - length
        start = int(rng.integers(0, context - length + 1))
        given = int(rng.integers(1, min(LONGEST_CUE, length - 1) + 1))
        tokens = text[:context] + words + text[start : start + length]
        answers = np.arange(len(tokens)) >= len(tokens) - length + given
        return Asked(tokens, context, answers)

    def facts(self, text: list[int], rng: np.random.Generator) -> Asked:
        """Facts at random places of the text, and a question about each, in another order."""
        told, asked, room = [], [], len(text)
        for _ in range(int(rng.integers(1, 1 + max(len(text) // 32, 1)))):
            fact, question, answer = self._fact(rng)
            length = len(fact) + len(question) + len(answer)
            if told and length > room - len(text) // 4:
                break
            told.append(fact)
            asked.append((question, answer))
            room -= length
        if room < 0:
            raise ValueError(f"a fact and its question do not fit a block of {len(text)}: give a longer --block_size")
        tokens, taken = [], 0
        for place, fact in zip(sorted(rng.integers(0, room + 1, len(told)).tolist()), told):
            tokens += text[taken:place] + fact
            taken = place
        tokens += text[taken:room]
        context, answers = len(tokens), [False] * len(tokens)
        for number in rng.permutation(len(asked)):
            question, answer = asked[number]
            tokens += question + answer
            answers += [False] * len(question) + [True] * len(answer)
        return Asked(tokens, context, np.array(answers))

    def _fact(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
        """A fact, the question about it and the answer, as token ids."""
        name = " ".join("".join(rng.choice(SYLLABLES, 2)).capitalize() for _ in range(2))
        if rng.random() < 0.75:
            said, question = FACTS[rng.integers(len(FACTS))]
            digits = int(rng.integers(3, 7))
            number = int(rng.integers(10 ** (digits - 1), 10**digits))
            value = f" {number + (number % HELD_OUT == 0)}"
        else:
            said, question = THING_FACTS[rng.integers(len(THING_FACTS))]
            value = f" {THINGS[rng.integers(len(THINGS))]}"
        said = said.format(name=name, value=value)
        return self._ids(said), self._ids(question.format(name=name)), self._ids(value)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
