r"""Text of an answer (LaTeX, plain, unicode) -> tokens. Linear in the length of the text.

number   value is its digits, as written ("0.25"), `exact` its Fraction
letter   one variable: "x", "alpha", "L_odot" comes later, from the parser
word     the content of \text{...}, or a plain word that is no product of letters
command  a LaTeX command or a function's name, without backslash
mark     everything else: an operator, a bracket ("{" groups, "\{" is a set's)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from shared.grading.caps import MAX_DIGITS, MAX_LENGTH, MAX_TOKENS, TooMuchError, UnreadableError
from shared.grading.words import FUNCTIONS, GREEK, UNITS, is_word

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∗": "*",
    "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3] ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "°": r"^\circ ", "≈": r"\approx ", "…": r"\ldots ", "⋯": r"\ldots ",
    "∠": r"\angle ",
    "′": "'", "’": "'", "∨": r"\lor ", "∧": r"\land ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "∖": r"\setminus ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "，": ",", "（": "(", "）": ")",
    "€": r"\euro ",
    "£": r"\pounds ", "：": ":", "；": ";", "％": "%", "＝": "=", "．": ".", "。": ".", "、": ",",
    **{letter: f"^{{{digit}}}" for digit, letter in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{letter: f"_{{{digit}}}" for digit, letter in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{half: rf"\frac{{{a}}}{{{b}}}" for half, a, b in (("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3),
       ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5), ("⅘", 4, 5), ("⅙", 1, 6),
       ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8))},
    **{letter: rf"\{name} " for letter, name in zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
       ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split(),
       strict=True)},
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)

# A comma (or a thin space) groups digits by threes; where commas separate, it does not.
_GROUP = r"(?:,|\{,\}|\{,\\!\}|,\s*\\!\s*|\\,|\\ |\\;|\\:|~| )"
_GROUPED = re.compile(rf"\d{{1,3}}(?:{_GROUP}\d{{3}})+(?![\d])")
_THIN = re.compile(r"\d{1,3}(?:(?:\{,\}|\{,\\!\}|,\s*\\!\s*|\\,)\d{3})+(?!\d)")  # never a list
_PLAIN = re.compile(r"\d+")
_FRACTION = re.compile(
    r"\.(?P<repeat>\d*)\\(?:overline|bar|dot)\s*(?:\{(?P<cycle>\d+)\}|(?P<one>\d))"
    r"|\.(?P<dots>\d+)\s*(?:\\l?dots|\\cdots|\.\.\.)"
    r"|\.(?P<digits>\d+)|\.(?!\.)(?=\s*(?:[-+*/^)\]},;:=<>\\$%]|\Z))"
)
_EXPONENT = re.compile(r"[eE](?P<power>[+-]?\d{1,6})(?![\d.A-Za-z])")
_SPACE = re.compile(
    r"(?:\s|~|\\[,;:!> ]|\\(?:quad|qquad|displaystyle|textstyle|limits|nolimits|left|right|mathopen"
    r"|mathclose|middle|[bB]igg?[lrm]?|thinspace|negthinspace|enspace|null|hfill)(?![A-Za-z])"
    r"|\\(?:h|v)?phantom\s*\{?-?\}?)+"
)
_TEXT = re.compile(
    r"\\(?P<face>text|mbox|hbox|textnormal|textrm|textbf|textit|textsf|texttt|mathrm|mathbf|mathit|mathsf"
    r"|rm|bf|operatorname\*?|mathop|emph|boldsymbol|bm|mathcal|underline)\s*\{"
)
_UPRIGHT = frozenset({"text", "mathrm", "mbox", "hbox", "textrm", "rm"})
_MATHEMATICS = re.compile(  # in the typeface of words: "1,000", "+", "A, C and F"
    r"[\d.,\s]*\d[\d.,\s]*|[-+*/=(),]|[A-Za-z](?:\s*,?(?:,|\band\b|\bor\b)\s*[A-Za-z]\b)+"
)
_COMMAND = re.compile(r"\\([A-Za-z]+\*?|.)", re.DOTALL)
_ENVIRONMENT = re.compile(r"(begin|end)\s*\{([a-zA-Z]+\*?)\}(?:\s*\[[a-z]\])?(?:\s*\{[clr|@ ]+\})?")
_UNIT_TEXT = re.compile(  # \\mathrm{m/s^2}
    r"\\(?:text|mathrm|rm)\s*\{((?:[A-Za-z]+(?:\^\{?-?\d\}?)?|[/*~.\s]|\\cdot)+)\}"
)
_NOUNS = re.compile(r"[A-Za-z\s.]*")
_LETTERS = re.compile(r"[A-Za-z]+")
_MODULE = re.compile(r"(?:np|numpy|math|sp|sympy|cmath)\.(?=[a-z])")
_MARKS = re.compile(r"\*\*|<=|>=|!=|==|<>|=>|->|&&|\|\||[-+*/^_=<>!%'()\[\]{}|,;:&?@#\"`.$]")
_NAMES = sorted({*FUNCTIONS, *GREEK, "infty", "infinity"}, key=len, reverse=True)
_NAME = re.compile("|".join(_NAMES))


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    value: str
    spaced: bool = False  # blank before it
    exact: Fraction = Fraction(0)


def tokenize(text: str, *, lists: bool = False) -> list[Token]:
    r"""Tokens of an answer; with `lists`, "1,234" is a list of two numbers everywhere.

    Raises TooMuchError beyond a cap, UnreadableError for what is no token.
    """
    if len(text) > MAX_LENGTH:
        raise TooMuchError(f"longer than {MAX_LENGTH} characters")
    return _Lexer(text.translate(_TRANSLATION).replace("{:}", ":"), lists).run()


class _Lexer:
    def __init__(self, text: str, lists: bool) -> None:
        self.text, self.lists = text, lists
        self.position = 0
        self.depth = 0
        self.tokens: list[Token] = []
        self.spaced = False

    def run(self) -> list[Token]:
        text = self.text
        while self.position < len(text):
            if len(self.tokens) > MAX_TOKENS:
                raise TooMuchError(f"more than {MAX_TOKENS} tokens")
            if found := _SPACE.match(text, self.position):
                self.position = found.end()
                self.spaced = True
                continue
            letter = text[self.position]
            digit = letter.isdigit() and letter.isascii()
            if digit or (letter == "." and _FRACTION.match(text, self.position)):
                self.number()
            elif letter == "\\":
                self.command()
            elif letter.isascii() and letter.isalpha():
                self.letters()
            elif found := _MARKS.match(text, self.position):
                self.position = found.end()
                self.mark(found[0])
            else:
                raise UnreadableError(f"cannot read {letter!r}")
            self.spaced = False
        return self.tokens

    def emit(self, kind: str, value: str, exact: Fraction = Fraction(0)) -> None:
        self.tokens.append(Token(kind, value, self.spaced, exact))

    def mark(self, value: str) -> None:
        if value in ("(", "[", r"\{"):
            self.depth += 1
        elif value in (")", "]", r"\}"):
            self.depth -= 1
        if value != "$":
            self.emit("mark", value)

    def number(self) -> None:
        start = self.position
        grouped = _THIN if self.lists or self.depth else _GROUPED
        found = grouped.match(self.text, start) or _PLAIN.match(self.text, start)
        whole = re.sub(r"\D", "", found[0]) if found else ""
        self.position = found.end() if found else start
        value = Fraction(_int(whole or "0"))
        shown = whole
        if part := _FRACTION.match(self.text, self.position):
            self.position = part.end()
            digits = part["digits"] or part["repeat"] or ""
            cycle = part["cycle"] or part["one"] or ""
            if part["dots"]:
                digits, cycle = _repeating(part["dots"])
            value += Fraction(_int(digits or "0"), 10 ** len(digits))
            if cycle:
                nines = 10 ** len(digits) * (10 ** len(cycle) - 1)
                value += Fraction(_int(cycle), nines)
            shown += "." + digits + cycle if digits or cycle else ""
        if power := _EXPONENT.match(self.text, self.position):
            self.position = power.end()
            exponent = int(power["power"])
            if abs(exponent) > MAX_DIGITS:
                raise TooMuchError(f"a number of more than {MAX_DIGITS} digits")
            value *= Fraction(10) ** exponent
            shown += "e"
        if len(shown) > MAX_DIGITS:
            raise TooMuchError(f"a number of more than {MAX_DIGITS} digits")
        self.emit("number", shown, value)

    def command(self) -> None:
        text = self.text
        after_number = bool(self.tokens) and self.tokens[-1].kind == "number"
        if after_number and (found := _UNIT_TEXT.match(text, self.position)) and "^" in found[1]:
            self.position = found.end()
            self.emit("word", re.sub(r"[{}~]|\\cdot", " ", found[1]).replace("^ ", "^"))
            return
        if found := _TEXT.match(text, self.position):
            close = text.find("}", found.end())
            inner = text[found.end() : close if close >= 0 else len(text)]
            if (
                "{" in inner
                or "\\" in inner.replace("\\ ", "").replace("\\$", "")
                or "_" in inner
                or "^" in inner
            ):
                self.position = found.end() - 1  # mathematics in another typeface: only a group
                return
            self.position = close + 1 if close >= 0 else len(text)
            self.words(inner.replace("\\", ""), upright=found["face"] in _UPRIGHT)
            return
        found = _COMMAND.match(text, self.position)
        if found is None:
            raise UnreadableError("a backslash at the end")
        name, self.position = found[1], found.end()
        if name in ("begin", "end"):
            environment = _ENVIRONMENT.match(text, found.start() + 1)
            if environment is None:
                raise UnreadableError(f"\\{name} of nothing")
            self.position = environment.end()
            self.emit(name, environment[2].rstrip("*"))
        elif name in ("{", "}", "|", "$", "%", "#", "\\", "&"):
            self.mark({"%": "%", "$": r"\$", "&": "and", "#": "#"}.get(name, "\\" + name))
        elif name in ("mathbb", "Bbb"):
            field = re.compile(r"\s*\{?\s*([A-Z])\s*\}?").match(text, self.position)
            if field is None:
                raise UnreadableError("\\mathbb of nothing")
            self.position = field.end()
            self.emit("command", "mathbb" + field[1])
        elif name in ("$", "_"):
            self.mark(name)
        else:
            self.emit("command", name)

    def words(self, inner: str, *, upright: bool) -> None:
        r"""\text{...}: a letter or a number in another typeface, a unit, or words."""
        inner = inner.strip()
        before = self.tokens[-1] if self.tokens else Token("", "")
        valued = before.kind == "number" or before.value in ("}", ")", "pi")
        numeral = self.text.startswith("_", self.position)  # 2\\text{A}_{16}
        if upright and valued and inner in UNITS and not numeral:
            self.emit("word", inner)
        elif inner == "$":
            self.emit("mark", "\\$")
        elif re.fullmatch(r"[A-Za-z]", inner):
            self.emit("letter", inner)
        elif (inner in FUNCTIONS or inner in GREEK) and inner not in ("min", "arg"):
            self.emit("command", inner)
        elif _MATHEMATICS.fullmatch(inner):
            rest = _Lexer(inner, self.lists)
            rest.depth = self.depth
            self.tokens += rest.run()
        elif inner in (",", ";", "."):
            self.emit("mark", inner)
        elif inner:
            separated = re.fullmatch(r"(,?)\s*(and|or|und|,|;)\s*(,?)", inner)
            self.emit("word", separated[2] if separated else inner)

    def letters(self) -> None:
        if found := _MODULE.match(self.text, self.position):
            self.position = found.end()
            return
        found = _LETTERS.match(self.text, self.position)
        assert found is not None
        run, self.position = found[0], found.end()
        if self._is_noun(run):
            self.emit("word", run)
        elif run in FUNCTIONS or run in GREEK or run == "mod":
            self.emit("command", run)
        elif run in ("oo", "inf", "infty", "infinity", "Infinity"):
            self.emit("command", "infty")
        elif is_word(run, after_value=self._after_value()):
            self.emit("word", run)
        else:
            pieces = _NAME.split(run)
            if max(map(len, pieces)) > 3:
                self.emit("word", run)
                return
            position = 0
            for name in _NAME.finditer(run):
                self.each(run[position : name.start()])
                self.emit("command", name[0])
                position = name.end()
            self.each(run[position:])

    def _is_noun(self, run: str) -> bool:
        """A word that ends the text after a value: "3/4 cup", "12 min"."""
        valued = self._after_value()
        plain = len(run) > 2 and (run == "min" or run not in FUNCTIONS | GREEK)
        return self.spaced and valued and plain and bool(_NOUNS.fullmatch(self.text, self.position))

    def _after_value(self) -> bool:
        before = self.tokens[-1] if self.tokens else Token("", "")
        return before.kind in ("number", "word") or before.value in ("}", ")", "pi")

    def each(self, letters: str) -> None:
        for letter in letters:
            self.emit("letter", letter)
            self.spaced = False


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise TooMuchError(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)


def _repeating(digits: str) -> tuple[str, str]:
    """0.1666... -> ("1", "6"): what is seen at least twice at the end goes on for ever."""
    for size in range(1, len(digits) // 2 + 1):
        cycle = digits[-size:]
        times = 1
        while digits[: len(digits) - size * times].endswith(cycle):
            times += 1
        if times >= (3 if size == 1 else 2):
            return digits[: len(digits) - size * times], cycle
    raise UnreadableError("a number that goes on, one cannot see how")
