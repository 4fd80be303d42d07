"""Filters that look at one trajectory by itself."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import ClassVar, Literal

from pydantic import Field

from shared.fences import prose
from shared.sandbox.result import Outcome
from tirgen import code_quality
from tirgen.agents.verifier import format_ok
from tirgen.curation.base import Decision, Filter, Row

_EMPTY_BOX = re.compile(r"\\f?boxed\s*\{\s*\}")
_DOLLAR = re.compile(r"(?<!\\)\$")


class Format(Filter):
    """Exactly the executed blocks with their observations, and one boxed answer at the end.

    The verifier's check of the same name, made again; and what the release adds (method.md 1.4
    nos. 4, 5): no empty box anywhere, no unpaired dollar sign.
    """

    KIND: ClassVar[str] = "format"

    empty_box: bool = Field(default=False, description="Whether an empty \\boxed{} is allowed.")
    paired_dollars: bool = Field(
        default=False, description="Drop an odd number of $ other than one, as the release does."
    )

    @property
    def reads_body(self) -> bool:
        return True

    def judge(self, row: Row) -> Decision:
        text = row.body.text
        problems = [] if (verdict := format_ok(row.body)).passed else [verdict.reason]
        if not self.empty_box and _EMPTY_BOX.search(text):
            problems.append("an empty box")
        n = len(_DOLLAR.findall(text))
        if self.paired_dollars and n % 2 and n != 1:
            problems.append(f"{n} dollar signs")
        return Decision(not problems, "; ".join(problems) or "well formed")


class Executed(Filter):
    """At least `min_calls` tool calls, every one of which succeeded."""

    KIND: ClassVar[str] = "executed"

    min_calls: int = Field(default=1, ge=0)
    max_calls: int | None = Field(default=None, ge=0)

    def judge(self, row: Row) -> Decision:
        calls = {"calls": row.n_calls}
        bad = [outcome for outcome in row.outcomes if outcome != Outcome.OK]
        if bad:
            reason = f"calls that ended by {', '.join(bad)}"
            return Decision(False, reason, calls | {"outcomes": bad})
        if row.n_calls < self.min_calls:
            return Decision(False, f"{row.n_calls} calls, fewer than {self.min_calls}", calls)
        if self.max_calls is not None and row.n_calls > self.max_calls:
            return Decision(False, f"{row.n_calls} calls, more than {self.max_calls}", calls)
        return Decision(True, f"{row.n_calls} calls succeeded", calls)


class Answer(Filter):
    """The answer equals the reference, says the newest verdict on it; undecided is not enough."""

    KIND: ClassVar[str] = "answer"

    def judge(self, row: Row) -> Decision:
        words = {True: "equal", False: "different", None: "undecided, or never checked"}
        return Decision(row.correct, words[row.correct])


class Length(Filter):
    """Between `min_tokens` and `max_tokens` of the policy, both included."""

    KIND: ClassVar[str] = "length"

    min_tokens: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)

    def judge(self, row: Row) -> Decision:
        n, evidence = row.n_tokens, {"tokens": row.n_tokens}
        if n < self.min_tokens:
            return Decision(False, f"{n} tokens, fewer than {self.min_tokens}", evidence)
        if self.max_tokens is not None and n > self.max_tokens:
            return Decision(False, f"{n} tokens, more than {self.max_tokens}", evidence)
        return Decision(True, f"{n} tokens", evidence)


class CodeQuality(Filter):
    """Library call or control flow, by syntax tree; share of trivial blocks (9.2 no. 18)."""

    KIND: ClassVar[str] = "code_quality"

    trivial: code_quality.Rule = Field(
        default="syntax", description="syntax: no library call, no control flow. lines: at most 5."
    )
    max_trivial: float = Field(
        default=0.4, ge=0, le=1, description="Allowed are ceil(share x blocks)."
    )
    one_good: bool = Field(
        default=True, description="At least one block must not be trivial, whatever the share."
    )

    @property
    def reads_body(self) -> bool:
        return True

    def judge(self, row: Row) -> Decision:
        codes = [call.code for call in row.body.calls]
        trivial = [i for i, code in enumerate(codes) if code_quality.is_trivial(code, self.trivial)]
        allowed = code_quality.trivial_allowed(len(codes), self.max_trivial, self.one_good)
        return Decision(
            bool(codes) and len(trivial) <= allowed,
            f"{len(trivial)} of {len(codes)} blocks trivial, {max(allowed, 0)} allowed",
            {"trivial": trivial, "blocks": len(codes)},
        )


class Repetition(Filter):
    """No `n`-gram of characters or words occurs more than `most` times (method.md 1.4 no. 9)."""

    KIND: ClassVar[str] = "repetition"

    unit: Literal["character", "word"] = "character"
    n: int = Field(default=20, ge=1)
    most: int = Field(default=20, ge=1)

    @property
    def reads_body(self) -> bool:
        return True

    def judge(self, row: Row) -> Decision:
        text = row.body.text
        if self.unit == "character":
            grams = [text[i : i + self.n] for i in range(len(text) - self.n + 1)]
        else:
            said = text.split()
            grams = [" ".join(said[i : i + self.n]) for i in range(len(said) - self.n + 1)]
        gram, count = max(Counter(grams).items(), key=lambda pair: pair[1], default=("", 0))
        reason = f"the most frequent {self.n}-gram occurs {count} times, {self.most} allowed"
        return Decision(count <= self.most, reason, {"gram": gram[:200], "count": count})


class Language(Filter):
    """Letters of other scripts than `scripts` are at most `max_share` of the letters in the prose.

    Scripts as in Unicode's character names: LATIN, GREEK, CJK, CYRILLIC, HANGUL, HIRAGANA, ...
    """

    KIND: ClassVar[str] = "language"

    scripts: tuple[str, ...] = Field(default=("LATIN", "GREEK"), min_length=1)
    max_share: float = Field(default=0.0, ge=0, le=1)
    traditional_chinese: bool = Field(
        default=True,
        description="False: characters that are in Big5 and not in GB 2312 are foreign, too.",
    )

    @property
    def reads_body(self) -> bool:
        return True

    def judge(self, row: Row) -> Decision:
        letters = {c: n for c, n in Counter(prose(row.body.text)).items() if c.isalpha()}
        foreign = {c: n for c, n in letters.items() if self._foreign(c)}
        n, total = sum(foreign.values()), sum(letters.values())
        share = n / total if total else 0.0
        return Decision(
            share <= self.max_share,
            f"{n} of {total} letters are of other scripts",
            {"letters": "".join(sorted(foreign))[:50], "share": round(share, 6)},
        )

    def _foreign(self, letter: str) -> bool:
        if letter.isascii():
            return "LATIN" not in self.scripts
        name = unicodedata.normalize("NFKC", letter)[0]  # 𝑥 is an x
        script = unicodedata.name(name, "UNKNOWN").replace("-", " ").split()[0]
        if script not in self.scripts:
            return True
        return not self.traditional_chinese and script == "CJK" and _traditional(letter)


def _traditional(letter: str) -> bool:
    def has(encoding: str) -> bool:
        try:
            letter.encode(encoding)
        except UnicodeEncodeError:
            return False
        return True

    return has("big5") and not has("gb2312")
