r"""Tokens -> tree: a precedence parser for one answer, in LaTeX, plain text, or a mix.

Loosest first:  items (, ; and or)  >  relation (= < \le \in ...)  >  set (\cup \cap \setminus)
>  ratio (:)  >  sum (+ - \pm)  >  product (* / implicit)  >  sign  >  power, factorial, %  >  atom.

What is ambiguous is read the way people mean it: "1/2x" from left to right; "2\frac12" and "2 1/2"
are mixed numbers; "f(x)" applies f, "n(n+1)" multiplies; "\sin 2x + 1" takes "2x".
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from shared.grading import tree
from shared.grading.caps import (
    MAX_ENTRIES,
    MAX_ITEMS,
    MAX_NESTING,
    MAX_SIGNS,
    TooMuchError,
    UnreadableError,
)
from shared.grading.tokens import Token, tokenize
from shared.grading.tree import Node
from shared.grading.units import measured
from shared.grading.words import FUNCTIONS, GREEK, NUMBER_WORDS, SHORT_GREEK

_RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "<>": "!=",
    "le": "<=", "leq": "<=", "leqslant": "<=", "leqq": "<=", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "geqq": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "in": "in",
    "equiv": "=", "approx": "~", "simeq": "~", "thickapprox": "~",
}  # fmt: skip
_SEPARATORS = {",": ",", ";": ",", "and": "and", "or": "or", "land": "and", "wedge": "and",
               "lor": "or", "vee": "or", "&&": "and", "||": "or", "&": "and"}  # fmt: skip
_SETS = {"cup": "union", "cap": "meet", "setminus": "without", "backslash": "without"}
_TIMES = frozenset({"*", "cdot", "times", "ast", "bullet"})
_FRACTIONS = frozenset({"frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"})
_BINOMIALS = frozenset({"binom", "dbinom", "tbinom"})
_MATRICES = frozenset({"pmatrix", "bmatrix", "matrix", "smallmatrix", "array", "Bmatrix"})
_CLOSING = {"lfloor": "rfloor", "lceil": "rceil", "langle": "rangle", "lvert": "rvert",
            "lbrace": "rbrace", "lbrack": "rbrack", "lparen": "rparen"}  # fmt: skip
_ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh",
    "atanh": "arctanh", "arsinh": "arcsinh", "arcosh": "arccosh", "artanh": "arctanh",
    "floor": "floor", "ceil": "ceil",
}  # fmt: skip
_LONG_ARGUMENT = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech "
    "csch arcsinh arccosh arctanh ln log lg exp".split()
)
_INVERSES = {name: "arc" + name for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
_APPLIED = frozenset("fgh")
_DOTTED = frozenset({"dot", "ddot", "hat", "vec", "tilde", "widehat", "overrightarrow"})


def read(text: str, *, lists: bool = False) -> Node:
    """The tree of an answer. Raises TooMuchError or UnreadableError, nothing else."""
    return Parser(tokenize(text, lists=lists)).answer()


class Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0
        self.bars = 0  # open ones
        self.signs = 0  # \\pm so far
        self.in_set = False  # where ":" and "|" separate
        self.in_derivative = False  # where dx is one name

    # ---- tokens ----------------------------------------------------------------------------------

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

    # ---- statements ------------------------------------------------------------------------------

    def answer(self) -> Node:
        node = self.items()
        while self.take(".", ",", ";"):
            continue
        if self.peek().kind != "end":
            raise self.unexpected()
        return node

    def items(self) -> Node:
        """a, b and c  ->  list; with "or" either; with "and" between statements both."""
        found, said = [self.relation()], set()
        while (mark := self.separator()) is not None:
            said.add(mark)
            found.append(self.relation())
            if len(found) > MAX_ITEMS:
                raise TooMuchError(f"more than {MAX_ITEMS} items")
        if len(found) == 1:
            return found[0]
        kind = "either" if "or" in said else "both" if said == {"and"} else "list"
        return Node(kind, "", tuple(found))

    def separator(self) -> str | None:
        """What stands between two items, or None; "," and a word together are one."""
        start, mark = self.position, None
        while True:
            token = self.peek()
            value = token.value.strip().lower() if token.kind == "word" else token.value
            if token.kind not in ("mark", "command", "word") or value not in _SEPARATORS:
                break
            mark = _SEPARATORS[value] if mark in (None, ",") else mark
            self.position += 1
        if mark is not None and (self.peek().kind == "end" or self.at(".", ")", "]", "}", "\\}")):
            self.position = start
            return None
        return mark

    def relation(self) -> Node:
        """a < b <= c; what is chained holds together."""
        while self.take("implies", "Rightarrow", "therefore", "quad", "=>"):
            continue
        if self.take("approx", "sim"):
            return self.side()
        terms, signs = [self.side()], []
        while (sign := self.relation_sign()) is not None:
            signs.append(sign)
            terms.append(self.side())
        if not signs:
            return self.residue(terms[0]) if self.at("pmod", "mod", "bmod") else terms[0]
        if len(terms) > MAX_ITEMS:
            raise TooMuchError(f"more than {MAX_ITEMS} items")
        if self.at("pmod", "mod", "bmod"):
            terms[-1] = self.residue(terms[-1])
        links = [tree.rel(s, a, b) for s, a, b in zip(signs, terms, terms[1:], strict=False)]
        return links[0] if len(links) == 1 else Node("chain", "", tuple(links))

    def residue(self, node: Node) -> Node:
        r"""3 \pmod 7"""
        self.next()
        return Node("residue", "", (node, self.argument()))

    def relation_sign(self) -> str | None:
        token = self.peek()
        if token.kind in ("mark", "command") and token.value in _RELATIONS:
            self.position += 1
            return _RELATIONS[token.value]
        if self.at("not") and self.peek(1).value in ("=", "in"):
            self.position += 2
            return "!=" if self.tokens[self.position - 1].value == "=" else "notin"
        return None

    def side(self) -> Node:
        """One side of a relation: a set expression, with its unit."""
        money = self.currency()
        node = self.sets()
        words = []
        while self.peek().kind == "word" and self.peek().value.lower() not in _SEPARATORS:
            words.append(self.next().value)
            if self.take("^"):
                exponent = self.argument(True)
                words.append(f"^{exponent.value}")
            if self.at("/") and self.peek(1).kind == "word":
                self.next()
                words.append("/")
        if words:
            node = measured(node, words)
        if money and node.kind == "measure":
            return Node("measure", f"{money} {node.value}", node.args)
        return Node("measure", money, (node,)) if money else node

    def currency(self) -> str:
        """$5, -$5 (the sign is left standing)."""
        marks = {"\\$": "dollar", "euro": "euro", "pounds": "quid", "pound": "quid"}
        at = 1 if self.at("-", "+") else 0
        token = self.peek(at)
        if token.kind in ("mark", "command") and token.value in marks:
            del self.tokens[self.position + at]
            return marks[token.value]
        return ""

    def sets(self) -> Node:
        node = self.ratio()
        while self.at(*_SETS):
            kind = _SETS[self.next().value]
            node = Node(kind, "", (node, self.ratio()))
        return node

    def ratio(self) -> Node:
        terms = [self.sum()]
        while self.at(":", "colon") and not self.in_set:
            self.next()
            terms.append(self.sum())
        return terms[0] if len(terms) == 1 else Node("ratio", "", tuple(terms))

    # ---- expressions -----------------------------------------------------------------------------

    def sum(self) -> Node:
        return self.deeper(self._sum)

    def _sum(self) -> Node:
        terms = [self.signed(self.product)]
        if terms[0].kind == "all" and self.take("-"):  # R - {1}
            return Node("without", "", (terms[0], self.product()))
        while self.at("+", "-", "pm", "mp"):
            terms.append(self.signed(self.product))
        return tree.add(*terms)

    def signed(self, inner: Callable[[], Node]) -> Node:
        """Signs, then what they stand before."""
        negative, pm = False, ""
        while self.at("+", "-", "pm", "mp"):
            sign = self.next().value
            negative ^= sign == "-"
            if sign in ("pm", "mp"):
                pm = "+-" if sign == "pm" else "-+"
                self.signs += 1
        if self.signs > MAX_SIGNS:
            raise TooMuchError(f"more than {MAX_SIGNS} signs of plus or minus")
        if (money := self.currency()) and not pm:
            node = Node("measure", money, (inner(),))
            return _negative(node) if negative else node
        node = inner()
        if negative:
            node = _negative(node)
        return Node("pm", pm, (node,)) if pm else node

    def product(self) -> Node:
        factors = [self.power()]
        while True:
            if self.take(*_TIMES):
                factors.append(self.signed(self.power))
            elif self.at("/", "div"):
                if self.peek(1).kind == "word":
                    break
                self.next()
                factors.append(tree.power(self.signed(self.power), tree.MINUS_ONE))
                if self._mixed(factors):
                    pass
            elif self.starts_factor():
                before = self.tokens[self.position - 1]
                token = self.peek()
                factor = self.power()
                if before.kind == "number" and token.kind == "number" and not self.at("/"):
                    raise UnreadableError("two numbers side by side")
                factors.append(factor)
                self._mixed(factors, before, token)
            else:
                break
        return tree.mul(*factors)

    def _mixed(
        self, factors: list[Node], before: Token | None = None, token: Token | None = None
    ) -> bool:
        r"""Turn the factors 2, \frac12 (or 2, 1, /2) at the end into their sum."""
        if before is None or token is None or before.kind != "number" or not before.value.isdigit():
            return False
        if token.value in _FRACTIONS and len(factors) >= 2:
            mark, last = "", factors[-1]
            if last.kind in ("percent", "deg"):
                mark, last = last.kind, last.args[0]
            part = exact_fraction(last)
            if part is not None and 0 < part < 1 and factors[-2].kind == "num":
                whole = factors[-2].value
                assert isinstance(whole, Fraction)
                mixed = tree.num(whole + part)
                factors[-2:] = [Node(mark, "", (mixed,)) if mark else mixed]
                return True
        if token.kind == "number" and self.at("/") and self.peek(1).kind == "number":
            top, bottom = token.exact, self.peek(1).exact
            whole = factors[-2].value
            if not (isinstance(whole, Fraction) and 0 < top < bottom and token.spaced):
                raise UnreadableError("two numbers side by side")
            self.position += 2
            factors[-2:] = [tree.num(whole + top / bottom)]
            return True
        return False

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "letter", "begin"):
            return True
        if token.kind == "command":
            return token.value not in _STOPS
        if token.kind == "mark":
            if token.value == "|":
                return self.bars == 0
            return token.value in ("(", "{", "[", "\\{", "\\$")
        return False

    def power(self) -> Node:
        return self.deeper(self._power)

    def _power(self) -> Node:
        node = self.atom()
        while True:
            if node.kind == "deg" and self.peek().value in ("C", "F") and not self.at("C"):
                return Node("measure", self.next().value, node.args)
            if self.take("!"):
                node = tree.fn("factorial", node)
            elif self.at("'"):
                while self.take("'"):
                    node = self._marked(node, "'")
                if node.kind == "sym" and self.at("(") and self._short_argument():
                    node = self._application(node)
            elif self.take("%"):
                node = Node("percent", "", (node,))
            elif self.at("^", "**"):
                self.next()
                if self.take("circ"):
                    node = Node("deg", "", (node,))
                    continue
                if self.at("prime", "'"):
                    self.next()
                    node = self._marked(node, "'")
                    continue
                if self.at("{") and self.peek(1).value in ("circ", "prime"):
                    self.next()
                    while self.at("circ", "prime"):
                        if self.next().value == "circ":
                            node = Node("deg", "", (node,))
                        else:
                            node = self._marked(node, "'")
                    self.expect("}")
                    continue
                if self.at("*", "+") and self.peek(1).value in ("", "}", ")"):
                    raise self.unexpected("as an exponent")
                exponent = self.signed(self.exponent)
                node = tree.power(node, exponent)
            elif self.take("degree", "textdegree"):
                node = Node("deg", "", (node,))
            else:
                return node

    def exponent(self) -> Node:
        r"""{...}, or one atom; a\^b\^c is a\^(b\^c)."""
        if self.at("{"):
            return self.group()
        node = self.atom()
        if self.take("!"):
            node = tree.fn("factorial", node)
        if self.take("^", "**"):
            node = tree.power(node, self.signed(self.exponent))
        return node

    def group(self) -> Node:
        """{...} that only groups; with a comma inside it is a set written without backslash."""
        self.expect("{")
        node = self.deeper(self.items)
        if self.take("choose"):
            node = tree.fn("binom", node, self.deeper(self.items))
        self.expect("}")
        return Node("set", "", node.args) if node.kind == "list" else node

    def argument(self, one_digit: bool = False) -> Node:
        r"""What follows \frac or \sqrt: {...}, or one token (of a number only its first digit)."""
        if self.at("{"):
            return self.group()
        token = self.peek()
        if one_digit and token.kind == "number" and len(token.value) > 1:
            if not token.value.isdigit():
                raise self.unexpected("as an argument")
            rest = token.value[1:]
            self.tokens[self.position] = Token("number", rest, False, Fraction(int(rest)))
            return tree.num(int(token.value[0]))
        if self.at("-"):
            self.next()
            return tree.neg(self.argument(one_digit))
        return self.deeper(self.atom)

    # ---- atoms -----------------------------------------------------------------------------------

    def atom(self) -> Node:
        token = self.peek()
        if token.kind == "number":
            return self.number()
        if token.kind == "letter":
            return self.letter()
        if token.kind == "begin":
            return self.environment()
        if token.kind == "command":
            return self.command()
        if token.kind == "word" and self._names_something():
            return tree.sym(self.next().value)
        match token.value if token.kind == "mark" else "":
            case "(" | "[" | "]":
                return self.brackets()
            case "{":
                return self.group_or_set()
            case "\\{":
                self.next()
                return self.set_items("\\}")
            case "|" | "\\|":
                return self.bars_around(token.value, token.value)
            case "<":
                return self.angle()
            case "@":
                raise self.unexpected()
        raise self.unexpected()

    def _names_something(self) -> bool:
        """A word in place of a variable: "SRMC", or "area" before "="."""
        word = self.peek().value
        if word in NUMBER_WORDS and self.position and self.peek(-1).value in ("_", "{"):
            return True
        return word.isalpha() and (word.isupper() or self.peek(1).value == "=")

    def number(self) -> Node:
        token = self.next()
        if self.at("_"):
            self.next()
            base = self.argument()
            base = tree.num(NUMBER_WORDS[base.name]) if base.name in NUMBER_WORDS else base
            if base.kind == "num" and isinstance(base.value, Fraction):
                return Node("based", f"{base.value}:{token.value}")
            raise self.unexpected("as the base of a number")
        follows = self.peek()
        digits, ahead = token.value, 0
        while follows.kind in ("letter", "number") and not follows.spaced:
            digits, ahead = digits + follows.value, ahead + 1
            follows = self.peek(ahead)
        if ahead and follows.value == "_" and digits.isalnum() and self._base_after(ahead):
            self.position += ahead + 1
            base = self.argument()
            return Node("based", f"{base.value}:{digits}")
        return tree.num(token.exact)

    def _base_after(self, ahead: int) -> bool:
        r"""Whether "_11" or "_{11}" follows: 1A_{11} is a numeral, 2x_1 a variable."""
        at = ahead + 1
        inner = self.peek(at + 1) if self.peek(at).value == "{" else self.peek(at)
        digits = "".join(self.peek(i).value for i in range(ahead))
        return inner.kind == "number" and inner.exact > 10 and digits.isupper()

    def letter(self) -> Node:
        name = self.next().value
        node = {"e": tree.E, "i": tree.IMAGINARY}.get(name) or tree.sym(name)
        if name == "d" and self._differential():
            return tree.sym("d" + self.atom().name)
        return self.scripted(node)

    def _differential(self) -> bool:
        """dx inside of dy/dx; a lone d is a variable."""
        before = self.peek(-2).value if self.position >= 2 else ""
        return (
            self.peek().kind == "letter" and self.in_derivative and (before in ("{", "/", "(", ""))
        )

    def scripted(self, node: Node) -> Node:
        """x_1, L_odot, x', f(x)."""
        if self.take("_"):
            tokens = self._script()
            node = tree.sym(f"{node.name}_{tokens}")
        if node.kind == "sym" and self.at("("):
            known = node.name[0] in _APPLIED and len(node.name.rstrip("'")) == 1
            if known or self._short_argument():
                return self._application(node)
        if node.name in _APPLIED and self.at("^"):
            script = [self.peek(ahead).value for ahead in range(1, 6)]
            if script == ["{", "-", "1", "}", "("]:
                self.position += 5
                return self._application(tree.sym(f"{node.name}^-1"))
        if node.kind == "sym" and self.at("^") and self.peek(1).value == "{":
            inner = self.peek(2).value
            if inner in ("*", "+", "-") and self.peek(3).value == "}":
                self.position += 4
                return tree.sym(node.name + inner)
        return node

    def _script(self) -> str:
        """A subscript as part of a name."""
        if not self.at("{"):
            return self.next().value
        depth = 0
        said: list[str] = []
        while True:
            token = self.next()
            if token.kind == "end":
                raise self.unexpected("in a subscript")
            depth += (token.value == "{") - (token.value == "}")
            if depth == 0:
                return "".join(said)
            if token.value not in "{}":
                said.append(token.value.replace(" ", ""))

    def _short_argument(self) -> bool:
        """Whether "(x)" or "(0)" follows: y(t) and I(0) are values of functions."""
        if not self.at("("):
            return False
        inner, closing = self.peek(1), self.peek(2)
        return inner.kind in ("letter", "number") and closing.value == ")"

    def _application(self, node: Node) -> Node:
        self.expect("(")
        args = self.deeper(self.items)
        self.expect(")")
        return Node("app", node.name, args.args if args.kind == "list" else (args,))

    def _marked(self, node: Node, mark: str) -> Node:
        if node.kind == "app":
            return Node("app", node.name + mark, node.args)
        if node.kind != "sym":
            raise self.unexpected("after a prime")
        return tree.sym(node.name + mark)

    def brackets(self) -> Node:
        opening = self.next().value
        self.bars, outside = 0, self.bars
        if self.at(")", "]") and opening in "([":
            self.next()
            self.bars = outside
            return Node("tuple", "")
        node = self.deeper(self.items)
        self.bars = outside
        closing = self.expect(")", "]", "[")
        if node.kind != "list":
            if (opening, closing) not in (("(", ")"), ("[", "]")):
                raise self.unexpected("to close a bracket")
            return node
        shape = ("(" if opening in "(]" else "[") + ("]" if closing == "]" else ")")
        if len(node.args) == 2 and shape != "[]":
            return Node("bracket", shape, node.args)
        if len(node.args) == 2 and not any(a.kind in ("bracket", "tuple") for a in node.args):
            return Node("bracket", shape, node.args)
        if (opening, closing) not in (("(", ")"), ("[", "]")):
            raise self.unexpected("to close a bracket")
        return _rows(node.args) if shape == "[]" else Node("tuple", "", node.args)

    def group_or_set(self) -> Node:
        if self.peek(1).value == "}":
            if self.peek(2).kind == "end" and self.position == 0:
                self.position += 2
                return tree.EMPTY
            self.position += 2
            return self.power()
        return self.group()

    def set_items(self, closing: str) -> Node:
        r"""\{a, b\} or \{x \mid x > 3\}."""
        if self.take(closing):
            return tree.EMPTY
        self.bars, outside = 1, self.bars  # a bar separates here
        self.in_set = True
        node = self.deeper(self.items)
        self.in_set = False
        self.bars = outside
        if self.take("|", "mid", ":", "colon", "vert"):
            condition = self.deeper(self.items)
            self.expect(closing)
            if condition.kind == "list":
                condition = Node("both", "", condition.args)
            return condition if node.kind in ("sym", "rel") else Node("set", "", (node, condition))
        self.expect(closing)
        return Node("set", "", node.args if node.kind == "list" else (node,))

    def bars_around(self, opening: str, closing: str) -> Node:
        self.expect(opening)
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.expect(closing)
        return tree.fn("abs", node)

    def angle(self) -> Node:
        self.expect("<")
        node = self.items()
        self.expect(">")
        return Node("tuple", "", node.args)

    def environment(self) -> Node:
        name = self.next().value
        if name == "cases":
            raise UnreadableError("cases")
        rows: list[list[Node]] = [[]]
        while self.peek().kind != "end_":
            if self.peek().kind == "end":
                break
            if self.take("&"):
                continue
            if self.take("\\\\", "cr"):
                rows.append([])
                continue
            if self.at("hline"):
                self.next()
                continue
            if name in _MATRICES or name.endswith("matrix"):
                rows[-1].append(self.sum())
            else:
                rows[-1].append(self.items())
            if sum(map(len, rows)) > MAX_ENTRIES:
                raise TooMuchError(f"more than {MAX_ENTRIES} entries")
        if self.next().value != name:
            raise UnreadableError(f"\\begin{{{name}}} does not end")
        rows = [row for row in rows if row]
        if name in ("vmatrix", "Vmatrix"):
            return _determinant(_matrix(rows))
        if name in _MATRICES:
            return _matrix(rows)
        if name in ("aligned", "align", "gathered", "split") and rows:
            return Node("list", "", tuple(cell for row in rows for cell in row))
        raise UnreadableError(f"\\begin{{{name}}}")

    # ---- commands --------------------------------------------------------------------------------

    def command(self) -> Node:
        name = self.next().value
        if name in _FRACTIONS:
            return self.fraction()
        if name in _BINOMIALS:
            return tree.fn("binom", self.argument(True), self.argument(True))
        if name == "sqrt":
            return self.root()
        if name in ("angle", "measuredangle"):
            corners = ""
            while self.peek().kind == "letter" and self.peek().value.isupper():
                corners += self.next().value
            return self.scripted(tree.sym(f"angle {corners}"))
        if name in ("sum", "prod"):
            return self.repeated(name)
        if name == "cbrt":
            return Node("root", "", (self.argument(), tree.num(3)))
        if name in ("infty", "infinity"):
            return tree.INF
        if name == "pi":
            return tree.PI
        if name in ("emptyset", "varnothing"):
            return tree.EMPTY
        if name.startswith("mathbb"):
            return self.numbers(name[-1])
        if name in _CLOSING:
            return self.enclosed(name)
        if name in ("vert",):
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.expect("vert")
            return tree.fn("abs", node)
        if name in _DOTTED:
            return self.scripted(self._marked(self.argument(), f" {name}"))
        if name in ("overline", "bar"):
            inner = self.argument()
            return tree.fn("conj", inner) if inner.kind != "sym" else tree.sym(f"bar {inner.name}")
        if name in ("boxed", "fbox", "mathrm", "mathbf", "text", "mathit"):
            return self.argument()
        if name in FUNCTIONS:
            return self.function(name)
        if name in GREEK or name in SHORT_GREEK or name in ("odot", "partial", "triangle"):
            return self.scripted(tree.sym(name))
        self.position -= 1
        raise self.unexpected()

    def numbers(self, name: str) -> Node:
        r"""\mathbb{R}, or \mathbb{R}^+."""
        if self.at("^") and "+" in (self.peek(1).value, self.peek(2).value):
            self.position += 2 if self.peek(1).value == "+" else 4
            if name == "R":
                return Node("bracket", "()", (tree.ZERO, tree.INF))
            name += "+"
        return Node("all", name)

    def repeated(self, name: str) -> Node:
        r"""\sum_{k=1}^{n} of the product that follows."""
        self.expect("_")
        start = self.group()
        self.expect("^")
        end = self.signed(self.exponent)
        term = self.deeper(self.product)
        index = start.args[0] if start.args else start
        if index == tree.IMAGINARY:  # here it counts
            index = tree.sym("i")
            term = tree.replace(term, tree.IMAGINARY, index)
        if start.kind != "rel" or start.name != "=" or index.kind != "sym":
            raise UnreadableError(f"the bounds of a {name}")
        if any(node.kind == "fn" and node.name in ("sum", "prod") for node in term):
            raise TooMuchError("a sum of sums")
        return tree.fn(name, index, start.args[1], end, term)

    def fraction(self) -> Node:
        self.in_derivative = self._is_derivative()
        top, bottom = self.argument(True), self.argument(True)
        self.in_derivative = False
        return tree.div(top, bottom)

    def _is_derivative(self) -> bool:
        r"""\frac{dy}{dx}: both parts begin with a d."""
        if not self.at("{"):
            return False
        at = self.position + 1
        depth = 1
        while at < len(self.tokens) and depth:
            depth += (self.tokens[at].value == "{") - (self.tokens[at].value == "}")
            at += 1
        if at + 1 >= len(self.tokens):
            return False
        starts = (self.peek(1).value, self.tokens[at + 1].value)
        if starts == ("d", "d"):
            follows = self.tokens[at + 2] if at + 2 < len(self.tokens) else Token("end", "")
            if self.peek(2).value == "^" or follows.value == "^":
                raise UnreadableError("a higher derivative")
            return follows.kind in ("letter", "command") and self.peek(2).value != "}"
        if "partial" in starts:
            raise UnreadableError("a partial derivative")
        return False

    def root(self) -> Node:
        degree: Node | None = None
        if self.take("["):
            degree = self.sum()
            self.expect("]")
        radicand = self.argument()
        if degree is None:
            degree = tree.num(2)
        return Node("root", "", (radicand, degree))

    def enclosed(self, opening: str) -> Node:
        self.bars, outside = 0, self.bars
        if opening == "langle":
            node = self.items()
        elif opening in ("lbrace",):
            self.bars = outside
            return self.set_items("rbrace")
        else:
            node = self.items()
        self.bars = outside
        self.expect(_CLOSING[opening])
        match opening:
            case "lfloor":
                return tree.fn("floor", node)
            case "lceil":
                return tree.fn("ceil", node)
            case "lvert":
                return tree.fn("abs", node)
        if opening == "langle":
            return Node("tuple", "", node.args)
        return node

    def function(self, name: str) -> Node:
        name = _ALIASES.get(name, name)
        base: Node | None = None
        exponent: Node | None = None
        while self.at("_", "^"):
            if self.next().value == "_":
                base = self.argument()
            else:
                exponent = self.signed(self.exponent)
        if exponent == tree.MINUS_ONE and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        args = self.function_argument(name)
        if name == "det":
            return _determinant(args[0])
        if name == "lg":
            name, base = "log", tree.num(10)
        if name == "log" and base is not None:
            node = tree.div(tree.fn("ln", *args), tree.fn("ln", base))
        elif name == "exp":
            node = tree.power(tree.E, args[0])
        elif base is not None:
            raise self.unexpected("after a subscript")
        else:
            node = tree.fn(name, *args)
        return tree.power(node, exponent) if exponent is not None else node

    def function_argument(self, name: str) -> tuple[Node, ...]:
        if self.at("("):
            self.next()
            self.bars, outside = 0, self.bars
            node = self.deeper(self.items)
            self.bars = outside
            self.expect(")")
            return node.args if node.kind == "list" else (node,)
        if self.at("{") or name not in _LONG_ARGUMENT:
            node = self.argument()
            if node.kind in ("set", "list"):
                return node.args
            return (node,)
        negative = self.take("-")
        factors = [self.power()]
        while self.starts_factor() and not self._begins_function():
            factors.append(self.power())
        if len(factors) == 1 and self.at("/") and self.peek(1).kind == "number":
            pass  # \sin x / 2 divides the sine
        node = tree.mul(*factors)
        return (tree.neg(node) if negative else node,)

    def _begins_function(self) -> bool:
        token = self.peek()
        return (token.kind == "command" and token.value in FUNCTIONS and token.value != "sqrt") or (
            token.kind == "mark" and token.value in ("(", "[", "{")
        )


