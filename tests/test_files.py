"""Nothing of the user's is lost: what a run reads, what it did not write, what is no file."""
import itertools
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import sample as command
from mcl import InputError
from mcl.files import FOLDER_MARKER, OutputFile, atomic_write, check_io_conflicts, check_writable, is_mcl_record, write_json

ROOT = Path(__file__).parent.parent
REF = ROOT / "examples" / "figure_eight.mp4"
QUICK = ["--steps", "2", "--guidance-steps", "1", "--size", "64x64"]


def run(*argv):
    return command.main([str(a) for a in (*argv, "--prompt", "a star", *QUICK)])


def everything(folder):
    """All names below a folder, with what each is and holds."""
    return {str(p.relative_to(folder)): (stat.S_IFMT(p.lstat().st_mode),
                                         p.read_bytes() if p.is_file() else None)
            for p in folder.rglob("*")}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The user's clip under many names, and files and folders that this program did not write."""
    shutil.copy(REF, tmp_path / "clip.mp4")
    os.link(tmp_path / "clip.mp4", tmp_path / "hard.mp4")
    (tmp_path / "soft.mp4").symlink_to("clip.mp4")
    (tmp_path / "x").mkdir()
    imageio.imwrite(tmp_path / "x" / "clip.gif", np.zeros((4, 16, 16, 3), np.uint8))
    for name in ("frames", "a-0.mp4.json", "maps"):
        (tmp_path / name).mkdir()
        imageio.imwrite(tmp_path / name / "00000.png", np.zeros((16, 16, 3), np.uint8))
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
def test_what_would_be_lost_is_refused_before_any_work(mine, capsys, argv):
    before = everything(mine)
    assert run(*argv) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and everything(mine) == before


def test_jobs_do_not_write_over_one_another(mine, capsys):
    for first, second in (("n.gif", "x/../n.gif"), ("n.mp4", "n.mp4"), ("m.mp4", "clip.mp4")):
        Path("jobs").write_text("\n".join(json.dumps({"out": out}) for out in (first, second)))
        before = everything(mine)
        assert run("--jobs", "jobs", "--ref", "clip.mp4") == 2 and everything(mine) == before
        assert "of jobs, line 2 another name" in capsys.readouterr().err
    Path("jobs").write_text("\n".join(json.dumps({"out": out, "save_motion": "m"})
                                      for out in ("n.mp4", "o.mp4")))
    assert run("--jobs", "jobs", "--ref", "clip.mp4") == 2
    assert "m: is written by --save-motion of jobs, line 1 as well" in capsys.readouterr().err


def test_what_this_program_wrote_is_replaced(mine):
    for _ in range(2):
        assert run("--ref", "clip.mp4", "--out", "new", "--compare", "--maps", "drawn") == 0
        assert run("--ref", "clip.mp4", "--out", "package.mp4", "--num-samples", 2) == 0
    assert Path("package.json").read_text() == "{}" and is_mcl_record(Path("package-1.mp4.json"))
    assert {FOLDER_MARKER, "00015.png"} < {p.name for p in Path("new").iterdir()}
    assert not [p for p in mine.rglob(".*.new.*")]


def test_a_second_look_is_taken_before_a_file_is_replaced(tmp_path):
    target = tmp_path / "a.json"
    with pytest.raises(InputError, match="is a folder"), atomic_write(target) as temporary:
        temporary.write_text("x")
        target.mkdir()
    with pytest.raises(InputError, match="pipe"), atomic_write(tmp_path / "b") as temporary:
        temporary.write_text("x")
        os.mkfifo(tmp_path / "b")
    assert stat.S_ISFIFO((tmp_path / "b").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b"]


def test_a_folder_comes_back_where_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "a", folder=True) as first:
        (first / "old").touch()
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(InputError, match="cannot be written: no"):
        with atomic_write(tmp_path / "a", folder=True) as second:
            (second / "new").touch()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {FOLDER_MARKER, "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_dead_process_left_is_cleared_up_and_a_living_one_s_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".{pid}.new.a.json").write_text("half")
        (tmp_path / f".{pid}.new.b.json").write_text("another's")
    (tmp_path / f".{dead.pid}.old.frames").mkdir()
    (tmp_path / f".{dead.pid}.old.frames" / FOLDER_MARKER).touch()
    write_json(tmp_path / "a.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.json", f".{os.getppid()}.new.a.json", f".{os.getppid()}.new.b.json",
        f".{dead.pid}.new.b.json", f".{dead.pid}.old.frames"}
    with pytest.raises(KeyError), atomic_write(tmp_path / "frames", folder=True):
        raise KeyError
    assert (tmp_path / "frames" / FOLDER_MARKER).exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="of POSIX")
def test_a_signal_is_answered_in_one_line_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "sample.py", "--ref", REF, "--prompt", "a star", "--out", "a.mp4"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    said = ""
    while "seed 0" not in said:
        said += process.stderr.read(20)
    process.send_signal(signal.SIGTERM)
    *_, last = process.communicate()[1].splitlines()
    assert process.returncode == 143 and last == "terminated; no file is left unfinished"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="of POSIX")
@pytest.mark.parametrize("command, number, code", [
    ("sample.py", signal.SIGINT, 130), ("sample.py", getattr(signal, "SIGHUP", 1), 143),
    ("convert_weights.py", signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_imported(tmp_path, command, number, code):
    """In place of torch stands what takes long and says so."""
    (tmp_path / "torch.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / command], env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))      # the tests' may be ignored
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate() == ("", "interrupted; nothing was begun\n")
    assert process.returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize("streams", ["| head -c0", "2>/dev/full"])
def test_what_cannot_be_said_is_done_all_the_same(tmp_path, streams):
    argv = [sys.executable, ROOT / "sample.py", "--ref", REF, "--prompt", "a star", *QUICK,
            "--num-samples", "2", "--out", "a.gif"]
    line = " ".join(shlex.quote(str(word)) for word in argv)
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} {streams}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout
    assert "Exception" not in done.stderr and len(list(tmp_path.glob("*.gif"))) == 2
    assert ("standard output could not be written" in done.stderr) == (streams[0] in ">|")


def test_records_are_strict_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), {"y": float("-inf")}, (1, 2.5)]})
    record = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert record.pop("motionclone") is True and record == {"x": [None, {"y": None}, [1, 2.5]]}


def test_plans_name_what_collides(tmp_path):
    check_io_conflicts([("--ref", tmp_path / "a")], [OutputFile("--out", tmp_path / "b")])
    with pytest.raises(InputError, match="a: is what --ref reads; give --out another name"):
        check_io_conflicts([("--ref", tmp_path / "a")], [OutputFile("--out", tmp_path / "." / "a")])
    with pytest.raises(InputError, match="cannot be a name"):
        check_writable(tmp_path / "\ud800.mp4")
