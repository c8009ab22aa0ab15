"""The notebook's code runs, and its stored outputs belong to a whole run."""
import contextlib
import io
import json
from pathlib import Path

import pytest

from tests.lazy import LazyModule

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
matplotlib, pyplot = LazyModule("matplotlib"), LazyModule("matplotlib.pyplot")


@pytest.fixture
def cells():
    """Return the notebook's cells with code."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def stored_outputs(cells):
    """Return all that the cells print, and the number of pictures that they draw."""
    outputs = [out for cell in cells for out in cell["outputs"]]
    return ("".join(line for out in outputs for line in out.get("text", [])),
            sum("image/png" in out.get("data", {}) for out in outputs))


def test_notebook_runs_and_its_loop_equals_clone_bit_for_bit(cells, monkeypatch):
    stored_text, stored_pictures = stored_outputs(cells)
    monkeypatch.setenv("WALKTHROUGH_QUICK", "1")
    matplotlib.use("Agg")
    output, names, pictures = io.StringIO(), {}, []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: pictures.append(pyplot.gcf()))
    with contextlib.redirect_stdout(output):
        for cell in cells:
            exec("".join(cell["source"]), names)
    text = output.getvalue()
    assert "\nequal: True\n" in text and "equal to extract_motion: True\n" in text
    lines = dict(line.split(":") for line in text.splitlines() if line.count(":") == 1)
    assert float(lines["by hand"]) == pytest.approx(float(lines["motion_loss"]), rel=1e-5)
    assert float(lines["after a step of length 2"]) < float(lines["g at the start"])
    assert len(text.splitlines()) == len(stored_text.splitlines())
    assert len(pictures) == stored_pictures
    for picture in pictures:
        picture.draw_without_rendering()
    pyplot.close("all")


def test_stored_outputs_are_small_and_belong_to_a_whole_run(cells):
    text, pictures = stored_outputs(cells)
    assert NOTEBOOK.stat().st_size < 600e3 and pictures == 9
    assert "equal: True" in text and "Warning" not in text and str(Path.home()) not in text
    fidelity = {line[:14].strip(): float(line[14:]) for line in text.splitlines()
                if line.startswith(("unguided ", "plain control ", "top-1 ", "inverted "))}
    assert max(fidelity["unguided"], fidelity["plain control"]) < fidelity["top-1"] - 0.05
    assert fidelity["top-1"] > 0.95
    numbers = [cell["execution_count"] for cell in cells]
    assert numbers == list(range(1, len(numbers) + 1))
