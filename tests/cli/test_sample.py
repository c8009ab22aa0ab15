"""The command: what it writes, and what it says to bad input."""
import contextlib
import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample as command
from mcl import InputError, Motion, SampleConfig, extract_motion, load_model, read_video
from mcl.checkpoint import save_model
from mcl.command.options import check, local_rank_device, parse, make_generator, settings

ROOT = Path(__file__).parents[2]
REF = str(ROOT / "examples" / "figure_eight.mp4")
PROMPT = "a red star on a navy background"
QUICK = ["--steps", "4", "--guidance-steps", "2", "--size", "64x64"]


@pytest.fixture(autouse=True)
def keep_warnings():
    """The command shows warnings in its own way; the other tests keep theirs."""
    with warnings.catch_warnings():
        yield


def run(*argv):
    return command.main([str(a) for a in argv])


def clone(out, *argv, prompt=PROMPT):
    assert run("--ref", REF, "--prompt", prompt, "--out", out, *QUICK, *argv) == 0
    return out


def test_writes_a_video_and_a_record_of_all_settings(tmp_path, capsys):
    out = clone(tmp_path / "a.mp4", "--compare", "--seed", 3)
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert imageio.imread(out).shape == (16, 64, 64, 3)
    assert imageio.imread(tmp_path / "a-compare.mp4").shape == (16, 64, 128, 3)
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    assert record["seed"] == 3 and record["prompt"] == PROMPT
    assert record["settings"]["steps"] == 4 and len(record["loss"]) == 2
    assert len(record["weights_sha256"]) == 64 and record["recompute"] is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-compare.mp4", "a.mp4", "a.mp4.json"]


