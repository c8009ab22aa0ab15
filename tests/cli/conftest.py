"""Fixtures of the command's tests: a small model in a file, and clips that are written once."""
import contextlib
import io
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mcl import save_model
from mcl.checkpoints import model_file
from mcl.cli.sample import main
from mcl.ownership import file_state

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "examples" / "figure_eight.mp4"
PROMPT = "a red star on a navy background"


def run(*argv):
    """Run sample.py in this process and return its exit code."""
    return main([str(argument) for argument in argv])


@pytest.fixture(autouse=True)
def restore_warnings():
    """Undo that the command prints warnings in its own way."""
    with warnings.catch_warnings():
        yield


@pytest.fixture(autouse=True, scope="package")
def model_files_are_read_once():
    """Keep each model that the command loads, because most tests load the same one."""
    load_model, models = model_file.load_model, {}

    def load_once(path, device, dtype, transform):
        if transform is not None:
            return load_model(path, device, dtype, transform)
        key = path, file_state(path), device, dtype
        if key not in models:
            models[key] = load_model(path, device, dtype)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "load_model", load_once)
        yield


@pytest.fixture(scope="session")
def weights(small, tmp_path_factory):
    """Return the file of a small random model: 4 frames of 32x32, 4 steps, 3 of them guided."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_model(small, path, torch.float32, {})
    return path


@pytest.fixture
def clone(weights):
    """Return a function that writes a clip of the small model and returns its path."""
    def clone(out, *argv, prompt=PROMPT):
        assert run("--weights", weights, "--ref", REFERENCE, "--prompt", prompt, "--out", out,
                   *argv) == 0
        return out
    return clone


@pytest.fixture(scope="session")
def first(weights, tmp_path_factory):
    """Return the files of one run with --compare and --save-motion, and its standard output."""
    folder, stdout = tmp_path_factory.mktemp("first"), io.StringIO()
    with contextlib.redirect_stdout(stdout), warnings.catch_warnings():
        assert run("--weights", weights, "--ref", REFERENCE, "--prompt", PROMPT, "--seed", 3,
                   "--compare", "--save-motion", folder / "motion.safetensors", "--out",
                   folder / "a.mp4") == 0
    return SimpleNamespace(folder=folder, clip=folder / "a.mp4", record=folder / "a.mp4.json",
                           motion=folder / "motion.safetensors", stdout=stdout.getvalue())
