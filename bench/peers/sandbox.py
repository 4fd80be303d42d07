"""What others pay for a run of Python code, for bench/sandbox.py.

Each peer runs a program and forgets it. `isolates` says whether anything stands between the code
and the account that runs it; a fast peer that does not isolate is no sandbox, and is marked so.
The peers' packages are the `bench` extra: pip install 'tirgen[bench]'.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from shared.sandbox.launcher import ENVIRONMENT, search_path
from shared.sandbox.limits import Limits
from shared.sandbox.pool import PRELOAD, WARMUP
from shared.sandbox.result import Tier

ROOT = Path(__file__).parents[2]
IMPORTS = "".join(f"import {name}\n" for name in PRELOAD)
FLAGS = ("-s", "-S", "-P", "-B")  # as the zygote is started


class Peer:
    """Use it in a `with` block; `run` returns what the program printed."""

    name: ClassVar[str]
    isolates: ClassVar[bool]
    needs: ClassVar[str | None] = None  # a package
    has_sympy: ClassVar[bool] = True

    @classmethod
    def missing(cls) -> str | None:
        """What to do to have it, or None."""
        if cls.needs is None or importlib.util.find_spec(cls.needs) is not None:
            return None
        return f"no package {cls.needs}: pip install 'tirgen[bench]'"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def run(self, program: str) -> str:
        raise NotImplementedError


def _output(command: list[str], **options: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


class Cold(Peer):
    """A new interpreter for every run, with the same imports: what most sandboxes do."""

    name, isolates = "cold python -c", False

    def run(self, program: str) -> str:
        return _output([sys.executable, "-c", IMPORTS + program], env=ENVIRONMENT)


_ENTER = f"""
import json, os, sys
from shared.sandbox import confine, namespaces, zygote
search = json.loads(sys.argv[1])
sys.path += search
readable = namespaces.interpreter_paths(search)
if sys.argv[2] == "A":
    namespaces.enter(readable, "/tmp/sandbox", {Limits().scratch}, {Limits().scratch_files})
confine.drop_capabilities()
"""


class ColdJailed(Peer):
    """The same behind our own wall, less the system call filter: namespaces, Landlock, rlimits."""

    name, isolates = "cold python -c in the same jail", True
    program = (
        f"{_ENTER}confine.isolate()\n"
        "rules = confine.rules((*readable, '/dev/null'), ('/dev/null',))\n"
        "confine.restrict(confine.ruleset(rules))\n"
    )

    def __init__(self, tier: Tier) -> None:
        self.tier = tier

    def run(self, program: str) -> str:
        arguments = [json.dumps(search_path()), self.tier]
        code = self.program + IMPORTS + program
        return _output(
            [sys.executable, *FLAGS, "-c", code, *arguments],
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            cwd="/",
        )


class Bubblewrap(Peer):
    """The same in bubblewrap, which isolates as most agents' tools do."""

    name, isolates = "cold python -c in bubblewrap", True

    @classmethod
    def missing(cls) -> str | None:
        return None if shutil.which("bwrap") else "no program bwrap: apt install bubblewrap"

    def run(self, program: str) -> str:
        wall = ["bwrap", "--unshare-all", "--die-with-parent", "--clearenv", "--ro-bind", "/", "/",
                "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
                "--ro-bind", sys.prefix, sys.prefix]  # fmt: skip
        for name, value in ENVIRONMENT.items():
            wall += ["--setenv", name, value]
        return _output([*wall, sys.executable, "-c", IMPORTS + program])


class Jupyter(Peer):
    """A warm kernel, its names reset before each run. The kernel is the user's own process."""

    isolates, needs = False, "jupyter_client"
    name = "warm Jupyter kernel, reset per run"

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("ipykernel") is None:
            return "no package ipykernel: pip install 'tirgen[bench]'"
        return super().missing()

    def __enter__(self) -> Self:
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(kernel_name="python3")
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.manager.kernel_spec.argv = command
        self.manager.start_kernel(env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.run(IMPORTS + WARMUP)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, program: str) -> str:
        texts: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                texts.append(message["content"]["text"])

        self.client.execute("%reset -f", silent=True, reply=True, timeout=60)
        reply = self.client.execute_interactive(program, output_hook=hook, timeout=60)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(reply["content"])
        return "".join(texts)


class Smolagents(Peer):
    """Interprets the syntax tree inside the caller's own process, which it says is no sandbox."""

    name, isolates, needs = "smolagents LocalPythonExecutor", False, "smolagents"

    def run(self, program: str) -> str:
        from smolagents.local_python_executor import LocalPythonExecutor

        executor = LocalPythonExecutor(["sympy", "numpy", "numpy.*", "scipy", "scipy.*"])
        executor.send_tools({})
        return str(executor(program).logs)


class Monty(Peer):
    """A small interpreter in Rust: no way out, and no libraries."""

    name, isolates, needs, has_sympy = "pydantic-monty", True, "pydantic_monty", False

    def __enter__(self) -> Self:
        from pydantic_monty import Monty as Pool

        self.pool = Pool(min_processes=1, max_processes=1)
        self.pool.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.__exit__(None, None, None)

    def run(self, program: str) -> str:
        texts: list[str] = []
        with self.pool.checkout() as session:
            session.feed_run(program, print_callback=lambda _, text: texts.append(text))
        return "".join(texts)


class BareFork:
    """`fork` and `wait` in an interpreter that is what our zygote is: same jail, imports, warm-up.

    The price below which no sandbox that forks can be: of nothing, or of a program whose output
    nobody reads.
    """

    program = f"""{_ENTER}
import ctypes, time
from shared.sandbox import pages
fork = ctypes.PyDLL(None).fork  # less what Python does around it, as our own
zygote.warm(json.loads(sys.argv[3]), sys.argv[4])
pages.settle()
print("ready", flush=True)
for line in sys.stdin:
    n, program = json.loads(line)
    times = []
    for _ in range(n):
        began = time.perf_counter()
        pid = fork()
        if pid == 0:
            if program:
                sys.stdout = open(os.devnull, "w")
                exec(program, {{}})
            os._exit(0)
        os.waitpid(pid, 0)
        times.append(time.perf_counter() - began)
    print(json.dumps(times), flush=True)
"""

    def __init__(self, tier: Tier) -> None:
        arguments = [json.dumps(search_path()), tier, json.dumps(PRELOAD), WARMUP]
        self.process = subprocess.Popen(
            [sys.executable, *FLAGS, "-c", self.program, *arguments],
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, cwd="/", text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def times(self, n: int, program: str = "") -> list[float]:
        """Seconds of n forks, each of which runs `program`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([n, program]) + "\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peers(tier: Tier) -> list[tuple[type[Peer], Callable[[], Peer]]]:
    """All of them, whether they are here or not."""
    return [
        (Cold, Cold), (ColdJailed, lambda: ColdJailed(tier)), (Bubblewrap, Bubblewrap),
        (Jupyter, Jupyter), (Smolagents, Smolagents), (Monty, Monty),
    ]  # fmt: skip


def label(peer: type[Peer]) -> str:
    """Its name, the version of its package, and whether it is a sandbox at all."""
    release = f" {version(peer.needs.replace('_', '-'))}" if peer.needs else ""
    return f"{peer.name}{release}{'' if peer.isolates else ' (does not isolate)'}"
