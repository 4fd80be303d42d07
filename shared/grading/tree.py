"""The tree that an answer is read into: one kind of node, hashable, comparable, without behaviour.

Scalars
    num(Fraction)  sym(name)  const("pi" | "e" | "i" | "inf")
    add(*)  mul(*)  pow(base, exponent)  root(radicand, degree)  pm(sign: "+-" | "-+"; x)
    fn("sum" | "prod"; variable, from, to, term)
    fn(name; *)  app(name; *)          known function; unknown one, of which only equality is known
    deg(x)  percent(x)  measure(unit; x)  based("base:digits")  ratio(*)
Collections
    list(*)  either(*)  both(*)        bare "a, b"; "a or b"; "a and b"
    tuple(*)  bracket("()" | "[)" | ...; lo, hi)   which may be a pair as well as an interval
    set(*)  union(*)  meet(*)  without(a, b)  all("R" | "Z" | ...)  matrix(rows of mul; "n x m")
Statements
    rel("=" | "<" | "<=" | ">" | ">=" | "!=" | "in"; left, right)   chains are `both` of them
    residue(x, modulus)
    text("words")  choice("B"; rest?)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Node:
    kind: str
    value: str | Fraction = ""
    args: tuple[Node, ...] = ()

    def __iter__(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for arg in self.args:
            yield from arg

    @property
    def name(self) -> str:
        return str(self.value)


def num(value: Fraction | int) -> Node:
    return Node("num", Fraction(value))


ZERO, ONE, MINUS_ONE = num(0), num(1), num(-1)
PI, E, IMAGINARY, INF = (Node("const", name) for name in ("pi", "e", "i", "inf"))
EMPTY = Node("set")
REALS = Node("all", "R")


def sym(name: str) -> Node:
    return Node("sym", name)


def add(*args: Node) -> Node:
    return args[0] if len(args) == 1 else Node("add", "", args)


def mul(*args: Node) -> Node:
    return args[0] if len(args) == 1 else Node("mul", "", args)


def neg(x: Node) -> Node:
    return num(-x.value) if isinstance(x.value, Fraction) else Node("mul", "", (MINUS_ONE, x))


def sub(a: Node, b: Node) -> Node:
    return add(a, neg(b))


def power(base: Node, exponent: Node) -> Node:
    return Node("pow", "", (base, exponent))


def div(a: Node, b: Node) -> Node:
    return mul(a, power(b, MINUS_ONE))


def fn(name: str, *args: Node) -> Node:
    return Node("fn", name, args)


def rel(op: str, left: Node, right: Node) -> Node:
    return Node("rel", op, (left, right))


def symbols(node: Node) -> frozenset[str]:
    return frozenset(n.name for n in node if n.kind == "sym")


def bound(node: Node) -> frozenset[str]:
    """Names of the variables that sums and products run over."""
    return frozenset(n.args[0].name for n in node if n.kind == "fn" and n.name in ("sum", "prod"))


def replace(node: Node, old: Node, new: Node) -> Node:
    if node == old:
        return new
    args = tuple(replace(arg, old, new) for arg in node.args)
    return node if args == node.args else Node(node.kind, node.value, args)


def mapped(node: Node, kind: str, change: Callable[[Node], Node]) -> Node:
    """`node` with every topmost part of a kind changed."""
    if node.kind == kind:
        return change(node)
    return Node(node.kind, node.value, tuple(mapped(arg, kind, change) for arg in node.args))


def components(node: Node) -> tuple[Node, ...] | None:
    """Of what may be a tuple or a vector."""
    if node.kind in ("tuple", "matrix") or (node.kind == "bracket" and node.name == "()"):
        return node.args
    return None


def kind(node: Node) -> str:
    """Of which sort an answer is, for people."""
    return "scalar" if is_scalar(node) else node.kind


SCALARS = frozenset("num sym const add mul pow root fn app deg percent based ratio pm".split())


def is_scalar(node: Node) -> bool:
    """One number or expression, without a sign that is open (pm)."""
    return node.kind in SCALARS and all(n.kind in SCALARS and n.kind != "pm" for n in node)