def test_the_same_command_writes_the_same_bytes(tmp_path):
    first, again = (clone(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    other = clone(tmp_path / "c.mp4", "--seed", 1)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_presets_set_steps_and_options_go_before_them():
    own = SampleConfig(steps=60, guidance_steps=25, guidance_noise_range=.25, guidance_warmup_steps=6, guidance_cooldown_steps=0)
    for preset, steps, guided, span, guidance_warmup_steps in (("camera", 100, 50, .3, 6),
                                                ("object", 300, 180, .4, 6),
                                                ("fast", 40, 17, .25, 4)):
        args = parse(["--ref", REF, "--prompt", "", "--preset", preset])
        found = settings(args, own)
        assert (found.steps, found.guidance_steps, found.guidance_noise_range) == (steps, guided, span)
        assert (found.guidance_warmup_steps, found.guidance_cooldown_steps, found.motion_weight) == (guidance_warmup_steps, 0, own.motion_weight)
        args.steps = 200
        args.guidance_steps = 30
        assert settings(args, own).steps == 200 and settings(args, own).guidance_steps == 30


def test_the_published_settings_are_the_defaults_and_the_presets():
    """METHOD of arXiv 2406.05338: version 4 and later, and versions 1 to 3."""
    own = SampleConfig()
    assert (own.steps, own.guidance_steps, own.guidance_noise_range, own.timestep_spacing) == (
        100, 50, .3, "uneven")
    assert (own.motion_weight, own.guidance_warmup_steps, own.guidance_cooldown_steps, own.extraction_timestep, own.top_k, own.guidance_blocks,
            own.cfg_scale) == (2000, 10, 10, 400, 1, ("up_blocks.1",), 8.5)
    assert own.mask_threshold == 0.3
    for preset, steps, guided in (("inversion-300", 300, 200), ("inversion-500", 500, 300)):
        args = parse(["--ref", REF, "--prompt", "", "--preset", preset])
        found = settings(args, own)
        assert args.method == "inversion"
        assert (found.steps, found.guidance_steps, found.spacing) == (steps, guided, "linspace")
        assert (found.guidance_warmup_steps, found.guidance_cooldown_steps, found.inversion_steps) == (10, 0, 1000)
        per_map = {b: w * found.motion_weight for b, w in found.block_weight_map.items()}
        assert per_map == pytest.approx({"up_blocks.1": 1667, "up_blocks.2": 833})
        assert (found.semantic_scale, found.semantic_blocks) == (42, ("up_blocks.1",))
        other = parse(["--ref", REF, "--prompt", "", "--preset", preset, "--blocks", "up_blocks.2"])
        assert settings(other, own).guidance_block_weights == ()         # which were of other blocks
        with pytest.raises(InputError, match="belongs to --method inversion"):
            parse(["--prompt", "", "--preset", preset, "--method", "single-step"])
    changed = ["--spacing", "leading", "--warmup", "3", "--cooldown", "4", "--mask-threshold", ".2"]
    found = settings(parse(["--ref", REF, "--prompt", "", *changed]), own)
    assert (found.spacing, found.guidance_warmup_steps, found.guidance_cooldown_steps, found.mask_threshold) == (
        "leading", 3, 4, .2)


def test_inversion_is_another_way_to_the_motion(tmp_path):
    once = clone(tmp_path / "a.mp4")
    argv = ["--method", "inversion", "--inversion-steps", 3, "--ref-prompt",
            "a yellow circle on gray", "--top-k", "all", "--inversion-dir", tmp_path / "kept"]
    inverted = clone(tmp_path / "b.mp4", *argv)
    assert once.read_bytes() != inverted.read_bytes()
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    assert clone(tmp_path / "c.mp4", *argv).read_bytes() == inverted.read_bytes()
    record = json.loads((tmp_path / "b.mp4.json").read_text())
    assert (record["method"], record["settings"]["top_k"]) == ("inversion", 16)


def test_semantic_guidance_changes_the_clip(tmp_path):
    words = ["--ref-prompt", "a yellow circle on gray", "--subject", "circle", "star"]
    clips = [clone(tmp_path / f"{i}.mp4", *argv).read_bytes() for i, argv in enumerate((
        [], ["--semantic-scale", 5000], ["--semantic-scale", 5000, *words],
        ["--method", "inversion", "--inversion-steps", 2, *words]))]
    assert len(set(clips)) == 4
    record = json.loads((tmp_path / "3.mp4.json").read_text())
    assert record["subject"] == ["circle", "star"]
    assert record["settings"]["semantic_scale"] == pytest.approx(
        record["settings"]["motion_weight"] * 42 / 1667)


@pytest.mark.parametrize("argv, message", [
    (["--subject", "ball", "star"], "the word 'ball' is not in the prompt ''"),
    (["--method", "inversion", "--save-motion", "m"], "leave out --motion and --save-motion"),
    (["--ref-prompt", "a cat"], "belongs to --method inversion or --subject"),
    (["--inversion-steps", "9"], "belong to --method inversion"),
    (["--inversion-dir", "d"], "belong to --method inversion"),
    (["--block-weights", "1,2,3"], "--block-weights (1.0, 2.0, 3.0) is not possible")])
def test_what_does_not_go_with_a_method_is_refused(argv, message, tmp_path, capsys):
    assert run("--ref", REF, "--prompt", "", "--out", tmp_path / "a.mp4", *argv) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_only_the_unet_is_on_the_accelerator_while_it_samples(tmp_path, monkeypatch):
    away, seen = [], []

    @contextlib.contextmanager
    def off(*modules):
        away.extend(type(module).__name__ for module in modules)
        yield
        away.clear()

    def states(*arguments, **options):
        for state in sample(*arguments, **options):
            seen.append(tuple(away))
            yield state

    sample = command.sample
    monkeypatch.setattr(command, "off_the_accelerator", off)
    monkeypatch.setattr(command, "sample", states)
    clone(tmp_path / "a.mp4")
    assert seen == [("AutoencoderKL", "TextEncoder")] * 4 and not away


def test_a_kept_motion_gives_the_same_clip_as_its_reference(tmp_path):
    kept = tmp_path / "m.safetensors"
    first = clone(tmp_path / "a.mp4", "--save-motion", kept)
    assert run("--motion", kept, "--prompt", PROMPT, "--out", tmp_path / "b.mp4", *QUICK) == 0
    assert (tmp_path / "b.mp4").read_bytes() == first.read_bytes()


def test_the_reference_is_noised_by_its_own_seed(tmp_path, embedded):
    """The motion is that of the noise of seed 2 ** 32, whatever the seed of the clip."""
    clone(tmp_path / "a.mp4", "--save-motion", tmp_path / "m.safetensors", "--seed", 5,
          "--device", "cpu")
    kept = Motion.load(tmp_path / "m.safetensors")
    config = dataclasses.replace(embedded.config.sample, height=64, width=64)
    latents = embedded.vae.encode(read_video(REF, 16, (64, 64)))
    for seed, same in ((2 ** 32, True), (1, False), (5, False)):
        found = extract_motion(embedded, latents, config,
                               generator=torch.Generator().manual_seed(seed))
        near = [torch.allclose(kept.values[name], values, atol=1e-3)
                for name, values in found.values.items()]
        assert all(near) if same else not any(near)


def test_a_motion_weight_of_zero_is_the_unguided_clip(tmp_path, embedded):
    off = clone(tmp_path / "a.mp4", "--motion-weight", 0)
    on = clone(tmp_path / "b.mp4")
    assert off.read_bytes() != on.read_bytes()
    assert json.loads((tmp_path / "a.mp4.json").read_text())["loss"] == []


def test_a_motion_weight_that_does_nothing_is_said(recwarn):
    for weight, said in (("1.28", ["--motion-weight 1.28 does next to nothing: these weights' own "
                                   "is 25000"]), ("10000", []), ("0", [])):
        recwarn.clear()
        check(parse(["--ref", REF, "--prompt", "", "--motion-weight", weight]))
        assert [str(warning.message) for warning in recwarn] == said


def test_several_samples_are_named_by_their_seeds(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: kept.append(True))
    clone(tmp_path / "a.gif", "--num-samples", 2, "--seed", 5, "--memory", "low")
    assert not kept     # low memory gives back what it frees
    records = [json.loads((tmp_path / f"a-{seed}.gif.json").read_text()) for seed in (5, 6)]
    assert [record["seed"] for record in records] == [5, 6] and records[0]["recompute"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a-5.gif", "a-5.gif.json", "a-6.gif", "a-6.gif.json"]
    alone = clone(tmp_path / "b.gif", "--seed", 6)
    assert kept and alone.read_bytes() == (tmp_path / "a-6.gif").read_bytes()


def test_seeds_have_64_bits_and_short_ones_are_torch_s():
    def noise(generator):
        return tuple(torch.randn(3, generator=generator).tolist())

    seeds = [0, 1, 2 ** 32 - 1, 2 ** 32, 2 ** 32 + 1, 2 ** 40 + 1, 2 ** 63 + 1, 2 ** 64 - 1]
    assert len({noise(make_generator(seed)) for seed in seeds}) == len(seeds)
    for seed in seeds[:3]:
        assert noise(make_generator(seed)) == noise(torch.Generator().manual_seed(seed))
    assert run("--ref", REF, "--prompt", "", "--seed", 2 ** 64 - 1, "--num-samples", 2) == 2


def test_words_the_model_does_not_know_are_named(tmp_path, capsys):
    clone(tmp_path / "a.mp4", prompt="a red zebra, on navy")
    warning, = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "not trained on: zebra;" in warning and "heart" in warning


@pytest.mark.parametrize("prompt, found", [
    ("a (red:1.2) star", "(red:1.2)"), ("a (red star: 2)", "(red star: 2)"),
    ("an (mp4:.5)", "(mp4:.5)"), ("((red)) star", "((red))"), ("[red] star", "[red]"),
    ("ink <lora:ink_v2:0.8>, star", "<lora:ink_v2:0.8>"), ("a star BREAK navy", "BREAK"),
    ("bad, embedding:easynegative", "embedding:easynegative"),
    ("a star (red), on (or near) navy", ""), ("the ratio (16:9) of John (3:16), at 10:30", ""),
    ("a break: embedding <3 > 2, 1:2.5", "")])
def test_syntax_of_other_programs_is_said_to_be_plain_text(prompt, found):
    for option in ("--prompt", "--negative-prompt"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            check(parse(["--ref", REF, "--prompt", "", option, prompt]))
        assert [str(w.message).partition(" goes to the model as plain")[0] for w in said] == (
            [found] if found else [])


def test_what_is_lost_of_a_phone_clip_is_said_once(tmp_path, capsys):
    """Of its sound and, where it is long, of what happens between the frames that are taken."""
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        video, audio = container.add_stream("mpeg4", rate=4), container.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for _ in range(48):
            grey = np.full((64, 64, 3), 99, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey)))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        for stream, last in ((audio, sound), (audio, None), (video, None)):
            container.mux(stream.encode(last))
    clone(tmp_path / "b.mp4", "--ref", tmp_path / "a.mov", "--steps", 1, "--guidance-steps", 1,
          "--stride", 3)
    warned = [line for line in capsys.readouterr().err.splitlines() if "a.mov" in line]
    assert len(warned) == 3 and warned[1].endswith("a.mov: its sound is left out")
    assert "a.mov: this model will hardly follow it" in warned[2]       # nothing moves in it
    assert "0.75 s apart" in warned[0] and "--duration 2 reads" in warned[0]
    assert json.loads((tmp_path / "b.mp4.json").read_text())["stride"] == 3


def test_an_empty_and_an_endless_prompt_are_answered(tmp_path, capsys):
    clone(tmp_path / "a.mp4", prompt="")
    clone(tmp_path / "b.mp4", prompt="a red star " * 40 + "on navy")
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.startswith("warning: the prompt has 122 tokens and 75 are read; dropped: a red "
                               "star") for line in lines)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.mp4").write_text("not a film")
    (folder / "short.mp4").write_bytes(Path(REF).read_bytes()[:3000])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.safetensors").write_text("<!doctype html><title>404</title>")
    (folder / "empty_folder").mkdir()
    return folder


@pytest.mark.parametrize("argv, message", [
    (["--ref", "{bad}/none.mp4"], "none.mp4: no such file"),
    (["--ref", "{bad}/text.mp4"], "text.mp4: cannot be decoded"),
    (["--ref", "{bad}/short.mp4"], "short.mp4: cannot be decoded"),
    (["--ref", "{bad}/empty.mp4"], "empty.mp4: cannot be decoded"),
    (["--ref", "{bad}/empty_folder"], "holds no image"),
    (["--start", "99"], "past the end"),
    (["--duration", "1", "--stride", "2"], "--stride: not allowed with argument --duration"),
    (["--stride", "9"], "--stride 9 is not possible: 16 frames would span 136"),
    (["--size", "100x128"], "multiples of 8"),
    (["--size", "big"], "like 512x512"),
    (["--window", "17"], "--window 17 is not possible: this model's motion modules know up to 16"),
    (["--frames", "17", "--semantic-scale", "1"], "semantic guidance is not possible here: it"),
    (["--frames", "0"], "--frames 0 is not possible: 1 or more"),
    (["--steps", "5", "--guidance-steps", "6"], "0 to the number of steps, 5"),
    (["--top-k", "17"], "number of frames, 16"),
    (["--blocks", "up_blocks.9"], "up_blocks.2"),
    (["--out", "{bad}/none/a.mp4"], "there is no folder"),
    (["--out", "{bad}/a.mpeg4"], "a.mpeg4: its name must end in .mp4"),
    (["--weights", "{bad}/none.safetensors"], "no such weights file"),
    (["--weights", "{bad}/page.safetensors"], "not a safetensors file"),
    (["--motion", "{bad}/page.safetensors"], "with --ref, or its kept motion"),
    (["--save-motion", "{bad}/none/m"], "there is no folder"),
    (["--maps", "{bad}/text.mp4"], "is a file; give the name of a folder"),
    (["--maps", "{bad}/none/maps"], "there is no folder"),
    (["--device", "abacus"], "'abacus' is not known"),
    (["--cfg-scael", "3"], "unrecognized arguments: --cfg-scael 3"),
    (["--fps", "0"], "--fps 0.0 is not possible"),
    (["--num-samples", "0"], "1 or more"),
    (["--seed", "-1"], "--seed -1 is not possible"),
    (["--device", "cpu:5"], "device 'cpu:5' is not there"),
    (["--block-weights", "a"], "write numbers with commas between"),
    (["--top-k", "x"], "'x' is neither a number nor all"),
    (["--size", "\u00b2x8"], "is not a size; write it like 512x512"),
    (["--subject", "star"], "--subject is 1 words: give two"),
    (["--subject", "ball", "star", "--ref-prompt", "a " * 90 + "ball"],
     "the word 'ball' stands behind the 75 tokens"),
    (["--method", "inversion", "--guidance-steps", "0", "--maps", "{bad}/m"],
     "there are none with"),
    (["--lora", "a\0b"], "cannot be a name here"),
    (["--seed", str(2 ** 64)], "0 to 18446744073709551615"),
])
def test_bad_input_is_one_line_and_leaves_nothing(bad, tmp_path, capsys, argv, message):
    argv = [a.format(bad=bad) for a in argv]
    before = sorted(p.name for p in bad.rglob("*"))
    assert run("--ref", REF, "--prompt", PROMPT, "--out", tmp_path / "a.mp4", *QUICK, *argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("no --weights")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert captured.out == "" and list(tmp_path.iterdir()) == []
    assert sorted(p.name for p in bad.rglob("*")) == before


def test_memory_that_cannot_be_had_is_said_before_anything_is_read(tmp_path, capsys):
    assert run("--ref", REF, "--prompt", "", "--out", tmp_path / "a.mp4", "--size",
               "800000x800000") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: 16 frames of 800000x800000 take more than 122880 GB of memory;")
    assert list(tmp_path.iterdir()) == []


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_rank_device("auto") == "cuda:1" and local_rank_device("cpu") == "cpu"


def test_a_run_that_is_not_finite_fails_and_leaves_nothing(tmp_path, capsys):
    assert run("--ref", REF, "--prompt", PROMPT, "--out", tmp_path / "a.mp4", *QUICK,
               "--motion-weight", "1e38") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "failed: not finite at step" in last
    assert last.endswith("--motion-weight or --cfg-scale, or --dtype float32, may mend it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("unet.conv_in.bias"), "unet.conv_in.bias is missing"),
    (lambda s: s.update({"unet.more": torch.ones(1)}), "unet.more belongs to no part"),
    (lambda s: s.update({"unet.conv_in.bias": torch.ones(3)}), r"unet.conv_in.bias is \(3,\)"),
    (lambda s: s["unet.conv_in.bias"].fill_(float("nan")), "unet.conv_in.bias .* not finite")])
def test_weights_load_strictly(small, tmp_path, change, message):
    path = tmp_path / "w.safetensors"
    save_model(small, path, torch.float32, {})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    again = load_model(path, device="cpu")
    assert again.config == small.config
    assert torch.equal(again.unet.conv_in.weight, small.unet.conv_in.weight)
    change(state)
    save_file(state, path, metadata)
    with pytest.raises(InputError, match=message):
        load_model(path, device="cpu")


def test_packed_weights_are_nearly_the_same_and_as_strict(small, tmp_path):
    path = tmp_path / "w.safetensors"
    model = copy.deepcopy(small)
    model.unet.conv_in.weight[3] = 0
    save_model(model, path, torch.float16, {}, pack_from=500)
    state = load_file(path)
    packed = [name for name, t in state.items() if t.dtype == torch.int8]
    assert "unet.conv_in.weight" in packed and "unet.conv_in.bias" not in packed
    again = load_model(path, device="cpu")
    for name, weight in model.unet.state_dict().items():
        found = again.unet.state_dict()[name]
        rows = weight.flatten(1).abs().amax(dim=1) if weight.ndim > 1 else weight.abs()
        error = (found - weight).abs().reshape(len(rows), -1).amax(dim=1)
        assert (error <= rows * (1 / 254 + 1e-3) + 1e-6).all()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for change, message in (
            (lambda s: s.pop("unet.conv_in.weight.scale"), "conv_in.weight is torch.int8 without"),
            (lambda s: s.update({"unet.conv_in.bias.scale": torch.ones(1)}),
             "conv_in.bias is torch.float16 with a scale"),
            (lambda s: s.update({"unet.more.scale": torch.ones(1)}), "unet.more.scale belongs to")):
        changed = dict(state)
        change(changed)
        save_file(changed, path, metadata)
        with pytest.raises(InputError, match=message):
            load_model(path, device="cpu")


def test_it_runs_as_a_program_of_its_own():
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt", "x"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "give the reference with --ref" in done.stderr
    assert "Traceback" not in done.stderr


def test_loading_does_not_wait_for_torch_s_compiler():
    load = ("import sys; from mcl import load_model; load_model(sys.argv[1], device='cpu');"
            "print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", load, ROOT / "weights" / "tiny.safetensors"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_report_measures_the_clip_and_an_unguided_one(tmp_path, capsys):
    out = clone(tmp_path / "a.mp4", "--report", "--size", "128x128", "--steps", 8,
                "--guidance-steps", 5)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(out) and [line.split()[0] for line in lines] == [
        "motion", "result", "unguided"]
    report = json.loads((tmp_path / "a.mp4.json").read_text())["report"]
    assert report["result"]["top-1 agreement"] > report["unguided"]["top-1 agreement"]


def test_a_long_clip_has_all_that_a_short_one_has(tmp_path, capsys):
    kept, few = tmp_path / "m.safetensors", ["--steps", 2, "--guidance-steps", 1, "--frames", 20]
    long = ["--overlap", 0.25, "--loop"]
    out = clone(tmp_path / "a.mp4", *few, *long, "--save-motion", kept, "--maps", tmp_path / "maps",
                "--report")
    assert imageio.imread(out).shape == (20, 64, 64, 3) and "top-1" in capsys.readouterr().out
    assert (tmp_path / "maps" / "index.html").exists()
    argv = ["--motion", kept, "--prompt", PROMPT, "--out", tmp_path / "b.mp4", *QUICK, *few]
    assert run(*argv, *long) == 0
    assert (tmp_path / "b.mp4").read_bytes() == out.read_bytes()
    assert run(*argv) == 2
    assert "in windows of 16 frames from (0, 10) on" in capsys.readouterr().err
    every = parse(["--ref", REF, "--prompt", "", "--frames", "20", "--top-k", "all"])
    assert check(every)[0].top_k == 16
