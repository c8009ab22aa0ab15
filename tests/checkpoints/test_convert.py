"""convert_weights.py converts every format of a small Stable Diffusion 1.5 to the same model."""
import json
import re
import sys
import types
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mcl import ModelConfig, clone, load_model, read_video
from mcl.checkpoints.convert import missing_parts
from mcl.checkpoints.detect import distillation_of
from mcl.config import from_dict
from mcl.presets import DISTILLED_PRESETS
from mcl.sampler import guidance_weight
from tests.foreign import (
    MINI,
    convert,
    diffusers_folder,
    ldm,
    mini_weights,
    motion,
    motion_adapter,
    old_attention,
    part,
    save,
    sinusoid,
    sparsectrl,
)

REF = Path(__file__).parents[2] / "examples" / "figure_eight.mp4"
BUFFERS = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000),
           "posterior_mean_coef1": torch.zeros(1000), "logvar": torch.zeros(1000),
           "scale_factor": torch.tensor(0.18), "first_stage_model.loss.logvar": torch.zeros(()),
           "cond_stage_model.transformer.text_model.embeddings.position_ids":
               torch.arange(77)[None], "something.else": torch.zeros(2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a base and a motion module."""
    folder = tmp_path_factory.mktemp("files")
    save(folder / "base.safetensors", ldm())
    save(folder / "mm.safetensors", motion("v3"))
    return folder


def expected_weights(dtype=torch.float32, mid_block=False):
    return {name: t.to(dtype) for name, t in mini_weights().items()
            if mid_block or "mid_block.motion_modules" not in name}


def equal(path, expected):
    weights = load_file(path)
    assert weights.keys() == expected.keys()
    return all(torch.equal(weights[name], t) for name, t in expected.items())


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def without_text_model(state):
    return {key.replace("transformer.text_model.", "transformer."): t for key, t in state.items()}


def half_of(state):
    return {key: t.half() if i % 2 else t for i, (key, t) in enumerate(state.items())}


BASES = {
    "plain.safetensors": lambda: ldm(),
    "buffers.safetensors": lambda: ldm() | BUFFERS,
    "zip.ckpt": lambda: {"state_dict": ldm(), "epoch": 3, "optimizer_states": [{}]},
    "top_level.ckpt": lambda: ldm(),
    "wrapped_twice.ckpt": lambda: {"state_dict": {"state_dict": ldm()}},
    "nai.ckpt": lambda: {"state_dict": without_text_model(ldm())},
    "old_vae.safetensors": lambda: ldm(("unet", "text_encoder")) | {
        f"first_stage_model.{k}": t for k, t in old_attention(part("vae")).items()},
}


@pytest.mark.parametrize("name", BASES)
def test_single_files_give_the_same_model(name, folder, tmp_path):
    base = save(tmp_path / name, BASES[name]())
    out = tmp_path / "out.safetensors"
    assert convert("--base", base, "--motion-module", folder / "mm.safetensors", "--out", out,
                   "--dtype", "fp32") == 0
    assert equal(out, expected_weights())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_unchanged(dtype, folder, tmp_path):
    kind = getattr(torch, dtype)
    base = save(tmp_path / "base.ckpt", {key: t.to(kind) for key, t in ldm().items()})
    out = tmp_path / "out.safetensors"
    short = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    assert convert("--base", base, "--motion-module", folder / "mm.safetensors", "--out", out,
                   "--dtype", short) == 0
    assert equal(out, expected_weights(kind))
    assert header(out)["dtype"] == dtype


def test_mixed_precision_is_converted_to_one(folder, tmp_path):
    base = save(tmp_path / "base.safetensors", half_of(ldm()))
    out = tmp_path / "out.safetensors"
    assert convert("--base", base, "--motion-module", folder / "mm.safetensors", "--out", out) == 0
    assert equal(out, expected_weights(torch.float16))


def test_legacy_pickles_with_foreign_objects(folder, tmp_path, monkeypatch):
    """Stable Diffusion's first files have a dict whose key is the class of a callback."""
    lightning = types.ModuleType("pytorch_lightning")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    thing = lightning.ModelCheckpoint()
    thing.best = torch.zeros(2)
    content = {"callbacks": {lightning.ModelCheckpoint: {"best": thing}}, "state_dict": ldm()}
    for new in (True, False):
        base = tmp_path / f"base{new}.ckpt"
        torch.save(content, base, _use_new_zipfile_serialization=new)
        out = tmp_path / "out.safetensors"
        assert convert("--base", base, "--motion-module", folder / "mm.safetensors", "--out", out,
                       "--dtype", "fp32") == 0
        assert equal(out, expected_weights())


def test_moving_averages_are_used_with_ema(folder, tmp_path, capsys):
    averages = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": t + 1
                for key, t in ldm(("unet",)).items()}
    averages |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    base = save(tmp_path / "base.safetensors", ldm() | averages)
    out = tmp_path / "out.safetensors"
    argv = ["--base", base, "--motion-module", folder / "mm.safetensors",
            "--out", out, "--dtype", "fp32"]
    assert convert(*argv) == 0
    assert equal(out, expected_weights())
    assert "688 moving averages" in capsys.readouterr().err
    assert convert(*argv, "--ema") == 0
    assert equal(out, {name: t + 1 if name.startswith("unet.") and "motion_modules" not in name
                       else t for name, t in expected_weights().items()})
    argv[1] = folder / "base.safetensors"
    assert convert(*argv, "--ema") == 2
    assert "Leave out --ema" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    {}, {"variant": ".fp16"}, {"ending": "bin"}, {"sharded": True}, {"configs": False}], ids=str)