_STOPS = frozenset(
    {*_RELATIONS, *_SEPARATORS, *_SETS, *_TIMES, *_CLOSING.values(), "pm", "mp", "div", "mid",
     "colon", "vert", "cr", "hline", "implies", "Rightarrow", "therefore", "quad", "not", "circ",
     "degree", "textdegree", "choose", "pmod", "mod", "bmod", "euro", "pounds", "sim", "approx"}
)  # fmt: skip


def exact_fraction(node: Node) -> Fraction | None:
    """The value of a plain \\frac{a}{b} of whole numbers."""
    if node.kind == "mul" and len(node.args) == 2 and node.args[1].kind == "pow":
        top, (bottom, exponent) = node.args[0].value, node.args[1].args
        if (
            isinstance(top, Fraction)
            and isinstance(bottom.value, Fraction)
            and exponent == tree.MINUS_ONE
            and top.denominator == bottom.value.denominator == 1
            and bottom.value
        ):
            return top / bottom.value
    return None


def _negative(node: Node) -> Node:
    if node.kind == "measure":
        return Node("measure", node.value, (_negative(node.args[0]),))
    return tree.neg(node)


def _matrix(rows: list[list[Node]]) -> Node:
    if not rows or len({len(row) for row in rows}) != 1:
        raise UnreadableError("a matrix with ragged rows")
    shape = f"{len(rows)} x {len(rows[0])}"
    return Node("matrix", shape, tuple(cell for row in rows for cell in row))


def _determinant(matrix: Node) -> Node:
    """By the first row. Raises UnreadableError for what is no small square matrix."""
    side = next((n for n in range(1, 5) if matrix.name == f"{n} x {n}"), 0)
    if matrix.kind != "matrix" or not side:
        raise UnreadableError("the determinant of what is no square matrix, or of a large one")
    return _minors([list(matrix.args[i * side : (i + 1) * side]) for i in range(side)])


def _minors(rows: list[list[Node]]) -> Node:
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for column, head in enumerate(rows[0]):
        rest = [row[:column] + row[column + 1 :] for row in rows[1:]]
        term = tree.mul(head, _minors(rest))
        terms.append(tree.neg(term) if column % 2 else term)
    return tree.add(*terms)


def _rows(items: tuple[Node, ...]) -> Node:
    """[[1, 2], [3, 4]] -> a matrix; [1, 2, 3] -> a tuple."""
    rows = [item for item in items if item.kind in ("bracket", "tuple")]
    if len(rows) == len(items) and len({len(row.args) for row in rows}) == 1:
        return _matrix([list(row.args) for row in rows])
    return Node("tuple", "", items)
