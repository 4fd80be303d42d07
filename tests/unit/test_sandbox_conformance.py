"""Every backend passes the conformance suite, and the suite finds those that should not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import pytest

from shared.errors import SandboxError
from shared.sandbox import Outcome, RunResult, Sandbox, Tier, pool
from shared.sandbox.conformance import CASES, check
from shared.sandbox.remote import RemoteSandbox
from tests.served import served

pytestmark = pytest.mark.timeout(240)  # some four seconds each, and more on a busy machine


@pytest.mark.parametrize("tier", [Tier.B, Tier.C])
def test_the_sandbox_conforms_without_namespaces_and_without_landlock(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "TIERS", (tier,))
    with Sandbox(zygotes=2, minimum_tier=tier) as sandbox:
        assert sandbox.tier is tier
        assert check(sandbox) == []


@pytest.fixture(scope="module")
def local() -> Iterator[Sandbox]:
    with Sandbox(zygotes=2) as opened:
        yield opened


def test_the_strongest_tier_of_this_host_conforms(local: Sandbox) -> None:
    assert check(local) == []


def test_the_remote_adapter_conforms_against_our_own_server(local: Sandbox) -> None:
    with served(local) as url, RemoteSandbox(url) as far:
        assert far.tier is local.tier
        assert check(far) == []


def test_the_claims_are_many_and_each_is_named_once() -> None:
    assert len({case.claim for case in CASES}) == len(CASES) >= 50


class Wrong:
    """A backend that is right but for one thing."""

    def __init__(self, inner: Sandbox, spoil: Callable[[RunResult, str], RunResult]) -> None:
        self.inner, self.spoil, self.tier = inner, spoil, inner.tier

    def run(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        return self.spoil(self.inner.run(code, seed=seed, timeout=timeout), code)

    async def arun(self, code: str, *, seed: int = 0, timeout: float = 10.0) -> RunResult:
        return self.spoil(await self.inner.arun(code, seed=seed, timeout=timeout), code)

    def __enter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    def __exit__(
        self, a: type[BaseException] | None, b: BaseException | None, c: TracebackType | None
    ) -> None: ...

    async def __aexit__(
        self, a: type[BaseException] | None, b: BaseException | None, c: TracebackType | None
    ) -> None: ...


def forget_output_of_failures(result: RunResult, _: str) -> RunResult:
    return replace(result, stdout="") if result.error else result


def call_everything_a_success(result: RunResult, _: str) -> RunResult:
    return replace(result, outcome=Outcome.OK, error=None)


def forget_where(result: RunResult, _: str) -> RunResult:
    return replace(result, error=replace(result.error, line=None)) if result.error else result


def mix_the_streams(result: RunResult, _: str) -> RunResult:
    return replace(result, stdout=result.stdout + result.stderr, stderr="")


def leave_out_the_count(result: RunResult, _: str) -> RunResult:
    return replace(result, bytes_cut=0)


def be_ascii_only(result: RunResult, _: str) -> RunResult:
    return replace(result, stdout=result.stdout.encode("ascii", "replace").decode())


def be_of_another_tier(result: RunResult, _: str) -> RunResult:
    return replace(result, tier=Tier.D)


_DRAWS = itertools.count()


def draw_anew(result: RunResult, _: str) -> RunResult:
    return replace(result, stdout=f"{result.stdout}{next(_DRAWS)}\n")


def raise_instead(result: RunResult, _: str) -> RunResult:
    if result.outcome is Outcome.TIMEOUT:
        raise SandboxError("Too late.")
    return result


WRONGS = {
    forget_output_of_failures: "an endless loop times out, and what was printed is kept",
    call_everything_a_success: "exit(3) is a failure",
    forget_where: "a syntax error has its line",
    mix_the_streams: "standard error is kept apart",
    leave_out_the_count: "long output is cut, and the cut is counted",
    be_ascii_only: "Unicode comes back as it was printed",
    be_of_another_tier: "printed text is the output",
    draw_anew: "a seed decides every draw",
    raise_instead: "an endless loop times out",
}


@pytest.mark.parametrize("spoil", WRONGS)
def test_a_backend_that_is_wrong_in_one_thing_is_found(
    local: Sandbox, spoil: Callable[[RunResult, str], RunResult]
) -> None:
    """The claim that it breaks is the one that fails, and it holds for what is not spoiled."""
    cases = [case for case in CASES if WRONGS[spoil] in case.claim]
    assert check(local, cases) == []
    assert [failure.claim for failure in check(Wrong(local, spoil), cases)] == [
        case.claim for case in cases
    ]