def test_diffusers_folders_give_the_same_model(options, folder, tmp_path):
    base = diffusers_folder(tmp_path / "sd15", **options)
    out = tmp_path / "out.safetensors"
    assert convert("--base", base, "--motion-module", folder / "mm.safetensors", "--out", out,
                   "--dtype", "fp16" if "variant" in options else "fp32") == 0
    assert equal(out, expected_weights(torch.float16 if "variant" in options else torch.float32))


def test_missing_parts_come_from_other_files(folder, tmp_path, capsys):
    unet = save(tmp_path / "unet.safetensors", ldm(("unet",)))
    vae = save(tmp_path / "vae.ckpt", {"state_dict": {
        key.removeprefix("first_stage_model."): t + 1 for key, t in ldm(("vae",)).items()}
        | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}})
    text = diffusers_folder(tmp_path / "sd15") / "text_encoder"
    out = tmp_path / "out.safetensors"
    argv = ["--base", unet, "--motion-module", folder / "mm.safetensors", "--out", out]
    assert convert(*argv) == 2
    assert capsys.readouterr().err == ("error: out: the model is not complete. Add the VAE "
                                       "(--vae), the text encoder (--text-encoder)\n")
    assert not out.exists()
    assert convert(*argv, "--vae", vae, "--text-encoder", text, "--dtype", "fp32") == 0
    assert equal(out, {name: t + 1 if name.startswith("vae.") else t
                       for name, t in expected_weights().items()})


MOTIONS = {
    "v1.ckpt": ("v1", lambda: motion("v1")),
    "v2.safetensors": ("v2", lambda: motion("v2")),
    "v3.safetensors": ("v3", lambda: motion("v3")),
    "v3_dummy.ckpt": ("v3", lambda: {"state_dict": motion("v3"), "animatediff_config": {"a": 1}}),
    "trained.ckpt": ("v2", lambda: {"epoch": 1, "state_dict": {
        f"module.{k}": t for k, t in (part("unet") | motion("v2")).items()}}),
    "other_prefix.safetensors": ("v3", lambda: {
        f"module.unet.{k}": t for k, t in motion("v3").items()}),
    "adapter_v2.safetensors": ("v2", lambda: motion_adapter("v2")),
    "adapter_v3.safetensors": ("v3", lambda: motion_adapter("v3")),
    "mm_v1_without_pe.safetensors": ("v1", lambda: {
        k: t for k, t in motion("v1").items() if "pos_encoder" not in k}),
    "motion-adapter-v1-5.safetensors": ("v1", lambda: {
        k: torch.cat([t, sinusoid(32, t.shape[2])[:, 24:]], 1) if k.endswith(".pe") else t
        for k, t in motion_adapter("v1").items()}),
    "half.safetensors": ("v3", lambda: {k: t.half() for k, t in motion("v3").items()}),
}


