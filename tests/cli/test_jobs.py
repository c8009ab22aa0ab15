"""Many clips in one run: the lines of a jobs file, failures, continuing, and torchrun."""
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import mcl.cli.sample as command
from mcl.cli import jobs
from mcl.cli.arguments import parse_args
from mcl.cli.jobs import all_gather, join_workers, read_jobs
from mcl.errors import InputError
from tests.cli.conftest import PROMPT, REFERENCE, ROOT, run

COMMON = ["--jobs", "jobs.jsonl", "--ref", "ref.mp4", "--prompt", PROMPT, "--steps", 2,
          "--guidance-steps", 1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder with a reference."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(REFERENCE, "ref.mp4")


@pytest.fixture
def loads(monkeypatch):
    """Return a list that gets an element each time a model is loaded."""
    calls, load_model = [], command.model_file.load_model

    def load(*args):
        calls.append(args)
        return load_model(*args)

    monkeypatch.setattr(command.model_file, "load_model", load)
    return calls


@pytest.fixture
def run_jobs(weights):
    """Return a function that runs jobs.jsonl."""
    return lambda *argv: run("--weights", weights, *COMMON, *argv)


def write_jobs(*options):
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, options)) + "\n\n")


def test_jobs_share_one_model_and_write_what_each_alone_would(run_jobs, loads, weights):
    write_jobs({"out": "a.mp4", "seed": 5}, {"out": "b.mp4", "top_k": 2, "compare": True})
    assert run_jobs() == 0 and len(loads) == 1
    assert run("--weights", weights, *COMMON[2:], "--seed", 5, "--out", "alone.mp4") == 0
    assert Path("a.mp4").read_bytes() == Path("alone.mp4").read_bytes()
    assert Path("b-compare.mp4").exists()


@pytest.mark.parametrize("lines, message", [
    (['{"steps": "many"}'], "line 1: argument --steps: invalid int value: 'many'"),
    (['{"sede": 3}'], "line 1: unrecognized arguments: --sede=3. Did you mean --seed?"),
    (['{"help": true}'], "line 1: --help is not an option of a job"),
    (['{"jobs": "a"}'], "line 1: --jobs is not an option of a job"),
    (['{"out=a.mp4 --seed": 3}'], "line 1: a.mp4 --seed=3: the extension is not known"),
    (['{"prompt": {"a": 1}}'], "line 1: prompt = {'a': 1}: use text, numbers or true"),
    (["[" * 100000], "line 1: maximum recursion depth"),
    (["[1]"], "line 1: [1] is not a job: write an object of options"),
    (["{"], "line 1: Expecting"), ([""], "has no jobs"),
    (["{}", '{"out": "b.mp4", "steps": 0}'], "line 2: "),
    (["{}", '{"out": "b.mp4", "ref": "none.mp4"}'], "line 2: none.mp4: no such file"),
    (["{}", '{"out": "b.mp4", "ref": "text.mp4"}'], "line 2: text.mp4: cannot be decoded"),
    (["{}", '{"out": "b.mp4", "stride": 19}'], "line 2: ref.mp4: stride = 19 is out of range"),
    (["{}", '{"out": "b.mp4", "start": 99}'], "line 2: ref.mp4: start = 99 s is past the end")])
def test_wrong_job_is_rejected_with_its_line_before_any_is_begun(lines, message, run_jobs, loads,
                                                                 capsys):
    Path("text.mp4").write_text("no film")
    Path("jobs.jsonl").write_text("\n".join(lines))
    assert run_jobs() == 2 and not loads
    error, = capsys.readouterr().err.splitlines()
    assert message in error and error.startswith("error: jobs.jsonl")
    assert sorted(p.name for p in Path().iterdir()) == ["jobs.jsonl", "ref.mp4", "text.mp4"]


@pytest.mark.parametrize("content", [None, b"\xff{}"])
def test_jobs_file_that_is_no_text_is_rejected(content, run_jobs, capsys):
    Path("jobs.jsonl").mkdir() if content is None else Path("jobs.jsonl").write_bytes(content)
    assert run_jobs() == 2
    assert re.match("error: jobs.jsonl(: has no jobs|, line 1: 'utf-8')", capsys.readouterr().err)


def test_values_of_a_job_replace_the_common_ones_and_may_begin_with_a_dash(weights):
    Path("jobs.jsonl").write_text("\ufeff" + "\n".join([
        '{"prompt": "-star", "subject": ["-a", "-star"], "ref_prompt": "-a", "compare": false, '
        '"fps": null}', '{"prompt": "a\u2028b", "out": "b.mp4", "top-k": 3}\r']), encoding="utf-8")
    argv = ["--weights", str(weights), "--jobs", "jobs.jsonl", "--ref", "ref.mp4", "--top-k", "2"]
    first, second = (clip.args for clip in read_jobs(parse_args(argv)))
    assert (first.prompt, first.subject, first.ref_prompt) == ("-star", ["-a", "-star"], "-a")
    assert (first.compare, first.fps, first.top_k) == (False, None, 2)
    assert (second.prompt, second.top_k, second.source) == ("a\u2028b", 3, "jobs.jsonl, line 2")


