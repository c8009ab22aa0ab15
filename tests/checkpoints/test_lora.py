"""LoRAs of every dialect: which weights they change, by scale * alpha / rank * up @ down."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sample as command
from mcl import InputError, load_model
from mcl.checkpoints.model_file import read_shapes
from mcl.checkpoints.lora import (Lora, all_deltas, deltas, merge, merged, open_lora,
                              parse_scaled)

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
    """{module: (down, up)}, random, of rank 4; kxk convolutions too."""
    g = torch.Generator().manual_seed(1)
    result = {}
    for module in modules:
        out, *rest = mini_weights()[module + ".weight"].shape
        result[module] = (0.1 * torch.randn(RANK, *rest, generator=g),
                          0.1 * torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=g))
    return result


def product(down, up):
    """The weight of the one layer that does what down and then up do."""
    if down.ndim == 2:
        return up @ down
    # A convolution of each unit picture is the weight, mirrored.
    units = torch.eye(down.shape[1])[:, :, None, None]
    size = down.shape[-1]
    pictures = F.pad(units, [size - 1] * 4)
    return F.conv2d(F.conv2d(pictures, down), up).flip(-1, -2).transpose(0, 1)


def shapes():
    return {name: t.shape for name, t in mini_weights().items()
            if "mid_block.motion_modules" not in name}


def check(path, option, factors, scale=1.0, alpha=None):
    """The file changes exactly the weights of the factors, by what they say."""
    changes, unused = all_deltas([open_lora(option, path, scale)], shapes())
    assert set(unused) == {path}
    assert changes.keys() == {module + ".weight" for module in factors}
    for module, (down, up) in factors.items():
        before = mini_weights()[module + ".weight"]
        after = merged(before, changes[module + ".weight"], torch.float32)
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
def test_kohya(alpha, ending, tmp_path):
    factors = random_pairs(LINEAR + CONV1 + CONV3 + [TEXT + "mlp.fc1", TEXT + "self_attn.q_proj"])
    path = save(tmp_path / f"lora.{ending}", kohya(factors, alpha))
    check(path, "--lora", factors, scale=0.7, alpha=alpha)


def test_alpha_can_be_ignored_as_animatediff_does(tmp_path):
    """By up @ down alone: with an alpha of half the rank, twice the usual change."""
    name, factors = LINEAR[0] + ".weight", random_pairs(LINEAR)
    path = save(tmp_path / "lora.safetensors", kohya(factors, alpha=RANK / 2))
    before = mini_weights()[name]
    usual, ignoring = (merged(before, all_deltas([open_lora("--lora", path, 0.7, ignore)],
                                                 shapes())[0][name], torch.float32) - before
                       for ignore in (False, True))
    down, up = factors[LINEAR[0]]
    assert torch.allclose(ignoring, 0.7 * up @ down, atol=1e-6)
    assert torch.allclose(ignoring, 2 * usual, atol=1e-6)


def test_kohya_with_another_prefix_and_flat_projections(tmp_path):
    factors = random_pairs([TEXT + "self_attn.k_proj", CONV1[0]])
    state = {name: t.flatten(1) if t.ndim == 4 else t
             for name, t in kohya(factors, text="lora_te1_").items()}
    check(save(tmp_path / "lora.safetensors", state), "--lora", factors)


def test_kohya_under_the_names_of_ldm(tmp_path):
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


def test_tucker_form(tmp_path):
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
    change = deltas(open_lora("--lora", path, 3.0), shapes())[0][module + ".weight"]
    assert torch.allclose(change.add_to(torch.zeros(whole.shape)), 1.5 * whole, atol=1e-6)


def diffusers(factors, suffixes, insert=""):
    """Dialects of diffusers; suffixes of down and up with what stands before them."""
    state = {}
    for module, pair in factors.items():
        for suffix, t in zip(suffixes, pair):
            name = module
            if insert:                      # "processor" and no number behind to_out
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
def test_diffusers_and_peft(dialect, tmp_path):
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
    assert open_lora("--lora", tmp_path).source.title.startswith("a LoRA")


@pytest.mark.parametrize("before", ["base_model.model.text_model.", "text_model.", "",
                                    "text_encoder.base_model.model.text_model.",
                                    "text_encoder."])
def test_the_text_encoder_under_other_prefixes(before, tmp_path):
    factors = random_pairs([TEXT + "mlp.fc1"])
    state = {name.replace("text_encoder.text_model.", before): t
             for name, t in diffusers(factors, DIALECTS["peft"][0]).items()}
    check(save(tmp_path / "a.safetensors", state), "--lora", factors)


def test_alpha_beside_the_tensors_of_peft(tmp_path):
    factors, text = random_pairs(LINEAR[:2]), random_pairs([TEXT + "mlp.fc2"])
    state = diffusers(factors | text, DIALECTS["peft"][0])
    metadata = {"lora_adapter_metadata": json.dumps({
        "unet.lora_alpha": 8, "unet.r": RANK, "text_encoder.lora_alpha": 2})}
    path = save(tmp_path / "a.safetensors", state, metadata)
    found, _ = deltas(open_lora("--lora", path), shapes())
    assert {d.scale for name, d in found.items() if name.startswith("unet.")} == {2.0}
    assert found[TEXT + "mlp.fc2.weight"].scale == 0.5

    folder = tmp_path / "peft"
    folder.mkdir()
    save(folder / "adapter_model.safetensors", {
        f"base_model.model.{name.removeprefix('unet.')}": t for name, t in state.items()
        if name.startswith("unet.")})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 16, "r": RANK, "alpha_pattern": {}}))
    check(folder, "--lora", factors, alpha=16)
    config.write_text(json.dumps({"lora_alpha": 16, "use_rslora": True}))
    with pytest.raises(InputError, match="a PEFT LoRA with use_rslora"):
        deltas(open_lora("--lora", folder), shapes())


def adapter(factors):
    return {name.removeprefix("unet."): t for name, t in diffusers(
        factors, *DIALECTS["processor"]).items()}


def test_the_domain_adapter(tmp_path):
    factors = random_pairs(LINEAR[:3])
    path = save(tmp_path / "v3_sd15_adapter.ckpt", adapter(factors))
    check(path, "--adapter", factors, scale=0.25)


def test_motion_loras_under_both_names(tmp_path):
    factors = random_pairs([TEMPORAL.format(k) + name for k in (0, 1)
                            for name in ("to_q", "to_out.0")])
    middle = {f"mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0."
              f"attention_blocks.0.processor.to_q_lora.{way}.weight": torch.zeros(2, 2)
              for way in ("down", "up")}
    check(save(tmp_path / "a.ckpt", {"state_dict": adapter(factors) | middle,
                                     "animatediff_config": {}}), "--motion-lora", factors)
    theirs = {f"unet.{name}".replace("temporal_transformer.", "").replace(
        "attention_blocks.0", "attn1").replace("attention_blocks.1", "attn2"): t
        for name, t in adapter(factors).items()}
    check(save(tmp_path / "b.safetensors", theirs), "--motion-lora", factors, scale=-1.0)


def test_several_are_added_in_float32_and_cast_once(tmp_path):
    factors = random_pairs(LINEAR[:1])
    path = save(tmp_path / "a.safetensors", kohya(factors))
    change = all_deltas([open_lora("--lora", path, s) for s in (1e-4, 1.0, -1.0)],
                        shapes())[0][LINEAR[0] + ".weight"]
    weight = mini_weights()[LINEAR[0] + ".weight"].half()
    expected = (weight.float() + 1e-4 * product(*factors[LINEAR[0]])).half()
    assert torch.equal(merged(weight, change, torch.float16), expected)


@pytest.mark.parametrize("spoil, message", [
    (lambda s: s.popitem(), "has not exactly one pair of down and up"),
    (lambda s: s.update({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}),
     "it changes lora_unet_x, which this model does not have"),
    (lambda s: s.update({"lora_unet_conv_in.set_weight": torch.zeros(2)}),
     "lora_unet_conv_in.set_weight is nothing that a LoRA"),
    (lambda s: s.update({next(iter(s)): torch.zeros(RANK, 5)}), "made for another model"),
    (lambda s: s.update({next(iter(s)).partition(".")[0] + ".alpha": torch.tensor(torch.nan)}),
     "alpha of .* is nan"),
    (lambda s: s.update({"unet." + LINEAR[0][5:] + ".lora_A.weight": torch.zeros(2, 2),
                         "unet." + LINEAR[0][5:] + ".lora_B.weight": torch.zeros(2, 2)}),
     "has not exactly one pair"),
    (lambda s: s.update({next(iter(s)).replace("lora_down", "lora_A"): torch.zeros(2, 2)}),
     "has two of down")])
def test_a_lora_that_does_not_fit_is_refused(spoil, message, tmp_path):
    state = kohya(random_pairs(LINEAR[:1]))
    spoil(state)
    path = save(tmp_path / "lora.safetensors", state)
    with pytest.raises(InputError, match=f"lora.safetensors: .*{message}"):
        deltas(open_lora("--lora", path), shapes())


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
    place = tmp_path_factory.mktemp("loras")
    save(place / "base.safetensors", ldm())
    save(place / "mm.ckpt", motion("v3"))
    save(place / "adapter.ckpt", adapter(random_pairs(LINEAR[:3])))
    save(place / "lora.safetensors", kohya(random_pairs(LINEAR + CONV3), alpha=2))
    save(place / "pan.ckpt", adapter(random_pairs([TEMPORAL.format(0) + "to_q"])))
    argv = ["--base", place / "base.safetensors", "--motion-module", place / "mm.ckpt",
            "--dtype", "fp32", "--out"]
    assert convert(*argv, place / "plain.safetensors") == 0
    assert convert(*argv, place / "merged.safetensors", *loras(place)) == 0
    return place


def loras(place):
    return ["--adapter", f"{place}/adapter.ckpt:0.5", "--lora", f"{place}/lora.safetensors:0.8",
            f"{place}/lora.safetensors:-0.1", "--motion-lora", f"{place}/pan.ckpt"]


def test_merging_while_converting_and_while_loading_is_the_same(files):
    given = [open_lora("--adapter", files / "adapter.ckpt", 0.5),
             open_lora("--lora", files / "lora.safetensors", 0.8),
             open_lora("--lora", files / "lora.safetensors", -0.1),
             open_lora("--motion-lora", files / "pan.ckpt")]
    file, shapes = files / "plain.safetensors", read_shapes(files / "plain.safetensors")
    model = load_model(file, "cpu", edit=merge(given, shapes))
    found, plain = (load_file(files / f"{name}.safetensors") for name in ("merged", "plain"))
    state = {f"{part}.{name}": t for part in ("unet", "vae", "text_encoder")
             for name, t in getattr(model, part).state_dict().items()}
    assert all(torch.equal(t, found[name]) for name, t in state.items())
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert changed == {f"{m}.weight" for m in LINEAR + CONV3 + [TEMPORAL.format(0) + "to_q"]}
    hashes = {load_model(file, "cpu", edit=merge(some, shapes) if some else None).sha256
              for some in ([], given[:1], [Lora(given[0].source, 0.6)])}
    assert len(hashes) == 3


def test_the_command_merges_and_records(files, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    argv = ["--weights", files / "plain.safetensors", "--ref", REF, "--prompt", "a cat", "--size",
            "64x64", "--frames", 2, "--steps", 1, "--guidance-steps", 1, "--out", out]
    assert command.main([str(a) for a in argv + loras(files)]) == 0
    assert json.loads(Path(f"{out}.json").read_text())["loras"] == [
        [f"{files}/adapter.ckpt", 0.5], [f"{files}/lora.safetensors", 0.8],
        [f"{files}/lora.safetensors", -0.1], [f"{files}/pan.ckpt", 1.0]]
    capsys.readouterr()
    for wrong, message in (
            (["--lora", files / "adapter.ckpt"], "not for --lora: give it with --adapter"),
            (["--adapter", files / "pan.ckpt"], "not for --adapter: give it with --motion-lora"),
            (["--lora", files / "mm.ckpt"], "convert_weights.py makes a model of it"),
            (["--lora", f"{files}/lora.safetensors:inf"], "the scale inf is not possible")):
        assert command.main([str(a) for a in argv + wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_lora_in_the_wrong_place_gets_the_right_command(files, tmp_path, capsys):
    place = files
    assert convert("--base", place / "base.safetensors", "--motion-module", place / "mm.ckpt",
                   "--motion-lora", f"{place}/adapter.ckpt:0.5", "--out",
                   tmp_path / "o.safetensors") == 2
    assert f"--adapter {place}/adapter.ckpt:0.5 --dtype" in capsys.readouterr().err
