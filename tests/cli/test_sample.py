"""The command sample.py: what it writes, and what it says about wrong input."""
import dataclasses
import json
import re
import warnings

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch

import mcl
from mcl import Motion, SampleConfig, extract_motion, load_model, read_video, save_model
from mcl.cli.arguments import local_rank_device, parse_args, validate_args
from mcl.cli.sample import command, main
from mcl.motion import REFERENCE_SEED
from tests.cli.conftest import PROMPT, REFERENCE, ROOT, run


def record_of(out):
    return json.loads(out.with_name(out.name + ".json").read_text())


def check(*argv):
    return validate_args(parse_args(["--ref", str(REFERENCE), *map(str, argv)]))


def test_command_writes_a_clip_a_comparison_a_motion_and_a_record(first, weights):
    assert first.stdout.splitlines() == [str(first.folder / "a-compare.mp4"), str(first.clip)]
    assert iio.imread(first.clip).shape == (4, 32, 32, 3)
    assert iio.imread(first.folder / "a-compare.mp4").shape == (4, 32, 64, 3)
    assert {path.name for path in first.folder.iterdir()} == {
        "a.mp4", "a.mp4.json", "a-compare.mp4", "motion.safetensors"}
    record = json.loads(first.record.read_text(), parse_constant=pytest.fail)
    assert (record["seed"], record["prompt"], record["report"]) == (3, PROMPT, {})
    settings = dataclasses.asdict(load_model(weights, "cpu").config.sample)
    assert record["settings"] == json.loads(json.dumps(settings))
    assert list(record["seconds"]) == ["read", "load", "extract", "clone"]
    assert len(record["loss"]) == 3 and record["gradient_checkpointing"] is False
    assert record["weights_sha256"] == load_model(weights, "cpu").sha256


def test_a_gif_needs_a_frame_rate_of_at_most_50_also_without_fps(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "config", dataclasses.replace(small.config, fps=60))
    save_model(small, tmp_path / "a.safetensors", torch.float32, {})
    options = ("--weights", tmp_path / "a.safetensors", "--prompt", PROMPT, "--out", "a.gif")
    with pytest.raises(mcl.InputError, match="at most 50 frames per second, not 60"):
        check(*options)
    check(*options, "--fps", 50)


