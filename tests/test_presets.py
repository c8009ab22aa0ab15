"""Presets: the published settings, and that nothing else is mixed into them."""
import dataclasses

import pytest

from mcl import InputError, SampleConfig
from mcl.presets import (
    CLIP_FIELDS,
    DISTILLED_PRESETS,
    PRESETS,
    PUBLISHED_SEMANTIC_RATIO,
    build_config,
)

SINGLE_STEP = {
    "method": "single-step", "timestep_spacing": "motionclone", "sampler": "ddim",
    "cfg_scale": 8.5, "cfg_start_fraction": 0.0, "cfg_end_fraction": 1.0, "motion_weight": 2000.0,
    "guidance_warmup_steps": 10, "guidance_cooldown_steps": 10, "guidance_interval": 1,
    "guidance_repeats": 1, "extraction_timestep": 400, "top_k": 1,
    "guidance_blocks": ("up_blocks.1",), "guidance_block_weights": (), "semantic_scale": 0.0}
INVERSION = {
    "method": "inversion", "inversion_steps": 1000, "timestep_spacing": "linspace",
    "sampler": "ddim", "cfg_scale": 8.5, "guidance_warmup_steps": 10,
    "guidance_cooldown_steps": 0, "guidance_repeats": 1, "top_k": 1,
    "guidance_blocks": ("up_blocks.1", "up_blocks.2"), "semantic_blocks": ("up_blocks.1",),
    "semantic_scale": 42.0, "mask_threshold": 0.3}
FEW_STEPS = {
    "method": "single-step", "motion_weight": 2000.0, "guidance_warmup_steps": 0,
    "guidance_cooldown_steps": 0, "guidance_interval": 1, "guidance_repeats": 3}
LIGHTNING = FEW_STEPS | {"sampler": "ddim", "timestep_spacing": "trailing", "cfg_scale": 1.0}
PUBLISHED = {
    "camera": SINGLE_STEP | {"steps": 100, "guidance_steps": 50, "guidance_noise_range": 0.3},
    "object": SINGLE_STEP | {"steps": 300, "guidance_steps": 180, "guidance_noise_range": 0.4},
    "image": SINGLE_STEP | {"steps": 100, "guidance_steps": 40, "guidance_noise_range": 0.3},
    "sketch": SINGLE_STEP | {"steps": 200, "guidance_steps": 120, "guidance_noise_range": 0.4},
    "inversion-200": INVERSION | {"steps": 200, "guidance_steps": 120},
    "inversion-500": INVERSION | {"steps": 500, "guidance_steps": 300},
    "lightning-2": LIGHTNING | {"steps": 2, "guidance_steps": 1},
    "lightning-4": LIGHTNING | {"steps": 4, "guidance_steps": 2},
    "lightning-8": LIGHTNING | {"steps": 8, "guidance_steps": 3},
    "animatelcm": FEW_STEPS | {"steps": 6, "guidance_steps": 2, "sampler": "lcm",
                               "timestep_spacing": "lcm", "cfg_scale": 2.0}}
# Settings that differ from every preset in every field that a preset can set.
OTHER = SampleConfig(
    steps=7, guidance_steps=6, guidance_noise_range=0.7, timestep_spacing="leading", cfg_scale=3.0,
    cfg_start_fraction=0.2, cfg_end_fraction=0.5, negative_prompt="blurry", motion_weight=5.0,
    guidance_warmup_steps=1, guidance_cooldown_steps=2, guidance_interval=4, guidance_repeats=5,
    extraction_timestep=300, top_k=2, guidance_blocks=("mid_block",), guidance_block_weights=(7.0,),
    inversion_steps=9, semantic_scale=1.0, semantic_blocks=("up_blocks.3",), mask_threshold=0.9,
    num_frames=24, height=64, width=128, context_length=8, context_overlap=0.5, closed_loop=True,
    memory="low")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model_settings", [SampleConfig(), OTHER, DISTILLED_PRESETS["animatelcm"]],
                         ids=["defaults", "other", "few steps"])
def test_preset_gives_the_published_settings_over_any_model(name, model_settings):
    config = build_config(model_settings, name)
    assert {field: getattr(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    fields = [f.name for f in dataclasses.fields(SampleConfig)]
    expected = {field: getattr(model_settings if field in CLIP_FIELDS else PRESETS[name], field)
                for field in fields}
    assert dataclasses.asdict(config) == expected


def test_published_motion_weights_of_the_inversion_are_per_map():
    """The loss is a mean over each map, summed: 1667 in up_blocks.1, 833 in up_blocks.2."""
    for name in ("inversion-200", "inversion-500"):
        config = build_config(SampleConfig(), name)
        assert {block: weight * config.motion_weight for block, weight in
                config.block_weight_map.items()} == pytest.approx(
                    {"up_blocks.1": 1667, "up_blocks.2": 833})



def test_settings_replace_those_of_a_preset():
    config = build_config(OTHER, "camera", steps=60, height=256)
    assert (config.steps, config.guidance_steps, config.height, config.width) == (60, 50, 256, 128)


def test_new_guidance_blocks_drop_the_weights_of_the_old_ones():
    assert build_config(OTHER, guidance_blocks=("up_blocks.1",)).guidance_block_weights == ()
    assert build_config(OTHER, guidance_block_weights=(3.0,)).guidance_block_weights == (3.0,)


def test_subject_sets_the_published_ratio_of_semantic_to_motion_weight():
    words = {"subject": ("cat", "dog")}
    config = build_config(SampleConfig(), **words)
    assert config.semantic_scale == pytest.approx(2000 * 42 / 1667)
    assert build_config(SampleConfig(), **words, motion_weight=1667.0).semantic_scale == (
        pytest.approx(42))
    assert build_config(SampleConfig(), **words, semantic_scale=0.0).semantic_scale == 0
    assert build_config(SampleConfig(), "inversion-200", **words).semantic_scale == 42
    assert PUBLISHED_SEMANTIC_RATIO == 42 / 1667


@pytest.mark.parametrize("preset, settings, message", [
    ("camra", {}, "preset = 'camra' is not known: .*camera, object"),
    (None, {"guidence_steps": 3}, "'guidence_steps': did you mean 'guidance_steps'"),
    (None, {"zzz": 3}, "unknown setting 'zzz': did you mean 'steps', 'guidance_steps', .*memory"),
    ("camera", {"steps": 40}, "preset camera guides 50 steps: use steps = 50 or more"),
    (None, {"steps": 5}, "this model guides 6 steps"),
    ("camera", {"steps": 0}, "preset camera guides"),
    (None, {"steps": 1001}, "between 1 and 1000")])
def test_unknown_preset_or_setting_is_rejected_with_a_suggestion(preset, settings, message):
    with pytest.raises(InputError, match=message):
        build_config(OTHER, preset, **settings)
