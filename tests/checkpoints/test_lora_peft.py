"""LoRAs of PEFT: alpha, rank and their patterns come from a config beside the file or inside it."""
import json

import pytest
import torch

from mcl import InputError
from mcl.checkpoints.lora import lora_deltas, open_lora
from tests.checkpoints.test_lora import (
    DIALECTS,
    LINEAR,
    RANK,
    TEXT,
    check,
    diffusers,
    random_pairs,
    shapes,
)
from tests.foreign import mini_weights, save


def test_alpha_is_read_from_the_config_of_peft(tmp_path):
    factors, text = random_pairs(LINEAR[:2]), random_pairs([TEXT + "mlp.fc2"])
    state = diffusers(factors | text, DIALECTS["peft"][0])
    metadata = {"lora_adapter_metadata": json.dumps({
        "unet.lora_alpha": 8, "unet.r": RANK, "text_encoder.lora_alpha": 2})}
    path = save(tmp_path / "a.safetensors", state, metadata)
    deltas, _ = lora_deltas(open_lora("--lora", path), shapes())
    assert {d.alpha / d.rank for name, d in deltas.items() if name.startswith("unet.")} == {2.0}
    text_delta = deltas[TEXT + "mlp.fc2.weight"]
    assert text_delta.alpha / text_delta.rank == 0.5

    folder = tmp_path / "peft"
    folder.mkdir()
    save(folder / "adapter_model.safetensors", {
        f"base_model.model.{name.removeprefix('unet.')}": t for name, t in state.items()
        if name.startswith("unet.")})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 16, "r": RANK, "alpha_pattern": {}}))
    check(folder, "--lora", factors, alpha=16)
    config.write_text(json.dumps({"lora_alpha": 16, "use_dora": True}))
    with pytest.raises(InputError, match="a PEFT LoRA with use_dora is not supported"):
        lora_deltas(open_lora("--lora", folder), shapes())


def test_a_peft_lora_given_as_a_file_is_merged_with_the_alpha_of_its_folder(tmp_path):
    factors = random_pairs(LINEAR[:2])
    file = save(tmp_path / "adapter_model.safetensors", {
        f"base_model.model.{name.removeprefix('unet.')}": t
        for name, t in diffusers(factors, DIALECTS["peft"][0]).items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK}))
    for path in (tmp_path, file):
        check(path, "--lora", factors, alpha=8)


def peft_strengths(tmp_path, config, modules=(*LINEAR[:3], TEXT + "mlp.fc2"), metadata=False):
    """Return alpha / rank of each module of a LoRA with PEFT's config, beside it or in it."""
    state = {f"base_model.model.{name.partition('.')[2]}": t for name, t in diffusers(
        random_pairs(modules), DIALECTS["peft"][0]).items()}
    if metadata:
        state = diffusers(random_pairs(modules), DIALECTS["peft"][0])
    file = save(tmp_path / "adapter_model.safetensors", state, {
        "lora_adapter_metadata": json.dumps(config)} if metadata else None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({} if metadata else config))
    deltas, _ = lora_deltas(open_lora("--lora", file), shapes())
    return [deltas[f"{module}.weight"].alpha / deltas[f"{module}.weight"].rank
            for module in modules]


@pytest.mark.parametrize("patterns, strengths", [
    ({}, [2, 2, 2, 2]),
    ({"to_q": 4, "fc2": 1}, [1, 2, 2, 0.25]),
    ({"o_q": 4, "attn2.to_k": 6}, [2, 1.5, 2, 2]),          # a whole part of the name
    ({"attn1.*": 4, "to_q": 6}, [1, 2, 1, 2]),              # the first pattern that matches
    ({r"attn\d\.(to_q|to_k)": 12}, [3, 3, 2, 2]),
    ({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 2}, [2, 0.5, 2, 2]),
    ({"^down_blocks.*to_q": 2, "^attn2.to_k": 1}, [0.5, 2, 2, 2]),
    ({"^text_model.*": 2}, [2, 2, 2, 0.5])])
@pytest.mark.parametrize("metadata", [False, True])
def test_the_patterns_of_peft_give_modules_their_own_alpha(patterns, strengths, metadata, tmp_path):
    """The values are PEFT's: the pattern matches the end of the name after a point, or all of it.

    The rank is 4, and lora_alpha is 8.
    """
    config = {"lora_alpha": 8, "r": RANK, "alpha_pattern": patterns, "use_rslora": False}
    if metadata:
        config = {f"{part}.{key}": value for key, value in config.items()
                  for part in ("unet", "text_encoder")}
    assert peft_strengths(tmp_path, config, metadata=metadata) == strengths


def test_rslora_divides_alpha_by_the_square_root_of_the_rank(tmp_path):
    config = {"lora_alpha": 8, "r": RANK, "alpha_pattern": {"to_q": 1}, "use_rslora": True}
    assert peft_strengths(tmp_path, config) == [0.5, 4, 4, 4]
    lora = open_lora("--lora", tmp_path, ignore_alpha=True)
    assert {d.alpha / d.rank for d in lora_deltas(lora, shapes())[0].values()} == {1}


def test_the_rank_pattern_of_peft_divides_the_alpha_of_a_whole_lokr(tmp_path):
    shape = mini_weights()[LINEAR[0] + ".weight"].shape
    name = f"base_model.model.{LINEAR[0].removeprefix('unet.')}"
    save(tmp_path / "adapter_model.safetensors", {f"{name}.lokr_w1": torch.ones(1, 1),
                                                  f"{name}.lokr_w2": torch.ones(shape)})
    for pattern, strength in (({}, 2), ({"attn1.to_q": 16}, 0.5)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(
            {"alpha": 8, "r": 4, "rank_pattern": pattern}))
        delta = lora_deltas(open_lora("--lora", tmp_path), shapes())[0][LINEAR[0] + ".weight"]
        assert torch.equal(delta.add_to(torch.zeros(shape)), torch.full(shape, float(strength)))


@pytest.mark.parametrize("patterns", [
    {r"(\w+\.?)+x": 1}, {"(a|a)*": 1}, {"(": 1}, {"*": 1}, {".*" * 9: 1}, ["to_q"], 3], ids=str)
def test_patterns_that_are_wrong_or_slow_to_match_are_rejected(patterns, tmp_path):
    with pytest.raises(InputError, match="adapter_model.safetensors: alpha_pattern .* unsupported"):
        peft_strengths(tmp_path, {"lora_alpha": 8, "alpha_pattern": patterns})
