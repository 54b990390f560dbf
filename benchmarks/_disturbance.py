"""The row of disturbance: what a training loop feels of an asynchronous save."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks._figures import ratio
from benchmarks._lab import Lab, alike
from benchmarks._values import BACKENDS, OURS, REFERENCE, SLOWEST, Chart, Section, Table

_IDLE_TICKS = 500

Answers = dict[str, list[dict[str, Any]]]


def disturbance(lab: Lab) -> Section:
    """Tick in the main thread while another saves, and in s3dcp's loop while it works."""
    shape = lab.sizes.bulk
    backends = [OURS, REFERENCE, SLOWEST]
    with lab.server() as server, lab.clients(server, alike(backends, shape)) as clients:
        idle = [clients[OURS].ask("idle", ticks_count=_IDLE_TICKS) for _ in range(lab.sizes.repeat)]
        found = lab.in_turns(clients, lambda client, n: client.disturb(f"{client.backend}-{n}"))
        ours = {OURS: clients[OURS]}
        lab.keep(ours)
        blocks = {
            "save": lab.in_turns(ours, lambda client, n: client.block(f"{n}", loads=False))[OURS],
            "load": lab.in_turns(ours, lambda client, _: client.block(OURS, loads=True))[OURS],
        }
    figures = {"99th percentile of hold-ups": _ms(found[OURS], "p99_s")}
    if REFERENCE in found:
        worst = ratio(_ms(found[OURS], "worst_s"), _ms(found[REFERENCE], "worst_s"))
        figures["worst hold-up, times the reference's"] = worst
    for operation, each in blocks.items():
        figures[f"{operation}: longest block of the loop thread"] = _ms(each, "wall_s")
    return Section(
        row="disturbance",
        title="Disturbance of a training loop",
        how=f"`dcp.async_save` of {shape} tensors on a thread, once they are staged, while the "
        "main thread sleeps 1 ms again and again: a hold-up is what a tick took beyond that. Each "
        "figure is the median of the runs'. The loop thread of s3dcp is watched by a coroutine "
        "that does the same, during saves and loads of their own; its blocks include waiting for "
        "the GIL and for a core.",
        table=_table(found, idle, blocks),
        figures=figures,
        charts=[
            Chart(
                title="Hold-ups of a 1 ms ticker during async_save",
                unit="ms",
                groups={
                    "99th percentile": {each: _ms(found[each], "p99_s") for each in found},
                    "worst": {each: _ms(found[each], "worst_s") for each in found},
                },
            )
        ],
        notes=lab.take_notes(),
    )


def _ms(answers: list[dict[str, Any]], name: str) -> float:
    return 1e3 * float(median(answer[name] for answer in answers))


def _table(found: Answers, idle: list[dict[str, Any]], blocks: Answers) -> Table:
    rows = []
    for name, answers in [("nothing", idle), *((BACKENDS[each], found[each]) for each in found)]:
        worst_ms = max(1e3 * answer["worst_s"] for answer in answers)
        cells = [f"{_ms(answers, each):.2f}" for each in ("p50_s", "p99_s", "worst_s")]
        rows.append([name, *cells, f"{worst_ms:.2f}", f"{len(answers)}"])
    for operation, answers in blocks.items():
        worst_ms = max(1e3 * answer["wall_s"] for answer in answers)
        blocked, own = _ms(answers, "wall_s"), _ms(answers, "cpu_s")
        name = f"s3dcp's loop thread, {operation} (CPU between two beats: {own:.1f} ms)"
        rows.append([name, "", "", f"{blocked:.2f}", f"{worst_ms:.2f}", f"{len(answers)}"])
    columns = ["hold-ups, ms", "median", "99th percentile", "worst", "worst of all runs", "runs"]
    return Table(columns=columns, rows=rows)
