"""95 % confidence intervals of proportions, and of differences of paired proportions."""

import math
import statistics

_Z = statistics.NormalDist().inv_cdf(0.975)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of `right / count`: Wilson score, without continuity correction."""
    share, z2 = right / count, _Z * _Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(gained: int, lost: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of `(gained - lost) / count`: Tango score for paired proportions.

    Tango 1998, Statistics in Medicine 17:891. Unlike a bootstrap, or an interval conditional on the
    pairs that differ, it has a width above zero even if no pair differs.
    """

    def statistic(delta: float) -> float:
        b = (2 * count - gained + lost) * delta - gained - lost
        c = lost * delta * (1 - delta)
        share = (math.sqrt(b * b + 8 * count * c) - b) / (4 * count)
        variance = count * (2 * share + delta * (1 - delta))
        return (gained - lost - count * delta) / math.sqrt(variance) if variance > 0 else 0.0

    def limit(outer: float, sign: float) -> float:
        inner = (gained - lost) / count
        for _ in range(60):
            middle = (inner + outer) / 2
            inside = sign * statistic(middle) < _Z
            inner, outer = (middle, outer) if inside else (inner, middle)
        return inner

    return limit(-1.0, 1.0), limit(1.0, -1.0)
