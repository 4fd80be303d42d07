"""The smallest parts of an answer: numbers, names with their scripts, brackets, sets, matrices."""

from __future__ import annotations

from fractions import Fraction

from shared.grading import matrices, tree
from shared.grading.caps import MAX_ENTRIES, TooMuchError, UnreadableError
from shared.grading.commands import Commands
from shared.grading.tree import Node
from shared.grading.words import NUMBER_WORDS

_MATRICES = frozenset({"pmatrix", "bmatrix", "matrix", "smallmatrix", "array", "Bmatrix"})
_APPLIED = frozenset("fgh")


class Atoms(Commands):
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

    def marked(self, node: Node, mark: str) -> Node:
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
        return matrices.from_rows(node.args) if shape == "[]" else Node("tuple", "", node.args)

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
            return matrices.determinant(matrices.matrix(rows))
        if name in _MATRICES:
            return matrices.matrix(rows)
        if name in ("aligned", "align", "gathered", "split") and rows:
            return Node("list", "", tuple(cell for row in rows for cell in row))
        raise UnreadableError(f"\\begin{{{name}}}")
