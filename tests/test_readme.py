"""README.md and BENCHMARKS.md: their commands and code run, and the files and options exist."""
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import mcl
from mcl.cli import arguments, convert, sample
from tests import foreign

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ((ROOT / name).read_text("utf-8") for name in ("README.md", "BENCHMARKS.md"))
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
         for line in block.splitlines() if line and not line.startswith("#")]
# Without the installation that precedes some of them: ["sample.py", "--ref", ...].
COMMANDS = [shlex.split(line.rpartition("&& ")[2])[1:] for line in SHELL]
NEEDS_CHECKPOINTS = [argv for argv in COMMANDS
                     if argv[0] == "convert_weights.py" or "--weights" in argv]
DEMO = [argv[1:] for argv in COMMANDS if argv[0] == "sample.py" and "--weights" not in argv]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
# Makes the models that README's code loads quick: two steps at a small size.
QUICK_MODELS = """
import dataclasses, sys
import mcl

load_model = mcl.load_model

def load_quick_model(path=None, **_):
    model = load_model(path, "cpu", {dtype!r})
    settings = dataclasses.replace(model.config.sample, steps=2, guidance_steps=1, num_frames=4,
                                   height=64, width=64)
    model.config = dataclasses.replace(model.config, sample=settings)
    return model

mcl.load_model = sys.modules["mcl.clone"].load_model = load_quick_model
"""


@pytest.fixture(autouse=True)
def keep_warnings():
    """Restore the display of warnings, which the commands change."""
    with warnings.catch_warnings():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty working directory in which the examples of README exist."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "jobs.jsonl").write_text(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_spans(text):
    """Return the code in the lines of a document, without its code blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_all_commands_of_the_readme_are_tested():
    num_pytest = COMMANDS.count(["-m", "pytest"])       # .ci/run runs this one
    assert num_pytest == 1
    assert len(COMMANDS) == len(NEEDS_CHECKPOINTS) + len(DEMO) + num_pytest
    assert len(NEEDS_CHECKPOINTS) == 4 and len(DEMO) == 6


@pytest.mark.parametrize("argv", DEMO, ids=range(len(DEMO)))
def test_command_for_the_demo_model_runs(folder, capsys, argv):
    few = ["--inversion-steps", "2"] if "inversion" in argv else []
    few += [] if "--num-frames" in argv else ["--num-frames", "4"]
    few += ["--steps", "2", "--guidance-steps", "1", "--size", "64x64"]
    assert sample.main(argv + few) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).exists()


def test_commands_for_stable_diffusion_run(folder):
    """Small random files have the names that README gives; the commands run in README's order."""
    foreign.save(folder / "v1-5-pruned-emaonly.safetensors", foreign.ldm())
    foreign.save(folder / "v3_sd15_mm.ckpt", foreign.motion())
    foreign.save(folder / "v3_sd15_sparsectrl_rgb.ckpt", foreign.sparsectrl("rgb"))
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    foreign.save(folder / "v3_sd15_adapter.ckpt", {f"{layer}.down.weight": torch.zeros(4, 96),
                                                   f"{layer}.up.weight": torch.zeros(96, 4)})
    imageio.imwrite(folder / "kite.png", np.zeros((64, 64, 3), np.uint8))
    (folder / "weights").mkdir()
    for name, *argv in NEEDS_CHECKPOINTS:
        if name == "convert_weights.py":
            assert convert.main(argv) == 0
        else:
            assert sample.main(argv + ["--steps", "1", "--guidance-steps", "0",
                                       "--num-frames", "1", "--size", "64x64"]) == 0
            (folder / "out.mp4").unlink()


def test_python_code_of_the_readme_runs_in_half_precision(folder, monkeypatch, capsys):
    for module in (mcl, sys.modules["mcl.clone"]):
        monkeypatch.setattr(module, "load_model", mcl.load_model)       # restored at the end
    with warnings.catch_warnings(action="error", category=DeprecationWarning):
        exec(QUICK_MODELS.format(dtype="bfloat16") + PYTHON, {})
    check_results(folder, capsys.readouterr().out.splitlines())


def check_results(folder, lines):
    """Check what README's code prints and writes."""
    assert len(lines) == 2                              # one for each step
    assert float(lines[0].split()[1]) > 0 and lines[1].endswith("None")
    for name in ("star.mp4", "zigzag.safetensors", "fox.mp4"):
        assert (folder / name).stat().st_size > 0


