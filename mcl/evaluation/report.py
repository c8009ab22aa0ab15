"""How well a clip follows its reference, beside an unguided one of the same noise."""
import math

from torch import Tensor

from .metrics import (camera_curves, change_centroids, curve_correlation, distance, fidelity, flicker,
                      top1_agreement)
from ..motion import Motion
from .tracking import tracklets

COLUMNS = ("motion fidelity", "corrected", "trajectory distance", "camera curves", "path of change",
           "flicker", "top-1 agreement")
# Held-out clips that follow have as much in one of these, of unguided ones one in twelve.
TELLING, FOLLOWED = ("corrected", "camera curves", "path of change"), 0.7

UNMEASURED = {**dict.fromkeys(COLUMNS[:3], "no point of it, or of the reference, was followed"),
              **dict.fromkeys(COLUMNS[3:5],
                              "its picture, or the reference's, does not move at all")}


def measure(reference: Tensor, clip: Tensor, motion: Motion | None, own: Motion | None
            ) -> dict[str, float]:
    """Figures of a clip (f, 3, H, W), as metrics.py defines them, by the names of COLUMNS; nan for
    what could not be measured.

    motion, own   of the reference and of the clip, read alike; None leaves their agreement out
    """
    a, b = tracklets(reference), tracklets(clip)
    followed = (*fidelity(a, b), distance(a, b)) if len(a) and len(b) else (math.nan,) * 3
    alike = (curve_correlation(x, y) if x.any() and y.any() else math.nan for x, y in (
        map(curves, (clip, reference)) for curves in (camera_curves, change_centroids)))
    values = (*followed, *alike, flicker(clip))
    figures = dict(zip(COLUMNS, values))
    if motion is not None and own is not None:
        figures[COLUMNS[-1]] = top1_agreement(motion, own)
    return figures


def verdict(row: dict[str, float]) -> str:
    """Whether a clip of these figures moves like its reference, in words, by any that tells."""
    telling = [row[name] for name in TELLING if not math.isnan(row[name])]
    if not telling:
        return "cannot be told"
    return "follows" if max(telling) >= FOLLOWED else "does not follow"


def table(rows: dict[str, dict[str, float]]) -> str:
    """Measured clips by their names, as lines of text; - and the reason for what is nan."""
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    first = max(map(len, rows))
    lines = ["  ".join([" " * first, *names])]
    for title, row in rows.items():
        lost = [name for name in names if math.isnan(row.get(name, 0.0))]
        cells = ["-" if n in lost else f"{row[n]:.3f}" if n in row else "" for n in names]
        aligned = [cell.rjust(len(name)) for cell, name in zip(cells, names)]
        why = "; ".join(dict.fromkeys(UNMEASURED[name] for name in lost))
        note = [f"(-: {why})"] if why else []
        lines.append("  ".join([title.ljust(first), *aligned, verdict(row), *note]))
    return "\n".join(lines)
