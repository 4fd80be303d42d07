"""One JSON object a line, as of every bench."""

from __future__ import annotations

import json
from typing import Any


def report(metric: str, value: float | None, unit: str, **more: Any) -> None:
    known = value if value is None else float(f"{value:.4g}")
    line = {"bench": "scale", "metric": metric, "value": known, "unit": unit}
    peer = {"peer": more.pop("peer", None), "ratio": more.pop("ratio", None)}
    print(json.dumps({**line, **peer, **more}), flush=True)