@pytest.mark.parametrize("line", [
    '{"prompt": "a", "prompt": "b"}', '{"top_k": 1, "top-k": 2}', '{"prompt": ["a", "b"]}',
    '{"guidance_blocks": ["up_blocks.1"], "guidance-blocks": ["up_blocks.2"]}'])
def test_value_that_is_given_twice_is_rejected(line):
    Path("jobs.jsonl").write_text(line)
    with pytest.raises(InputError, match="jobs.jsonl, line 1: .*given twice"):
        read_jobs(parse_args(["--jobs", "jobs.jsonl", "--ref", "ref.mp4"]))


def test_last_line_is_checked_before_any_video_is_opened_and_each_video_once(monkeypatch):
    read = []
    monkeypatch.setattr(jobs, "read_video", lambda *args, **_: read.append(args))
    write_jobs(*({"out": f"{i}.gif", "prompt": str(i)} for i in range(20)), {"top_k": 99})
    argv = parse_args(["--jobs", "jobs.jsonl", "--ref", "ref.mp4"])
    with pytest.raises(InputError, match="jobs.jsonl, line 21: top_k = 99"):
        read_jobs(argv)
    assert not read
    write_jobs(*({"out": f"{i}.gif", "prompt": str(i)} for i in range(20)))
    assert len(read_jobs(argv)) == 20 and len(read) == 1


def test_failed_job_stops_no_other_and_only_it_is_run_again(run_jobs, capsys, loads):
    write_jobs({"out": "a.mp4", "motion_weight": 1e38}, {"out": "b.mp4"},
               {"out": "c.gif", "num_samples": 2})
    assert run_jobs() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "jobs.jsonl: 4 clips; 0 were up to date, 1 failed"
    assert lines[-1].startswith("jobs.jsonl, line 1: failed: ")
    names = ["b.mp4", "c-0.gif", "c-1.gif"]
    assert not Path("a.mp4").exists() and all(map(os.path.exists, names))

    before = {name: os.stat(name).st_ino for name in names}
    write_jobs({"out": "a.mp4"}, {"out": "b.mp4"}, {"out": "c.gif", "num_samples": 2})
    assert run_jobs() == 0 and Path("a.mp4").exists()
    assert {name: os.stat(name).st_ino for name in names} == before
    assert capsys.readouterr().err.splitlines()[-1] == (
        "jobs.jsonl: 4 clips; 3 were up to date, 0 failed")
    loads.clear()
    assert run_jobs() == 0 and not loads


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """Return the folder of a finished job."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(tmp_path_factory.mktemp("finished"))
        shutil.copy(REFERENCE, "ref.mp4")
        write_jobs({"out": "b.gif"})
        assert run("--weights", weights, *COMMON) == 0
        return Path.cwd()


def test_finished_job_is_not_run_again(finished, run_jobs, loads):
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    assert run_jobs() == 0 and not loads


@pytest.mark.parametrize("change", [
    lambda: write_jobs({"out": "b.gif", "seed": 1}),
    lambda: write_jobs({"out": "b.gif", "compare": True}),
    lambda: write_jobs({"out": "b.gif", "report": True}),
    lambda: write_jobs({"out": "b.gif", "maps": "m"}),
    lambda: write_jobs({"out": "b.gif", "save_motion": "m.safetensors"}),
    lambda: write_jobs({"out": "b.gif", "dtype": "bfloat16"}),
    lambda: Path("b.gif").write_bytes(Path("b.gif").read_bytes()[:-1]),
    lambda: Path("b.gif").unlink(),
    lambda: shutil.copy(ROOT / "examples" / "zigzag.mp4", "ref.mp4")],
    ids=["seed", "compare", "report", "maps", "save_motion", "dtype", "changed clip", "no clip",
         "reference"])
def test_changed_job_or_file_is_run_again(change, finished, run_jobs, loads):
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    change()
    loads.clear()
    assert run_jobs() == 0 and loads


def test_record_that_another_program_changed_is_not_replaced(run_jobs, capsys):
    write_jobs({"out": "b.gif"})
    assert run_jobs() == 0
    Path("b.gif.json").write_text("{}")
    assert run_jobs() == 2 and "was not written by this program" in capsys.readouterr().err


def test_fingerprint_does_not_depend_on_the_process_that_asks(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 40, 1 << 40))
    fingerprints = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        clip, = read_jobs(parse_args(["--ref", "ref.mp4", "--prompt", "a star"]))
        fingerprints.append(jobs.job_fingerprint(clip, {}))
    assert fingerprints[0] == fingerprints[1]


def test_single_process_shares_its_work_with_no_other():
    assert join_workers() == (0, 1) and all_gather(["a"], 1) == ["a"]


def test_torchrun_shares_the_jobs_that_are_left(weights, run_jobs):
    clips = [{"out": f"{i}.mp4", "seed": i} for i in range(4)]
    write_jobs(clips[1])
    assert run_jobs() == 0
    write_jobs(*clips)
    again = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python",
         sys.executable, ROOT / "sample.py", "--weights", weights, *map(str, COMMON)],
        capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("jobs.jsonl: 4 clips; 1 were up to date, 0 failed") == 1
    assert {path.name for path in Path().glob("*.mp4")} == {
        *(f"{i}.mp4" for i in range(4)), "ref.mp4"}
