import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from kv_compression.generation.documents import split_document
from kv_compression.generation.words import RUN, WORD, folded_runs

ASCII = st.text(st.characters(max_codepoint=127))
JOINERS = {"zero width non-joiner": "\u200c", "zero width joiner": "\u200d", "soft hyphen": "\u00ad"}
TEXTS = {
    "Hindi": "झील के पास एक पुरानी चक्की है",
    "Tamil": "ஏரிக்கு அருகில் பழைய ஆலை",
    "Malayalam": "അവന്\u200d പഴയ മില്ലില്\u200d ആണ്",
    "French, decomposed": unicodedata.normalize("NFD", "La forêt près du château était l'été fermée"),
    "Vietnamese, decomposed": unicodedata.normalize("NFD", "Cối xay gió cũ bên hồ nước"),
    "Persian": "آسیاب\u200cهای قدیمی کنار دریاچه",
    "Arabic": "طاحونة قديمة قُرْبَ البحيرة",
    "Hebrew": "הַטַּחֲנָה לְיַד צה״ל הָאֲגַם",
    "Ukrainian": "п’ять м'ячів біля млина",
    "Greek": "Ο παλιός μύλος δίπλα στη λίμνη",
    "soft hyphens": "wind\u00admills near the lake\u00adside",
    "word joiner": "wind\u2060mills near it",
}


@pytest.mark.parametrize("name", TEXTS)
def test_no_word_is_cut_in_any_script(name):
    text = TEXTS[name]
    words = text.split()
    assert WORD.findall(text) == words
    for count in range(1, len(words)):
        document = split_document(0, text, count, 1)
        assert document.prefix.split() == words[:count]
        assert document.reference.split() == [words[count]]
        assert document.reference[0] == " "


def test_apostrophes_join_letters_alone_and_points_digits():
    """As in the public reproduction of the paper."""
    found = WORD.findall("Don't say it’s 1980's or 10’x8' 'n' 3.50, v2.0.1 a.b 5.x l'\u00e9te\u0301'a x_y 90\u200b91")
    numbers = ["1980", "s", "or", "10", "x8", "n", "3.50", "v2.0.1", "a", "b", "5", "x"]
    assert found == ["Don't", "say", "it’s", *numbers, "l'\u00e9te\u0301'a", "x", "y", "90", "91"]


@given(ASCII)
def test_words_of_ascii_text_are_cut_as_before_but_for_apostrophes(text):
    """As runs of letters and digits, with apostrophes between letters and points between digits."""
    letter = r"[A-Za-z0-9]"
    expected = re.compile(rf"{letter}(?:{letter}|(?<=[A-Za-z])'(?=[A-Za-z])|(?<=[0-9])\.(?=[0-9]))*")
    assert WORD.findall(text) == expected.findall(text)


@given(st.text())
def test_words_are_whole_runs(text):
    words = WORD.findall(text)
    assert [run for word in words for run in RUN.findall(word)] == RUN.findall(text)
    for word in WORD.finditer(text):
        following = text[word.end() : word.end() + 1]
        assert not following.isalnum() and not unicodedata.category(following or " ").startswith("M")


@given(ASCII)
def test_the_runs_of_ascii_text_are_rouge_score_s_tokens(text):
    assert folded_runs(text) == DefaultTokenizer().tokenize(text)


@given(st.text())
def test_runs_are_the_same_in_every_form_of_unicode(text):
    forms = {form: folded_runs(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")}
    assert forms["NFC"] == forms["NFD"] == folded_runs(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Straße", "STRASSE"), ("ΣΟΦΟΣ", "σοφος"), ("Над Озером", "над озером"), ("\u212a9", "k9")]
    + [(f"wind{joiner}mills", "windmills") for joiner in JOINERS.values()],
)
def test_case_and_joiners_do_not_count(one, other):
    assert folded_runs(one) == folded_runs(other) != []


def test_accents_points_and_scripts_without_spaces():
    assert folded_runs("für") != folded_runs("fär")
    assert folded_runs("שָׁלוֹם") != folded_runs("שלום")
    assert folded_runs("湖边的旧磨坊。湖边") == ["湖边的旧磨坊", "湖边"]  # a run from mark to mark
    assert WORD.findall("湖边的旧磨坊。湖边") == ["湖边的旧磨坊", "湖边"]
