"""The command convert_weights.py: what --check says of a file, and options that are missing."""
import hashlib

import pytest
import torch

from mcl import Model, Motion
from mcl.checkpoints.model_file import save_model
from mcl.cli import convert as convert_command
from tests.conftest import SMALL
from tests.foreign import convert, ldm, motion, save


def test_check_says_what_each_file_is(tmp_path, capsys):
    vae = save(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)})
    page = tmp_path / "page.ckpt"
    page.write_text("<!DOCTYPE html>")
    assert convert("--check", vae) == 0
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first == f"{vae}: a VAE of Stable Diffusion 1.5"
    assert second == "  1 tensors, 1 float32, 0.000 GB"
    assert third == ("  for --vae; a complete model also needs the UNet (--base), the text "
                     "encoder (--text-encoder), the motion module (--motion-module)")
    assert fourth == f"  sha256 {hashlib.sha256(vae.read_bytes()).hexdigest()}  vae.safetensors"
    save_model(Model(SMALL), tmp_path / "m.safetensors", torch.float16, {})
    assert convert("--check", page, tmp_path / "m.safetensors") == 2
    assert "an HTML page" in (out := capsys.readouterr().out)
    assert "a converted model of this project" in out and "--weights" in out
    Motion.save(Motion({}, {}, {}), tmp_path / "motion.safetensors")
    assert convert("--check", tmp_path / "motion.safetensors") == 2
    assert "a saved motion, not a checkpoint. Run sample.py --motion" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    (["--base", "x"], "--out is missing: give the file to write"),
    (["--check", "x", "--out", "y.safetensors"], "--check converts nothing: leave out the other"),
    (["--check", "x", "--base", "y"], "--check converts nothing: leave out the other")])
def test_options_that_do_not_go_together_are_rejected(argv, message, capsys):
    assert convert(*argv) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda tensors: {name: t / 2 for name, t in tensors.items()},
                                    lambda tensors: {name: t * float("nan") for name, t in
                                                     tensors.items()}])
def test_file_that_changes_during_the_conversion_is_an_error(change, tmp_path, monkeypatch, capsys):
    base = save(tmp_path / "base.safetensors", ldm())
    module = save(tmp_path / "mm.safetensors", motion())
    argv = ["--base", base, "--motion-module", module, "--out", tmp_path / "o.safetensors"]
    hash_files = convert_command.sha256_of_files

    def hash_and_change(paths):
        hashes = hash_files(paths)
        save(module, change(motion()))
        return hashes

    monkeypatch.setattr(convert_command, "sha256_of_files", hash_and_change)
    assert convert(*argv) == 2
    assert "mm.safetensors: was changed while it was read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors",
                                                                "mm.safetensors"]
