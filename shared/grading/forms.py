r"""What form an answer has, before its mathematics: a choice "(B)", words, or an expression.

read(r"\text{(B)}")  ->  choice B        read("no solution")  ->  the empty set
read("Monday.")      ->  text "monday"   read("18 dollars")   ->  measure of dollars
"""

from __future__ import annotations

import re

from shared.grading import tree
from shared.grading.caps import MAX_LENGTH, TooMuchError
from shared.grading.parse import read as read_expression
from shared.grading.tree import Node
from shared.grading.words import (
    EMPTY_WORDS,
    FUNCTIONS,
    GREEK,
    NUMBER_WORDS,
    REAL_WORDS,
    SAME_WORDS,
    SHORT_GREEK,
)

_WRAPPER = re.compile(
    r"\\(?:text|mbox|hbox|textnormal|textrm|textbf|textit|textsf|mathrm|mathbf|mathsf|emph|rm|bf"
    r"|boxed|fbox|underline|operatorname)\s*\{([^{}\\]*)\}"
)
_SPACES = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))+")
_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? ?)?"
    r"(?:\((?P<round>[A-Ja-j])\)|\[(?P<square>[A-J])\]|(?P<bare>[A-J])(?P<mark>[.):]))"
    r"(?:[.:)]? ?(?P<rest>.*))?",
    re.IGNORECASE | re.DOTALL,
)
_NAMED_CHOICE = re.compile(r"(?:answer|option|choice)(?: is)?:? ?\(?([A-Ja-j])\)?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z\s,'’.\-&/;:()\"!?]*(?: \d{1,4}(?:st|nd|rd|th)?)?")
_NUMERAL = re.compile(
    r"\(?(?P<digits>(?=[A-Z]*\d)[0-9A-Z]+)\)? ?_ ?\{? ?(?P<base>1[1-9]|[23]\d) ?\}?"
)
_CLOCK = re.compile(r"(?<=\d)\s*([ap])\.?\s?m\.?\s*$", re.IGNORECASE)
_TO = re.compile(r"\s*(\d+) to (\d+)\s*")
_ARTICLES = frozenset("a an the is are it its".split())
_SAID = re.compile(r"\s*\\(?:text|mbox)\s*\{[A-Za-z' ]{1,60}\b(?:is|are|equals)[:=]?\s*\}")
_ABOUT = re.compile(  # what is said before a value: "about 5", "The solutions are x = 1"
    r"\s*(?:(?:[A-Za-z' ]{1,60}\b(?:is|are|equals?|equal to|be)|approximately|about|around|roughly"
    r"|exactly|a total of|total|only|approx\.?|ca\.)\s*[:=]?\s+|[:=]\s*)"
    r"(?=[\d$\\(+\-.\[{]|[a-zA-Z]\s*[=<>])",
    re.IGNORECASE,
)


def read(text: str, *, lists: bool = False) -> Node:
    """The tree of an answer. Raises TooMuchError or UnreadableError, nothing else."""
    if len(text) > MAX_LENGTH:
        raise TooMuchError(f"longer than {MAX_LENGTH} characters")
    if found := _SAID.match(text):
        text = text[found.end() :]
    if found := _ABOUT.match(text):
        text = text[found.end() :]
    plain = _plain(text)
    return (
        _choice(plain)
        or _numeral(plain)
        or _words(plain)
        or _expression(plain if _WRAPPER.fullmatch(text.strip()) else text, lists)
    )


def _expression(text: str, lists: bool) -> Node:
    text = _TO.sub(r"\1:\2", text)
    return read_expression(_CLOCK.sub(r"\\text{ \1.m.}", text), lists=lists)


def _numeral(plain: str) -> Node | None:
    """A5_{11}: digits that are letters, with the base that makes them so."""
    found = _NUMERAL.fullmatch(plain)
    return Node("based", f"{found['base']}:{found['digits']}") if found else None


def _plain(text: str) -> str:
    r"""Without \text{} wrappers, spaces folded."""
    for _ in range(3):
        text, times = _WRAPPER.subn(r" \1 ", text)
        if not times:
            break
    text = _SPACES.sub(" ", text.replace("$", " ").replace(r"\$", "$"))
    return re.sub(r"\( (\w) \)", r"(\1)", text).strip()


def _choice(plain: str) -> Node | None:
    if found := _NAMED_CHOICE.fullmatch(plain):
        return Node("choice", found[1].upper())
    found = _CHOICE.fullmatch(plain)
    if found is None:
        return None
    letter = (found["round"] or found["square"] or found["bare"]).upper()
    rest = (found["rest"] or "").strip(" .,")
    if found["bare"] and not rest and found["mark"] == ":":
        return None
    if not rest:
        return Node("choice", letter)
    if rest[0] in "+-*/^=<>!_,(" or rest.startswith("\\c") or found["square"]:
        return None  # (a)(b + 1), (a) + b, (A), (B): no choice
    if found["round"] and found["round"].islower() and not rest[0].isdigit():
        return None  # (a) b is a product
    try:
        return Node("choice", letter, (read(rest),))
    except ValueError:
        return Node("choice", letter)


def _words(plain: str) -> Node | None:
    text = plain.rstrip(" .!")
    if not _WORDS.fullmatch(text):
        return None
    bare = re.sub(r"[^\w\s,;/&-]", "", text.lower())
    words = [word for word in re.split(r"[\s,;/&-]+", bare) if word]
    known = FUNCTIONS | GREEK | SHORT_GREEK | {"oo", "inf", "infty", "and", "or", "mod"}
    if all(word in known or len(word) < 3 for word in words) and not (
        len(words) == 1 and words[0] in ("no", "so")
    ):
        return None
    if any(word in known and word not in ("and", "or", "max", "min") for word in words):
        return None  # sin x
    if len(words) == 1 and len(words[0]) == 3 and words[0] not in _THREE and text.islower():
        return None  # xyz
    said = " ".join(bare.replace(",", " , ").split())
    if said in EMPTY_WORDS:
        return tree.EMPTY
    if said in REAL_WORDS:
        return tree.REALS
    if said in NUMBER_WORDS:
        return tree.num(NUMBER_WORDS[said])
    said = SAME_WORDS.get(said, said)
    if said == "infinity":
        return tree.INF
    parts = [part for part in re.split(r" , and | , | and ", said) if part]
    if len(parts) > 1:
        return Node("list", "", tuple(Node("text", _core(part)) for part in parts))
    return Node("text", _core(said))


_THREE = frozenset("yes odd red dne may one two six ten low set zero".split())


def _core(said: str) -> str:
    """Without articles and hyphens."""
    words = [w for w in re.split(r"[\s-]+", said) if w and w not in _ARTICLES]
    return " ".join(words) or said
