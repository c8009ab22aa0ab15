"""Many clips in one run: what a file of jobs may say, what fails, what is not made again."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import sample as command
from mcl import SampleConfig
from mcl.cli import jobs
from mcl.cli.jobs import Crew, parse_jobs, requested
from mcl.cli.outputs import clips_of

ROOT = Path(__file__).parents[2]
REF = ROOT / "examples" / "figure_eight.mp4"
COMMON = ["--prompt", "a red star", "--steps", "3", "--guidance-steps", "1", "--size", "32x32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In a folder with a reference; the command shows warnings in its own way meanwhile."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(REF, "ref.mp4")
    with warnings.catch_warnings():
        yield


@pytest.fixture
def loaded(monkeypatch):
    """A note of each time that a model is read."""
    times, read = [], command.load_model
    monkeypatch.setattr(command, "load_model", lambda *a: times.append(a) or read(*a))
    return times


def write(*jobs):
    Path("jobs.jsonl").write_text("\n".join(json.dumps(job) for job in jobs) + "\n\n")


def run(*argv):
    return command.main(["--jobs", "jobs.jsonl", "--ref", "ref.mp4", *COMMON, *argv])


def test_many_jobs_run_with_one_model_and_write_what_each_alone_would(loaded):
    write({"out": "a.mp4", "seed": 5}, {"out": "b.mp4", "top_k": 2, "compare": True})
    assert run() == 0 and len(loaded) == 1
    assert command.main(["--ref", "ref.mp4", *COMMON, "--seed", "5", "--out", "alone.mp4"]) == 0
    assert Path("a.mp4").read_bytes() == Path("alone.mp4").read_bytes()
    assert Path("b-compare.mp4").exists()


@pytest.mark.parametrize("lines, message", [
    (['{"out": "a.mp4"}', '{"out": "a.mp4"}'],
     "a.mp4: is written by --out of jobs.jsonl, line 1 as well"),
    (['{"steps": "many"}'], "line 1: argument --steps: invalid int value: 'many'"),
    (['{"colour": 3}'], "line 1: unrecognized arguments: --colour=3"),
    (['{"help": true}'], "line 1: 'help' is no option of a job"),
    (['{"out=a.mp4 --seed": 3}'], "is no option of a job"),
    (['{"prompt": {"a": 1}}'], "line 1: prompt is {'a': 1}, where text"),
    (["[" * 100000], "line 1: maximum recursion depth"),
    (["[1]"], "line 1: not an object of options"), (["{"], "line 1: Expecting"),
    ([""], "holds no job"),
    (["{}", '{"out": "b.mp4", "steps": 0}'], "line 2: --steps 0 is not possible"),
    (["{}", '{"out": "b.mp4", "ref": "none.mp4"}'], "line 2: none.mp4: no such file"),
    (["{}", '{"out": "b.mp4", "ref": "text.mp4"}'], "line 2: text.mp4: cannot be decoded"),
    (["{}", '{"out": "b.mp4", "stride": 9}'], "line 2: ref.mp4: --stride 9 is not possible"),
    (["{}", '{"out": "b.mp4", "start": 99}'], "line 2: ref.mp4: start 99 s is past the end")])
def test_jobs_that_cannot_be_are_refused_before_any_is_begun(lines, message, capsys, loaded):
    Path("text.mp4").write_text("no film")
    Path("jobs.jsonl").write_text("\n".join(lines))
    assert run() == 2 and not loaded
    error, = capsys.readouterr().err.splitlines()
    assert message in error and error.startswith("error: ")
    assert sorted(p.name for p in Path().iterdir()) == ["jobs.jsonl", "ref.mp4", "text.mp4"]


def test_a_value_is_what_it_says_whatever_it_looks_like():
    Path("jobs.jsonl").write_text("\ufeff" + "\n".join([
        '{"prompt": "-star", "negative_prompt": "--", "subject": ["-a", "-x"], "compare": false, '
        '"fps": null}',
        '{"prompt": "a\u2028b", "out": "b.mp4", "top_k": 3}\r']), encoding="utf-8")
    first, second = parse_jobs(["--jobs", "jobs.jsonl", "--ref", "ref.mp4"])
    assert (first.prompt, first.negative_prompt.strip(), first.subject) == (
        "-star", "--", ["-a", "-x"])
    assert (first.compare, first.fps) == (False, None)
    assert (second.prompt, second.top_k, second.where) == ("a\u2028b", 3, "jobs.jsonl, line 2")


def test_a_job_that_fails_stops_no_other_and_only_it_is_made_again(capsys, loaded):
    write({"out": "a.mp4", "motion_weight": 1e38}, {"out": "b.mp4"},
          {"out": "c.gif", "num_samples": 2})
    assert run() == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == "jobs.jsonl: 4 clips; 1 failed:"
    assert said[-1].startswith("jobs.jsonl, line 1: failed: not finite at step 2")
    names = ["b.mp4", "c-0.gif", "c-1.gif"]
    assert not Path("a.mp4").exists() and all(map(os.path.exists, names))

    before = {name: os.stat(name).st_ino for name in names}
    write({"out": "a.mp4"}, {"out": "b.mp4"}, {"out": "c.gif", "num_samples": 2})
    assert run() == 0 and Path("a.mp4").exists()
    assert {name: os.stat(name).st_ino for name in names} == before
    assert capsys.readouterr().err.splitlines()[-1] == (
        "jobs.jsonl: 4 clips, 3 of them made of the same before")
    loaded.clear()
    assert run() == 0 and not loaded


@pytest.mark.parametrize("change", [
    lambda: write({"out": "b.mp4", "seed": 1}),
    lambda: write({"out": "b.mp4", "compare": True}),
    lambda: write({"out": "b.mp4", "report": True}),
    lambda: write({"out": "b.mp4", "maps": "m"}),
    lambda: write({"out": "b.mp4", "save_motion": "m.safetensors"}),
    lambda: write({"out": "b.mp4", "dtype": "bfloat16"}),
    lambda: Path("b.mp4").write_bytes(Path("b.mp4").read_bytes()[:-1]),
    lambda: Path("b.mp4").unlink(), lambda: Path("b.mp4.json").write_text("{}"),
    lambda: shutil.copy(ROOT / "examples" / "zigzag.mp4", "ref.mp4")])
def test_a_clip_is_made_again_when_anything_of_it_is_another(change, loaded, monkeypatch):
    monkeypatch.setattr(jobs, "kept_digest", jobs.sha256_of)     # as in a process of its own
    write({"out": "b.mp4"})
    assert run() == 0
    change()
    loaded.clear()
    assert run() in (0, 2)      # 2: a record that is not ours any more
    assert loaded or Path("b.mp4.json").read_text() == "{}"


def test_the_processes_of_a_crew_share_all_of_the_work():
    for size in (1, 2, 3, 8):
        parts = [Crew(rank, size).share(range(7)) for rank in range(size)]
        assert sorted(one for part in parts for one in part) == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_a_clip_is_made_of_does_not_depend_on_which_process_asks(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        args = command.parse_jobs(["--ref", "ref.mp4", "--prompt", "a star"])[0]
        assert args.device == f"cuda:{rank}"
        found.append(requested(clips_of(args)[0], SampleConfig(), 8))
    assert found[0] == found[1]


def test_torchrun_shares_the_jobs_and_goes_on_after_it_was_killed():
    write(*({"out": f"{i}.mp4", "seed": i} for i in range(4)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python",
              sys.executable, ROOT / "sample.py", "--jobs", "jobs.jsonl", "--ref", "ref.mp4",
              *COMMON]
    process = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True)
    while not list(Path().glob("*.mp4.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary, = [line for line in done.stderr.splitlines() if line.startswith("jobs.jsonl: 4 clips")]
    assert "made of the same before" in summary
    assert sorted(p.name for p in Path().glob("*.mp4")) == [*(f"{i}.mp4" for i in range(4)),
                                                            "ref.mp4"]
