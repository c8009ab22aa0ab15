"""The command destroys no file: inputs, files that it did not write, devices."""
import contextlib
import itertools
import json
import os
import shutil
import stat
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from mcl.cli import sample
from mcl.cli.arguments import parse_args
from mcl.cli.outputs import check_jobs_io, output_clips
from mcl.config import SampleConfig
from mcl.ownership import FOLDER_MARKER, read_record, sha256_of
from tests.cli import conftest
from tests.cli.conftest import REFERENCE, ROOT


@pytest.fixture
def run(weights):
    """Return a function that runs the command with a small model."""
    return lambda *argv: conftest.run("--weights", weights, *argv, "--prompt", "a star", "--steps",
                                      2, "--guidance-steps", 1)


def snapshot(folder):
    """Return all names below a folder with their type and content."""
    return {str(path.relative_to(folder)): (stat.S_IFMT(path.lstat().st_mode),
                                            path.read_bytes() if path.is_file() else None)
            for path in folder.rglob("*")}


@pytest.fixture
def user_files(tmp_path, monkeypatch):
    """A clip under several names, and files and folders that this program did not write."""
    shutil.copy(REFERENCE, tmp_path / "clip.mp4")
    os.link(tmp_path / "clip.mp4", tmp_path / "hard.mp4")
    (tmp_path / "soft.mp4").symlink_to("clip.mp4")
    (tmp_path / "x").mkdir()
    iio.imwrite(tmp_path / "x" / "clip.gif", np.zeros((4, 16, 16, 3), np.uint8))
    for name in ("frames", "a-0.mp4.json", "maps"):
        (tmp_path / name).mkdir()
        iio.imwrite(tmp_path / name / "00000.png", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "taken.mp4.json").write_text('{"name": "mine"}')
    (tmp_path / "b-compare.mp4").write_bytes(b"mine")
    (tmp_path / "c-1.mp4").write_bytes(b"mine")
    os.mkfifo(tmp_path / "pipe.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("argv", [
    *(["--ref", ref, "--out", out] for ref, out in itertools.product(
        ("clip.mp4", "hard.mp4", "soft.mp4", "x/../clip.mp4"), ("clip.mp4", "./hard.mp4"))),
    ["--ref", "x/clip.gif", "--out", "x/clip.gif"], ["--ref", "frames", "--out", "frames"],
    ["--ref", "b-compare.mp4", "--out", "b.mp4", "--compare"],
    ["--ref", "clip.mp4", "--out", "n.mp4", "--save-motion", "hard.mp4"],
    ["--ref", "clip.mp4", "--out", "frames"], ["--ref", "clip.mp4", "--out", "pipe.mp4"],
    ["--ref", "clip.mp4", "--out", "n.mp4", "--maps", "maps"],
    ["--ref", "clip.mp4", "--out", "n.mp4", "--maps", "n.mp4"],
    ["--ref", "clip.mp4", "--out", "taken.mp4"], ["--ref", "clip.mp4", "--out", "a-0.mp4"],
    ["--ref", "clip.mp4", "--out", "b.mp4", "--compare"],
    ["--ref", "clip.mp4", "--out", "c.mp4", "--num-samples", "2"],
    *(["--ref", "clip.mp4", "--out", out] for out in (
        "", ".", "-", ".mp4", "x", "n" * 251 + ".mp4", "n\0.mp4", "none/a.mp4"))])
def test_a_run_that_would_destroy_a_file_is_rejected_before_any_work(user_files, run, capsys, argv):
    before = snapshot(user_files)
    assert run(*argv) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and snapshot(user_files) == before


def test_jobs_that_would_write_the_same_file_are_rejected(user_files, run, capsys):
    for first, second in (("n.gif", "x/../n.gif"), ("n.mp4", "n.mp4"), ("m.mp4", "clip.mp4")):
        Path("jobs").write_text("\n".join(json.dumps({"out": out}) for out in (first, second)))
        before = snapshot(user_files)
        assert run("--jobs", "jobs", "--ref", "clip.mp4") == 2 and snapshot(user_files) == before
        assert "of jobs, line 2 another name" in capsys.readouterr().err
    Path("jobs").write_text("\n".join(json.dumps({"out": out, "save_motion": "m"})
                                      for out in ("n.mp4", "o.mp4")))
    assert run("--jobs", "jobs", "--ref", "clip.mp4") == 2
    assert "m: is also written by --save-motion of jobs, line 1." in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".gif", ""])
