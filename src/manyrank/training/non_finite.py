"""Which rows gave a loss or gradient that is no finite number: for the user, and in logs/non_finite.json."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate.utils import gather_object

from ..errors import NonFiniteError
from ..runs.run_folder import write


def name_rows(what: str, rows: list[tuple[str, int]], *, step: int, rank: int, folder: Path) -> NonFiniteError:
    """The error that names the rows of each rank. All ranks together; rank 0 writes.

    Args:
        rows: of this rank, the source of each and its number there.
        folder: the run's.
    """
    everyone = gather_object([(rank, rows)])
    if rank == 0:
        entries = [
            {"rank": number, "rows": [list(row) for row in bad_rows]} for number, bad_rows in everyone if bad_rows
        ]
        write(folder / "logs" / "non_finite.json", json.dumps({"step": step, "what": what, "ranks": entries}, indent=1))
    named = [
        f"rank {number}: rows {sorted(row for path, row in bad_rows if path == source)} of {source}"
        for number, bad_rows in everyone
        for source in sorted({path for path, _ in bad_rows})
    ]
    return NonFiniteError(f"{what} in step {step} ({'; '.join(named)}); see logs/non_finite.json")
