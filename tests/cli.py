"""What a command line under test has printed, or the error that it ended with."""

from __future__ import annotations

from typer.testing import Result

from shared.errors import TirgenError


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output or result.exception
    return result.output


def error_of(result: Result) -> TirgenError:
    assert isinstance(result.exception, TirgenError), result.output
    return result.exception
