"""Semantic guidance: tokens, masks and the loss, each against its equation written out in numpy."""
import dataclasses

import numpy as np
import pytest
import torch

from mcl import (
    AttentionMaps,
    AttentionRequest,
    InputError,
    extract_motion,
    invert_reference,
    make_subject_masks,
    sample,
    semantic_guidance,
)
from mcl.semantic import (
    Masks,
    binary_masks,
    gaussian_masks,
    masked_key_means,
    masked_mean,
    noised_reference_attention,
    semantic_loss,
    subject_mask,
    subject_tokens,
)
from tests.conftest import randn


def test_tokens_of_a_word_are_at_all_of_its_positions(small):
    prompt = "a photorealistic zebrafish, a Zebra"
    assert [len(ids) for _, ids in small.tokenizer.split(prompt)] == [1, 2, 2, 1, 1, 1]
    assert subject_tokens(small, prompt, "zebrafish") == [4, 5]
    assert subject_tokens(small, prompt, "ZEBRA") == [8]
    assert subject_tokens(small, prompt, "a") == [1, 7]
    assert subject_tokens(small, prompt, "photorealistic zebrafish") == [2, 3, 4, 5]


@pytest.mark.parametrize("prompt, word, message", [
    ("a photorealistic zebrafish, a Zebra", "fish",
     "'fish' is not in the prompt .*: name a word of it \\(a, photorealistic, zebrafish, a, zebra"),
    ("", "fish", "'fish' is not in the prompt '': .*it has none"),
    ("a fish", "", "'' is not in the prompt"),
    ("a " * 75 + "fish", "fish", "'fish' is not among the first 75 tokens")])
def test_word_that_is_not_read_is_rejected(small, prompt, word, message):
    with pytest.raises(InputError, match=message):
        subject_tokens(small, prompt, word)


def cross_attention(*layers, grid):
    names = [str(i) for i in range(len(layers))]
    return AttentionMaps(cross=dict(zip(names, layers)), grids=dict.fromkeys(names, grid))


def test_mask_is_where_the_normalized_attention_is_above_the_threshold():
    """One frame with a bright corner, one with a bright column, two layers that agree."""
    frames = np.zeros((2, 2, 3), np.float32)
    frames[0, 0, 0], frames[1, :, 2], frames[1, 0, 1] = 1.0, 0.8, 0.2
    maps = [torch.from_numpy(frames).reshape(2, 1, 6, 1).expand(2, 4, 6, 7) * scale + 0.1
            for scale in (1.0, 0.5)]
    maps[0] = maps[0].clone()
    maps[0][..., 3:] = randn(2, 4, 6, 4).abs() * 9          # attention to other words
    mask = subject_mask(cross_attention(*maps, grid=(2, 3)), [1, 2], 0.3)
    assert mask.tolist() == [[[True, False, False], [False, False, False]],
                             [[False, False, True], [False, False, True]]]
    uniform = cross_attention(torch.full((1, 2, 6, 7), 0.3), grid=(2, 3))
    assert not subject_mask(uniform, [1], 0.3).any()


@pytest.mark.parametrize("threshold, mask", [(0.49, [False, True, True]),
                                             (0.5, [False, False, True])])
def test_position_at_the_threshold_is_not_in_the_mask(threshold, mask):
    """The normalized attention of the three positions is exactly 0, 0.5 and 1."""
    attention = cross_attention(torch.tensor([0.25, 0.5, 0.75]).reshape(1, 1, 3, 1), grid=(1, 3))
    assert subject_mask(attention, [0], threshold).tolist() == [[mask]]


