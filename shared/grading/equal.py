r"""Are two trees equal? By their structure, down to scalars.

What one side leaves out is forgiven where it can mean only one thing: a name ("x = 3" and "3"), a
unit ("5 cm" and "5"), the braces of a set ("1, 2" and "\{2, 1\}"). Where it could mean two things
the pair is undecided: a percent sign, the base of a numeral, the brackets of a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from shared.grading import families, parse, reals, scalars, symbolic, tree
from shared.grading.caps import MAX_ITEMS, TooMuchError, UnreadableError
from shared.grading.tree import Node
from shared.grading.units import unit
from shared.grading.values import LOG_BASE, ComplexError, UndefinedError, at, exact
from shared.grading.verdict import Decision, Stage, Value, different, equal, every, undecided

_ITEMS = frozenset({"list", "either", "both", "set"})
_VECTORS = frozenset({"matrix", "tuple", "bracket"})
_HERE = Stage.STRUCTURE


def compare(a: Node, b: Node) -> Decision:
    """Raises TooMuchError or UnreadableError, nothing else."""
    a, b = settled(a), settled(b)
    if a == b:
        return equal(_HERE)
    for rule in (
        _choices,
        _texts,
        _fields,
        _residues,
        _based,
        _quantities,
        _names,
        _signs,
        _shapes,
    ):
        found = rule(a, b)
        if found is not None:
            return found
    if "ratio" in (a.kind, b.kind):
        return _ratios(a, b)
    if tree.is_scalar(a) and tree.is_scalar(b):
        if _is_lettering(a) and _is_lettering(b) and set(a.args) == set(b.args):
            return undecided(_HERE, "the same letters in another order")
        return families.compare(a, b) or scalars.compare(a, b)
    for rule in (_intervals, _collections, _conditions, _relations):
        found = rule(a, b)
        if found is not None:
            return found
    kinds = sorted({_kind(a), _kind(b)})
    if len(kinds) == 2:
        return different(_HERE, f"a {kinds[0]} and a {kinds[1]}")
    return undecided(_HERE, f"no rule compares a {a.kind} with a {b.kind}")


def _is_lettering(node: Node) -> bool:
    """AB: a product of matrices, a vector, a word, where order counts."""
    return node.kind == "mul" and all(n.kind == "sym" and n.name.isupper() for n in node.args)


def _kind(node: Node) -> str:
    return "scalar" if tree.is_scalar(node) else node.kind


# ---- what one text says twice -------------------------------------------------------------------


def settled(node: Node) -> Node:
    """Without what adds nothing: "= 0.56 = 56%", "\\approx 0.67", "k \\in Z" beside a family.

    Raises UnreadableError where an answer contradicts itself.
    """
    if node.kind == "rel" and node.name == "~":
        left, right = node.args
        if left.kind in ("sym", "app"):
            return tree.rel("=", left, right)
        _check_about(left, right)
        return left
    if node.kind == "rel" and node.name == "=" and _is_vector_equation(node):
        pairs = zip(node.args[0].args, node.args[1].args, strict=True)
        return Node("list", "", tuple(tree.rel("=", name, value) for name, value in pairs))
    if node.kind == "rel" and node.name == "in" and node.args[1].kind == "set":
        choices = (tree.rel("=", node.args[0], value) for value in node.args[1].args)
        return Node("either", "", tuple(choices)) if len(node.args[1].args) > 1 else node
    if node.kind == "mul" and sum(arg.kind in _VECTORS for arg in node.args) == 1:
        return _scaled(node)
    if node.kind == "rel" and node.name == "in" and node.args[0].kind in ("tuple", "bracket"):
        return node.args[0] if node.args[1].kind == "all" else node
    if node.kind == "chain" and all(link.name in "=~" for link in node.args):
        return _one_of_chain(node)
    if node.kind == "rel" and node.name == "=" and not tree.symbols(node):
        return _one_of_chain(Node("chain", "", (node,)))
    if node.kind in ("list", "both"):
        kept = tuple(arg for arg in node.args if not _is_integrality(arg))
        if kept and len(kept) < len(node.args):
            whole = frozenset[str]().union(*map(tree.symbols, set(node.args) - set(kept)))
            kept = tuple(families.marked(arg, whole) for arg in kept)
            return settled(kept[0] if len(kept) == 1 else Node(node.kind, "", kept))
    if node.kind == "both" and not reals.is_condition(node):
        return Node("list", "", node.args)
    return node


def _scaled(node: Node) -> Node:
    """A number times a matrix or a vector."""
    vector = next(arg for arg in node.args if arg.kind in _VECTORS)
    factors = [arg for arg in node.args if arg is not vector]
    if not all(map(tree.is_scalar, factors)) or (
        vector.value not in ("", "()") and "x" not in vector.name
    ):
        return node
    return Node(vector.kind, vector.value, tuple(tree.mul(*factors, x) for x in vector.args))


def _is_vector_equation(node: Node) -> bool:
    """(x, y) = (1, 2)."""
    sides = [_components(side) for side in node.args]
    if sides[0] is None or sides[1] is None or len(sides[0]) != len(sides[1]):
        return False
    return all(part.kind == "sym" for part in sides[0])


def _one_of_chain(node: Node) -> Node:
    """x = 1/2 = 0.5 -> x = 1/2: the parts must agree."""
    terms = [node.args[0].args[0]]
    for link in node.args:
        if link.name == "~" and terms[-1].kind not in ("sym", "app"):
            _check_about(terms[-1], link.args[1])
            break
        terms.append(link.args[1])
    name = terms[0] if terms[0].kind in ("sym", "app") else None
    values = [term for term in terms if term is not name]
    if name is None and any(tree.symbols(term) for term in terms):
        return node
    if not values:
        return node
    for other in values[1:]:
        if not compare(values[0], other).equal:
            raise UnreadableError("an answer that says two different things")
    last = values[-1] if tree.symbols(values[0]) else values[0]
    return last if name is None else tree.rel("=", name, last)


def _check_about(exactly: Node, about: Node) -> None:
    """Raises UnreadableError where one is not roughly the other."""
    values = [scalars.order(n.args[0] if n.kind == "measure" else n) for n in (exactly, about)]
    one, other = values
    if one is not None and other is not None and not math.isclose(one, other, rel_tol=0.05):
        raise UnreadableError("an answer that says two different things")


def _is_integrality(node: Node) -> bool:
    r"""k \in \mathbb{Z}."""
    return (
        node.kind == "rel"
        and node.name == "in"
        and node.args[0].kind in ("sym", "list")
        and node.args[1].kind == "all"
        and node.args[1].name in "ZN"
    ) or (node.kind == "text" and "integer" in node.name)


# ---- choices, words, units ----------------------------------------------------------------------


def _choices(a: Node, b: Node) -> Decision | None:
    if "choice" not in (a.kind, b.kind):
        return None
    if a.kind != "choice":
        a, b = b, a
    rest = a.args[0] if a.args else None
    if b.kind == "choice":
        if a.name != b.name:
            return different(_HERE, "different choices")
        if rest is not None and b.args and compare(rest, b.args[0]).value is Value.DIFFERENT:
            return undecided(_HERE, "the same letter with different texts")
        return equal(_HERE)
    if b.kind == "sym" and len(b.name) == 1:
        same = a.name == b.name.upper()
        return equal(_HERE) if same else different(_HERE, "different choices")
    if b in (tree.E, tree.IMAGINARY):
        return equal(_HERE) if a.name == b.name.upper() else different(_HERE, "different choices")
    if rest is not None:
        return compare(rest, b)
    return undecided(_HERE, "a choice and a value")


def _texts(a: Node, b: Node) -> Decision | None:
    if "text" not in (a.kind, b.kind):
        return None
    if a.kind != b.kind:
        return different(_HERE, "words and no words") if _kind(a) != _kind(b) else None
    if a.name == b.name or a.name.replace(" ", "") == b.name.replace(" ", ""):
        return equal(_HERE)
    words = [set(side.name.split()) for side in (a, b)]
    if words[0] < words[1] or words[1] < words[0]:
        return undecided(_HERE, "one text is part of the other")
    if words[0] == words[1]:
        return undecided(_HERE, "the same words in another order")
    return different(_HERE, "different words")


def _fields(a: Node, b: Node) -> Decision | None:
    if a.kind == b.kind == "all":
        return different(_HERE, "different sets of numbers")
    return None


def _residues(a: Node, b: Node) -> Decision | None:
    r"""3 \pmod 7 is 10 \pmod 7; a modulus may be left out."""
    if "residue" not in (a.kind, b.kind):
        return None
    if a.kind == b.kind:
        modulus = compare(a.args[1], b.args[1])
        values = [exact(node) for node in (a.args[0], b.args[0], a.args[1])]
        if not modulus.equal:
            return modulus
        if None in values or not values[2]:
            return compare(a.args[0], b.args[0])
        one, other, size = (value for value in values if value is not None)
        whole = ((one - other) / size).denominator == 1
        return equal(_HERE) if whole else different(_HERE, "different residues")
    residue, other_side = (a, b) if a.kind == "residue" else (b, a)
    if not tree.is_scalar(other_side):
        return None
    return compare(residue.args[0], other_side)


def _based(a: Node, b: Node) -> Decision | None:
    """Numerals of a named base: 52_8. Without the name nobody knows what is meant."""
    has = [any(n.kind == "based" for n in side) for side in (a, b)]
    if has[0] == has[1] or not (tree.is_scalar(a) and tree.is_scalar(b)):
        return None
    named, other = (a, b) if has[0] else (b, a)
    bases = {n.name.split(":")[0] for n in named if n.kind == "based"}
    found = scalars.compare(named, other)
    if bases == {"10"}:
        return found
    bare = _map(named, "based", lambda n: _digits(n.name.split(":")[1]))
    if found.equal or scalars.compare(bare, other).equal:
        return undecided(_HERE, "the base is named on one side only")
    return different(found.stage, "unequal in that base and without it")


def _digits(text: str) -> Node:
    return tree.num(int(text)) if text.isdigit() else Node("text", text)


def _map(node: Node, kind: str, change: object) -> Node:
    assert callable(change)
    if node.kind == kind:
        found = change(node)
        assert isinstance(found, Node)
        return found
    return Node(node.kind, node.value, tuple(_map(arg, kind, change) for arg in node.args))


def _quantities(a: Node, b: Node) -> Decision | None:
    """Units, percent and degrees at the top of either side."""
    kinds = (a.kind, b.kind)
    if "percent" in kinds:
        return _percents(a, b)
    if "measure" in kinds:
        return _measures(a, b)
    if "deg" in kinds and tree.is_scalar(a) and tree.is_scalar(b):
        if a.kind == b.kind:
            return compare(a.args[0], b.args[0])
        angle, other = (a, b) if a.kind == "deg" else (b, a)
        if any(n.kind == "deg" for n in other):
            return None
        found = compare(angle.args[0], other)
        return found if found.equal else scalars.compare(angle, other)
    return None


def _percents(a: Node, b: Node) -> Decision | None:
    if a.kind == b.kind:
        return compare(a.args[0], b.args[0])
    percent, other = (a, b) if a.kind == "percent" else (b, a)
    if not tree.is_scalar(other) or not tree.is_scalar(percent):
        return None
    found = compare(tree.div(percent.args[0], tree.num(100)), other)
    if found.value is Value.DIFFERENT and compare(percent.args[0], other).equal:
        return undecided(_HERE, "a percent sign on one side only")
    return found


def _measures(a: Node, b: Node) -> Decision | None:
    if a.kind != b.kind:
        (quantity, other) = (a, b) if a.kind == "measure" else (b, a)
        meaning = unit(quantity.name)
        if other.kind == "deg":
            if dict(meaning.dimension) == {"radian": 1}:
                return scalars.compare(quantity.args[0], other)
            return different(_HERE, "degrees and another unit")
        found = compare(quantity.args[0], other)  # a unit that is left out
        if not found.equal and tree.is_scalar(other) and tree.symbols(other):
            try:
                written = tree.mul(quantity.args[0], parse.read(quantity.name))  # 3 m/s
            except UnreadableError:
                return found
            return compare(written, other)
        return found
    mine, gold = unit(a.name), unit(b.name)
    left, right = a.args[0], b.args[0]
    values = compare(left, right)
    if mine == gold:
        return values
    if {mine.label, gold.label} == {frozenset({"am"}), frozenset({"pm"})}:
        return different(_HERE, "before and after noon")
    if mine.label or gold.label:
        if mine.label and gold.label and (mine.label <= gold.label or gold.label <= mine.label):
            return values
        if values.equal:
            return undecided(_HERE, "the same value of different things")
        return values
    if not mine.dimension or not gold.dimension:
        return values
    if mine.dimension != gold.dimension:
        return different(_HERE, "units of different kinds")
    if not (tree.is_scalar(left) and tree.is_scalar(right)):
        return None
    return compare(tree.mul(left, tree.num(mine.size)), tree.mul(right, tree.num(gold.size)))


# ---- names --------------------------------------------------------------------------------------


def assignment(node: Node) -> tuple[Node, Node] | None:
    """("x", value) of "x = value" or "value = x", where the value does not use the name."""
    if node.kind != "rel" or node.name not in ("=", "in"):
        return None
    left, right = node.args
    for name, value in ((left, right), (right, left)):
        if _is_name(name, value) and all(part != name for part in value):
            if node.name == "in" and name is not left:
                return None
            return name, value
    return None


def _is_name(node: Node, value: Node) -> bool:
    """x, f(x), or a length AB."""
    if node.kind == "mul":
        parts = [arg.args[0] if arg.kind == "pow" else arg for arg in node.args]
        names = [part.name if part.kind == "sym" else "" for part in parts]
        if all(len(name) > 1 and name[0] == "d" for name in names):
            return True  # dy/dx
        lengths = all(name.isupper() or name.startswith("angle ") or name == "m" for name in names)
        return lengths and not tree.symbols(value)
    return node.kind in ("sym", "app")


def _names(a: Node, b: Node) -> Decision | None:
    mine, gold = assignment(a), assignment(b)
    if mine is None and gold is None:
        return None
    if mine is not None and gold is not None:
        return _two_names(a, b, mine, gold)
    value, other = (mine[1], b) if mine else (gold[1], a) if gold else (a, b)
    if other.kind in ("rel", "chain") or reals.is_condition(other):
        return None
    if other.kind in ("list", "either") and any(assignment(arg) for arg in other.args):
        return None
    return compare(value, other)


def _two_names(
    a: Node, b: Node, mine: tuple[Node, Node], gold: tuple[Node, Node]
) -> Decision | None:
    (left, x), (right, y) = mine, gold
    if left == right:
        found = compare(x, y)
        return found if not tree.symbols(x) or found.equal else None
    if left.kind == right.kind == "app":
        if left.name == right.name and len(left.args) == len(right.args):
            for old, new in zip(left.args, right.args, strict=True):
                if old.kind != "sym" or new.kind != "sym" or new in x or old in y:
                    return None
                x = tree.replace(x, old, new)
            return compare(x, y)
    elif left.kind != right.kind:
        return compare(x, y)  # y = 2x and f(x) = 2x
    if tree.symbols(x) | tree.symbols(y):
        return None
    return different(_HERE, "values of different names")


def _system(node: Node) -> dict[Node, Node] | None:
    """a = 1, b = 2."""
    pairs = [assignment(arg) for arg in node.args] if node.kind in _ITEMS else []
    found = {pair[0]: pair[1] for pair in pairs if pair is not None}
    return found if len(found) == len(node.args) >= 2 else None


# ---- collections --------------------------------------------------------------------------------


def _signs(a: Node, b: Node) -> Decision | None:
    r"""\pm stands for two answers."""
    if not any(n.kind == "pm" for side in (a, b) for n in side):
        return None
    return compare(_expanded(a), _expanded(b))


def _expanded(node: Node) -> Node:
    if not any(n.kind == "pm" for n in node):
        return node
    if node.kind in _ITEMS:
        parts = [part for arg in node.args for part in _both_signs(arg)]
        if len(parts) > MAX_ITEMS:
            raise TooMuchError(f"more than {MAX_ITEMS} items")
        return Node(node.kind, "", tuple(parts))
    return Node("list", "", tuple(_both_signs(node)))


def _both_signs(node: Node) -> list[Node]:
    """All signs of one expression go together, \\mp against them."""
    if not any(n.kind == "pm" for n in node):
        return [node]
    return [
        _map(node, "pm", lambda n, s=sign: n.args[0] if n.name[0] == s else tree.neg(n.args[0]))
        for sign in "+-"
    ]


def _shapes(a: Node, b: Node) -> Decision | None:
    """Tuples, vectors and matrices: by components."""
    shapes = [_components(side) for side in (a, b)]
    if None in shapes or (a.kind == b.kind == "bracket" and not a.name == b.name == "()"):
        return None
    mine, gold = (shape for shape in shapes if shape is not None)
    if a.kind == b.kind == "matrix" and a.name != b.name:
        return different(_HERE, "matrices of different shapes")
    if len(mine) != len(gold):
        return different(_HERE, f"{len(mine)} components and {len(gold)}")
    if a.kind != b.kind and "matrix" in (a.kind, b.kind):
        matrix = a if a.kind == "matrix" else b
        if not matrix.name.endswith("x 1") and not matrix.name.startswith("1 x"):
            return different(_HERE, "a matrix and a tuple")
    return every(compare(x, y) for x, y in zip(mine, gold, strict=True))


def _components(node: Node) -> tuple[Node, ...] | None:
    if node.kind in ("tuple", "matrix") or (node.kind == "bracket" and node.name == "()"):
        return node.args
    return None


def _ratios(a: Node, b: Node) -> Decision:
    sides = [side.args if side.kind == "ratio" else (side,) for side in (a, b)]
    if len(sides[0]) == len(sides[1]):
        if any(not tree.is_scalar(part) for side in sides for part in side):
            return undecided(_HERE, "a ratio of what is no number")
        same = every(compare(x, y) for x, y in zip(*sides, strict=True))
        if same.equal or any(part == tree.ZERO for side in sides for part in side):
            return same  # 5:00 is a time of day
        crossed = [
            compare(tree.mul(x, sides[1][0]), tree.mul(y, sides[0][0]))
            for x, y in zip(sides[0][1:], sides[1][1:], strict=True)
        ]
        return every(crossed)
    for ratio, other in ((a, b), (b, a)):
        if ratio.kind == "ratio" and len(ratio.args) == 2 and tree.is_scalar(other):
            return scalars.compare(tree.div(*ratio.args), other)
    return different(_HERE, "a ratio of another length")


def _intervals(a: Node, b: Node) -> Decision | None:
    """Two intervals whose ends may hold variables."""
    if not (a.kind == b.kind == "bracket"):
        return None
    found = reals.compare(a, b)
    if found is not None:
        return found
    if a.name != b.name:
        return different(_HERE, "open and closed ends")
    return every(compare(x, y) for x, y in zip(a.args, b.args, strict=True))


def _collections(a: Node, b: Node) -> Decision | None:
    systems = [_system(side) for side in (a, b)]
    if (systems[0] is None) != (systems[1] is None):
        named, other = (a, b) if systems[1] is None else (b, a)
        solutions = _common_name(named)  # x_1 = 1, x_2 = 2
        if solutions != named and other.kind in _ITEMS:
            return _multisets(solutions, _common_name(other))
    if systems[0] is not None or systems[1] is not None:
        return _systems(a, b, *systems)
    if any(reals.is_condition(side) for side in (a, b)):
        return None
    a, b = (_common_name(side) for side in (a, b))
    if a.kind in _ITEMS and b.kind in _ITEMS:
        return _multisets(a, b)
    for items, other in ((a, b), (b, a)):
        if items.kind in ("list", "either") and _components(other) is not None:
            if len(items.args) != len(other.args):
                return different(_HERE, "a list and a tuple of another length")
            found = every(compare(x, y) for x, y in zip(items.args, other.args, strict=True))
            if found.equal:
                return undecided(_HERE, "a list without the brackets of a tuple")
            return different(found.stage, "a list and a tuple")
        if items.kind == "set" and len(items.args) == 1 and tree.is_scalar(other):
            return compare(items.args[0], other)
        if items.kind in _ITEMS and tree.is_scalar(other):
            if items.args and all(compare(item, other).equal for item in items.args):
                return undecided(_HERE, "the same answer, several times")
            return different(_HERE, "several answers and one")
    return None


def _common_name(node: Node) -> Node:
    """x = 1 or x = 2  ->  1 or 2;  x = 1, 2  ->  1, 2."""
    if node.kind not in _ITEMS or not node.args:
        return node
    pairs = [assignment(arg) for arg in node.args]
    names = {_unnumbered(pair[0]) for pair in pairs if pair is not None}
    if len(names) != 1 or pairs[0] is None:
        return node
    if any(p is None and not tree.is_scalar(n) for p, n in zip(pairs, node.args, strict=True)):
        return node
    values = (p[1] if p else n for p, n in zip(pairs, node.args, strict=True))
    return Node(node.kind, "", tuple(values))


def _unnumbered(name: Node) -> Node:
    """x_1, x_2: solutions for one x."""
    stem, _, index = name.name.partition("_")
    return tree.sym(stem) if name.kind == "sym" and index.isdigit() else name


def _systems(
    a: Node, b: Node, mine: dict[Node, Node] | None, gold: dict[Node, Node] | None
) -> Decision | None:
    if mine is not None and gold is not None:
        if set(mine) == set(gold):
            return every(compare(mine[name], gold[name]) for name in mine)
        if all(n.kind == "sym" for n in (*mine, *gold)):
            return different(_HERE, "values of different names")
        return _multisets(a, b)
    values = tuple((mine or gold or {}).values())
    other = b if mine is not None else a
    if other.kind in _ITEMS and any(assignment(arg) for arg in other.args):
        return different(_HERE, "values of different names")
    components = _components(other) or (other.args if other.kind in ("list", "either") else None)
    if components is None or len(components) != len(values):
        return different(_HERE, "named values and something else")
    return every(compare(x, y) for x, y in zip(values, components, strict=True))


def _multisets(a: Node, b: Node) -> Decision:
    """Order does not matter; how often something is said matters only outside of braces."""
    mine, gold = list(a.args), list(b.args)
    if "set" in (a.kind, b.kind):
        mine, gold = _distinct(mine), _distinct(gold)
    if len(mine) != len(gold):
        if mine and gold and len(_distinct(mine)) == len(_distinct(gold)):
            found = _matched(_distinct(mine), _distinct(gold))
            if found.equal:
                return undecided(_HERE, "equal but for what is said twice")
        return different(_HERE, f"{len(mine)} answers and {len(gold)}")
    texts = all(node.kind == "text" for node in (*mine, *gold))
    found = _matched(mine, gold)
    if found.equal and texts and not every(map(compare, mine, gold)).equal:
        return undecided(_HERE, "the same words in another order")
    return found


def _matched(mine: list[Node], gold: list[Node]) -> Decision:
    stage, doubt, left = _HERE, "", list(gold)
    for item in mine:
        for place, other in enumerate(left):
            found = compare(item, other)
            if found.equal:
                stage = found.at(stage).stage
                del left[place]
                break
            if found.value is Value.UNDECIDED:
                doubt = found.reason
        else:
            if doubt:
                return undecided(_HERE, doubt)
            return different(_HERE, "one answer has no partner")
    return equal(stage)


def _distinct(nodes: list[Node]) -> list[Node]:
    kept: list[Node] = []
    for node in nodes:
        if not any(compare(node, other).equal for other in kept):
            kept.append(node)
    return kept


# ---- conditions and equations -------------------------------------------------------------------


def _conditions(a: Node, b: Node) -> Decision | None:
    return reals.compare(a, b)


def _relations(a: Node, b: Node) -> Decision | None:
    links = [_links(side) for side in (a, b)]
    if not all(links):
        return None
    if len(links[0]) != len(links[1]):
        return undecided(_HERE, "another number of relations")
    if len(links[0]) == 1:
        return _proportional(links[0][0], links[1][0])
    left = list(links[1])
    for link in links[0]:
        found = [_proportional(link, other) for other in left]
        place = next((i for i, one in enumerate(found) if one.equal), None)
        if place is None:
            return every(found)
        del left[place]
    return equal(Stage.SYMBOLIC)


def _links(node: Node) -> list[Node]:
    """Every relation with "<", "<=", "=" or "!=" only."""
    parts = node.args if node.kind in ("chain", "list", "both") else (node,)
    found = []
    for part in parts:
        if part.kind != "rel" or not all(map(tree.is_scalar, part.args)):
            return []
        swapped = {">": "<", ">=": "<="}.get(part.name)
        found.append(tree.rel(swapped, *part.args[::-1]) if swapped else part)
    return found


def _proportional(a: Node, b: Node) -> Decision:
    """l - r of one is that of the other, times a constant (a positive one for inequalities)."""
    if a.name != b.name:
        return different(_HERE, "different relations")
    if not tree.symbols(a) or not tree.symbols(b):
        return every(compare(x, y) for x, y in zip(a.args, b.args, strict=True))
    mine, gold = tree.sub(*a.args), tree.sub(*b.args)
    if a.name in ("=", "!="):
        mine, gold = symbolic.numerator(mine) or mine, symbolic.numerator(gold) or gold
    for point in _points(mine, gold):
        left, right = _inserted(mine, point), _inserted(gold, point)
        signs = [_sign(side) for side in (left, right)]
        if 0 in signs or None in signs:
            if signs[0] != signs[1]:
                return different(Stage.NUMERIC, "one holds where the other does not")
            continue
        if a.name in ("<", "<=") and signs[0] != signs[1]:
            return different(Stage.NUMERIC, "one holds where the other does not")
        found = scalars.compare(tree.mul(mine, right), tree.mul(gold, left))
        return found.at(Stage.SYMBOLIC) if found.equal else found
    return undecided(Stage.NUMERIC, "no point to compare at")


def _points(a: Node, b: Node) -> Iterator[dict[str, Fraction]]:
    both = tree.add(a, b)
    yield from scalars.points(sorted(tree.symbols(both)), both)


def _inserted(node: Node, point: dict[str, Fraction]) -> Node:
    return _map(node, "sym", lambda n: tree.num(point[n.name]))


def _sign(node: Node) -> int | None:
    try:
        value = at(node, {LOG_BASE: Fraction(10)}, 40, real=True)
    except (ComplexError, UndefinedError):
        return None
    return 0 if abs(value) < 1e-30 else 1 if value > 0 else -1
