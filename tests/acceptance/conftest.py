"""One home for all tests that break nothing; one for those that do."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.acceptance.home import Home, opened

# A suite that was started with `nohup` or in the background ignores these, and so would the
# commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home that is up."""
    with opened(tmp_path_factory.mktemp("home")) as home:
        said = home.tirgen("up")
        assert said.code == 0, said
        yield home


@pytest.fixture(scope="session")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose parts are killed; every test says first what it wants to be up."""
    with opened(tmp_path_factory.mktemp("victim")) as home:
        yield home
