"""Published settings by name, and the settings of one run.

Each preset is a complete `SampleConfig`: nothing of a model's own settings is mixed into it but the
size of the clip, its context windows, and the texts of the user (`CLIP_FIELDS`).
"""
import dataclasses
import difflib
from typing import Any

from .config import SampleConfig
from .errors import InputError

PUBLISHED_SEMANTIC_RATIO = 42 / 1667        # weight of the semantic loss to that of the motion loss
# Fields that describe the clip to be made. A preset leaves them as they are.
CLIP_FIELDS = ("negative_prompt", "ref_prompt", "subject", "num_frames", "height", "width",
               "context_length", "context_overlap", "closed_loop", "memory")
# The paper's first form (arXiv 2406.05338v1 to v3). The loss weighs 1667 in up_blocks.1, and 833 in
# up_blocks.2.
_INVERSION: dict[str, Any] = {
    "method": "inversion", "inversion_steps": 1000, "timestep_spacing": "linspace",
    "guidance_warmup_steps": 10, "guidance_cooldown_steps": 0, "motion_weight": 1667.0,
    "guidance_blocks": ("up_blocks.1", "up_blocks.2"), "guidance_block_weights": (1.0, 833 / 1667),
    "semantic_scale": 42.0, "semantic_blocks": ("up_blocks.1",)}
# Distilled motion modules take few steps. The steps from timestep 700 on are guided, three times
# each, because one guided pass in so few steps loses part of the motion.
_FEW_STEPS: dict[str, Any] = {
    "guidance_repeats": 3, "guidance_warmup_steps": 0, "guidance_cooldown_steps": 0}
# Presets for distilled motion modules: AnimateDiff-Lightning (arXiv 2403.12706) and AnimateLCM
# (arXiv 2402.00769).
DISTILLED_PRESETS: dict[str, SampleConfig] = {
    **{f"lightning-{steps}": SampleConfig(
        steps=steps, guidance_steps=guided, timestep_spacing="trailing", cfg_scale=1.0,
        **_FEW_STEPS) for steps, guided in ((2, 1), (4, 2), (8, 3))},
    "animatelcm": SampleConfig(steps=6, guidance_steps=2, timestep_spacing="lcm", sampler="lcm",
                               cfg_scale=2.0, **_FEW_STEPS)}
PRESETS: dict[str, SampleConfig] = {
    "camera": SampleConfig(),
    "object": SampleConfig(steps=300, guidance_steps=180, guidance_noise_range=0.4),
    "image": SampleConfig(steps=100, guidance_steps=40),
    "sketch": SampleConfig(steps=200, guidance_steps=120, guidance_noise_range=0.4),
    "inversion-200": SampleConfig(steps=200, guidance_steps=120, **_INVERSION),
    "inversion-500": SampleConfig(steps=500, guidance_steps=300, **_INVERSION), **DISTILLED_PRESETS}


def build_config(base: SampleConfig, preset: str | None = None, **settings: Any) -> SampleConfig:
    """Return the settings of one run: the model's own, then the preset's, then the given ones.

    Args:
        base: The model's own settings.
        preset: One of `PRESETS`.
        settings: Fields of `SampleConfig`.

    Raises:
        InputError: If the preset or a setting is not known, or a value is not legal.
    """
    for name in set(settings) - set(vars(base)):
        close = difflib.get_close_matches(name, vars(base), n=1) or vars(base)
        raise InputError(f"unknown setting {name!r}: did you mean {', '.join(map(repr, close))}?")
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset = {preset!r} is not known: use one of {', '.join(PRESETS)}")
    clip = {name: getattr(base, name) for name in CLIP_FIELDS}
    config = base if preset is None else dataclasses.replace(PRESETS[preset], **clip)
    guided = config.guidance_steps
    if "guidance_steps" not in settings and settings.get("steps", guided) < guided:
        raise InputError(f"{f'preset {preset}' if preset else 'this model'} guides {guided} steps: "
                         f"use steps = {guided} or more, or set guidance_steps as well")
    if "guidance_blocks" in settings:
        settings.setdefault("guidance_block_weights", ())   # the old ones belong to other blocks
    if settings.get("subject") and not config.semantic_scale:
        weight = settings.get("motion_weight", config.motion_weight)
        settings.setdefault("semantic_scale", PUBLISHED_SEMANTIC_RATIO * weight)
    return dataclasses.replace(config, **settings)
