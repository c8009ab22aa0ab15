"""The table of many clones: CLIP against transformers, what is measured, and how it goes on."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample as command
from mcl import InputError
from mcl.checkpoints.model_file import DEFAULT_WEIGHTS
from mcl.cli.jobs import kept_digest, parse_jobs
from mcl.checkpoints.infer_config import clip_configs
from tests.benchmarks.clip_model import Clip, load_clip, pixels_of
from mcl.evaluation.report import COLUMNS
from tests.benchmarks.paper_table import PAPER, main, student, table
from mcl.networks.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]


def clip_config(text=32, text_heads=4, vision=48, heads=3, layers=2, patch=8, grid=4, d=24,
                text_layers=2):
    return transformers.CLIPConfig(
        projection_dim=d,
        text_config=dict(hidden_size=text, intermediate_size=4 * text, projection_dim=d,
                         num_hidden_layers=text_layers, num_attention_heads=text_heads),
        vision_config=dict(hidden_size=vision, intermediate_size=4 * vision, projection_dim=d,
                           num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch,
                           image_size=patch * grid))


LARGE_14 = dict(text=768, text_heads=12, text_layers=12, vision=1024, heads=16, layers=24,
                patch=14, grid=16, d=768)
BASE_32 = dict(text=512, text_heads=8, text_layers=12, vision=768, heads=12, layers=12,
               patch=32, grid=7, d=512)


def oracle(**sizes):
    """A CLIPModel with weights so large that no part of it is silent."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(clip_config(**sizes)).eval()
    for p in model.parameters():
        p.data += (0.3 if p.ndim < 2 else p[0].numel() ** -0.5) * torch.randn(p.shape)
    return model


def processor(side):
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)


def pictures(h, w, number=3, seed=0):
    """Smooth on one side, noise on the other: (n, h, w, 3) of 8 bits."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (number, h, w, 3))
    ramp = np.linspace(0, 255, w)[None, None, :, None]
    return np.where(np.arange(w)[None, None, :, None] < w // 2, noise, ramp).astype(np.uint8)


def frames_of(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP as transformers saves it."""
    path = tmp_path_factory.mktemp("clip")
    oracle().save_pretrained(path)
    return path


# CLIP

@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("sizes, has_config", [
    ({}, True), (dict(text=64, text_heads=1, vision=128, heads=2, patch=6, grid=5, d=40), False)])
def test_clip_embeds_as_transformers_does(sizes, has_config, tmp_path):
    model = oracle(**sizes)
    model.save_pretrained(tmp_path)
    if not has_config:
        (tmp_path / "config.json").unlink()
    ours = load_clip(tmp_path / "model.safetensors")
    ids = Tokenizer()(["", "a red star on a navy background", "a fox " * 60])
    pixels = pictures(40, 61)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=processor(ours.side)(
            list(pixels), return_tensors="pt").pixel_values)
        text, seen = ours.embed_text(ids), ours.embed_pictures(
            pixels_of(frames_of(pixels), ours.side))
    assert (text - expected.text_embeds).abs().max() < 1e-5
    assert (seen - expected.image_embeds).abs().max() < 1e-5
    for embeds in (text, seen):         # which tell the three apart
        assert (embeds @ embeds.T - torch.eye(3)).tril(-1).amax() < 0.99
    alignment, consistency = ours.cosines("a red star on a navy background", frames_of(pixels))
    a, b, c = expected.image_embeds
    assert alignment == pytest.approx(float((a + b + c) @ expected.text_embeds[1] / 3),
                                      abs=1e-6)
    assert consistency == pytest.approx(float((a @ b + b @ c) / 2), abs=1e-6)


@pytest.mark.parametrize("h, w", [(224, 224), (512, 512), (480, 854), (333, 225), (64, 97)])
def test_pictures_are_prepared_as_transformers_does(h, w):
    pixels = pictures(h, w)
    expected = processor(224)(list(pixels), return_tensors="pt").pixel_values
    assert (pixels_of(frames_of(pixels), 224) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [LARGE_14, BASE_32])
def test_every_weight_of_openai_s_models_has_its_place(sizes):
    config = clip_config(**sizes)
    with torch.device("meta"):
        theirs = transformers.CLIPModel(config).state_dict()
        shapes = {name: t.shape for name, t in theirs.items() if name != "logit_scale"}
        text, vision, d = clip_configs("a file", shapes, {})
        ours = Clip(text, vision, d)
    assert {name: t.shape for name, t in ours.state_dict().items()} == shapes
    assert (text.num_attention_heads, vision.heads, ours.side) == (sizes["text_heads"], sizes["heads"], 224)
    assert clip_configs("a file", shapes, config.to_dict()) == (text, vision, d)