def test_interrupted_run_is_repeated_with_the_same_command(tmp_path, monkeypatch, suffix):
    """Each rename is the last one that happens, as if the process was killed after it."""
    argv = ["--ref", str(REFERENCE), "--prompt", "", "--out", str(tmp_path / f"a{suffix}"),
            "--num-samples", "2", "--compare"]
    clip = output_clips(args := parse_args(argv), SampleConfig())[0]

    def write(level):
        check_jobs_io(output_clips(args, clip.config))
        for path in (clip.out, clip.comparison):
            clip.write_video(path, torch.full((2, 3, 8, 8), level), 8)
        clip.write_record({"level": level}, {path: sha256_of(path) for path in clip.output_paths()})

    write(0.5)
    expected, last = sha256_of(tmp_path), False
    replace, count, limit = os.replace, 0, 0

    def replace_until_killed(*paths):
        nonlocal count
        count += 1
        if count > limit:
            raise KeyboardInterrupt
        replace(*paths)

    while not last:
        write(0.0)
        monkeypatch.setattr(os, "replace", replace_until_killed)
        monkeypatch.setattr("mcl.files.remove_temporaries", lambda target: None)
        count, limit = 0, limit + 1
        with contextlib.suppress(KeyboardInterrupt):
            write(0.5)
            last = True
        monkeypatch.undo()
        write(0.5)
        assert sha256_of(tmp_path) == expected
    assert limit == 7


def test_file_of_an_earlier_run_with_other_options_is_still_known(user_files, run):
    argv = ["--ref", "clip.mp4", "--num-samples", 2, "--out", "e.gif"]
    for option in (["--compare"], [], ["--compare"]):
        assert run(*argv, *option) == 0
    Path("e-0-compare.gif").write_bytes(b"mine")
    before = snapshot(user_files)
    assert run(*argv, "--compare") == 2 and snapshot(user_files) == before


def test_input_that_changes_while_it_is_read_is_an_error(user_files, run, monkeypatch, capsys):
    read_source = sample.read_source

    def read_and_change(clip):
        frames = read_source(clip)
        shutil.copy(ROOT / "examples" / "zigzag.mp4", "clip.mp4")
        return frames

    monkeypatch.setattr(sample, "read_source", read_and_change)
    assert run("--ref", "clip.mp4", "--out", "n.gif") == 2
    assert "error: clip.mp4: was changed while it was read" in capsys.readouterr().err
    assert not Path("n.gif").exists()


def test_clip_that_another_run_replaces_has_no_record_of_this_run(run, user_files, monkeypatch,
                                                                capsys):
    monkeypatch.setattr(sample.report, "sample_unguided", lambda *args: Path("n.gif").unlink() or (
        shutil.copy("x/clip.gif", "n.gif") and torch.zeros(1, 4, 4, 8, 8)))
    monkeypatch.setattr(sample.report, "measure_clips", lambda *args: {})
    monkeypatch.setattr(sample.report, "format_table", str)
    assert run("--ref", "clip.mp4", "--out", "n.gif", "--report") == 2
    assert "error: n.gif: another program replaced it. Run" in capsys.readouterr().err
    assert "seed" not in read_record(Path("n.gif.json"))


def test_files_that_this_program_wrote_are_replaced(user_files, run):
    for _ in range(2):
        assert run("--ref", "clip.mp4", "--out", "new", "--compare", "--maps", "report") == 0
        assert run("--ref", "clip.mp4", "--out", "package.mp4", "--num-samples", 2) == 0
    assert Path("package.json").read_text() == "{}" and read_record(Path("package-1.mp4.json"))
    assert {FOLDER_MARKER, "00003.png"} < {path.name for path in Path("new").iterdir()}
    assert not list(user_files.rglob(".*.new.*"))
