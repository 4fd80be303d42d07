"""kill -9 of what works on a run: nothing finished is lost, nothing is made twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.acceptance.home import Home, until
from tests.processes import kill_tree

N = 40


@contextmanager
def in_the_middle(home: Home, run: str) -> Iterator[None]:
    """Starts a run, breaks it in the block when some is done, and sees to it that all ends well."""
    asked = ["--limit", str(N), "--run", run, "--set", "in_flight=4", "--detach"]
    said = home.tirgen("generate", "nano", *asked)
    assert said.code == 0, said
    until(lambda: len(home.finished(run)) >= 5, "some items are finished")
    before = home.finished(run)
    assert 5 <= len(before) < N, "the fault comes too late to prove anything"
    yield
    home.leases_run_out()
    said = home.quick("resume", run)
    assert said.code == 0, said
    home.assert_reconciles(run, N)
    after = home.finished(run)
    assert len(after) == N - home.count(run, "state = 'failed'") == N
    assert before.items() <= after.items(), "what was finished is untouched"


def test_kill_9_of_the_pool_process_loses_and_doubles_nothing(victim: Home) -> None:
    """Celery forks another, and the killed one's items are swept. Killed is not failed."""
    with in_the_middle(victim, "pool"):
        (child,) = victim.worker().children()
        parent = victim.worker().pid
        kill_tree(child)
        until(lambda: bool(victim.worker().children()), "there is another")
    assert victim.worker().pid == parent
    assert victim.count("pool", "kills > 0") >= 1, "control: it held items"
    assert victim.count("pool", "failures > 0") == 0


def test_kill_9_of_the_whole_worker_loses_and_doubles_nothing(victim: Home) -> None:
    """`resume` starts another worker."""
    with in_the_middle(victim, "tree"):
        worker = victim.worker()
        kill_tree(worker)
    assert victim.worker().pid != worker.pid
    assert victim.count("tree", "kills > 0") >= 1, "control: it held items"
    assert victim.count("tree", "failures > 0") == 0


def test_kill_9_of_the_database_loses_and_doubles_nothing(victim: Home) -> None:
    """`up` recovers it from its log; the worker that outlasts it goes on, or is replaced."""
    with in_the_middle(victim, "database"):
        victim.postmaster().kill()
        said = victim.tirgen("up")
        assert said.code == 0, said
    assert victim.count("database", "failures > 0") == 0
