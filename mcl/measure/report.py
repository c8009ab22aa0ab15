"""How well a clip follows its reference, beside an unguided one of the same noise."""
from torch import Tensor

from .metrics import (camera_curves, curve_correlation, distance, fidelity, flicker,
                      top1_agreement)
from ..motion import Motion
from .tracking import tracklets

COLUMNS = ("motion fidelity", "corrected", "trajectory distance", "camera curves", "flicker",
           "top-1 agreement")


def measure(reference: Tensor, clip: Tensor, motion: Motion | None, own: Motion | None
            ) -> dict[str, float]:
    """Figures of a clip (f, 3, H, W), as metrics.py defines them, by the names of COLUMNS.

    motion, own   of the reference and of the clip, read alike; None leaves their agreement out
    """
    a, b = tracklets(reference), tracklets(clip)
    values = (*fidelity(a, b), distance(a, b),
              curve_correlation(camera_curves(clip), camera_curves(reference)), flicker(clip))
    figures = dict(zip(COLUMNS, values))
    if motion is not None and own is not None:
        figures[COLUMNS[-1]] = top1_agreement(motion, own)
    return figures


def table(rows: dict[str, dict[str, float]]) -> str:
    """Measured clips by their names, as lines of text."""
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    first = max(map(len, rows))
    lines = ["  ".join([" " * first, *names])]
    for title, row in rows.items():
        cells = [f"{row[n]:.3f}".rjust(len(n)) if n in row else " " * len(n) for n in names]
        lines.append("  ".join([title.ljust(first), *cells]))
    return "\n".join(lines)