@pytest.mark.parametrize("name", MOTIONS)
def test_motion_modules_of_every_version_and_format(name, folder, tmp_path):
    version, state = MOTIONS[name]
    out = tmp_path / "out.safetensors"
    dtype = "fp16" if "half" in name else "fp32"
    assert convert("--base", folder / "base.safetensors", "--out", out, "--dtype", dtype,
                   "--motion-module", save(tmp_path / name, state())) == 0
    assert equal(out, expected_weights(torch.float16 if "half" in name else torch.float32,
                             mid_block=version == "v2"))
    unet = from_dict(ModelConfig, json.loads(header(out)["config"])).unet
    assert unet.inflated_groupnorm == (version != "v1")
    assert unet.motion_mid_block == (version == "v2")
    assert unet.motion_max_seq_length == (24 if version == "v1" else 32)


@pytest.mark.parametrize("name, preset", [
    ("animatediff_lightning_4step_comfyui.safetensors", "lightning-4"),
    ("animatediff_lightning_1step_comfyui.safetensors", ""),
    ("AnimateDiff-Lightning/animatediff_lightning_8step_diffusers.safetensors", "lightning-8"),
    ("AnimateLCM/diffusion_pytorch_model.safetensors", "animatelcm"),
    ("AnimateLCM_sd15_t2v.ckpt", "animatelcm"), ("mm_sd_v15_v2.ckpt", "")])
def test_distilled_motion_modules_are_detected_by_their_names(name, preset):
    assert distillation_of(Path("/models", name)) == preset
    assert preset in ("", *DISTILLED_PRESETS)


def test_a_distilled_motion_module_brings_its_settings(folder, tmp_path, capsys):
    out, name = tmp_path / "out.safetensors", "animatediff_lightning_4step_comfyui.safetensors"
    assert convert("--base", folder / "base.safetensors", "--out", out,
                   "--motion-module", save(tmp_path / name, motion("v2"))) == 0
    assert "an AnimateDiff motion module, v2, lightning-4: " in capsys.readouterr().err
    config = from_dict(ModelConfig, json.loads(header(out)["config"])).sample
    assert config == DISTILLED_PRESETS["lightning-4"]
    assert (config.steps, config.timestep_spacing, config.num_frames) == (4, "trailing", 16)
    assert guidance_weight(0, config, 16 * 64 * 64) == 2000


