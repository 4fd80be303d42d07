"""The model of a chaos run, in a process of its own: one tool call and one answer an item.

Argument: the port. Every fourth problem gets a wrong answer, so that items end as rejected, too.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from typing import Any

from tests.fake_endpoint import FakeEndpoint, Reply
from tests.scripted import Server, http, speech

NUMBER = re.compile(r"what is (\d+) times 7")


def question(i: int) -> str:
    """The text of problem `i`; its answer is 7 i."""
    return f"Problem {i}: what is {i} times 7?"


def reasoner(user: str, response: str, seed: int) -> str:
    found = NUMBER.search(user)
    assert found is not None
    i = int(found[1])
    said = 7 * i + (i % 4 == 3)
    return speech(f"S0 CALC {i} times 7", f"S1 hence \\boxed{{{said}}}")(user, response, seed)


def extractor(user: str, seed: int) -> str:
    step = user.partition("\n")[2]
    found = re.search(r"S0 CALC (\d+) times 7", step)
    if found is None:
        return json.dumps({"solvable": False})
    code = f"total = 0\nfor _ in range(7):\n    total += {found[1]}\nprint(total)"
    return json.dumps({"solvable": True, "logic": f"S0 {found[1]} times 7", "code": code})


def main() -> None:
    port = int(sys.argv[1])
    answer = http(Server(reasoner, extractor))

    def script(path: str, body: Any) -> Reply:
        server.requests.clear()  # hours of them would be kept otherwise
        return answer(path, body)

    with FakeEndpoint(script, address=("0.0.0.0", port)) as server:
        threading.Event().wait()


if __name__ == "__main__":
    main()
