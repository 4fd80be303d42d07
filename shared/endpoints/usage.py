"""What the model calls of one trajectory cost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass


@dataclass
class Usage:
    """Counts of one role. A call that failed or was cancelled is counted like any other."""

    requests: int = 0
    """HTTP requests sent, retries among them."""
    retries: int = 0
    """Those of the requests that repeated one that had failed."""
    failures: int = 0
    """Calls that ended in an EndpointError."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server reported them; a reply that never came reports none."""
    seconds: float = 0.0
    """Time in which a request was out; waits for a permit or between retries are not in it."""
    base_url: str = ""
    """Of the server that sent the last good reply."""

    def add(self, other: Usage) -> None:
        self.requests += other.requests
        self.retries += other.retries
        self.failures += other.failures
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds
        self.base_url = other.base_url or self.base_url


class UsageMeter(defaultdict[str, Usage]):
    """Role -> Usage, one meter per trajectory: `chat(..., meter=meter["reasoner"])`."""

    def __init__(self) -> None:
        super().__init__(Usage)
