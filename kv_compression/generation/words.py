"""What a word is, in any script: where documents are cut, and what ROUGE compares.

A run is a letter or digit and all that follow it, with their combining marks, joiners and soft hyphens: what Unicode
attaches to the character before it (UAX #29, rules WB3c and WB4) never ends a run. A word is runs that an apostrophe
joins between letters, or a point between digits: "don't" and "3.50" are a word of two runs each. Documents are cut
between words. ROUGE compares runs, because rouge_score splits at apostrophes and points, and figures for ASCII text are
to stay its own. Scripts without spaces (Chinese, Japanese, Thai) have a run from one punctuation mark to the next.
"""

import unicodedata

import regex

_ATTACHED = r"[\p{M}\p{Cf}--\u200B]"  # marks and format characters; U+200B, the space of no width, parts words
_RUN = rf"[\p{{L}}\p{{N}}][\p{{L}}\p{{N}}||{_ATTACHED}]*"
# Besides the apostrophes Hebrew's geresh and gershayim, which stand between letters as these do.
_JOINT = rf"(?:(?<=\p{{L}}{_ATTACHED}*)['’׳״](?=\p{{L}})|(?<=\d{_ATTACHED}*)\.(?=\d))"
RUN = regex.compile(_RUN, regex.VERSION1)
WORD = regex.compile(rf"{_RUN}(?:{_JOINT}{_RUN})*", regex.VERSION1)
_FORMAT = regex.compile(r"[\p{Cf}--\u200B]", regex.VERSION1)


def folded_runs(text: str) -> list[str]:
    """The runs of a text, alike for texts that differ in case, in Unicode's form (NFC, NFD) or in joiners alone.

    Accents count, vowel points too. For ASCII text these are rouge_score's tokens. (This project.)
    """
    folded = unicodedata.normalize("NFD", text).casefold()
    return RUN.findall(_FORMAT.sub("", unicodedata.normalize("NFD", folded)))
