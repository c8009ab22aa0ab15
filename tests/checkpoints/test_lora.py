"""LoRAs of every dialect change the right weights by scale * alpha / rank * up @ down."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from mcl import InputError, load_model
from mcl.checkpoints.containers import Checkpoint, wrap_tensor
from mcl.checkpoints.detect import detect
from mcl.checkpoints.lora import (
    Lora,
    apply_deltas,
    collect_deltas,
    lora_deltas,
    merge_loras,
    open_lora,
    parse_scaled,
)
from mcl.checkpoints.model_file import read_shapes
from mcl.cli import sample as command
from tests.foreign import convert, ldm, mini_weights, motion, save

REF = Path(__file__).parents[2] / "examples" / "figure_eight.mp4"
ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
TEMPORAL = ("unet.up_blocks.1.motion_modules.2.temporal_transformer.transformer_blocks.0."
            "attention_blocks.{}.")
TEXT = "text_encoder.text_model.encoder.layers.3."
LINEAR = [ATTENTION + name for name in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0",
                                        "ff.net.0.proj")]
CONV1 = ["unet.down_blocks.1.attentions.0.proj_in", "unet.up_blocks.2.resnets.0.conv_shortcut"]
CONV3 = ["unet.down_blocks.1.resnets.0.conv1", "unet.down_blocks.0.downsamplers.0.conv",
         "unet.up_blocks.0.upsamplers.0.conv", "unet.conv_in"]
RANK = 4


def random_pairs(modules):
    """Return random factors (down, up) of rank 4 by module, linear or convolutional."""
    g = torch.Generator().manual_seed(1)
    result = {}
    for module in modules:
        out, *rest = mini_weights()[module + ".weight"].shape
        result[module] = (0.1 * torch.randn(RANK, *rest, generator=g),
                          0.1 * torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=g))
    return result


def product(down, up):
    """Return the weight of the one layer that equals the layer down followed by the layer up."""
    if down.ndim == 2:
        return up @ down
    # The convolution of an image with a single one is the weight, mirrored.
    units = torch.eye(down.shape[1])[:, :, None, None]
    size = down.shape[-1]
    images = F.pad(units, [size - 1] * 4)
    return F.conv2d(F.conv2d(images, down), up).flip(-1, -2).transpose(0, 1)


def shapes():
    return {name: t.shape for name, t in mini_weights().items()
            if "mid_block.motion_modules" not in name}


def check(path, option, factors, scale=1.0, alpha=None):
    """Check that a file changes exactly the weights of the factors, by their product."""
    deltas, ignored = collect_deltas([open_lora(option, path, scale)], shapes())
    assert set(ignored) == {path}
    assert deltas.keys() == {module + ".weight" for module in factors}
    for module, (down, up) in factors.items():
        before = mini_weights()[module + ".weight"]
        after = apply_deltas(before, deltas[module + ".weight"], torch.float32)
        expected = before + scale * (alpha or RANK) / RANK * product(down, up)
        assert torch.allclose(after, expected, atol=1e-6)
        assert not torch.allclose(after, before, atol=1e-3)


def kohya(factors, alpha=None, text="lora_te_"):
    state = {}
    for module, (down, up) in factors.items():
        name = module.replace("text_encoder.", text).replace("unet.", "lora_unet_").replace(
            ".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


@pytest.mark.parametrize("alpha", [None, 0, 2, 8])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_kohya_loras_change_the_right_weights(alpha, ending, tmp_path):
    factors = random_pairs(LINEAR + CONV1 + CONV3 + [TEXT + "mlp.fc1", TEXT + "self_attn.q_proj"])
    path = save(tmp_path / f"lora.{ending}", kohya(factors, alpha))
    check(path, "--lora", factors, scale=0.7, alpha=alpha)


def test_ignoring_alpha_merges_up_times_down_alone(tmp_path):
    """With an alpha of half the rank this is twice the usual change."""
    name, factors = LINEAR[0] + ".weight", random_pairs(LINEAR)
    path = save(tmp_path / "lora.safetensors", kohya(factors, alpha=RANK / 2))
    before = mini_weights()[name]
    usual, ignoring = (
        apply_deltas(before, collect_deltas([open_lora("--lora", path, 0.7, ignore_alpha)],
                                            shapes())[0][name], torch.float32) - before
        for ignore_alpha in (False, True))
    down, up = factors[LINEAR[0]]
    assert torch.allclose(ignoring, 0.7 * up @ down, atol=1e-6)
    assert torch.allclose(ignoring, 2 * usual, atol=1e-6)


def test_kohya_loras_with_another_prefix_and_flat_projections(tmp_path):
    factors = random_pairs([TEXT + "self_attn.k_proj", CONV1[0]])
    state = {name: t.flatten(1) if t.ndim == 4 else t
             for name, t in kohya(factors, text="lora_te1_").items()}
    check(save(tmp_path / "lora.safetensors", state), "--lora", factors)


@pytest.mark.parametrize("text", ["lora_te_", "lora_te1_"])
def test_kohya_loras_without_text_model_in_their_names(text, tmp_path):
    factors = random_pairs([TEXT + "mlp.fc1", TEXT + "self_attn.k_proj"])
    state = {name.replace("text_model_", ""): t for name, t in kohya(factors, text=text).items()}
    check(save(tmp_path / "lora.safetensors", state), "--lora", factors)


def test_kohya_loras_with_the_names_of_ldm(tmp_path):
    modules = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": LINEAR[0],
        "input_blocks_4_0_in_layers_2": CONV3[0], "input_blocks_3_0_op": CONV3[1],
        "output_blocks_2_1_conv": CONV3[2], "input_blocks_0_0": CONV3[3],
        "output_blocks_6_0_skip_connection": CONV1[1], "input_blocks_4_1_proj_in": CONV1[0],
        "middle_block_1_proj_out": "unet.mid_block.attentions.0.proj_out",
        "middle_block_2_emb_layers_1": "unet.mid_block.resnets.1.time_emb_proj",
        "time_embed_2": "unet.time_embedding.linear_2", "out_2": "unet.conv_out"}
    factors = random_pairs(modules.values())
    state = {}
    for name, module in modules.items():
        down, up = factors[module]
        state |= {f"lora_unet_{name}.lora_down.weight": down,
                  f"lora_unet_{name}.lora_up.weight": up}
    check(save(tmp_path / "lora.safetensors", state), "--lora", factors)


def test_a_tucker_lora_has_a_core_between_its_factors(tmp_path):
    g = torch.Generator().manual_seed(2)
    module = CONV3[0]
    out, inner, *_ = mini_weights()[module + ".weight"].shape
    down, mid, up = (0.3 * torch.randn(*shape, generator=g) for shape in (
        (RANK, inner, 1, 1), (RANK, RANK, 3, 3), (out, RANK, 1, 1)))
    state = kohya({module: (down, up)}, alpha=2)
    name = next(iter(state)).partition(".")[0]
    state[f"{name}.lora_mid.weight"] = mid
    path = save(tmp_path / "lora.safetensors", state)
    whole = torch.einsum("op,pqhw,qi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    delta = lora_deltas(open_lora("--lora", path, 3.0), shapes())[0][module + ".weight"]
    assert torch.allclose(delta.add_to(torch.zeros(whole.shape)), 1.5 * whole, atol=1e-6)


def diffusers(factors, suffixes, insert=""):
    """Return a LoRA in a dialect of diffusers, by the suffixes of down and up."""
    state = {}
    for module, pair in factors.items():
        for suffix, t in zip(suffixes, pair):
            name = module
            if insert:                      # "processor", and no number after to_out
                before, _, last = module.removesuffix(".0").rpartition(".")
                name = f"{before}.{insert}{last}"
            state[name + suffix] = t
    return state


DIALECTS = {
    "processor": (("_lora.down.weight", "_lora.up.weight"), "processor."),
    "layer": ((".lora.down.weight", ".lora.up.weight"), ""),
    "peft": ((".lora_A.weight", ".lora_B.weight"), ""),
    "peft, named": ((".lora_A.default.weight", ".lora_B.default.weight"), "")}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_diffusers_and_peft_loras_change_the_right_weights(dialect, tmp_path):
    suffixes, insert = DIALECTS[dialect]
    factors = random_pairs(LINEAR[:3])
    text = random_pairs([TEXT + "self_attn.v_proj", TEXT + "self_attn.out_proj"])
    state = diffusers(factors, suffixes, insert)
    if dialect == "layer":
        state |= diffusers(text, (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"))
    elif dialect == "processor":
        names = {"v_proj": "to_v", "out_proj": "to_out"}
        for module, (down, up) in text.items():
            before, _, last = module.rpartition(".")
            state |= {f"{before}.{names[last]}_lora.down.weight": down,
                      f"{before}.{names[last]}_lora.up.weight": up}
    else:
        state |= diffusers(text, suffixes)
    for ending in ("safetensors", "bin"):
        path = save(tmp_path / f"pytorch_lora_weights.{ending}", state)
        check(path, "--lora", factors | text, scale=0.5)
    assert open_lora("--lora", tmp_path).checkpoint.description.startswith("a LoRA")


@pytest.mark.parametrize("before", ["base_model.model.text_model.", "text_model.", "",
                                    "text_encoder.base_model.model.text_model.",
                                    "text_encoder."])
def test_text_encoder_keys_under_other_prefixes(before, tmp_path):
    factors = random_pairs([TEXT + "mlp.fc1"])
    state = {name.replace("text_encoder.text_model.", before): t
             for name, t in diffusers(factors, DIALECTS["peft"][0]).items()}
    check(save(tmp_path / "a.safetensors", state), "--lora", factors)


def adapter(factors):
    return {name.removeprefix("unet."): t for name, t in diffusers(
        factors, *DIALECTS["processor"]).items()}


def test_the_domain_adapter_changes_the_right_weights(tmp_path):
    factors = random_pairs(LINEAR[:3])
    path = save(tmp_path / "v3_sd15_adapter.ckpt", adapter(factors))
    check(path, "--adapter", factors, scale=0.25)


def test_motion_loras_with_the_names_of_animatediff_and_diffusers(tmp_path):
    factors = random_pairs([TEMPORAL.format(k) + name for k in (0, 1)
                            for name in ("to_q", "to_out.0")])
    middle = {f"mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0."
              f"attention_blocks.0.processor.to_q_lora.{way}.weight": torch.zeros(2, 2)
              for way in ("down", "up")}
    check(save(tmp_path / "a.ckpt", {"state_dict": adapter(factors) | middle,
                                     "animatediff_config": {}}), "--motion-lora", factors)
    state = {f"unet.{name}".replace("temporal_transformer.", "").replace(
        "attention_blocks.0", "attn1").replace("attention_blocks.1", "attn2"): t
        for name, t in adapter(factors).items()}
    check(save(tmp_path / "b.safetensors", state), "--motion-lora", factors, scale=-1.0)


def test_several_loras_are_added_in_float32_and_converted_once(tmp_path):
    factors = random_pairs(LINEAR[:1])
    path = save(tmp_path / "a.safetensors", kohya(factors))
    deltas = collect_deltas([open_lora("--lora", path, s) for s in (1e-4, 1.0, -1.0)],
                            shapes())[0][LINEAR[0] + ".weight"]
    weight = mini_weights()[LINEAR[0] + ".weight"].half()
    expected = (weight.float() + 1e-4 * product(*factors[LINEAR[0]])).half()
    assert torch.equal(apply_deltas(weight, deltas, torch.float16), expected)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.popitem(), r"has down \(4, 64\), which make no change"),
    (lambda s: s.update({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}),
     "this model has no lora_unet_x. Give a LoRA for this model"),
    (lambda s: s.update({"lora_unet_conv_in.set_weight": torch.zeros(2)}),
     "lora_unet_conv_in.set_weight is of no known kind of LoRA"),
    (lambda s: s.update({next(iter(s)): torch.zeros(RANK, 5)}), "Give a LoRA for this model"),
    (lambda s: s.update({name: t[:0] if "down" in name else t[:, :0] for name, t in s.items()}),
     "Give a LoRA for this model"),
    (lambda s: s.update({name: t.to(torch.int8) for name, t in s.items()}),
     "Give a LoRA for this model"),
    (lambda s: s.update({next(iter(s)).partition(".")[0] + ".alpha": torch.tensor(torch.nan)}),
     "alpha of .* is nan"),
    (lambda s: s.update({next(iter(s)).partition(".")[0] + ".alpha": torch.tensor(torch.inf)}),
     "alpha of .* is inf"),
    (lambda s: s.update({next(iter(s)).partition(".")[0] + ".alpha": torch.zeros(0)}),
     r"alpha of .* is \[\]. Give another"),
    (lambda s: s.update({next(iter(s)).partition(".")[0] + ".alpha": torch.ones(3)}),
     r"alpha of .* is \[1.0, 1.0\]"),
    (lambda s: s.update({"unet." + LINEAR[0][5:] + ".lora_A.weight": torch.zeros(RANK, 64),
                         "unet." + LINEAR[0][5:] + ".lora_B.weight": torch.zeros(64, RANK)}),
     "it changes .* twice"),
    (lambda s: s.update({next(iter(s)).replace("lora_down", "lora_A"): torch.zeros(2, 2)}),
     "has two of down")])
def test_a_lora_that_does_not_fit_is_rejected(change, message, tmp_path):
    state = kohya(random_pairs([ATTENTION + "attn1.to_q"]))
    change(state)
    path = save(tmp_path / "lora.safetensors", state)
    with pytest.raises(InputError, match=f"lora.safetensors: .*{message}"):
        lora_deltas(open_lora("--lora", path), shapes())


def test_a_lora_with_nan_is_rejected_by_its_name(tmp_path):
    state = kohya(random_pairs(LINEAR[:1]))
    state[next(iter(state))].fill_(torch.nan)
    path = save(tmp_path / "nan.safetensors", state)
    deltas, _ = lora_deltas(open_lora("--lora", path), shapes())
    message = r"nan.safetensors: .*\(down\) is not finite in torch.float32. Use another file$"
    with pytest.raises(InputError, match=message):
        apply_deltas(mini_weights()[LINEAR[0] + ".weight"], [*deltas.values()], torch.float16)


def test_the_scale_must_be_finite():
    checkpoint = detect(Checkpoint({
        name: wrap_tensor(t) for name, t in kohya(random_pairs(LINEAR[:1])).items()}, (),
        path=Path("x")))
    with pytest.raises(InputError, match="x: the scale inf is out of range"):
        Lora(checkpoint, torch.inf)


def test_the_scale_follows_the_last_colon(tmp_path):
    assert parse_scaled("a.ckpt") == (Path("a.ckpt"), 1.0)
    assert parse_scaled("a.ckpt:0.8") == (Path("a.ckpt"), 0.8)
    assert parse_scaled("C:/a.ckpt") == (Path("C:/a.ckpt"), 1.0)
    assert parse_scaled("C:/a.ckpt:-1") == (Path("C:/a.ckpt"), -1.0)
    odd = tmp_path / "a:2"
    odd.touch()
    assert parse_scaled(str(odd)) == (odd, 1.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a motion module, one LoRA of each kind, and the model without and with them."""
    folder = tmp_path_factory.mktemp("loras")
    save(folder / "base.safetensors", ldm())
    save(folder / "mm.ckpt", motion("v3"))
    save(folder / "adapter.ckpt", adapter(random_pairs(LINEAR[:3])))
    save(folder / "lora.safetensors", kohya(random_pairs(LINEAR + CONV3), alpha=2))
    save(folder / "pan.ckpt", adapter(random_pairs([TEMPORAL.format(0) + "to_q"])))
    argv = ["--base", folder / "base.safetensors", "--motion-module", folder / "mm.ckpt",
            "--dtype", "fp32", "--out"]
    assert convert(*argv, folder / "plain.safetensors") == 0
    assert convert(*argv, folder / "merged.safetensors", *lora_options(folder)) == 0
    return folder


