"""Hints that must not reach a teacher: too long, or telling what could not be known at their turn.

**Leak filter.** A hint is knowledge from the end of the episode. It may say what to do; it may not
hand over an order number that was found three turns later, because then the student is trained to
guess numbers. So every *id or number* of a hint and of its corrected action, that is every token
with a digit in it, must occur in the turn's own context h_k (the decoded prompt ids), in the
instruction or in what every task shares. So must every *name*: words between brackets or quotation
marks in the corrected action (option values, arguments), and words of the hint with a capital
inside a sentence that occur in the corrected action or were observed later. The failure cause is
not filtered: it explains an observation that the teacher may see.

**How texts are compared.** h_k went through a tokenizer, and word-level tokenizers give back `p42`
as `p42`, `p 42` or `p 4 2`. Both texts are therefore normalised (Unicode form, case, `1,200` =
`1200`), runs of single digits are joined (`p 4 2` -> `p 42`), and inside a token a little
punctuation or white space may stand between letters and digits, so that `p42`, `P-42` and `p 42`
are one id. A match may not begin or end inside a longer number: 42 is not known from 142 or 4 2 0.
In doubt (`42` where the context has `p42`) a token counts as known.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import pairwise

from hero.config import ReflectionConfig
from hero.renderer import Renderer
from hero.types import Diagnosis, Trajectory

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BETWEEN_SINGLE_DIGITS = re.compile(r"(?<=(?<!\d)\d)\s(?=\d(?!\d))")
TOKEN = re.compile(r"[^\W_]+(?:(?<=\d)[.:/-](?=\d)[^\W_]+)*")
"""Letters and digits, joined by punctuation only between digits: `b07xyz`, `12.99`, `10:30`."""
WORD = re.compile(r"[^\W\d_]{2,}")
ARGUMENT = re.compile(r"""\[([^\[\]]*)\]|\(([^()]*)\)|"([^"]*)"|(?<!\w)'([^']*)'(?!\w)""")
INSIDE_SENTENCE = re.compile(r"(?<=[\w,;] )\w+")
LONGEST_NAME = 6
MAX_ID_CHARS = 1000
"""Of all ids of a hint and its action: more of them is a list of what was found, not a hint."""
PIECE = re.compile(r"\d+|[^\W\d_]+")


class Verdict(StrEnum):
    """What a filter did to a diagnosis."""

    KEPT = "kept"
    LEAKED = "leaked"
    TOO_LONG = "too_long"


class HintFilter:
    """Both filters, as `config` asks for them, with the tokenizer they count and compare by."""

    def __init__(self, renderer: Renderer, config: ReflectionConfig, shared: str = "") -> None:
        """`shared` is text that is known in every task: rules, the words of the action format."""
        self.renderer = renderer
        self.config = config
        self.shared = shared

    def apply(self, diagnosis: Diagnosis, trajectory: Trajectory) -> tuple[Diagnosis, Verdict]:
        """The diagnosis of one turn, its hint removed if it may not be shown.

        A leak in the hint or the corrected action removes both: one may paraphrase the other.
        """
        verdict = Verdict.KEPT
        if len(self.renderer.encode(diagnosis.hint)) > self.config.max_hint_tokens:
            diagnosis, verdict = replace(diagnosis, hint=""), Verdict.TOO_LONG
        if self.config.leak_filter and self._leaks(diagnosis, trajectory):
            return replace(diagnosis, hint="", corrected_action=""), Verdict.LEAKED
        return diagnosis, verdict

    def _leaks(self, diagnosis: Diagnosis, trajectory: Trajectory) -> bool:
        names = numbered_names(f"{diagnosis.hint}\n{diagnosis.corrected_action}")
        if sum(map(len, names)) > MAX_ID_CHARS:  # each is looked for in the whole context
            return True
        if names and unknown_names(names, self._known(diagnosis, trajectory)):
            return True
        return self.is_specific(diagnosis, trajectory)

    def is_specific(self, diagnosis: Diagnosis, trajectory: Trajectory) -> bool:
        """Whether hint or corrected action give away a name that could not be known."""
        later = [turn.observation or "" for turn in trajectory.turns[diagnosis.turn :]]
        names = plain_names(diagnosis.hint, diagnosis.corrected_action, " ".join(later))
        # Without a name, the usual case, a long prompt need not be decoded.
        return bool(names) and not names <= words(self._known(diagnosis, trajectory))

    def _known(self, diagnosis: Diagnosis, trajectory: Trajectory) -> str:
        context = self.renderer.decode(trajectory.turns[diagnosis.turn].prompt_ids)
        return f"{context}\n{trajectory.instruction}\n{self.shared}"


def words(text: str) -> set[str]:
    """Its words of two letters or more, in normal form."""
    return set(WORD.findall(_normalise(text)))


def plain_names(hint: str, action: str, later: str) -> set[str]:
    """Words that look like names: arguments of `action`, capitals in `hint` that were met `later`.

    Arguments of more than `LONGEST_NAME` words are sentences and name nothing.
    """
    arguments = [part for match in ARGUMENT.findall(action) for part in match if part]
    names = {w for a in arguments if len(a.split()) <= LONGEST_NAME for w in words(a)}
    capitals = " ".join(word for word in INSIDE_SENTENCE.findall(hint) if word[0].isupper())
    return names | (words(capitals) & (words(later) | words(action)))


def numbered_names(text: str) -> list[str]:
    """Ids and numbers of a text in normal form, each once: its tokens that contain a digit."""
    tokens = TOKEN.findall(_join_digits(_normalise(text)))
    return list(dict.fromkeys(token for token in tokens if any(c.isdecimal() for c in token)))


def unknown_names(names: Sequence[str], known: str) -> list[str]:
    """Those of `names` (from `numbered_names`) that do not occur in the text `known`."""
    known = _normalise(known)
    # Both readings: single digits in a row are a spelled-out number or a list ("sizes 7 8 9").
    known = f"{known}\n{_join_digits(known)}"
    return [name for name in names if not _pattern(name).search(known)]


def _normalise(text: str) -> str:
    return THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())


def _join_digits(text: str) -> str:
    return BETWEEN_SINGLE_DIGITS.sub("", text)


def _pattern(name: str) -> re.Pattern[str]:
    pieces = PIECE.findall(name)
    body = pieces[0]
    for left, right in pairwise(pieces):
        both_digits = left[-1].isdecimal() and right[0].isdecimal()  # 12.99 is not 1299
        body += (r"[\W_]{1,3}" if both_digits else r"[\W_]{0,3}") + right
    before = r"(?<!\d)" if pieces[0].isdecimal() else r"(?<![^\W_])"
    after = r"(?!\d)" if pieces[-1].isdecimal() else r"(?![^\W_])"
    return re.compile(before + body + after)
