"""The dataset card of an exported snapshot: what it is, where it comes from, how to load it."""

from __future__ import annotations

import re
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from shared.store.snapshots import Record

_SIZES = {
    1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
}  # fmt: skip


def card(record: Record) -> str:
    """README.md, with the front matter that the Hub and `datasets` read."""
    size = next((word for bound, word in _SIZES.items() if record.n_rows < bound), "n>10M")
    # Markdown, not HTML: what users named is quoted as code instead.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["code"] = _code
    text = files("tirgen.curation").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(record=record, lineage=record.lineage, size=size)


def _code(text: str) -> str:
    """A text of the user's on one line, and no markup in it: a fence longer than any inside."""
    flat = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", flat)), default=0) + 1)
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"
