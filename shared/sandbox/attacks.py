"""Hostile programs, each named as the threat that it is, with what must come of it at every tier.

They show that these programs are stopped, not that nothing gets out. `tests/unit` runs them once at
every tier; `bench/sandbox_attacks.py` runs a thousand. After snekbox's tests (python-discord), and
what each wall was built against.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shared.sandbox.limits import MIB, Limits
from shared.sandbox.pool import Sandbox
from shared.sandbox.result import Outcome, RunResult, Tier

LIMITS = Limits(
    memory=300 * MIB, file_size=MIB, open_files=32, scratch=8 * MIB, scratch_files=100, flood=MIB
)


class Expect(StrEnum):
    STOPPED = "stopped"  # a model error before "out" is printed
    ENDED = "ended"  # a timeout, in time
    NOTHING = "nothing"  # it runs, and prints nothing but what `prints` says
    THROUGH = "through"  # "out" is printed: this tier does not prevent it, or need not


STOPPED, ENDED, NOTHING, THROUGH = Expect


@dataclass(frozen=True, slots=True)
class Attack:
    """`before` runs first, on the same zygote. `b` is as `a`, and `c` as `b`, unless given."""

    name: str
    code: str
    a: Expect = STOPPED
    b: Expect | None = None
    c: Expect | None = None
    prints: str = ""
    before: str = ""
    timeout: float = 5.0

    def expected(self, tier: Tier) -> Expect:
        b = self.b or self.a
        return {Tier.A: self.a, Tier.B: b}.get(tier, self.c or b)


def unexpected(sandbox: Sandbox, attack: Attack) -> str | None:
    """Carry the attack out: None if it came to what it must, else what it came to."""
    if attack.before:
        sandbox.run(attack.before, timeout=attack.timeout)
    stop = "" if attack.a in (ENDED, NOTHING) else "\nprint('out')"
    result = sandbox.run(attack.code + stop, timeout=attack.timeout)
    assert sandbox.tier is not None
    return None if _met(attack, attack.expected(sandbox.tier), result) else f"{result}"


def _met(attack: Attack, expect: Expect, result: RunResult) -> bool:
    match expect:
        case Expect.STOPPED:
            return result.outcome is Outcome.MODEL_ERROR and "out" not in result.stdout
        case Expect.ENDED:
            return result.outcome is Outcome.TIMEOUT
        case Expect.NOTHING:
            fine = result.outcome in (Outcome.OK, Outcome.NO_OUTPUT)
            return fine and result.stdout.strip() == attack.prints
        case Expect.THROUGH:
            return "out" in result.stdout


def _calls(kind: str, **calls: str) -> list[Attack]:
    """One attack for each call into libc, which must return less than 0."""
    head = "import ctypes\nlibc = ctypes.CDLL(None)\nif libc."
    return [
        Attack(f"{kind}: {name.replace('_', ' ')}", f"{head}{call} < 0: raise OSError")
        for name, call in calls.items()
    ]


def _simple(kind: str, *pairs: tuple[str, str], a: Expect = STOPPED, b: Expect | None = None,
            c: Expect | None = None, timeout: float = 5.0) -> list[Attack]:  # fmt: skip
    return [Attack(f"{kind}: {name}", code, a, b, c, timeout=timeout) for name, code in pairs]


_READS = _simple(
    "read",
    ("a host file", "open('/etc/passwd').read()"),
    ("the root directory", "import os; os.listdir('/')"),
    ("which processes there are", "import os; [p for p in os.listdir('/proc') if p == '1'][0]"),
    ("a sibling's command line", "open('/proc/1/cmdline').read()"),
    ("the sandbox's own source", "import sys; open(sys.modules['shared.sandbox'].__file__).read()"),
    c=THROUGH,  # cannot hide what every user may read
) + _simple(
    "read",
    ("the parent's environment", "import os; open(f'/proc/{os.getppid()}/environ').read()"),
    ("the parent's memory", "import os; open(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
    ("the parent's descriptors", "import os; os.readlink(f'/proc/{os.getppid()}/fd/0')"),
    ("its own memory as a file", "open('/proc/self/mem', 'rb').read(1)"),
    ("a package that is not installed for it", "import shared.store"),
    ("a kernel log", "import os; open('/dev/kmsg').read(1)"),
)

_WRITES = _simple(
    "write",
    ("in its own directory", "open('f', 'w').write('x')"),
    a=THROUGH,
    b=STOPPED,
) + _simple(
    "write",
    ("to /tmp", "open('/tmp/attack', 'w').write('x')"),
    ("above its own directory", "open('../attack', 'w').write('x')"),
    ("to shared memory", "open('/dev/shm/attack', 'w').write('x')"),
    ("over a library", "import os; open(os.__file__, 'a')"),
    ("away a library", "import os; os.remove(os.__file__)"),
    ("a library's times", "import os; os.utime(os.__file__)"),
    ("extended attributes", "import os; os.setxattr('.', 'user.x', b'1')"),
    ("a symbolic link", "import os; os.symlink('/etc', 'l')"),
    ("a hard link to a host file", "import os; os.link('/etc/passwd', 'l')"),
    ("modes", "import os; open('f', 'w'); os.chmod('f', 0o4777)"),
    ("a device", "import os; os.mknod('d', 0o20666, 0x101)"),
    ("a fifo", "import os; os.mkfifo('p')"),
    ("100 000 files", "for n in range(100_000): open(f'f{n}', 'w').close()"),
    ("100 000 directories", "import os\nfor n in range(100_000): os.mkdir(f'd{n}')"),
    ("a deep tree", "import os\nfor _ in range(100_000): os.mkdir('d'); os.chdir('d')"),
    ("a big file", "open('f', 'wb').write(bytes(2 << 20))"),
    ("many files that are big together",
     "for n in range(99): open(str(n), 'wb').write(bytes(1 << 20))"),
    ("a sparse file", "open('f', 'wb').truncate(1 << 40)"),
    ("a lock on a host file", "import fcntl, os; fcntl.flock(open(os.__file__), fcntl.LOCK_SH)"),
    ("a record lock", "import fcntl, os; fcntl.lockf(open(os.__file__), fcntl.LOCK_SH)"),
)  # fmt: skip

_NETWORK = _simple(
    "network",
    ("TCP", "import socket; socket.socket()"),
    ("UDP", "import socket; socket.socket(type=socket.SOCK_DGRAM)"),
    ("IPv6", "import socket; socket.socket(socket.AF_INET6)"),
    ("a unix socket", "import socket; socket.socket(socket.AF_UNIX).bind('s')"),
    ("an abstract socket", "import socket; socket.socket(socket.AF_UNIX).bind('\\0attack')"),
    ("a pair of sockets", "import socket; socket.socketpair()"),
    ("raw packets", "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    ("netlink", "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    ("the virtual machine's host", "import socket; socket.socket(socket.AF_VSOCK)"),
    ("a name", "import socket; socket.getaddrinfo('example.com', 80)"),
    ("a web page", "import urllib.request as u; u.urlopen('http://127.0.0.1:1/', timeout=1)"),
    ("an event loop", "import asyncio; asyncio.run(asyncio.sleep(0))"),  # needs a pair of sockets
) + _calls("network", a_socket_by_number="socket(2, 1, 0)")

_PROCESSES = _simple(
    "process",
    ("fork", "import os\nif os.fork() == 0: os._exit(0)"),
    ("fork bomb", "import os\nwhile True: os.fork()"),
    ("subprocess", "import subprocess; subprocess.run(['/bin/true'], check=True)"),
    ("shell", "import os\nif os.system('true') != 0: raise OSError"),
    ("execve",
     "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"out\")'])"),
    ("spawn", "import os; os.posix_spawn('/bin/true', ['true'], {})"),
    ("multiprocessing", "import multiprocessing as m; m.Process(target=print).start()"),
    ("a pool of processes", "import multiprocessing as m; m.Pool(2).map(abs, [1])"),
    ("a pseudo terminal", "import pty; pty.fork()"),
    ("a program in memory", "import os; f = os.memfd_create('x'); os.execve(f, ['x'], {})"),
    ("thread bomb", "import threading as t, time\nfor _ in range(9999):"
     " t.Thread(target=time.sleep, args=(9,), daemon=True).start()"),
    ("a thousand short threads", "import threading as t\n"
     "for _ in range(1000): x = t.Thread(target=int); x.start(); x.join()"),
    ("kill the zygote", "import os; os.kill(os.getppid(), 9)"),
    ("kill everyone", "import os; os.kill(-1, 9)"),
    ("kill its group", "import os; os.killpg(0, 9)"),
    ("signal by descriptor", "import os; os.pidfd_open(os.getppid())"),
    ("new session", "import os; os.setsid()"),
    ("new group", "import os; os.setpgid(0, 0)"),
    ("other ids", "import os; os.setuid(12345)"),
    ("other groups", "import os; os.setgroups([])"),
    ("a better priority", "import os; os.nice(-5)"),
    ("real time", "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    ("another core", "import os; os.sched_setaffinity(0, {0})"),
    ("a higher limit", "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))"),
    ("another's limit", "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))"),
    ("another root", "import os; os.chroot('.')"),
    ("keystrokes for the terminal", "import fcntl; fcntl.ioctl(0, 0x5412, b'x')"),
)  # fmt: skip

_KERNEL = _calls(
    "kernel",
    ptrace="ptrace(16, 1, 0, 0)",
    vfork="vfork()",
    fork_by_clone="syscall(56, 17, 0, 0, 0, 0)",
    fork_beside_itself="syscall(56, 0x1208011, 0, 0, 0, 0)",
    clone3="syscall(435, bytes(88), 88)",
    user_namespace="unshare(0x10000000)",
    thread_with_a_namespace="syscall(56, 0x50f00 | 0x20000, 0, 0, 0, 0)",
    enter_a_namespace="setns(0, 0)",
    mount="mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
    io_uring="syscall(425, 1, bytes(120))",
    bpf="syscall(321, 0, 0, 0)",
    perf_events="syscall(298, 0, 0, 0, 0, 0)",
    user_page_faults="syscall(323, 0)",
    read_another_memory="syscall(310, 1, 0, 0, 0, 0, 0)",
    compare_processes="syscall(312, 1, 1, 0, 0, 0)",
    key_rings="syscall(250, 0, -3, 0)",
    shared_segments="shmget(0, 4096, 0o1600)",
    message_queues="syscall(240, b'attack', 66, 0o600, 0)",
    watch_files="inotify_init()",
    memory_files="syscall(319, b'x', 0)",
    modules="syscall(175, 0, 0, b'')",
    reboot="syscall(169, 0, 0, 0, 0)",
    x32_calls="syscall(0x40000000 + 39)",
    personality="personality(0x0040000)",
    the_clock="syscall(227, 0, bytes(16))",
    a_filter_of_its_own="syscall(317, 1, 0, 0)",
    to_outlive_its_parent="prctl(1, 0, 0, 0, 0)",
    to_be_inspected="prctl(4, 1, 0, 0, 0)",
    signal_with_data="syscall(129, 1, 9, 0)",
    signal_a_thread="syscall(234, 1, 1, 9)",
    file_handles="syscall(304, 0, 0, 0)",
    open_by_the_new_call="syscall(437, -100, b'/etc/passwd', bytes(24), 24)",
)

_MEMORY = _simple(
    "memory",
    ("one block", "x = bytearray(1 << 30)"),
    ("lists that double", "x = [0]\nwhile True: x = x * 2"),
    ("text", "x = 'x' * (1 << 30)"),
    ("a map", "import mmap; mmap.mmap(-1, 1 << 30)"),
    ("a private map", "import mmap; mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE)"),
    ("shared memory", "from multiprocessing.shared_memory import SharedMemory as S\n"
     "S(create=True, size=1 << 20)"),
    ("numpy", "import numpy; numpy.ones(1 << 28)"),
    ("an integer", "x = 1 << (1 << 33)"),
    ("recursion", "def f(): f()\nf()"),
    ("recursion without a limit", "import sys; sys.setrecursionlimit(1 << 30)\n"
     "f = lambda x: sorted([x], key=f)\nf(1)"),
    ("nested lists", "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)"),
    ("a deep expression", "eval('(' * 10**6)"),
    ("open files", "x = [open('/dev/null') for _ in range(100)]"),
    ("descriptors", "import os\nx = [os.dup(0) for _ in range(100)]"),
    ("pipes", "import os\nx = [os.pipe() for _ in range(100)]"),
    timeout=20.0,
)  # fmt: skip

_FLOODS = _simple(
    "flood",
    ("standard output", "while True: print('x' * 1000)"),
    ("standard error", "import sys\nwhile True: sys.stderr.write('x' * 1000)"),
    ("both", "import sys\nwhile True: print('x' * 99, file=sys.stderr); print('x' * 99)"),
    ("the facts", "import os\nwhile True: os.write(3, b'x' * 1000)"),
    ("by one write", "import os; os.write(1, b'x' * (8 << 20)); raise OSError"),
    ("by a long message", "raise ValueError('x' * (1 << 24))"),
    ("from threads", "import threading\ndef f():\n  while True: print('x' * 1000)\n"
     "for _ in range(4): threading.Thread(target=f).start()\nf()"),
)  # fmt: skip

_ENDLESS = _simple(
    "endless",
    ("loop", "while True: pass"),
    ("catches everything", "while True:\n  try:\n    while True: pass\n"
     "  except BaseException: pass"),
    ("swallows interrupts", "while True:\n  try: raise KeyboardInterrupt\n"
     "  except KeyboardInterrupt: pass"),
    ("ignores signals", "import signal\nfor n in range(1, 65):\n"
     "  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
     "while True: pass"),
    ("blocks signals", "import signal; signal.pthread_sigmask(0, range(1, 64))\nwhile True: pass"),
    ("one call into C", "sum(range(10**13))"),
    ("a regular expression", "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')"),
    ("threads", "import threading\ndef f():\n  while True: pass\n"
     "for _ in range(4): threading.Thread(target=f).start()"),
    ("at exit", "import atexit\ndef f():\n  while True: pass\natexit.register(f)"),
    ("at exit of a thread", "import threading\ndef f():\n  while True: pass\n"
     "threading._register_atexit(f)"),
    ("finaliser", "class E:\n  def __del__(self):\n    while True: pass\nE()"),
    ("finaliser of a cycle", "import gc\nclass E:\n  def __del__(self):\n    while True: pass\n"
     "e = E(); e.e = e; del e; gc.collect()"),
    ("text of an exception", "class E(Exception):\n  def __str__(self):\n    while True: pass\n"
     "raise E"),
    ("standard output of its own",
     "import sys\nclass E:\n  def flush(self):\n    while True: pass\n"
     "  def write(self, x): pass\nsys.stdout = E()"),
    a=ENDED, timeout=0.2,
)  # fmt: skip

_CRASHES = _simple(
    "crash",
    ("segmentation fault", "import ctypes; ctypes.string_at(0)"),
    ("abort", "import os; os.abort()"),
    ("kill itself", "import signal; signal.raise_signal(signal.SIGKILL)"),
    ("alarm", "import signal, time; signal.setitimer(signal.ITIMER_REAL, .01); time.sleep(60)"),
    ("quit with the zygote's code", "import os; os._exit(70)"),
    ("frees what is not its own", "import ctypes; ctypes.CDLL(None).free(ctypes.c_void_p(8))"),
    ("objects out of numbers", "import ctypes\n"
     "print(ctypes.cast(12345, ctypes.py_object).value)"),
    ("references taken away", "import ctypes\nfor o in (int, str, type, object):\n"
     "  ctypes.c_ssize_t.from_address(id(o)).value = 1\nfor _ in range(99): del o; o = type(1)\n"
     "import gc; gc.collect(); ctypes.string_at(0)"),
    ("closes everything", "import os; os.closerange(0, 64); os._exit(1)"),
    ("takes its own exit away", "import os; os._exit = exit = None; import sys\n"
     "sys.modules['shared.sandbox.child'].flush = None; 1 / 0"),
    ("NUL in the code", "a\0b"),
    ("half a character", "x = '\ud800"),
)  # fmt: skip

_FORGERIES = _simple(
    "forge",
    ("an exception", 'import os; os.write(3, b\'{"type": "Fake", "line": 1}\'); os._exit(9)'),
    ("facts that are no text", "import os; os.write(3, b'\\xff' * 1000); os._exit(9)"),
    ("facts that nest", "import os; os.write(3, b'[' * 60000); os._exit(9)"),
    ("facts of other types", 'import os; os.write(3, b\'{"type": [], "line": "x"}\'); os._exit(9)'),
    ("no facts", "import os; os.close(3); 1 / 0"),
    ("a failed start", "import os; os.write(3, b'Esetup failed'); os._exit(70)"),
    ("a status", "print('{\"status\": 0}'); import os; os._exit(70)"),
    ("no streams", "import sys; sys.stderr = sys.stdout = None; 1 / 0"),
    ("no traceback", "import traceback; traceback.extract_tb = None; 1 / 0"),
    ("an exception without a name", "class E(Exception):\n  def __str__(self): raise E\nraise E"),
    ("exit by a strange code", "raise SystemExit(1 << 70)"),
    ("a hostile pickle", "import pickle\n"
     "if pickle.loads(b\"cos\\nsystem\\n(S'true'\\ntR.\") != 0: raise OSError"),
)  # fmt: skip

_SECRET = "'planted' + '-by-another-run'"
_LEFT = [
    Attack("left: patched modules", "import json, math; print(math.sqrt(4), json.dumps(1))",
           NOTHING, prints="2.0 1", before="import json, math\n"
           "math.sqrt = json.dumps = None; import builtins; builtins.print = None"),
    Attack("left: modules thrown away",
           "import sys, os; print(len(sys.modules) > 50, bool(sys.path))", NOTHING,
           prints="True True", before="import sys; sys.modules.clear(); sys.path.clear()"),
    Attack("left: objects in memory", "import gc\nfound = [o for o in gc.get_objects() if"
           f" isinstance(o, dict) and any(v == {_SECRET} for v in list(o.values()))]\n"
           "print(len(found))", NOTHING, prints="0", before=f"import sys; sys.keep = {_SECRET}"),
    Attack("left: variables", "print('x' in globals(), __name__)", NOTHING, prints="False __main__",
           before="x = 1"),
    Attack("left: files", "import os\nprint([f for f in os.listdir('.') if f == 'left'])",
           NOTHING, STOPPED, NOTHING, prints="[]", before="open('left', 'w').write('x')"),
    Attack("left: a directory nobody may enter", "import os\n"
           "print([f for f in os.listdir('.') if f == 'left'])", NOTHING, STOPPED, NOTHING,
           prints="[]", before="import os; os.mkdir('left'); os.mkdir('left/d', 0)"),
    Attack("left: handlers", "import signal, threading\n"
           "print(signal.getsignal(signal.SIGTERM) == left if 'left' in globals() else 0)", NOTHING,
           prints="0", before="import signal\ndef left(*_): pass\nsignal.signal(15, left)"),
    Attack("left: chance", "import random; print(random.random() == 0.8444218515250481)", NOTHING,
           prints="True",
           before="import random, os\nrandom.seed(5); random.random = os.urandom = 0"),
    Attack("left: the clock", "import time; print(time.time() == 1735689600.000001)", NOTHING,
           prints="True", before="import time\nfor _ in range(99): time.time()\ntime.time = None"),
    Attack("seen: the caller's environment", "import os; print('PLANTED_SECRET' in os.environ)",
           NOTHING, prints="False"),
    Attack("seen: descriptors", "import os\nopened = []\nfor n in range(4096):\n"
           "  try: os.fstat(n); opened.append(n)\n  except OSError: pass\nprint(opened)",
           NOTHING, prints="[0, 1, 2, 3]"),
    Attack("seen: arguments", "import sys; print(len(sys.argv) <= 3, 'answer' in str(sys.argv))",
           NOTHING, prints="True False"),
    Attack("text: NUL, a lone surrogate and bytes that are no text",
           "import sys; print('a\\0b\\ud800', flush=True); sys.stdout.buffer.write(b'\\xff')",
           NOTHING, prints="a\0b\\ud800\n\ufffd"),
    Attack("text: nothing to print to", "import sys; sys.stdout = None; print('x')", NOTHING),
]  # fmt: skip

ATTACKS: tuple[Attack, ...] = (
    *_READS, *_WRITES, *_NETWORK, *_PROCESSES, *_KERNEL, *_MEMORY, *_FLOODS, *_ENDLESS, *_CRASHES,
    *_FORGERIES, *_LEFT,
)  # fmt: skip
