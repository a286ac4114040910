"""Means over seeds, differences paired by seed, and verdicts on claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Confidence level of the interval that must exclude 0 for a verdict."""

NOTHING = 1e-4
"""Nats per token: an interval within this distance of 0 means no difference."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Standard error of the mean; None for a single value.
        seeds: Number of values.
    """

    mean: float
    error: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate the mean of at least one value."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, None, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, math.sqrt(variance / count), count)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's confidence interval of the mean; unbounded for a single value."""
        if self.error is None:
            return -math.inf, math.inf
        reach = t_quantile(self.seeds - 1) * self.error
        return self.mean - reach, self.mean + reach

    def __str__(self) -> str:
        return f"{self.mean:.4f}{self._error}"

    @property
    def signed(self) -> str:
        """The mean with a sign, and the standard error."""
        return f"{self.mean:+.4f}{self._error}"

    @property
    def _error(self) -> str:
        return "" if self.error is None else f" ± {self.error:.4f}"


def verdict(difference: Estimate) -> str:
    """Return the verdict on the claim that one arm has a lower loss than another.

    Args:
        difference: Loss of the other arm minus loss of this arm, paired by seed.
    """
    low, high = difference.interval
    if -NOTHING < low <= high < NOTHING:
        return "does not hold: there is no difference"
    if low > 0:
        return "holds"
    if high < 0:
        return "does not hold: the opposite does"
    seeds = "1 seed" if difference.seeds == 1 else f"{difference.seeds} seeds"
    return f"cannot be told with {seeds}"


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return t such that Student's distribution has probability `confidence` between -t and t.

    Args:
        freedom: Degrees of freedom, at least 1.
        confidence: Between 0 and 1.
    """
    from scipy.stats import t  # the import takes 1 s

    return float(t.ppf((1 + confidence) / 2, freedom))
