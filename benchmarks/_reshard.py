"""The row of resharding: how many bytes travel for the rows that a rank needs."""

from __future__ import annotations

from benchmarks._figures import moved
from benchmarks._lab import Client, Lab, alike
from benchmarks._values import BACKENDS, OURS, REFERENCE, MiB, Sample, Section, Table

#: Who reads what whom wrote; stock is torch's format as the reference library writes it.
_PAIRS = ((OURS, OURS), (OURS, REFERENCE), (REFERENCE, REFERENCE))


def reshard(lab: Lab) -> Section:
    """Load a tensor in other pieces than it was saved in."""
    sizes = lab.sizes
    found: dict[tuple[str, str], list[Sample]] = {}
    with lab.server() as server, lab.clients(server, alike([OURS, REFERENCE], None)) as clients:
        for backend, client in clients.items():
            client.sample(
                "save_pieces", nbytes=sizes.rows_nbytes, pieces=sizes.saved_pieces, name=backend
            )
        for reader, writer in _PAIRS:
            if reader in clients and writer in clients:
                found[reader, writer] = _loads(lab, clients[reader], writer)
    figures = {
        f"written by {'s3dcp' if writer == OURS else 'stock'}: bytes moved, times those needed": (
            moved(samples)
        )
        for (reader, writer), samples in found.items()
        if reader == OURS
    }
    least = sizes.rows_nbytes // max(sizes.loaded_pieces) / MiB
    return Section(
        row="reshard",
        title="Resharding by rows",
        how=f"A tensor of {sizes.rows_nbytes // MiB} MiB, saved in {sizes.saved_pieces} pieces of "
        f"whole rows, and loaded by {' and by '.join(map(str, sizes.loaded_pieces))} ranks, a "
        f"piece of {least:.0f} MiB or more each; metadata included, at the worst rank. Stock is "
        "torch's own format, written by the reference library.",
        table=_table(found),
        figures=figures,
        notes=lab.take_notes(),
    )


def _loads(lab: Lab, client: Client, name: str) -> list[Sample]:
    sizes = lab.sizes
    return [
        client.sample("load_piece", nbytes=sizes.rows_nbytes, pieces=pieces, piece=piece, name=name)
        for pieces in sizes.loaded_pieces
        for piece in range(pieces)
    ]


def _table(found: dict[tuple[str, str], list[Sample]]) -> Table:
    rows = [
        [
            f"{BACKENDS[reader]} reads {BACKENDS[writer]}'s",
            f"{sum(each.nbytes for each in samples) / MiB:,.0f}",
            f"{sum(each.received_bytes for each in samples) / MiB:,.0f}",
            f"{moved(samples):.3f}",
            f"{sum(each.requests for each in samples)}",
        ]
        for (reader, writer), samples in found.items()
    ]
    columns = ["", "needed, MiB", "received, MiB", "received / needed, at worst", "requests"]
    return Table(columns=columns, rows=rows)
