"""The state of a parser: where it stands in its tokens, and what it may call of the grammar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from shared.grading.caps import MAX_NESTING, TooMuchError, UnreadableError
from shared.grading.tokens import Token
from shared.grading.tree import Node


class Cursor(ABC):
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0
        self.bars = 0  # open ones
        self.signs = 0  # \\pm so far
        self.in_set = False  # where ":" and "|" separate
        self.in_derivative = False  # where dx is one name

    def peek(self, ahead: int = 0) -> Token:
        at = self.position + ahead
        return self.tokens[at] if at < len(self.tokens) else Token("end", "")

    def next(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def at(self, *values: str) -> bool:
        token = self.peek()
        return token.kind in ("mark", "command") and token.value in values

    def take(self, *values: str) -> bool:
        if self.at(*values):
            self.position += 1
            return True
        return False

    def expect(self, *values: str) -> str:
        if not self.at(*values):
            raise self.unexpected(f"instead of {values[0]!r}")
        return self.next().value

    def unexpected(self, more: str = "") -> UnreadableError:
        token = self.peek()
        what = "the end" if token.kind == "end" else f"{token.value[:20]!r}"
        return UnreadableError(f"{what} is unexpected {more}".strip())

    def deeper(self, inner: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise TooMuchError(f"nested deeper than {MAX_NESTING}")
        found = inner()
        self.depth -= 1
        return found

    # ---- the grammar, told in `parse` ------------------------------------------------------------

    @abstractmethod
    def items(self) -> Node:
        """A whole answer, or what stands between brackets."""

    @abstractmethod
    def sum(self) -> Node: ...

    @abstractmethod
    def product(self) -> Node: ...

    @abstractmethod
    def power(self) -> Node: ...

    @abstractmethod
    def signed(self, inner: Callable[[], Node]) -> Node: ...

    @abstractmethod
    def exponent(self) -> Node: ...

    @abstractmethod
    def group(self) -> Node: ...

    @abstractmethod
    def argument(self, one_digit: bool = False) -> Node: ...

    @abstractmethod
    def atom(self) -> Node: ...

    @abstractmethod
    def starts_factor(self) -> bool: ...

    @abstractmethod
    def scripted(self, node: Node) -> Node: ...

    @abstractmethod
    def marked(self, node: Node, mark: str) -> Node: ...

    @abstractmethod
    def set_items(self, closing: str) -> Node: ...
