"""What the README promises: its commands run, its code runs, its files are there."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import convert_weights
import mcl
import sample as command

from tests import foreign

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python (sample\.py .*)", README)


@pytest.fixture
def beside_examples(tmp_path, monkeypatch):
    """A folder to write to in which the paths of the README lead where they should."""
    for name in ("examples", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs(beside_examples, capsys):
    commands = [shlex.split(c)[1:] for c in COMMANDS
                if "--help" not in c and "--weights" not in c]
    assert len(commands) == 6
    for argv in commands:
        few = ["--inversion-steps", "2"] if "inversion" in argv else []
        assert command.main(argv + ["--steps", "2", "--guidance-steps", "1", *few]) == 0
        assert Path(capsys.readouterr().out.splitlines()[-1]).exists()


def test_every_command_for_other_weights_runs(tmp_path, monkeypatch, capsys):
    """In the order of the README, with small random files of the names that it gives."""
    foreign.save(tmp_path / "v1-5-pruned-emaonly.safetensors", foreign.ldm())
    foreign.save(tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors", {
        name.removeprefix("first_stage_model."): t for name, t in foreign.ldm(("vae",)).items()})
    foreign.save(tmp_path / "v3_sd15_mm.ckpt", foreign.motion())
    foreign.save(tmp_path / "v3_sd15_adapter.ckpt", {
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora."
        f"{way}.weight": torch.zeros(shape) for way, shape in (("down", (4, 96)), ("up", (96, 4)))})
    foreign.save(tmp_path / "v3_sd15_sparsectrl_rgb.ckpt", foreign.sparsectrl("rgb"))
    imageio.imwrite(tmp_path / "kite.png", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "weights").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(c) for c in re.findall(
        r"python ((?:convert_weights.py|sample.py --weights) .*)", README)]
    assert len(commands) == 7
    small = ["--steps", "1", "--guidance-steps", "0", "--frames", "1", "--size", "64x64"]
    for name, *argv in commands:
        if name == "sample.py":
            assert command.main([a for a in argv if a not in ("--preset", "camera")] + small) == 0
        else:
            assert convert_weights.main(argv) == 0
    assert (tmp_path / "out.mp4").exists()


def code_of_the_readme(dtype="auto"):
    """Its blocks in order, as one program of two steps."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    quick = ("\nimport dataclasses\nmodel.config = dataclasses.replace(model.config, "
             "sample=dataclasses.replace(model.config.sample, steps=2, guidance_steps=1))\n")
    changed = re.sub(r"load_model\(\).*\n", f"load_model(device='cpu', dtype={dtype!r})\n" + quick,
                     code)
    assert changed != code
    return changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_code_of_the_readme_runs(beside_examples, capsys, dtype):
    exec(code_of_the_readme(dtype), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "0", "1"]
    assert all(float(line.split()[1]) > 0 for line in lines[::2])
    assert (beside_examples / "out.mp4").exists()


def test_the_code_of_the_readme_runs_with_an_installed_wheel(tmp_path):
    """Built of a copy, unpacked where a package would lie, and run in another directory."""
    for name in ("mcl", "weights"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir",
                    tmp_path, tmp_path / "source"], check=True)
    wheel, = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "examples").symlink_to(ROOT / "examples")
    code = code_of_the_readme() + "\nimport mcl\nprint(mcl.__file__, mcl.__version__)"
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code],
                          cwd=tmp_path / "elsewhere", capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    *_, last = done.stdout.splitlines() or [done.stderr]
    assert last == f"{tmp_path / 'site' / 'mcl' / '__init__.py'} {mcl.__version__}", done.stderr
    assert (tmp_path / "site" / "mcl" / "py.typed").exists()
    assert (tmp_path / "site" / "mcl" / "evaluation" / "html_report.html").exists()


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`((?:mcl|tests|examples|weights)/[\w./]*|\w+\.(?:py|md))`", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
