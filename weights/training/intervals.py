"""Means with confidence intervals, for the tables of the evaluation and of the benchmarks."""
import math
import statistics
from collections.abc import Sequence

import numpy as np


def student_t_95(degrees_of_freedom: int) -> float:
    """Return the bound that the absolute value of Student's t stays below in 95 % of cases.

    With n degrees of freedom t is sqrt(n) * tan(a), where the density of the angle a is
    proportional to cos(a) ** (n - 1). The density is summed numerically.
    """
    angles = np.linspace(0, math.pi / 2, 1_000_001)
    mass = np.cumsum(np.cos(angles) ** (degrees_of_freedom - 1))
    angle = angles[np.searchsorted(mass, 0.95 * mass[-1])]
    return math.sqrt(degrees_of_freedom) * math.tan(angle)


def mean_ci95(groups: Sequence[Sequence[float]], digits: int) -> str:
    """Return the mean of the groups' means with its 95 % confidence interval: "0.98 ± 0.01".

    Args:
        groups: Values of each group, such as those of all seeds of a clip; no group is empty.
        digits: Decimal places.

    Returns:
        "-" without groups; the mean alone for one group.
    """
    means = [statistics.fmean(group) for group in groups]
    text = f"{statistics.fmean(means):.{digits}f}" if means else "-"
    if len(means) > 1:
        error = statistics.stdev(means) / math.sqrt(len(means))
        text += f" ± {student_t_95(len(means) - 1) * error:.{digits}f}"
    return text
