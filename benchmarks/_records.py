"""A report as JSON, so that its page can be written again without another run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from benchmarks._values import Chart, Report, Section, Table


def dump(report: Report) -> str:
    """Return a report as JSON."""
    return json.dumps(asdict(report), indent=1) + "\n"


def load(text: str) -> Report:
    """Return the report that `dump` was given."""
    found: dict[str, Any] = json.loads(text)
    return Report(**{**found, "sections": [_section(each) for each in found["sections"]]})


def _section(found: dict[str, Any]) -> Section:
    table, charts = Table(**found["table"]), [Chart(**each) for each in found["charts"]]
    return Section(**{**found, "table": table, "charts": charts})