# Runs the commands of the installed package, like the scripts that pip writes.
INSTALLED_COMMANDS = """
import runpy
from importlib.metadata import PathDistribution
from pathlib import Path

def run_command(name, *argv):
    sys.argv = [name, *argv]
    try:
        scripts[name].load()() if name in scripts else runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0

site = Path(mcl.__file__).parents[1]
dist_info, = site.glob("*.dist-info")
scripts = {script.name: script for script in PathDistribution(dist_info).entry_points}
print(mcl.__file__, mcl.__version__)
run_command("mcl-sample", "--ref", "examples/zigzag.mp4", "--prompt", "a red star", "--steps", "1",
            "--guidance-steps", "0", "--num-frames", "4", "--size", "64x64")
run_command("mcl-convert", "--check", str(site / "mcl" / "weights" / "tiny.safetensors"))
run_command("mcl", "--list-words")
"""


def test_installed_wheel_runs_the_python_code_and_the_commands(folder):
    source, site = folder / "source", folder / "site"
    for name in ("mcl", "weights"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                    "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    wheel, = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(source)

    code = QUICK_MODELS.format(dtype="auto") + PYTHON + INSTALLED_COMMANDS
    process = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code],
                             cwd=folder, capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": str(site)})
    assert process.returncode == 0, process.stderr
    first, second, place, clip, *others = process.stdout.splitlines()
    check_results(folder, [first, second])
    assert place == f"{site / 'mcl' / '__init__.py'} {mcl.__version__}"
    assert clip == "out.mp4" and (folder / "out.mp4").exists()
    assert any("complete" in line for line in others) and "penguin" in others
    for name in ("py.typed", "evaluation/html_report.html"):
        assert (site / "mcl" / name).exists()
    assert not (site / "mcl" / "weights" / "training").exists()


def test_quick_start_is_on_the_first_screen():
    screen = README.splitlines()[:30]
    assert SHELL[0] in screen and "--prompt" in SHELL[0]
    assert sum(line.startswith("clip = mcl.clone(") for line in screen) == 1


@pytest.mark.parametrize("text, max_lines, max_bytes", [(README, 220, 14_000),
                                                        (BENCHMARKS, 160, 12_000)])
def test_documents_are_short(text, max_lines, max_bytes):
    assert len(text.splitlines()) <= max_lines and len(text.encode()) <= max_bytes


@pytest.mark.parametrize("text", [README, BENCHMARKS], ids=["README", "BENCHMARKS"])
def test_named_files_exist(text):
    spans = " ".join(code_spans(text))
    names = re.findall(r"(?:^|\s)((?:mcl|tests|examples|weights)/[\w./-]*|\w+\.(?:py|md))", spans)
    names += [name.replace(".", "/") + ".py"
              for name in re.findall(r"python -m ((?:mcl|tests|weights)[\w.]*)", spans)]
    names += [name for name in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in name]
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_options_and_presets_in_the_readme_exist():
    parsers = arguments.build_parser(show_all=True), convert.build_parser()
    options = re.findall(r"--[a-z][a-z-]+", " ".join(parser.format_help() for parser in parsers))
    spans = [span for span in code_spans(README) if "torchrun" not in span]
    named = [option for span in spans for option in re.findall(r"--[a-z][a-z-]+", span)]
    assert len(named) > 10 and set(named) <= set(options)
    assert set(spans) >= mcl.presets.PRESETS.keys()


def test_options_and_settings_in_the_benchmarks_exist():
    """Options without a script in front of them belong to the script that was named last."""
    settings, source = {field.name for field in dataclasses.fields(mcl.SampleConfig)}, ""
    for span in code_spans(BENCHMARKS):
        script = re.match(r"(?:python )?(?:-m )?([\w./]+)", span)
        if script and "--" in span:
            path = "mcl/cli/arguments.py" if script[1] == "sample.py" else script[1]
            is_file = path.endswith(".py")
            source = (ROOT / (path if is_file else path.replace(".", "/") + ".py")).read_text()
        options = re.findall(r"--[a-z-]+", span)
        assert [option for option in options if f'"{option}"' not in source
                and f"    {option[2:].replace('-', '_')}:" not in source] == [], span
        assert set(re.findall(r"(\w+)=", span)) <= settings, span


def test_linters_are_those_of_the_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    linters = re.findall(r"`(\.venv/bin/[^`]+)`", README)
    assert len(linters) == 2 and all(line in ci.splitlines() for line in linters)
    assert next(line for line in README.splitlines() if "python -m pytest" in line) in SHELL
