r"""Commands of LaTeX inside of an expression: \frac, \sqrt, \sum, functions, named brackets."""

from __future__ import annotations

from shared.grading import matrices, tree
from shared.grading.caps import TooMuchError, UnreadableError
from shared.grading.cursor import Cursor
from shared.grading.tokens import Token
from shared.grading.tree import Node
from shared.grading.words import FUNCTIONS, GREEK, SHORT_GREEK

FRACTIONS = frozenset({"frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"})
_BINOMIALS = frozenset({"binom", "dbinom", "tbinom"})
CLOSING = {"lfloor": "rfloor", "lceil": "rceil", "langle": "rangle", "lvert": "rvert",
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
_DOTTED = frozenset({"dot", "ddot", "hat", "vec", "tilde", "widehat", "overrightarrow"})


class Commands(Cursor):
    def command(self) -> Node:
        name = self.next().value
        if name in FRACTIONS:
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
        if name in CLOSING:
            return self.enclosed(name)
        if name in ("vert",):
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.expect("vert")
            return tree.fn("abs", node)
        if name in _DOTTED:
            return self.scripted(self.marked(self.argument(), f" {name}"))
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
        self.expect(CLOSING[opening])
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
            return matrices.determinant(args[0])
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
