"""What the README promises: its commands run, its code runs, its files are there."""
import re
import shlex
from pathlib import Path

import pytest

import sample as command

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
    commands = [shlex.split(c)[1:] for c in COMMANDS if "--help" not in c]
    assert len(commands) == 5
    for argv in commands:
        assert command.main(argv + ["--steps", "2", "--guidance-steps", "1"]) == 0
        assert Path(capsys.readouterr().out.splitlines()[-1]).exists()


def test_the_code_of_the_readme_runs(beside_examples, capsys):
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("config=config,", "config=dataclasses.replace(config, steps=2, "
                        "guidance_steps=1),")
    exec("import dataclasses\n" + code, {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (beside_examples / "out.mp4").exists()


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`((?:mcl|tests|examples|weights)/[\w./]*|\w+\.(?:py|md))`", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
