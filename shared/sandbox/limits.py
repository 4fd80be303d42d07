"""Every limit of a run, by the name under which it appears in the error that it causes."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use. Sizes in bytes. CPU time is the `timeout` of the call itself."""

    memory: int = 1024 * MIB  # address space beyond that of the preloaded interpreter
    output: int = 64 << 10  # kept of stdout and of stderr, each; the rest is counted and dropped
    flood: int = 16 * MIB  # written to stdout and stderr together before the run is ended
    file_size: int = 16 * MIB  # of any one file in the run's own directory
    open_files: int = 64
    scratch: int = 64 * MIB  # tier A: all files of a run together
    scratch_files: int = 4096  # tier A: files and directories of a run together
    cells: int = 64  # states that one session keeps

    def wall(self, timeout: float) -> float:
        """Seconds of wall time after which a run that sleeps is ended: a backstop, CPU decides."""
        return 3 * timeout + 2