def test_gaussian_masks_are_the_equation():
    mask = randn(3, 6, 10) > 0.5
    mask[2] = False                                         # a frame without a subject
    foreground, background = gaussian_masks(mask)
    for f in range(2):
        rows, columns = np.nonzero(mask[f].numpy())
        y, x = np.mgrid[:6, :10]
        sigma = 5 / 16 * (6 * 10) ** 0.5
        gauss = np.exp(-((y - rows.mean()) ** 2 + (x - columns.mean()) ** 2) / (2 * sigma ** 2))
        assert np.allclose(foreground[f], gauss * mask[f].numpy(), atol=1e-6)
        assert np.allclose(background[f], (1 - gauss) * (1 - mask[f].numpy()), atol=1e-6)
    assert float(foreground[2].abs().sum()) == 0 and background.isfinite().all()


def test_masked_mean_is_zero_in_frames_without_weight():
    keys, weight = randn(6, 2, 5), torch.zeros(2, 2, 3)
    weight[0, 1, 2], weight[0, 0, 0] = 1.0, 3.0
    expected = (3 * keys[0, 0] + keys[5, 0]) / 4
    assert torch.allclose(masked_mean(keys, (2, 3), weight), torch.stack([expected, 0 * expected]))


def test_semantic_loss_is_the_equation():
    """Two layers, one on a grid twice as fine; the foreground of one frame is empty."""
    grids = {"a": (4, 6), "b": (8, 12)}
    keys = {"a": randn(24, 3, 5), "b": randn(96, 3, 4, seed=1)}
    unguided_keys = {"a": randn(24, 3, 5, seed=2), "b": randn(96, 3, 4, seed=3)}
    guided, unguided = (AttentionMaps(temporal_keys=k, grids=grids) for k in (keys, unguided_keys))
    masks = gaussian_masks(randn(3, 4, 6, seed=4) > 0)
    unguided_masks = binary_masks(randn(3, 4, 6, seed=5) > 0)
    masks.foreground[1] = 0
    expected = 0.0
    for name, factor in (("a", 1), ("b", 2)):
        for weight, unguided_weight in zip(masks, unguided_masks):
            square = np.zeros((3, keys[name].shape[-1]))
            for f in range(3):
                w, v = (np.repeat(np.repeat(m[f].numpy(), factor, 0), factor, 1).reshape(-1, 1)
                        for m in (weight, unguided_weight))
                if w.sum() and v.sum():
                    mean, unguided_mean = ((m * k[name][:, f].numpy()).sum(0) / m.sum()
                                           for m, k in ((w, keys), (v, unguided_keys)))
                    square[f] = (mean - unguided_mean) ** 2
            expected += square.mean()
    means = masked_key_means(unguided, unguided_masks)
    assert float(semantic_loss(guided, masks, means)) == pytest.approx(expected, rel=1e-5)
    assert float(semantic_loss(unguided, unguided_masks, means)) == 0
    whole = sum(((keys[n].numpy().mean(0) - unguided_keys[n].numpy().mean((0, 1))) ** 2).mean()
                for n in keys)
    assert float(semantic_loss(guided, None, masked_key_means(unguided, None))) == pytest.approx(
        whole, rel=1e-5)