def lora_options(folder):
    return ["--adapter", f"{folder}/adapter.ckpt:0.5", "--lora", f"{folder}/lora.safetensors:0.8",
            f"{folder}/lora.safetensors:-0.1", "--motion-lora", f"{folder}/pan.ckpt"]


def test_merging_while_converting_equals_merging_while_loading(files):
    loras = [open_lora("--adapter", files / "adapter.ckpt", 0.5),
             open_lora("--lora", files / "lora.safetensors", 0.8),
             open_lora("--lora", files / "lora.safetensors", -0.1),
             open_lora("--motion-lora", files / "pan.ckpt")]
    path = files / "plain.safetensors"
    shapes = read_shapes(path)
    model = load_model(path, "cpu", transform=merge_loras(loras, shapes))
    merged, plain = (load_file(files / f"{name}.safetensors") for name in ("merged", "plain"))
    assert all(torch.equal(t, merged[name]) for name, t in model.state_dict().items())
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert changed == {f"{m}.weight" for m in LINEAR + CONV3 + [TEMPORAL.format(0) + "to_q"]}
    first = loras[0].checkpoint
    hashes = {load_model(path, "cpu", transform=merge_loras(group, shapes) if group else None
                         ).sha256
              for group in ([], [Lora(first, 0.5)], [Lora(first, 0.6)], [Lora(first, 0.5, True)])}
    assert len(hashes) == 4