@pytest.mark.filterwarnings("ignore:.*s apart")
def test_library_writes_the_same_bytes(first, weights, tmp_path):
    mcl.clone(REFERENCE, PROMPT, model=weights, seed=3).save(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == first.clip.read_bytes()


def test_library_and_command_agree_on_settings_and_the_part_of_the_reference(clone, weights,
                                                                             tmp_path):
    out = clone(tmp_path / "a.gif", "--start", 0.5, "--duration", 0.5, "--steps", 2,
                "--guidance-steps", 1, "--size", "48x32", "--top-k", 0, "--cfg-scale", 3)
    mcl.clone(REFERENCE, PROMPT, model=weights, start=0.5, duration=0.5, steps=2, guidance_steps=1,
              width=48, height=32, top_k=0, cfg_scale=3.0).save(tmp_path / "b.gif")
    assert out.read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_saved_motion_gives_the_same_clip_as_its_reference(first, weights, tmp_path, capsys):
    argv = ["--weights", weights, "--motion", first.motion, "--prompt", PROMPT, "--seed", 3,
            "--out", tmp_path / "a.mp4"]
    assert run(*argv) == 0
    assert (tmp_path / "a.mp4").read_bytes() == first.clip.read_bytes()
    assert Motion.load(first.motion).metadata["source"] == REFERENCE.name
    assert run(*argv, "--num-frames", 3) == 2
    assert "extracted with num_frames = 4, not 3" in capsys.readouterr().err


def test_samples_are_named_by_their_seeds(first, clone, tmp_path, monkeypatch):
    trimming = []
    monkeypatch.setattr("mcl.cli.sample.disable_malloc_trimming", lambda: trimming.append(False))
    clone(tmp_path / "a.mp4", "--num-samples", 2, "--seed", 2, "--memory", "low")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a-2.mp4", "a-2.mp4.json", "a-3.mp4", "a-3.mp4.json"}
    assert [record_of(tmp_path / f"a-{seed}.mp4")["seed"] for seed in (2, 3)] == [2, 3]
    assert (tmp_path / "a-3.mp4").read_bytes() == first.clip.read_bytes()
    assert (tmp_path / "a-2.mp4").read_bytes() != first.clip.read_bytes()
    assert record_of(tmp_path / "a-2.mp4")["gradient_checkpointing"] is True
    assert not trimming         # low memory returns freed memory to the system


def test_the_reference_is_noised_by_its_own_seed(tmp_path, embedded):
    """The motion is that of the noise of seed 2 ** 32, whatever the seed of the clip."""
    assert run("--ref", REFERENCE, "--prompt", PROMPT, "--steps", 2, "--guidance-steps", 1,
               "--size", "64x64", "--out", tmp_path / "a.mp4", "--seed", 5, "--device", "cpu",
               "--save-motion", tmp_path / "m.safetensors") == 0
    saved = Motion.load(tmp_path / "m.safetensors")
    config = dataclasses.replace(embedded.config.sample, height=64, width=64)
    latents = embedded.vae.encode(read_video(REFERENCE, 16, (64, 64)))
    assert REFERENCE_SEED == 2 ** 32
    for seed, is_same in ((2 ** 32, True), (1, False), (5, False)):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        motion = extract_motion(embedded, latents, config, noise=noise)
        close = [torch.allclose(saved.values[name], values, atol=1e-3)
                 for name, values in motion.values.items()]
        assert all(close) if is_same else not any(close)


def test_motion_weight_of_zero_disables_guidance(first, clone, tmp_path):
    out = clone(tmp_path / "a.mp4", "--motion-weight", 0, "--seed", 3)
    assert out.read_bytes() != first.clip.read_bytes() and record_of(out)["loss"] == []


def test_finished_inversion_is_used_again(first, clone, tmp_path):
    argv = ["--method", "inversion", "--inversion-steps", 2, "--ref-prompt", "a yellow circle",
            "--subject", "circle", "star", "--inversion-dir", tmp_path / "cache", "--seed", 3]
    out, again = clone(tmp_path / "a.mp4", *argv), clone(tmp_path / "b.mp4", *argv)
    assert out.read_bytes() == again.read_bytes() != first.clip.read_bytes()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    settings = record_of(out)["settings"]
    assert settings["subject"] == ["circle", "star"]
    assert settings["semantic_scale"] == pytest.approx(settings["motion_weight"] * 42 / 1667)


def test_long_clip_has_a_report_and_a_page_of_its_attention(clone, weights, tmp_path, capsys):
    motion, argv = tmp_path / "m.safetensors", ["--num-frames", 6, "--context-length", 4,
                                                 "--steps", 2, "--guidance-steps", 1]
    out = clone(tmp_path / "a.mp4", *argv, "--closed-loop", "--save-motion", motion, "--maps",
                tmp_path / "maps", "--report", "--fps", 5)
    *table, last = capsys.readouterr().out.splitlines()
    assert last == str(out) and any("change centroids" in line for line in table)
    assert iio.imread(out).shape == (6, 32, 32, 3) and iio.immeta(out)["fps"] == 5
    assert record_of(out)["report"].keys() == {"clone", "unguided"}
    assert (tmp_path / "maps" / "index.html").exists()
    argv = ["--weights", weights, "--motion", motion, "--prompt", PROMPT, *argv, "--out",
            tmp_path / "b.mp4"]
    assert run(*argv, "--closed-loop", "--fps", 5) == 0
    assert (tmp_path / "b.mp4").read_bytes() == out.read_bytes()
    assert run(*argv) == 2
    assert "extracted with context_offsets" in capsys.readouterr().err


def test_images_control_the_clip(small_rgb, tmp_path):
    save_model(small_rgb, tmp_path / "rgb.safetensors", torch.float32, {})
    iio.imwrite(tmp_path / "a.png", np.full((40, 40, 3), (250, 20, 20), np.uint8))
    argv = ["--weights", tmp_path / "rgb.safetensors", "--ref", REFERENCE, "--prompt", PROMPT,
            "--steps", 2, "--guidance-steps", 1]
    images = [[], ["--image", tmp_path / "a.png"], ["--image", f"{tmp_path}/a.png@-1"],
              ["--image", f"{tmp_path}/a.png@0", f"{tmp_path}/a.png@3"]]
    for i, options in enumerate(images):
        assert run(*argv, *options, "--out", tmp_path / f"{i}.webp") == 0
    assert len({(tmp_path / f"{i}.webp").read_bytes() for i in range(4)}) == 4
    assert record_of(tmp_path / "3.webp")["images"] == [[f"{tmp_path}/a.png", 0],
                                                        [f"{tmp_path}/a.png", 3]]


@pytest.mark.parametrize("weight, message", [
    (1.28, ["motion_weight has hardly any effect below 290"]),
    (10000, []), (0, [])])
def test_motion_weight_without_effect_is_reported(weight, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check("--prompt", "", "--motion-weight", weight)
    assert [str(warning.message) for warning in caught] == message


@pytest.mark.parametrize("prompt, syntax", [
    ("a (red:1.2) star", "(red:1.2)"), ("a (red star: 2)", "(red star: 2)"),
    ("an (mp4:.5)", "(mp4:.5)"), ("((red)) star", "((red))"), ("[red] star", "[red]"),
    ("ink <lora:ink_v2:0.8>, star", "<lora:ink_v2:0.8>"), ("a star BREAK navy", "BREAK"),
    ("bad, embedding:easynegative", "embedding:easynegative"),
    ("a star (red), on (or near) navy", ""), ("the ratio (16:9) of John (3:16), at 10:30", ""),
    ("a break: embedding <3 > 2, 1:2.5", "")])
def test_prompt_syntax_of_other_programs_is_reported_as_plain_text(prompt, syntax):
    for options in (["--prompt", prompt], ["--prompt", "", "--negative-prompt", prompt]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check(*options)
        assert [str(warning.message).partition(" is read as plain text")[0]
                for warning in caught] == ([syntax] if syntax else [])


def test_words_that_the_model_does_not_know_and_long_prompts_are_reported(tmp_path, capsys):
    assert run("--ref", REFERENCE, "--prompt", "a red zebra " * 40, "--out", tmp_path / "a.gif",
               "--steps", 1, "--guidance-steps", 0, "--size", "32x32", "--num-frames", 2) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    printed = [line for line in lines if line.startswith("warning: ")]
    assert any("does not know: zebra. Known words: python sample.py --list-words" in line
               for line in printed)
    assert any("the prompt has 120 tokens and 75 are read; dropped: " in line for line in printed)
    assert lines[0].startswith("Using the built-in demo model")
    assert run("--list-words") == 0
    assert {"star", "navy"} <= set(capsys.readouterr().out.split())


def test_sound_gaps_and_a_still_reference_are_reported_once(tmp_path, capsys):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        video, audio = container.add_stream("mpeg4", rate=4), container.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for _ in range(48):
            gray = np.full((64, 64, 3), 99, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(gray)))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux([*audio.encode(sound), *audio.encode(None), *video.encode(None)])
    assert run("--ref", tmp_path / "a.mov", "--prompt", PROMPT, "--out", tmp_path / "b.mp4",
               "--steps", 1, "--guidance-steps", 0, "--size", "64x64", "--stride", 3) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "a.mov" in line]
    assert len(lines) == 3 and all(text in line for text, line in zip(
        ("s apart; the model", "note: the sound of", "hardly moves"), lines))
    assert record_of(tmp_path / "b.mp4")["stride"] == 3


@pytest.mark.parametrize("argv, message", [
    ([], "sample.py needs --prompt"),
    (["--prompt", "", "--motion", REFERENCE], "--motion needs --ref to be left out"),
    (["--prompt", "", "--subject", "ball", "star", "--ref-prompt", "a ball"],
     "'star' is not in the prompt ''"),
    (["--prompt", "", "--subject", "ball", "star"], "--subject needs --ref-prompt"),
    (["--prompt", "", "--subject", "star"], "subject = ('star',) is out of range"),
    (["--prompt", "star", "--subject", "ball", "star", "--ref-prompt", "a " * 90 + "ball"],
     "'ball' is not among the first 75 tokens"),
    (["--prompt", "", "--method", "inversion", "--save-motion", "m"], "--save-motion needs"),
    (["--prompt", "", "--ref-prompt", "a cat"], "--ref-prompt needs --method inversion or"),
    (["--prompt", "", "--inversion-steps", "9"], "--inversion-steps needs --method inversion"),
    (["--prompt", "", "--inversion-dir", "d"], "--inversion-dir needs --method inversion"),
    (["--prompt", "", "--method", "inversion", "--guidance-steps", "0", "--maps", "m"],
     "--maps needs --guidance-steps 1"),
    (["--prompt", "", "--guidance-block-weights", "1", "2", "3"], "guidance_block_weights = (1.0"),
    (["--prompt", "", "--image", REFERENCE], "--image needs a model with SparseCtrl"),
    (["--prompt", "", "--num-frames", "17", "--semantic-scale", "1"], "semantic guidance needs"),
    (["--prompt", "", "--preset", "camera", "--steps", "40"], "preset camera guides 50 steps")])
def test_option_that_lacks_what_it_needs_is_rejected(argv, message):
    with pytest.raises(mcl.InputError, match=re.escape(message)):
        check(*argv)


@pytest.mark.parametrize("option", [
    ["--start", "0"], ["--duration", "0"], ["--stride", "1"], ["--compare"], ["--report"],
    ["--save-motion", "m"]])
def test_option_of_a_reference_is_rejected_with_a_saved_motion(option):
    argv = ["--motion", str(REFERENCE), "--prompt", "a star", *option]
    with pytest.raises(mcl.InputError, match=f"{option[0]} needs --ref"):
        validate_args(parse_args(argv))


@pytest.mark.parametrize("argv, warned", [
    (["--motion-weight", 0, "--top-k", 2, "--guidance-interval", 2], "top-k guidance-interval"),
    (["--motion-weight", 0, "--top-k", 2, "--save-motion", "m"], ""),
    (["--guidance-steps", 0, "--motion-weight", 2, "--guidance-noise-range", 0.5],
     "motion-weight guidance-noise-range"),
    (["--timestep-spacing", "linspace", "--guidance-noise-range", 0.5], "guidance-noise-range"),
    (["--cfg-scale", 1, "--negative-prompt", "x", "--cfg-start-fraction", 0],
     "negative-prompt cfg-start-fraction"),
    (["--cfg-end-fraction", 0, "--negative-prompt", "x"], "negative-prompt"),
    (["--cfg-end-fraction", 0.5, "--cfg-scale", 2, "--negative-prompt", "x"], ""),
    (["--context-overlap", 0.5], "context-overlap"),
    (["--context-overlap", 0.5, "--num-frames", 20], ""),
    (["--mask-threshold", 0.5, "--semantic-blocks", "up_blocks.1"],
     "semantic-blocks mask-threshold"),
    (["--mask-threshold", 0.5, "--semantic-scale", 1], "mask-threshold"),
    (["--method", "inversion", "--extraction-timestep", 9], "extraction-timestep"),
    (["--ignore-alpha"], "ignore-alpha"), (["--out", "folder", "--fps", 9], "fps"),
    (["--out", "a.gif", "--fps", 9, "--guidance-blocks", "up_blocks.1"], "")])
def test_option_without_effect_is_reported(argv, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check("--prompt", "a star", *argv)
    reported = [str(warning.message).partition(" has no effect ") for warning in caught]
    assert {option for option, marker, _ in reported if marker} == {
        f"--{name}" for name in warned.split()}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Return a folder of files that are no videos and no weights."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.mp4").write_text("not a film")
    (folder / "short.mp4").write_bytes(REFERENCE.read_bytes()[:3000])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.safetensors").write_text("<!doctype html><title>404</title>")
    (folder / "empty_folder").mkdir()
    return folder


@pytest.mark.parametrize("argv, message", [
    (["--ref", "{bad}/none.mp4"], "none.mp4: no such file"),
    (["--ref", "{bad}/text.mp4"], "text.mp4: cannot be decoded"),
    (["--ref", "{bad}/short.mp4"], "short.mp4: cannot be decoded"),
    (["--ref", "{bad}/empty.mp4"], "empty.mp4: cannot be decoded"),
    (["--ref", "{bad}/empty_folder"], "no image"),
    (["--motion", "{bad}/page.safetensors"], "page.safetensors: the file is truncated or"),
    (["--start", "99"], "start = 99 s is past the end"),
    (["--start", "nan"], "start = nan"),
    (["--duration", "1", "--stride", "2"], "stride = 2 is out of range"),
    (["--stride", "9"], "stride = 9 is out of range: 16 frames need 136"),
    (["--size", "100x128"], "multiples of 8"),
    (["--size", "big"], "like 512x512"), (["--size", "\u00b2x8"], "like 512x512"),
    (["--context-length", "17"], "context_length = 17 is out of range"),
    (["--num-frames", "0"], "num_frames = 0 is out of range"),
    (["--steps", "5", "--guidance-steps", "6"], "guidance_steps = 6 is out of range"),
    (["--top-k", "17"], "top_k = 17 is out of range"),
    (["--top-k", "x"], "--top-k: invalid int value: 'x'"),
    (["--guidance-block-weights", "a"], "invalid float value: 'a'"),
    (["--guidance-blocks", "up_blocks.9"], "up_blocks.2"),
    (["--out", "{bad}/none/a.mp4"], "there is no folder"),
    (["--out", "{bad}/a.mpeg4"], "a.mpeg4: the extension is not known"),
    (["--weights", "{bad}/none.safetensors"], "none.safetensors: no such file"),
    (["--weights", "{bad}/page.safetensors"], "page.safetensors: the file is an HTML page"),
    (["--save-motion", "{bad}/none/m"], "there is no folder"),
    (["--maps", "{bad}/text.mp4"], "exists and is not a folder"),
    (["--maps", "{bad}/none/maps"], "there is no folder"),
    (["--method", "inversion", "--inversion-dir", "{bad}/text.mp4"], "is not a folder"),
    (["--method", "inversion", "--inversion-dir", "{bad}/none/a"], "there is no folder"),
    (["--device", "abacus"], "'abacus' is not known"),
    (["--device", "cpu:5"], "device 'cpu:5' is not available"),
    (["--fps", "0"], "fps = 0.0 is out of range"), (["--fps", "nan"], "fps = nan is"),
    (["--fps", "60", "--out", "a.gif"], "a.gif: a gif plays at most 50 frames per second, not 60"),
    (["--num-samples", "0"], "--num-samples needs to be 1 to 10000"),
    (["--seed", "-1"], "--seed needs to be 0 to 18446744073709551615, not -1"),
    (["--seed", str(2 ** 64)], "0 to 18446744073709551615"),
    (["--seed", str(2 ** 64 - 1), "--num-samples", "2"], "0 to 18446744073709551614"),
    (["--lora", "a\0b"], "no such file"),
    (["--steps", "3", "--steps", "4"], "--steps is given twice")])
def test_wrong_input_is_one_line_and_leaves_no_file(bad, tmp_path, capsys, argv, message):
    argv = [argument.format(bad=bad) for argument in argv]
    options = {"--ref": REFERENCE, "--prompt": PROMPT, "--out": tmp_path / "a.mp4"}
    if "--motion" in argv:
        del options["--ref"]
    argv += [word for option, value in options.items() if option not in argv
             for word in (option, value)]
    before = sorted(path.name for path in bad.rglob("*"))
    assert run(*argv) == 2
    captured = capsys.readouterr()
    line, = [line for line in captured.err.splitlines() if not line.startswith("Using the built")]
    assert line.startswith("error: ") and message in line
    assert captured.out == "" and list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in bad.rglob("*")) == before