def test_a_motion_adapter_keeps_its_number_of_heads(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save(adapter / "diffusion_pytorch_model.safetensors", motion_adapter("v3"))
    (adapter / "config.json").write_text(json.dumps({"motion_num_attention_heads": 4}))
    for path in (adapter, adapter / "diffusion_pytorch_model.safetensors"):
        out = tmp_path / "out.safetensors"
        assert convert("--base", folder / "base.safetensors", "--motion-module", path,
                       "--out", out) == 0
        assert json.loads(header(out)["config"])["unet"]["motion_num_attention_heads"] == 4


def test_a_converted_file_describes_itself_and_loads(folder, tmp_path, capsys):
    out = tmp_path / "my.safetensors"
    assert convert("--base", folder / "base.safetensors",
                   "--motion-module", folder / "mm.safetensors", "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "1130 tensors used, 0 ignored" in captured.err
    assert "520 tensors used, 40 ignored (40 positional encodings" in captured.err
    assert "1650 tensors, 0 of them changed by LoRAs" in captured.err
    sources = json.loads(header(out)["sources"])
    assert list(sources) == ["--base base.safetensors", "--motion-module mm.safetensors"]
    assert all(len(sha256) == 64 for sha256 in sources.values())
    model = load_model(out, device="cpu")
    assert model.config.name == "my"
    assert model.config.unet.block_out_channels == MINI.unet.block_out_channels
    assert model.config.vae == MINI.vae and model.config.text_encoder == MINI.text_encoder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.safetensors"]


def test_a_converted_model_clones_a_motion(folder, tmp_path):
    out = tmp_path / "my.safetensors"
    assert convert("--base", folder / "base.safetensors",
                   "--motion-module", folder / "mm.safetensors",
                   "--out", out, "--name", "mine") == 0
    clip = clone(REF, "a cat", model=out, width=64, height=64, num_frames=4, steps=2,
                 guidance_steps=1)
    assert clip.frames.shape == (4, 3, 64, 64) and len(clip.steps) == 2


@pytest.mark.parametrize("kind, form", [("rgb", "ckpt"), ("scribble", "diffusers")])
def test_a_model_with_sparsectrl_takes_images(kind, form, folder, tmp_path, monkeypatch):
    state = sparsectrl(kind, form == "diffusers")
    control = save(tmp_path / "control.ckpt", state if form == "diffusers" else {
        "controlnet": {f"module.{name}": t for name, t in state.items()}})
    out, image = tmp_path / "my.safetensors", tmp_path / "image.png"
    assert convert("--base", folder / "base.safetensors",
                   "--motion-module", folder / "mm.safetensors",
                   "--sparsectrl", control, "--out", out, "--dtype", "fp32") == 0
    assert equal(out, expected_weights() | {
        f"sparsectrl.{name}": t for name, t in sparsectrl(kind).items()
        if not name.endswith(".pe")})
    imageio.imwrite(image, np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8))
    conditions = {}

    def record(name):
        function = getattr(sys.modules["mcl.clone"], name)

        def call(*args, **kwargs):
            conditions[name] = kwargs["control"]
            return function(*args, **kwargs)
        monkeypatch.setattr(sys.modules["mcl.clone"], name, call)

    record("sample")
    record("extract_motion")
    model = load_model(out, "cpu")
    clips = {}
    for indices, occupied in {(): [], (0, 3): [1, 0, 0, 1]}.items():
        clips[indices] = clone(REF, "a cat", model=model, control=dict.fromkeys(indices, image),
                               width=64, height=64, num_frames=4, steps=1, guidance_steps=1).frames
        # The new clip shows the images, the reference its own frames at the same indices.
        assert conditions.keys() == {"sample", "extract_motion"}
        for condition in conditions.values():
            mask = [] if condition is None else condition[0, -1].flatten(1).amax(dim=1).tolist()
            assert mask == occupied
    assert not torch.equal(*clips.values())
    frames = read_video(REF, 4, (64, 64))[[0, 3]]
    expected = (frames + 1) / 2 if kind == "scribble" else model.vae.encode(frames)[0].movedim(0, 1)
    assert torch.equal(conditions["extract_motion"][0, :-1, [0, 3]].movedim(0, 1), expected)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.diffusion_model.out.2.bias"),
     "base.safetensors: the tensor unet.conv_out.bias is missing"),
    (lambda s: s.update({"model.diffusion_model.strange": torch.zeros(2)}),
     "the tensor unet.strange belongs to no part"),
    (lambda s: s.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
     r"unet.conv_out.bias is \(5,\); expected \(4,\)"),
    (lambda s: s["model.diffusion_model.out.2.bias"].fill_(float("nan")),
     "base.safetensors: the tensor unet.conv_out.bias is not finite in torch.float16"),
    (lambda s: s["model.diffusion_model.out.2.bias"].fill_(70000.0),
     "unet.conv_out.bias is not finite in torch.float16. Use another file, or float32"),
])
def test_an_incomplete_or_damaged_base_is_rejected(change, message, folder, tmp_path, capsys):
    state = {name: t.clone() if name.endswith("out.2.bias") else t for name, t in ldm().items()}
    change(state)
    base = save(tmp_path / "base.safetensors", state)
    out = tmp_path / "out.safetensors"
    assert convert("--base", base, "--motion-module", folder / "mm.safetensors", "--out", out) == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert re.search(message, line)
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("option, file, message", [
    ("--base", "mm.safetensors", "an AnimateDiff motion module, v3, not for --base. Pass it with "
     "--motion-module"),
    ("--sparsectrl", "base.safetensors", "not for --sparsectrl. Pass it with --base"),
    ("--lora", "mm.safetensors", "not for --lora. Pass it with --motion-module"),
    ("--vae", "unet.safetensors", "diffusers file (UNet), not for --vae. Pass it with --base")])
