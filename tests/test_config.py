"""Configs: legal ranges, conditions between fields, and their dict form."""
import dataclasses
import math

import pytest

from mcl import InputError, ModelConfig, SampleConfig
from mcl.config import (
    CLIPTextConfig,
    SparseCtrlConfig,
    UNetConfig,
    VAEConfig,
    from_dict,
)
from tests.conftest import SMALL

CONFIGS = (SampleConfig, UNetConfig, VAEConfig, CLIPTextConfig, SparseCtrlConfig,
           ModelConfig)


@pytest.mark.parametrize("changes, message", [
    ({"guidance_steps": 101}, "guidance_steps = 101 .* between 0 and 100, the number of steps"),
    ({"top_k": 17}, "top_k = 17 .* between 1 and 16, the number of frames, or 0 for all"),
    ({"steps": 0}, "steps = 0 .* between 1 and 1000"), ({"steps": 1.5}, "steps = 1.5 .* whole"),
    ({"steps": True}, "steps = True .* whole number"),
    ({"closed_loop": 1}, "closed_loop = 1 .* true or false"),
    ({"timestep_spacing": "odd"}, "one of motionclone, linspace, leading, trailing, lcm"),
    ({"sampler": "euler"}, "sampler = 'euler' .* one of ddim, lcm"),
    ({"timestep_spacing": "lcm"}, "steps = 100 .* between 1 and 50 with timestep_spacing lcm"),
    ({"sampler": "lcm", "semantic_scale": 1.0}, "semantic_scale = 1.0 .* 0 with sampler lcm"),
    ({"motion_weight": float("nan")}, "motion_weight = nan .* finite number"),
    ({"motion_weight": 1e39}, "motion_weight = 1e.39"),
    ({"guidance_noise_range": 0.0}, "guidance_noise_range = 0.0 .* above 0"),
    ({"context_overlap": 1.0}, "context_overlap = 1.0 .* between 0 and 0.9"),
    ({"guidance_blocks": ()}, "guidance_blocks = .* at least one block"),
    ({"guidance_blocks": "up_blocks.1"}, "guidance_blocks = 'up_blocks.1' .* a list, each text"),
    ({"guidance_block_weights": (1.0, 2.0)}, "empty, or 1 numbers"),
    ({"guidance_block_weights": (-1.0,)}, "guidance_block_weights"),
    ({"semantic_blocks": []}, "semantic_blocks = .* at least one block"),
    ({"subject": ("ball",)}, "subject = .* two words"), ({"memory": "some"}, "auto, low, high"),
    ({"guidence_steps": 3}, "SampleConfig has no setting 'guidence_steps'")])
def test_illegal_setting_is_rejected_with_the_legal_values(changes, message):
    with pytest.raises(InputError, match=message):
        from_dict(SampleConfig, changes)


@pytest.mark.parametrize("kind", CONFIGS)
def test_values_just_beyond_the_bounds_are_rejected(kind):
    for field in dataclasses.fields(kind):
        for bound, sign in (("low", -1), ("high", 1)):
            limit = field.metadata.get(bound, math.inf)
            if field.type in (int, float) and math.isfinite(limit):
                beyond = (limit + sign if field.type is int
                          else math.nextafter(limit, sign * math.inf))
                with pytest.raises(InputError, match=f"{field.name} = .* is out of range"):
                    kind(**{field.name: beyond})


@pytest.mark.parametrize("kind, changes, message", [
    (UNetConfig, {"block_out_channels": [320, 650]}, "block_out_channels = .* multiples of 32"),
    (UNetConfig, {"block_out_channels": []}, "1 to 8 multiples"),
    (UNetConfig, {"cross_attention_levels": [2, 0]}, "some of 0 to 3, in rising order"),
    (VAEConfig, {"scaling_factor": 0}, "scaling_factor = 0 .* above 0"),
    (CLIPTextConfig, {"hidden_size": 769}, "hidden_size = 769 .* a multiple of 12"),
    (SparseCtrlConfig, {"kind": "depth"}, "kind = 'depth' .* rgb, scribble"),
    (ModelConfig, {"vae": {"latent_channels": 8}}, "vae = .* 4 latent channels"),
    (ModelConfig, {"text_encoder": {"hidden_size": 12}}, "text_encoder = .* hidden size 768"),
    (ModelConfig, {"unet": 3}, "UNetConfig is 3: it must be settings by name"),
    (ModelConfig, {"unet": {"heads": 3}}, "UNetConfig has no setting 'heads'")])
def test_impossible_network_is_rejected(kind, changes, message):
    with pytest.raises(InputError, match=message):
        from_dict(kind, changes)


@pytest.mark.parametrize("config", [SMALL, ModelConfig()])
def test_config_is_unchanged_by_its_dict_form(config):
    assert from_dict(ModelConfig, dataclasses.asdict(config)) == config


def test_block_weights_are_by_name():
    config = SampleConfig(guidance_blocks=["up_blocks.1", "up_blocks.2"],
                          guidance_block_weights=[1, 0.5])
    assert config.block_weight_map == {"up_blocks.1": 1, "up_blocks.2": 0.5}
    assert SampleConfig().block_weight_map == {}


def test_every_setting_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(SampleConfig))
