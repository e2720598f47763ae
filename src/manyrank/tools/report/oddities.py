"""Signs in a run's record that something is odd. Each is a function of the record; None where there is no such sign. No torch.

The bounds are rules of thumb: they decide whether a sentence is printed, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from .curves import Point
from .run_record import RunRecord

RISE = 0.02  # of the validation loss over its lowest, from which it counts
FLAT = 0.01  # change of the loss, from its first to its last lines, below which it counts as none
SPREAD = 0.1  # of the loss over its lowest mean, which batches may make
FEWEST = 10  # lines by which a loss is judged
WINDOW = 5  # a mean is over one in so many lines
MANY = 0.05  # of the rows
LOW_MFU = 0.15
NEARLY = 0.9  # of the lines


def overfitting(run: RunRecord) -> str | None:
    """Tell whether the validation loss rises from its lowest for the rest of the run, by two validations or more."""
    points = _finite(run.curve("eval_loss"))
    if not points:
        return None
    lowest = min(range(len(points)), key=lambda number: points[number][1])
    step, least = points[lowest]
    losses = [loss for _, loss in points[lowest:]]
    rises = all(after > before - FLAT * least for before, after in pairwise(losses))
    if len(losses) < 3 or not rises or losses[-1] <= (1 + RISE) * least:
        return None
    return f"overfitting from step {step:,}: the validation loss rises from {least:.4g} to {losses[-1]:.4g}"


def flat_loss(run: RunRecord) -> str | None:
    """Tell whether the loss is at the end where it was at the beginning."""
    means = _means(run)
    if not means or abs(means[-1] - means[0]) >= FLAT * abs(means[0]):
        return None
    return f"the loss is flat: {means[0]:.4g} in the first lines, {means[-1]:.4g} in the last"


def diverged_loss(run: RunRecord) -> str | None:
    """Tell whether the loss is not finite, or has lost more than half of what it had gained, or more than it had."""
    if bad := [step for step, loss in run.curve("loss") if not math.isfinite(loss)]:
        return f"the loss has diverged: it is not finite at step {bad[0]:,}"
    means = _means(run)
    if not means:
        return None
    first, least, last = means[0], min(means), means[-1]
    if last - least <= SPREAD * abs(least) or last - least <= (first - least) / 2:
        return None
    return f"the loss has diverged: from {least:.4g} at its lowest to {last:.4g} at the end"


def rows_lost(run: RunRecord) -> str | None:
    """Tell whether many rows are left out or cut."""
    lost = run.rows_left_out + run.rows_cut
    if not run.rows or lost <= MANY * run.rows:
        return None
    counts = ((run.rows_left_out, "left out"), (run.rows_cut, "cut at max_length"))
    what = " and ".join(f"{count:,} {name}" for count, name in counts if count)
    return f"of {run.rows:,} rows {what}"


def low_mfu(run: RunRecord) -> str | None:
    """Tell whether GPUs wait more than they compute."""
    mfu = run.median("mfu") if run.on_gpu else None
    return f"the GPUs are idle, or work in small pieces: MFU {mfu:.1%}" if mfu is not None and mfu < LOW_MFU else None


def clipped(run: RunRecord) -> str | None:
    """Tell whether the gradient is clipped in nearly every step that is logged."""
    bound, norms = run.value("max_grad_norm"), [norm for _, norm in run.curve("grad_norm")]
    if not isinstance(bound, int | float) or not bound or len(norms) < FEWEST:
        return None
    share = sum(norm > bound for norm in norms) / len(norms)
    return f"the gradient is clipped in {share:.0%} of the steps logged" if share >= NEARLY else None


SIGNS: tuple[Callable[[RunRecord], str | None], ...] = (
    overfitting,
    flat_loss,
    diverged_loss,
    rows_lost,
    low_mfu,
    clipped,
)


def oddities(run: RunRecord) -> list[str]:
    return [text for sign in SIGNS if (text := sign(run))]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _means(run: RunRecord) -> list[float]:
    """Means of the loss over a sliding part of the lines; none of few lines, and none where the run learns from rewards."""
    losses = [loss for _, loss in _finite(run.curve("loss"))]
    if len(losses) < FEWEST or run.curve("reward"):
        return []
    width = len(losses) // WINDOW
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(after - before) / width for before, after in zip(sums, sums[width:])]