def test_a_file_with_the_wrong_option_is_rejected(option, file, message, folder, tmp_path, capsys):
    if file == "unet.safetensors":
        save(tmp_path / file, {f"unet.{name}": t for name, t in part("unet").items()})
    path = next(place / file for place in (folder, tmp_path) if (place / file).exists())
    assert convert(option, path, "--out", tmp_path / "o.safetensors") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and message in error and error.count("\n") == 1


def test_a_converted_model_is_not_converted_again(folder, tmp_path, capsys):
    done = tmp_path / "done.safetensors"
    argv = ["--motion-module", folder / "mm.safetensors", "--out", done, "--base"]
    assert convert(*argv, folder / "base.safetensors") == 0
    capsys.readouterr()
    assert convert(*argv, done) == 2
    assert f"Run python sample.py --weights {done}\n" in capsys.readouterr().err


def test_a_whole_model_may_be_given_for_its_vae(folder, tmp_path):
    out = tmp_path / "out.safetensors"
    base = folder / "base.safetensors"
    other = save(tmp_path / "other.safetensors", {key: t + 1 for key, t in ldm().items()})
    for vae, offset in ((base, 0), (other, 1)):
        assert convert("--base", base, "--vae", vae, "--motion-module", folder / "mm.safetensors",
                       "--out", out, "--dtype", "fp32") == 0
        assert equal(out, {name: t + offset if name.startswith("vae.") else t
                           for name, t in expected_weights().items()})


@pytest.mark.parametrize("argv, message", [
    (["--motion-module", "{mm}"], "is not complete. Add the UNet (--base), the VAE (--vae)"),
    (["--base", "{base}"], "is not complete. Add the motion module (--motion-module)"),
    (["--base", "{base}", "--motion-module", "{mm}", "--out", "{out}/no/o.safetensors"],
     "there is no folder"),
    (["--base", "{base}", "--motion-module", "{mm}", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    (["--base", "none.ckpt", "--motion-module", "{mm}"], "none.ckpt: no such file or folder"),
    (["--bass", "{base}"], "unrecognized arguments"),
])
def test_wrong_usage_is_one_line(argv, message, folder, tmp_path, capsys):
    places = {"mm": folder / "mm.safetensors", "base": folder / "base.safetensors", "out": tmp_path}
    argv = [a.format(**places) for a in argv]
    assert convert(*argv, *["--out", tmp_path / "o.safetensors"] * ("--out" not in argv)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_input_is_not_overwritten(folder, capsys):
    base = folder / "base.safetensors"
    before, argv = base.read_bytes(), ("--base", base, "--motion-module", folder / "mm.safetensors")
    assert convert(*argv, "--out", base) == 2
    assert "base.safetensors: is read by --base. Give --out another" in capsys.readouterr().err
    assert base.read_bytes() == before
    assert convert(*argv, "--out", folder / "o.ckpt") == 2
    assert "o.ckpt: its name must end in .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, "interrupted; no unfinished file is left"),
    (MemoryError(), 1, "failed: out of memory")])
def test_an_interrupted_conversion_leaves_no_file(error, code, line, folder, tmp_path, monkeypatch,
                                                  capsys):
    def stop(*_):
        raise error
    monkeypatch.setattr("mcl.checkpoints.convert.apply_deltas", stop)
    assert convert("--base", folder / "base.safetensors",
                   "--motion-module", folder / "mm.safetensors",
                   "--out", tmp_path / "o.safetensors") == code
    assert capsys.readouterr().err.endswith(f"{line}\n")
    assert list(tmp_path.iterdir()) == []


def test_sparsectrl_is_not_a_part_that_a_model_needs():
    assert missing_parts(("unet", "vae", "text_encoder", "motion")) == []