def test_the_file_records_its_loras(files):
    with safe_open(files / "merged.safetensors", framework="pt") as file:
        sources = json.loads(file.metadata()["sources"])
    assert list(sources) == [
        "--base base.safetensors", "--motion-module mm.ckpt", "--adapter adapter.ckpt:0.5",
        "--lora lora.safetensors:0.8", "--lora lora.safetensors:-0.1", "--motion-lora pan.ckpt:1"]


def test_sample_merges_loras_and_records_them(files, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    argv = ["--weights", files / "plain.safetensors", "--ref", REF, "--prompt", "a cat", "--size",
            "64x64", "--num-frames", 2, "--steps", 1, "--guidance-steps", 1, "--out", out]
    assert command.main([str(a) for a in argv + lora_options(files)]) == 0
    assert json.loads(Path(f"{out}.json").read_text())["loras"] == [
        [f"{files}/adapter.ckpt", 0.5], [f"{files}/lora.safetensors", 0.8],
        [f"{files}/lora.safetensors", -0.1], [f"{files}/pan.ckpt", 1.0]]
    capsys.readouterr()
    for options, message in (
            (["--lora", files / "adapter.ckpt"], "not for --lora. Pass it with --adapter"),
            (["--adapter", files / "pan.ckpt"], "not for --adapter. Pass it with --motion-lora"),
            (["--lora", files / "mm.ckpt"], "Pass it with --motion-module of convert_weights.py"),
            (["--lora", f"{files}/lora.safetensors:inf"], "the scale inf is out of range")):
        assert command.main([str(a) for a in argv + options]) == 2
        assert message in capsys.readouterr().err


def test_a_lora_with_the_wrong_option_is_rejected(files, tmp_path, capsys):
    assert convert("--base", files / "base.safetensors", "--motion-module", files / "mm.ckpt",
                   "--motion-lora", f"{files}/adapter.ckpt:0.5", "--out",
                   tmp_path / "o.safetensors") == 2
    assert capsys.readouterr().err == (
        f"error: {files}/adapter.ckpt: AnimateDiff's domain adapter (v3_sd15_adapter), not for "
        "--motion-lora. Pass it with --adapter\n")