def test_old_files_and_pickles_are_read_too(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    expected = load_clip(folder).state_dict()
    tensors |= {f"{tower}.embeddings.position_ids": torch.arange(n)[None]
                for tower, n in (("text_model", 77), ("vision_model", 17))}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    found = load_clip(tmp_path / "pytorch_model.bin").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize("change, config, message", [
    (without("visual_projection.weight"), {}, "visual_projection.weight is missing"),
    (without("text_projection.weight"), {}, "text_projection.weight is missing"),
    (lambda t: t.update(more=torch.zeros(1)), {}, "more belongs to no part"),
    (lambda t: t["logit_scale"].copy_(torch.nan), {}, None),
    (lambda t: t["vision_model.pre_layrnorm.bias"].fill_(torch.inf), {}, "not finite"),
    (lambda t: t.update({"text_model.embeddings.position_embedding.weight": torch.zeros(9, 32)}),
     {}, "reads 9 tokens of a text, CLIP reads 77"),
    (lambda t: t.update({"vision_model.embeddings.position_embedding.weight": torch.zeros(16, 48)}),
     {}, r"position_embedding.weight is \(16, 48\), the config says \(17, 48\)"),
    (lambda t: t.update({"vision_model.embeddings.position_embedding.weight": torch.zeros(0, 48)}),
     {}, "grid = 0 is not possible"),
    (None, {"hidden_act": "gelu"}, "vision_config config has hidden_act = 'gelu'; CLIP has"),
    (None, {"num_attention_heads": 5}, "hidden_size = 48 is not possible: a multiple of 5"),
    (None, {"num_attention_heads": "3"}, "heads = '3' is not possible"),
    (None, {"num_attention_heads": None}, "how many heads its 48 channels have"),
    (None, 3, "its vision_config is 3, which is no config")])
def test_a_clip_that_cannot_be_is_refused(change, config, message, folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    said["vision_config"] = said["vision_config"] | config if config != 3 else 3
    if change is not None:
        change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(said))
    if message is None:
        assert load_clip(tmp_path).side == 32
    else:
        with pytest.raises(InputError, match=f"{tmp_path}.*{message}"):
            load_clip(tmp_path)


# The table

def record(reference, prompt, **figures):
    return {"reference": reference, "prompt": prompt,
            **{name: {column: values[i] for column, values in figures.items()}
               for i, name in enumerate(("clone", "unguided"))}}


def test_means_are_of_references_and_prompts_with_their_intervals():
    records = [record("a", "x", flicker=(1.0, 0.5)), record("a", "x", flicker=(3.0, 0.5)),
               record("b", "x", flicker=(4.0, None)), record("b", "y", flicker=(6.0, None))]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
            for line in table(records).splitlines()}
    assert list(rows) == ["", "---", *PAPER, *COLUMNS]
    # of 2, 4 and 6: the deviation is 2, its share sqrt(3), t = 4.3027
    assert rows["flicker"] == ["4.0000 ± 4.9683", "0.5000 (of 1)", ""]
    assert rows["CLIP text alignment"][2] == "0.3187"
    assert rows["CLIP temporal consistency"] == ["- (of 0)", "- (of 0)", "0.9621"]


