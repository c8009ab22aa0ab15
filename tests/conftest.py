"""Fixtures of the tests: small random models, and the built-in demo model."""
import dataclasses
import functools
import gc
import os
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mcl import Model, ModelConfig, load_model
from mcl.checkpoints import convert
from mcl.config import CLIPTextConfig, SampleConfig, SparseCtrlConfig, UNetConfig, VAEConfig
from tests.processes import ProcessStarter
from weights.training.clip_metrics import render_template

if "PYTEST_XDIST_WORKER" in os.environ:     # several workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"     # for the programs that tests start


def pytest_sessionfinish():
    """Do not search what is left for garbage while the process ends."""
    gc.freeze()


def skip_on_meta(function):
    """Return a function of torch.nn.init that spends no time on tensors without values."""
    @functools.wraps(function)
    def wrapper(tensor, *args, **kwargs):
        return tensor if tensor.is_meta else function(tensor, *args, **kwargs)
    return wrapper


for name in ("kaiming_uniform_", "normal_", "uniform_"):
    setattr(nn.init, name, skip_on_meta(getattr(nn.init, name)))
convert.build_on_meta = functools.cache(convert.build_on_meta)      # a plan reads only its shapes


SMALL = ModelConfig(
    name="small",
    unet=UNetConfig(block_out_channels=(16, 24, 32), layers_per_block=1,
                    cross_attention_levels=(0, 1), num_attention_heads=2, cross_attention_dim=12,
                    norm_num_groups=4, motion_num_attention_heads=2, motion_max_seq_length=24),
    vae=VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4),
    text_encoder=CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=1,
                                num_attention_heads=2),
    sample=SampleConfig(steps=4, guidance_steps=3, num_frames=4, height=32, width=32,
                        guidance_warmup_steps=2, guidance_cooldown_steps=2))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights far from their initial ones, so that every branch has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        scale = 1 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.2
        base = 1.0 if p.ndim == 1 and p.mean() == 1 else 0.0
        p.data = base + scale * torch.randn(p.shape, generator=generator)
    return module.requires_grad_(False).eval()


def random_model(config: ModelConfig) -> Model:
    """Return a model whose networks have the same random weights in every run."""
    model = Model(config)
    for network in model.children():
        randomize(network)
    return model


@pytest.fixture(scope="session")
def small():
    return random_model(SMALL)


@pytest.fixture(scope="session")
def small_rgb():
    """Return the small model with SparseCtrl for images."""
    return random_model(dataclasses.replace(
        SMALL, sparsectrl=SparseCtrlConfig("rgb", motion_num_attention_heads=2)))


@pytest.fixture(scope="session")
def embedded():
    return load_model(device="cpu")


@pytest.fixture(scope="session")
def start():
    """Return a function that starts a script in a process of its own, quickly."""
    starter = ProcessStarter()
    yield starter
    starter.close()


@pytest.fixture
def drawn_words(monkeypatch):
    """Replace the font's emoji by patches of six colors, 2.4 radii wide and 1.6 high."""
    def sprite(word):
        colors = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(crc32(word.encode())))
        patches = colors.repeat_interleave(19, dim=1).repeat_interleave(19, dim=2)
        return F.pad(torch.cat([patches, torch.ones(1, 38, 57)]), (20, 19, 29, 29))

    render_template.cache_clear()
    for module in ("photos", "held_out", "clip_metrics", "train"):
        monkeypatch.setattr(f"weights.training.{module}.emoji_sprite", sprite)
    yield sprite
    render_template.cache_clear()


@pytest.fixture(scope="session")
def quick(embedded):
    """Return settings of few steps, enough for guidance to have an effect."""
    return dataclasses.replace(embedded.config.sample, steps=8, guidance_steps=5,
                               guidance_warmup_steps=2, guidance_cooldown_steps=2)
