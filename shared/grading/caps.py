"""Static caps: what is refused before anything computes with it, and under which name.

Every figure is far above any answer that a person would write down, and far below what hurts.
"""

from __future__ import annotations

MAX_LENGTH = 4000  # characters of an answer
MAX_TOKENS = 2000
MAX_NESTING = 120  # brackets, groups, powers: about forty of each within each other
MAX_DIGITS = 400  # of one literal
MAX_BITS = 1 << 17  # of an exact number; about 39,000 digits
MAX_FACTORIAL = 5000
MAX_EXPONENT = 100_000
MAX_TOWER = 3  # powers within exponents: x^{y^{z}} is two
MAX_ITEMS = 64  # of a list, tuple or set
MAX_ENTRIES = 144  # of a matrix
MAX_SIGNS = 6  # \\pm in one expression
MAX_TERMS = 2000  # of a sum or product that is written out
MAX_SYMBOLS = 24


class TooMuchError(ValueError):
    """An answer is beyond a cap; the message names it."""


class UnreadableError(ValueError):
    """An answer is not in the language that the parser reads; the message says where."""
