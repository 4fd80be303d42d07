"""Standard input for a run: a program that feeds it, then runs the code under its own name.

Runs have none of their own (a tool call needs none); trainers that grade programs by input and
output send one with each request of `/run_code`.
"""

from __future__ import annotations

_PROGRAM = """\
def __start__(data, code):
    import linecache, os, sys, threading
    source, sink = os.pipe()
    os.dup2(source, 0)
    os.close(source)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    def write():
        try:
            with open(sink, "wb") as file:
                file.write(data)
        except OSError:
            return  # the code did not read it all
    if len(data) <= 65536:  # a pipe takes this much at once
        write()
    else:
        threading.Thread(target=write, daemon=True).start()
    linecache.cache["<code>"] = (len(code), None, code.splitlines(keepends=True), "<code>")
    return compile(code, "<code>", "exec", dont_inherit=True)
exec(globals().pop("__start__")({data!r}, {code!r}))
"""


def with_stdin(code: str, stdin: str | None) -> str:
    """`code`, or a program that runs it with `stdin` to read; its tracebacks have one more line."""
    if not stdin:
        return code
    return _PROGRAM.format(data=stdin.encode("utf-8", "surrogatepass"), code=code)
