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
from shared.grading.atoms import Atoms
from shared.grading.caps import MAX_ITEMS, MAX_SIGNS, TooMuchError, UnreadableError
from shared.grading.commands import CLOSING, FRACTIONS
from shared.grading.tokens import Token, tokenize
from shared.grading.tree import Node
from shared.grading.units import measured

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
_STOPS = frozenset(
    {*_RELATIONS, *_SEPARATORS, *_SETS, *_TIMES, *CLOSING.values(), "pm", "mp", "div", "mid",
     "colon", "vert", "cr", "hline", "implies", "Rightarrow", "therefore", "quad", "not", "circ",
     "degree", "textdegree", "choose", "over",
     "pmod", "mod", "bmod", "euro", "pounds", "sim", "approx"}
)  # fmt: skip


def read(text: str, *, lists: bool = False) -> Node:
    """The tree of an answer. Raises TooMuchError or UnreadableError, nothing else."""
    return Parser(tokenize(text, lists=lists)).answer()


class Parser(Atoms):
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

    def _at_to(self) -> bool:
        r"""2 \text{ to } 1"""
        return (self.peek().kind, self.peek().value) == ("word", "to")

    def ratio(self) -> Node:
        terms = [self.sum()]
        while not self.in_set and (self.at(":", "colon") or self._at_to()):
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
        if token.value in FRACTIONS and len(factors) >= 2:
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
                    node = self.marked(node, "'")
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
                    node = self.marked(node, "'")
                    continue
                if self.at("{") and self.peek(1).value in ("circ", "prime"):
                    self.next()
                    while self.at("circ", "prime"):
                        if self.next().value == "circ":
                            node = Node("deg", "", (node,))
                        else:
                            node = self.marked(node, "'")
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
        elif self.take("over"):
            node = tree.div(node, self.deeper(self.items))
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