def test_student_s_t_is_the_tabulated_one():
    for freedom, t in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (29, 2.04523), (1000, 1.96234)):
        assert student(freedom) == pytest.approx(t, abs=2e-4)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """In a folder with a reference; the command shows warnings in its own way meanwhile."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "figure_eight.mp4", "ref.mp4")
    with warnings.catch_warnings():
        yield


def write(*cases):
    Path("cases.jsonl").write_text("\n".join(map(json.dumps, cases)) + "\n")


def options(folder, *more):
    return ["--cases", "cases.jsonl", "--clip", str(folder), "--ref", "ref.mp4", "--prompt",
            "a red star", "--steps", "3", "--guidance-steps", "1", "--size", "32x32", "--frames",
            "4", *more]


def lines():
    return [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()]


def test_a_case_is_what_sample_makes_of_it(here, folder):
    write({"seed": 5})
    assert main(options(folder)) == 0
    line, = lines()
    assert command.main([*options(folder)[4:], "--seed", "5", "--report", "--out", "clip"]) == 0
    report = json.loads(Path("clip.json").read_text())["report"]
    for name, same in (("clone", "result"), ("unguided", "unguided")):
        assert {column: line[name][column] for column in report[same]} == report[same]
    frames = frames_of(np.stack([imageio.imread(p) for p in sorted(Path("clip").glob("*.png"))]))
    assert [line["clone"][column] for column in PAPER] == pytest.approx(
        load_clip(folder).cosines("a red star", frames))


def test_what_is_measured_is_not_measured_again_but_what_changes_is(here, folder, capsys):
    write({"seed": 5}, {"seed": 6, "motion_weight": 1e38}, {"seed": 7})
    assert main(options(folder)) == 1
    said = capsys.readouterr()
    assert "cases.jsonl, line 2: failed: not finite at step 2" in said.err
    assert said.err.splitlines()[-1] == "cases.jsonl: 3 cases, 0 of them measured before; 1 failed"
    assert "| flicker | 0." in said.out and [line["seed"] for line in lines()] == [5, 7]

    shutil.copytree(folder, "clip")     # the same by another name
    write({"seed": 5}, {"seed": 6}, {"seed": 7, "cfg_scale": 2})
    assert main(options("clip")) == 0
    assert "3 cases, 1 of them measured before; 0 failed" in capsys.readouterr().err
    assert [line["seed"] for line in lines()] == [5, 7, 6, 7]

    def found():
        assert main(options("clip")) == 0
        return capsys.readouterr()

    once = found()
    assert "3 of them measured before" in once.err
    (Path("clip") / "config.json").open("a").write("\n")
    shutil.copy(ROOT / "examples" / "zigzag.mp4", "ref.mp4")
    kept_digest.cache_clear()
    other = found()
    assert "0 of them measured before" in other.err and other.out != once.out and len(lines()) == 7


@pytest.mark.parametrize("argv, message", [
    (["--clip", "none"], "none: no such file"), (["--clip", "ref.mp4"], "neither safetensors nor"),
    (["--clip", str(DEFAULT_WEIGHTS)], "holds no CLIP of texts and pictures"),
    (["--cases", "none.jsonl"], "none.jsonl: cannot be read"),
    (["--cases", "ref.mp4"], "ref.mp4: cannot be read"),
    (["--out", "cases.jsonl"], "is what --cases reads"), (["--out", "ref.mp4"], "is what --ref"),
    (["--out", "notes.txt"], "notes.txt, line 1: is cut off or not JSON"),
    (["--out", "other.jsonl"], "other.jsonl, line 1: has no figures of a table"),
    (["--out", "none/table.jsonl"], "there is no folder none"),
    (["--jobs", "cases.jsonl"], "--jobs is given twice"),
    (["--colour", "red"], "line 1: unrecognized arguments: --colour red"),
    (["--steps", "0"], "line 1: --steps 0 is not possible"),
    (["--method", "inversion"], "line 1: the table is of --method single-step"),
    (["--semantic-scale", "5"], "without semantic guidance"),
    (["--adapter", "ref.mp4"], "leave out --image, and merge LoRAs"),
    (["--num-samples", "0"], "line 1: --num-samples 0"),
    (["--device", "none"], "line 1: device 'none' is not known")])
def test_what_cannot_be_is_refused_in_a_line(argv, message, here, folder, capsys):
    write({})
    Path("notes.txt").write_text("remember")
    Path("other.jsonl").write_text('{"clone": {"flicker": "much"}, "unguided": {}}\n')
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    given = options(folder)
    if argv[0] in given:
        given[given.index(argv[0]) + 1] = argv[1]
    else:
        given += argv
    assert main(given) == 2
    error, = capsys.readouterr().err.splitlines()
    assert message in error
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_davis_is_there_to_start_from():
    jobs = parse_jobs([f"--jobs={ROOT / 'examples' / 'davis.jsonl'}"])
    names = [job.ref.name for job in jobs]
    assert len(names) == 30 and names == sorted(set(names))
    assert {str(job.ref.parent) for job in jobs} == {"DAVIS/JPEGImages/480p"}
    assert len({job.prompt for job in jobs}) == 30


def test_a_table_is_of_one_model(here, folder, capsys):
    write({}, {"dtype": "bfloat16"})
    assert main(options(folder)) == 2
    assert "line 2: a table is of one model" in capsys.readouterr().err


def test_processes_share_the_cases_and_go_on_after_they_were_killed(here, folder):
    write(*({"seed": i} for i in range(4)))
    alone = [sys.executable, "-m", "tests.benchmarks.paper_table", *options(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(alone, stderr=subprocess.DEVNULL, env=environment)
    while not Path("table.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = lines()
    assert 0 < len(began) < 4
    done = subprocess.run([*LAUNCH, *alone], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"4 cases, {len(began)} of them measured before; 0 failed" in done.stderr
    assert done.stdout.count("| flicker |") == 1
    assert lines()[:len(began)] == began and sorted(r["seed"] for r in lines()) == list(range(4))
    assert not list(Path().glob(".*"))
