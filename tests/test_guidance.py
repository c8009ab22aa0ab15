"""Guidance: its checks, its weight at each step, and its gradient."""
import dataclasses

import pytest
import torch

from mcl import (
    AttentionMaps,
    AttentionRequest,
    Guidance,
    InputError,
    Motion,
    SampleConfig,
    motion_guidance,
)
from mcl.guidance import guidance_gradient, guidance_weight, resolve_guidance
from tests.conftest import randn

LAYER = ("up_blocks.1.motion_modules.{}.temporal_transformer.transformer_blocks.0."
         "attention_blocks.{}")


def total(maps, t):
    return sum(x.sum() for x in (*maps.temporal.values(), *maps.temporal_keys.values()))


def test_weight_rises_falls_and_is_the_published_one_at_the_published_size():
    config, num_elements = SampleConfig(), 16 * 64 * 64
    weights = [guidance_weight(i, config, num_elements) for i in range(51)]
    assert weights[0] == 200 and weights[9] == weights[40] == 2000
    assert weights[41] == 1800 and weights[49] == 200 and weights[50] == 0
    assert guidance_weight(20, config, num_elements // 4) == 500
    config = dataclasses.replace(config, guidance_warmup_steps=0, guidance_cooldown_steps=0)
    assert {guidance_weight(i, config, num_elements) for i in range(50)} == {2000}


def test_gradient_is_that_of_the_weighted_sum_of_losses():
    z = randn(2, 3).requires_grad_()
    maps = AttentionMaps({"a": z ** 2, "b": z ** 3}, {"a": z.exp()}, frame_offset=5)
    guidance = [Guidance(lambda m, t: t * m.temporal["a"].sum(), ("a",), weight=0.5),
                Guidance(lambda m, t: m.frame_offset * m.temporal_keys["a"].sum(), ("a",),
                         "temporal_keys", weight=-2.0)]
    g, grad = guidance_gradient(guidance, maps, z, 7)
    assert not g.requires_grad
    assert torch.allclose(g, 3.5 * (z ** 2).sum() - 10 * z.exp().sum())
    assert torch.allclose(grad, 7 * z - 10 * z.exp(), atol=1e-5)


def test_loss_receives_only_the_attention_that_it_names():
    z, calls = randn(2, 3).requires_grad_(), []
    maps = AttentionMaps({"a": z, "b": z}, {"a": z})
    guidance_gradient([Guidance(lambda m, t: calls.append(m) or total(m, t), ("b",))], maps, z, 7)
    assert [(list(m.temporal), list(m.temporal_keys)) for m in calls] == [(["b"], [])]


def test_gradient_in_half_precision_is_not_rounded_to_zero():
    z = torch.ones(4, requires_grad=True)
    maps = AttentionMaps({"a": z.half()})
    tiny = 2.0 ** -26                   # half precision holds 2**-24 and more
    _, grad = guidance_gradient([Guidance(lambda m, t: tiny * m.temporal["a"].float().sum(),
                                          ("a",))], maps, z, 7)
    assert torch.equal(grad, torch.full((4,), tiny))


@pytest.mark.parametrize("layers", ["up_blocks.1", ("up_blocks.1",), ["up_blocks.1"]])
def test_resolved_guidance_has_full_layer_names(small, layers):
    resolved, = resolve_guidance([Guidance(total, layers, "temporal_keys", 3.0)], None, small,
                                 small.config.sample)
    names = tuple(LAYER.format(m, k) for m in range(2) for k in range(2))
    assert resolved == Guidance(total, names, "temporal_keys", 3.0)
    assert resolved.request == AttentionRequest(temporal_keys=names)


@pytest.mark.parametrize("guidance, message", [
    (Guidance(total), "guidance = .* must be a list"), (total, "must be a list"),
    ([total], r"guidance = \[<function to.* must be a list, \[Guidance\(loss\), ...\]"),
    ([Guidance(total), (total, "up_blocks.1")], "guidance = .* must be a list"),
    ([Guidance(total, "up_block.1")], "'up_block.1' has no temporal attention"),
    ([Guidance(total, "up_blocks.0", "cross")], "'up_blocks.0' has no cross-attention")])
def test_guidance_that_the_model_cannot_use_is_rejected(small, guidance, message):
    with pytest.raises(InputError, match=message):
        resolve_guidance(guidance, None, small, small.config.sample)


@pytest.mark.parametrize("arguments, message", [
    ({"loss": "up"}, "loss = 'up' is out of range: it must be a function"),
    ({"kind": "temporal_map"}, "kind = 'temporal_map' .* temporal, temporal_keys, cross"),
    ({"weight": float("nan")}, "weight = nan"),
    ({"weight": "2"}, "weight = '2'")])
def test_impossible_guidance_is_rejected_when_it_is_created(arguments, message):
    with pytest.raises(InputError, match=message):
        Guidance(**{"loss": total} | arguments)


def test_motion_guidance_reads_the_layers_of_the_motion():
    values, indices = {"up_blocks.1.x": torch.ones(1, 1, 2, 1)}, torch.zeros(1, 1, 2, 1).long()
    guidance = motion_guidance(Motion(values, {"up_blocks.1.x": indices}), {"up_blocks.1": 3.0})
    maps = AttentionMaps({"up_blocks.1.x": torch.full((1, 1, 2, 2), 0.5)})
    assert guidance.request == AttentionRequest(temporal=("up_blocks.1.x",))
    assert float(guidance.loss(maps, 0)) == 3 * 0.25
