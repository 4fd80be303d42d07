"""Every limit of a run, by the name under which it appears in the error that it causes."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use. Sizes in bytes. CPU time is the `timeout` of the call itself.

    A run is one process: it may start threads and no other process, so what bounds the process
    bounds the run.
    """

    memory: int = 1024 * MIB  # address space beyond that of the preloaded interpreter
    threads: int = 256  # started in the whole life of a run (or of one cell)
    output: int = 64 << 10  # kept of stdout and of stderr, each; the rest is counted and dropped
    flood: int = 16 * MIB  # written in all before the run is ended
    file_size: int = 16 * MIB  # of any one file in the run's own directory
    open_files: int = 64
    scratch: int = 64 * MIB  # tier A: all files of a run together
    scratch_files: int = 4096  # tier A: files and directories of a run together
    states: int = 32  # of one session that are kept in memory; older ones are replayed when needed
    states_memory: int = 1024 * MIB  # that these may hold together beyond the preloaded interpreter

    def wall(self, timeout: float) -> float:
        """Seconds of wall time after which a run that sleeps is ended: a backstop, CPU decides."""
        return 5 * timeout + 10
