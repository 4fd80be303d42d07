"""Self-correction as the authors released it, for tests to show its defects (method.md 5.1).

Written anew from what it does: texts, not ids. The fence that opens a block is committed before the
block; on a failure the last tokens of the whole committed response are dropped, prompt and response
are joined again, and one of the interaction rounds is gone. Which of its tokens are observations is
noted when they are injected, and never again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shared.fences import Kind, observation, parse


@dataclass
class Released:
    """`sequence`: prompt and response as they stand; `contexts`: what the policy was shown.

    masked: (from, to) in tokens of the response, of what it takes for observations.
    """

    prompt: str
    header: str  # the assistant's mark at the end of the prompt
    say: Callable[
        [str], str
    ]  # the whole context -> what the policy writes up to a fence or the end
    run: Callable[[str], tuple[bool, str]]  # code -> did it succeed, what is observed
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    l_suf: int = 500
    n_corr: int = 4
    rounds: int = 10
    contexts: list[str] = field(default_factory=list)
    masked: list[tuple[int, int]] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.response = ""
        self.sequence = self.prompt

    def solve(self) -> str:
        tries = 0
        for _ in range(self.rounds):
            thought = self._write()
            if not thought.endswith("```"):
                break
            block = self._write()
            code = parse("```" + block)[0]
            if code.kind is not Kind.PYTHON:
                continue
            self.executed.append(code.body)
            succeeded, seen = self.run(code.body)
            if not succeeded and tries < self.n_corr:
                tries += 1
                self._drop(block)
                continue
            tries = 0
            begin = len(self.encode(self.response))
            self._add(observation(seen))
            self.masked.append((begin, len(self.encode(self.response))))
        return self.response

    def _write(self) -> str:
        self.contexts.append(self.sequence)
        said = self.say(self.sequence)
        self._add(said)
        return said

    def _add(self, text: str) -> None:
        self.response += text
        self.sequence += text

    def _drop(self, block: str) -> None:
        """Take the block and L_suf tokens of all that was committed, whatever they are."""
        committed = self.response.removesuffix(block)
        self.response = self.decode(self.encode(committed)[: -self.l_suf])
        self.sequence = self.prompt.removesuffix(self.header) + self.response