@pytest.mark.parametrize("option, close", [
    ("--framse", "--num-frames"), ("--guidance-setps", "--guidance-steps"),
    ("--pomrpt", "--prompt"), ("--zzz", None)])
def test_misspelt_option_is_rejected_with_the_closest_one_before_weights_are_read(
        option, close, monkeypatch, capsys):
    monkeypatch.setattr("mcl.checkpoints.model_file.load_model", pytest.fail)
    assert run("--ref", REFERENCE, "--prompt", PROMPT, f"{option}=3") == 2
    hint = f"Did you mean {close}?" if close else "Run sample.py --help for the options"
    assert capsys.readouterr().err == f"error: unrecognized arguments: {option}=3. {hint}\n"


def test_clip_that_cannot_fit_into_memory_fails_before_anything_is_read(tmp_path, capsys):
    assert run("--ref", REFERENCE, "--prompt", "", "--out", tmp_path / "a.mp4", "--size",
               "16384x16384", "--num-frames", 4096, "--top-k", 1) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: 4096 frames of 16384x16384 need more than 13194 GB")
    assert list(tmp_path.iterdir()) == []


def test_result_that_is_not_finite_fails_and_leaves_no_file(weights, tmp_path, capsys):
    assert run("--weights", weights, "--ref", REFERENCE, "--prompt", PROMPT, "--out",
               tmp_path / "a.mp4", "--motion-weight", "1e38") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("failed: ")
    assert list(tmp_path.iterdir()) == []


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_rank_device("auto") == "cuda:1" and local_rank_device("cpu") == "cpu"


def test_help_fits_one_screen_and_help_all_lists_every_setting(start, tmp_path):
    lines = help_text(start, tmp_path, ROOT / "sample.py", "--help").splitlines()
    assert len(lines) <= 60 and max(map(len, lines[:-4])) <= 80
    assert lines[0] == "usage: sample.py --ref VIDEO --prompt TEXT [options]"
    assert "  --steps N                     sampling steps [18]" in lines
    module = "import runpy; runpy.run_module('mcl', run_name='__main__')"
    complete = help_text(start, tmp_path, "-c", module, "--help-all")
    for field in dataclasses.fields(SampleConfig):
        assert field.name in ("height", "width") or f"--{field.name.replace('_', '-')} " in complete


def help_text(start, folder, *argv):
    with open(folder / "help.txt", "w") as stdout:
        process = start(argv, folder, stdout, COLUMNS="80")
    assert process.wait() == 0
    return (folder / "help.txt").read_text()


def test_process_of_the_command_shares_the_cores(monkeypatch):
    calls = []
    monkeypatch.setattr("mcl.cli.sample.share_cores", lambda: calls.append("share_cores"))
    monkeypatch.setattr("mcl.cli.sample.run_main", calls.append)
    command()
    assert calls == ["share_cores", main]
