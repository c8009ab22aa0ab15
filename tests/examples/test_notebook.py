"""The notebook runs, and its stored outputs belong to a whole run."""
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"


def outputs_of(notebook):
    """Return all that the cells print, and the number of pictures that they draw."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return ("".join(out.text for out in outputs if out.output_type == "stream"),
            sum("image/png" in out.get("data", {}) for out in outputs))


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_runs_and_its_loop_equals_clone_bit_for_bit(notebook, monkeypatch, tmp_path):
    stored_text, stored_pictures = outputs_of(notebook)
    monkeypatch.setenv("WALKTHROUGH_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text, pictures = outputs_of(notebook)
    assert "\nequal: True\n" in text and "equal to extract_motion: True\n" in text
    lines = dict(line.split(":") for line in text.splitlines() if line.count(":") == 1)
    assert float(lines["by hand"]) == pytest.approx(float(lines["motion_loss"]), rel=1e-5)
    assert float(lines["after a step of length 2"]) < float(lines["g at the start"])
    assert len(text.splitlines()) == len(stored_text.splitlines())
    assert pictures == stored_pictures


def test_stored_outputs_are_small_and_belong_to_a_whole_run(notebook):
    text, pictures = outputs_of(notebook)
    assert NOTEBOOK.stat().st_size < 600e3 and pictures == 9
    assert "equal: True" in text and "Warning" not in text and str(Path.home()) not in text
    fidelity = {line[:14].strip(): float(line[14:]) for line in text.splitlines()
                if line.startswith(("unguided ", "plain control ", "top-1 ", "inverted "))}
    assert max(fidelity["unguided"], fidelity["plain control"]) < fidelity["top-1"] - 0.05
    assert fidelity["top-1"] > 0.95
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
