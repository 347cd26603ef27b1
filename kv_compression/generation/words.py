"""What a word is, in any script: where documents are cut, and what ROUGE compares.

A run is a letter or digit and the letters and digits that follow it, with their combining marks, joiners and soft
hyphens: what Unicode attaches to the character before it (UAX #29, rules WB3c and WB4) never ends a run. A word is one
or more runs, joined by an apostrophe between letters or a point between digits: "don't" and "3.50" are words of two
runs each. Documents are cut between words. ROUGE compares runs, because rouge_score splits at apostrophes and points,
and figures for ASCII text must stay its own. In scripts without spaces (Chinese, Japanese, Thai) a run goes from one
punctuation mark to the next.
"""

import unicodedata

import regex

_ATTACHED = r"[\p{M}\p{Cf}--\u200B]"  # marks, format characters; U+200B, the zero-width space, separates words
_RUN = rf"[\p{{L}}\p{{N}}][\p{{L}}\p{{N}}||{_ATTACHED}]*"
# The apostrophes, and Hebrew's geresh and gershayim, which stand between letters as apostrophes do.
_JOINT = rf"(?:(?<=\p{{L}}{_ATTACHED}*)['’׳״](?=\p{{L}})|(?<=\d{_ATTACHED}*)\.(?=\d))"
RUN = regex.compile(_RUN, regex.VERSION1)
WORD = regex.compile(rf"{_RUN}(?:{_JOINT}{_RUN})*", regex.VERSION1)
_FORMAT = regex.compile(r"[\p{Cf}--\u200B]", regex.VERSION1)


def folded_runs(text: str) -> list[str]:
    """The runs of a text, alike for every case, Unicode form (NFC, NFD) and joiner.

    Accents and vowel points count. For ASCII text these are rouge_score's tokens. (This project.)
    """
    folded = unicodedata.normalize("NFD", text).casefold()
    return RUN.findall(_FORMAT.sub("", unicodedata.normalize("NFD", folded)))
