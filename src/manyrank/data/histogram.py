"""Lengths as bars. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BARS = 16  # of a histogram, at most


@dataclass(frozen=True)
class Bar:
    """So many examples of `first` to `last` tokens."""

    first: int
    last: int
    count: int


def bars(lengths: np.ndarray) -> tuple[Bar, ...]:
    """A histogram of round steps: 1, 2 or 5 times a power of ten, the smallest that makes at most BARS bars.

    What is longer than 99% of the examples may be together in one last bar, so that a few do not flatten the rest.
    """
    import numpy as np

    usual, longest = int(np.percentile(lengths, 99, method="higher")), int(lengths.max())
    steps = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    step = next(step for step in steps if usual // step - lengths.min() // step < BARS - 1)
    numbers = range(int(lengths.min() // step), usual // step + 1)
    counts = np.bincount(np.minimum(lengths // step, numbers.stop), minlength=numbers.stop + 1)
    result = [Bar(k * step, (k + 1) * step - 1, int(counts[k])) for k in numbers]
    if counts[numbers.stop]:
        result.append(Bar(numbers.stop * step, longest, int(counts[numbers.stop])))
    return tuple(result)