def test_requested_keys_and_cross_attention_are_those_of_the_layers(small):
    """Compares them with the outputs of the layers' own projections."""
    unet, z, text = small.unet, randn(1, 4, 3, 8, 12), small.encode_text(["a red star"])
    block = "up_blocks.1"
    outputs = {}
    hooks = [module.register_forward_hook(
        lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module in unet.named_modules() if name.startswith(block)]
    layer = unet.resolve_layers(AttentionRequest((block,))).temporal[1]
    attention = unet.forward_to_attention(
        z, 500, text, AttentionRequest(temporal_keys=(layer,), cross=(block,)))
    for hook in hooks:
        hook.remove()
    assert list(attention.temporal_keys) == [layer] and not attention.temporal
    assert torch.equal(attention.temporal_keys[layer], outputs[f"{layer}.to_k"])
    cross = f"{block}.attentions.1.transformer_blocks.0.attn2"
    q, k = (outputs[f"{cross}.{name}"].unflatten(-1, (2, -1)).transpose(1, 2)
            for name in ("to_q", "to_k"))
    expected = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    assert len(attention.cross) == 2 and attention.grids[cross] == (4, 6)
    probs = attention.cross[cross]
    assert probs.shape == (3, 2, 4 * 6, 77)
    assert torch.allclose(probs.transpose(0, 1).flatten(1, 2), expected[0], atol=1e-6)


def test_semantic_guidance_descends_the_semantic_loss(small):
    """Its effect on one step is the gradient computed here from the unguided clip's keys."""
    config = dataclasses.replace(small.config.sample, motion_weight=3e4, semantic_scale=50.0,
                                 semantic_blocks=("up_blocks.1", "up_blocks.2"),
                                 mask_threshold=0.4)
    prompt, start, reference = "a red star", randn(1, 4, 4, 8, 8, seed=3), randn(1, 4, 4, 8, 8)
    noise = randn(1, 4, 4, 8, 8, seed=1)
    motion = extract_motion(small, reference, noise=noise)
    subject = make_subject_masks(
        small, prompt, "star", "a ball", "ball",
        noised_reference_attention(small, reference, "a ball", config, noise), config)
    guidance = semantic_guidance(small, prompt, start, config, subject)
    first, second = list(sample(small, prompt, motion, config, guidance=[guidance],
                                latents=start))[:2]
    motion_only = next(sample(small, prompt, motion, config, latents=start))
    unguided = next(sample(small, prompt, None, config, latents=start))

    text = small.encode_text([prompt])
    request = guidance.request._replace(cross=("up_blocks.1",))
    means, masks = [], subject.masks(first.timestep)
    for z, t in ((start, first.timestep), (unguided.latents, second.timestep)):
        attention = small.unet.forward_to_attention(z, t, text, request)
        mask = subject_mask(attention, subject_tokens(small, prompt, "star"), 0.4)
        means.append(masked_key_means(attention, binary_masks(mask)))
    z = start.clone().requires_grad_()
    attention = small.unet.forward_to_attention(z, first.timestep, text, guidance.request)
    assert {name[:11] for name in attention.temporal_keys} == {"up_blocks.1", "up_blocks.2"}
    grad, = torch.autograd.grad(semantic_loss(attention, masks, means[0]), z)
    size_ratio, warmup = 4 * 8 * 8 / (16 * 64 * 64), 1 / 2
    noises = [(1 - small.schedule.alpha_bar(s.timestep)).sqrt() for s in (first, second)]
    expected = -noises[0] * noises[1] * 50.0 * warmup * size_ratio * grad
    difference = first.latents - motion_only.latents
    assert (difference - expected).norm() < 1e-2 * expected.norm()

    attention = small.unet.forward_to_attention(first.latents, second.timestep, text,
                                                guidance.request)
    assert guidance.weight == pytest.approx(50 / 3e4)
    assert float(guidance.loss(attention, second.timestep)) == pytest.approx(float(
        semantic_loss(attention, masks, means[1])), rel=1e-4)


@pytest.mark.parametrize("name", ["semantic_scale", "motion_weight"])
def test_semantic_guidance_with_a_weight_of_zero_is_rejected(small, name):
    config = dataclasses.replace(small.config.sample, **{"semantic_scale": 1.0, name: 0.0})
    with pytest.raises(InputError, match="must both be above 0"):
        semantic_guidance(small, "a star", randn(1, 4, 4, 8, 8), config)


def test_subject_masks_of_an_inversion_change_with_the_timestep(small):
    config = dataclasses.replace(small.config.sample, inversion_steps=4)
    inverted = invert_reference(small, randn(1, 4, 4, 8, 8), "a ball", config)
    subject = make_subject_masks(small, "a red star", "star", "a ball", "ball", inverted.attention,
                                 config)
    first, second = (subject.masks(t) for t in sorted(inverted.latents)[:2])
    assert isinstance(first, Masks) and first.foreground.shape == (4, 4, 4)
    assert not torch.equal(first.foreground, second.foreground)
