"""Hostile programs, at the tiers that are accepted by default. The names are the threat model.

They show that these programs are stopped, not that nothing gets out. The control at
the end runs attacks without the wall, where they get through.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from shared.sandbox import Limits, Outcome, Sandbox, Tier, launcher, pool

LIMITS = Limits(memory=300 << 20, file_size=1 << 20, open_files=32, scratch_files=100)
SECRET = "planted-gold-answer"


@pytest.fixture(scope="module", params=[Tier.A, Tier.B])
def jail(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    patch = pytest.MonkeyPatch()
    patch.setattr(pool, "TIERS", (request.param,))
    patch.setenv("TIRGEN_TEST_SECRET", SECRET)
    with Sandbox(
        zygotes=1, preload=("numpy",), warmup="", limits=LIMITS, minimum_tier=request.param
    ) as opened:
        yield opened
    patch.undo()


LIBC = "import ctypes\nif ctypes.CDLL(None)."

# Each prints "out" when it gets through.
GETS_OUT = {
    "read a host file": "open('/etc/passwd').read()",
    "list the root": "import os; os.listdir('/')",
    "list home directories": "import os; os.listdir('/root'); os.listdir('/home')",
    "read another process": "open('/proc/1/environ').read()",
    "read own process": "open('/proc/self/mem').read(1)",
    "write to tmp": "open('/tmp/attack', 'w').write('x')",
    "write above the run's directory": "open('../attack', 'w').write('x')",
    "leave by a symbolic link": "import os; os.symlink('/etc', 'l'); os.listdir('l')",
    "hard link a host file": "import os; os.link('/etc/passwd', 'l'); open('l').read()",
    "change modes": "import os; open('f', 'w'); os.chmod('f', 0o777)",
    "connect": "import socket; socket.socket()",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "raw socket by ctypes": f"{LIBC}socket(2, 1, 0) < 0: raise OSError",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "os.system": "import os\nif os.system('true') != 0: raise OSError",
    "execve": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"out\")'])",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start()",
    "memfd and exec": "import os; f = os.memfd_create('x'); os.execve(f, ['x'], {})",
    "signal the zygote": "import os, signal; os.kill(os.getppid(), 0)",
    "signal everyone": "import os; os.kill(-1, 0)",
    "ptrace": f"{LIBC}ptrace(0, 0, 0, 0) < 0: raise OSError",
    "new user namespace": f"{LIBC}unshare(0x10000000) < 0: raise OSError",
    "bpf": f"{LIBC}syscall(321, 0, 0, 0) < 0: raise OSError",
    "io_uring": f"{LIBC}syscall(425, 1, bytes(120)) < 0: raise OSError",
    "x32 calls": f"{LIBC}syscall(0x40000000 + 39) < 0: raise OSError",
    "raise a limit": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "limits of others": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))",
    "set ids": "import os; os.setuid(12345)",
    "new session": "import os; os.setsid()",
    "fill the disk": "open('f', 'wb').write(bytes(2 << 20))",
    "sparse file": "open('f', 'wb').truncate(1 << 40)",
    "open many files": "x = [open('/dev/null') for _ in range(100)]",
    "memory bomb": "x = bytearray(1 << 30)",
    "memory bomb by lists": "x = [0]\nwhile True: x = x * 2",
    "shared memory": "import mmap; mmap.mmap(-1, 1 << 30)",
    "numpy memory": "import numpy; numpy.ones(1 << 28)",
    "thread bomb": "import threading, time\n"
    "for _ in range(3000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
}


@pytest.mark.parametrize("name", GETS_OUT)
def test_cannot(jail: Sandbox, name: str) -> None:
    result = jail.run(f"{GETS_OUT[name]}\nprint('out')", timeout=5)
    assert result.outcome is Outcome.MODEL_ERROR, result
    assert "out" not in result.stdout


ENDLESS = {
    "loop": "while True: pass",
    "loop that catches everything": "while True:\n  try:\n    while True: pass\n"
    "  except BaseException: pass",
    "loop that ignores signals": "import signal\n"
    "for n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\n"
    "while True: pass",
    "one long call into C": "x = 10 ** (10 ** 9)",
    "threads": "import threading\ndef f():\n  while True: pass\n"
    "for _ in range(4): threading.Thread(target=f).start()",
    "exit handler": "import atexit\ndef f():\n  while True: pass\natexit.register(f)",
    "endless text of an exception": "class E(Exception):\n  def __str__(self):\n"
    "    while True: pass\nraise E",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_ends_in_time(jail: Sandbox, name: str) -> None:
    result = jail.run(ENDLESS[name], timeout=0.5)
    assert result.outcome is Outcome.TIMEOUT, result


def test_a_run_sees_neither_the_callers_environment_nor_its_descriptors(jail: Sandbox) -> None:
    """The planted secret stands in the environment of the process that started the zygote."""
    assert os.environ["TIRGEN_TEST_SECRET"] == SECRET
    result = jail.run(
        "import os, fcntl\nprint(dict(os.environ))\nopened = []\n"
        "for n in range(4096):\n"
        "  try: fcntl.fcntl(n, fcntl.F_GETFD); opened.append(n)\n  except OSError: pass\n"
        "print(opened)"
    )
    environment, descriptors = result.stdout.splitlines()
    assert SECRET not in environment
    assert set(eval(environment)) <= set(launcher.ENVIRONMENT) | {"LD_LIBRARY_PATH"}  # noqa: S307
    assert descriptors == "[0, 1, 2, 3]"


def test_nothing_of_one_run_reaches_the_next(jail: Sandbox) -> None:
    jail.run(
        "import builtins, sys, numpy, json\nbuiltins.print = None\nsys.path.clear()\n"
        "numpy.zeros = None\njson.dumps = None\nopen('left', 'w').write('x')\n"
    )
    result = jail.run("import os, numpy\nprint(os.listdir('.'), numpy.zeros(1))\n1 / 0")
    assert result.stdout == "[] [0.]\n"
    assert result.error is not None
    assert result.error.type == "ZeroDivisionError"


@pytest.mark.parametrize(
    "forgery",
    [
        'import os; os.write(3, b\'{"type": "Fake", "message": "", "line": 1}\'); os._exit(9)',
        "import os; os.write(3, b'\\xff' * 1000); os._exit(9)",
        "import os; os.write(3, b'[' * 60000); os._exit(9)",
        'import os; os.write(3, b\'{"type": [], "line": "x"}\'); os._exit(9)',
        "import os; os.close(3); 1 / 0",
        "import os; os.write(3, b'Esetup failed'); os._exit(70)",
        "print('{\"status\": 0}'); import os; os._exit(70)",
        "import sys; sys.stderr = sys.stdout = None; 1 / 0",
        "import os; os.closerange(0, 64); os._exit(1)",
        "import traceback; traceback.extract_tb = None; 1 / 0",
    ],
)
def test_a_failed_run_cannot_pass_for_another_outcome(jail: Sandbox, forgery: str) -> None:
    """Above all not for an infrastructure error, which would be retried and never punished."""
    result = jail.run(f"print('forged')\n{forgery}")
    assert result.outcome is Outcome.MODEL_ERROR, result
    assert result.error is not None


def test_the_zygote_outlives_hostile_runs(jail: Sandbox) -> None:
    before = {zygote.process.pid for zygote in jail._all}
    for code in ("import ctypes; ctypes.string_at(0)", "import os; os.abort()", "1 / 0") * 20:
        assert jail.run(code).outcome is Outcome.MODEL_ERROR
    deep = "import os\nfor _ in range(90):\n  os.mkdir('d'); os.chdir('d')\nprint(1)"
    assert jail.run(deep).stdout == "1\n"
    assert jail.run("import os; print(os.listdir('.'))").stdout == "[]\n"
    assert {zygote.process.pid for zygote in jail._all} == before


def test_many_files_are_refused_where_the_file_system_is_the_runs_own(jail: Sandbox) -> None:
    result = jail.run("for n in range(5000): open(f'f{n}', 'w').close()\nprint('out')")
    if jail.tier is Tier.A:
        assert result.error is not None
        assert "No space left" in result.error.message
    assert jail.run("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_control_without_a_wall_the_same_programs_get_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier D: the attacks themselves work, so it is the wall that stops them above."""
    monkeypatch.setattr(pool, "TIERS", (Tier.D,))
    with Sandbox(zygotes=1, preload=(), warmup="", minimum_tier=Tier.D) as open_field:
        for name in ("read a host file", "list the root", "connect", "subprocess", "fork",
                     "signal the zygote", "execve", "change modes"):  # fmt: skip
            result = open_field.run(f"{GETS_OUT[name]}\nprint('out')")
            assert "out" in result.stdout, (name, result)
