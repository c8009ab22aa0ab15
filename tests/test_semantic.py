"""Semantic guidance: tokens, masks and the loss, each against its equation written out in numpy."""
import dataclasses

import numpy as np
import pytest
import torch

from mcl import (InputError, AttentionRequest, extract_motion, invert_reference, sample, semantic_guidance,
                 make_subject_masks)
from mcl.semantic import (Masks, masked_key_means, infer_grid, noised_reference_attention, binary_masks, semantic_loss, gaussian_masks,
                          subject_mask, subject_tokens)

from tests.conftest import randn


def test_a_words_tokens_wherever_it_stands(small):
    ids = small.tokenizer.encode("a photorealistic zebrafish, a zebra")
    assert [small.tokenizer.decode([i]) for i in ids] == [
        "a", "photo", "realistic", "zebra", "fish", ",", "a", "zebra"]
    prompt = "a photorealistic zebrafish, a Zebra"
    assert subject_tokens(small, prompt, "zebrafish") == [4, 5]
    assert subject_tokens(small, prompt, "ZEBRA") == [8]
    assert subject_tokens(small, prompt, "a") == [1, 7]
    assert subject_tokens(small, prompt, "photorealistic zebrafish") == [2, 3, 4, 5]
    with pytest.raises(InputError, match="'fish' is not in the prompt .* it has a, photorealis"):
        subject_tokens(small, prompt, "fish")


def test_mask_of_a_hand_made_map():
    """One frame with a bright corner, one with a bright column, two layers that agree on it."""
    pictures = np.zeros((2, 2, 3), np.float32)
    pictures[0, 0, 0], pictures[1, :, 2], pictures[1, 0, 1] = 1.0, 0.8, 0.2
    maps = [torch.from_numpy(pictures).reshape(2, 1, 6, 1).expand(2, 4, 6, 7) * s + 0.1
            for s in (1.0, 0.5)]
    maps[0] = maps[0].clone()
    maps[0][..., 3:] = randn(2, 4, 6, 4).abs() * 9          # of other words
    mask = subject_mask(maps, [1, 2], (2, 3), 0.3)
    assert mask.tolist() == [[[True, False, False], [False, False, False]],
                             [[False, False, True], [False, False, True]]]
    assert not subject_mask([torch.full((1, 2, 6, 7), 0.3)], [1], (2, 3), 0.3).any()


def test_a_place_at_the_threshold_is_not_in_the_mask():
    """The shares of the three places are exactly 0, 0.5 and 1."""
    maps = [torch.tensor([0.25, 0.5, 0.75]).reshape(1, 1, 3, 1)]
    for threshold, mask in ((0.49, [False, True, True]), (0.5, [False, False, True])):
        assert subject_mask(maps, [0], (1, 3), threshold).tolist() == [[mask]]


def test_softened_masks_are_the_equation():
    mask = randn(3, 6, 10) > 0.5
    mask[2] = False                                         # a frame without a subject
    front, back = gaussian_masks(mask)
    for f in range(2):
        rows, columns = np.nonzero(mask[f].numpy())
        y, x = np.mgrid[:6, :10]
        sigma = 5 / 16 * (6 * 10) ** 0.5
        gauss = np.exp(-((y - rows.mean()) ** 2 + (x - columns.mean()) ** 2) / (2 * sigma ** 2))
        assert np.allclose(front[f], gauss * mask[f].numpy(), atol=1e-6)
        assert np.allclose(back[f], (1 - gauss) * (1 - mask[f].numpy()), atol=1e-6)
    assert float(front[2].abs().sum()) == 0 and back.isfinite().all()


def test_loss_is_the_equation():
    """Two layers, one on a grid twice as fine; the foreground of one frame is empty."""
    keys = {"a": randn(24, 3, 5), "b": randn(96, 3, 4, seed=1)}
    own = {"a": randn(24, 3, 5, seed=2), "b": randn(96, 3, 4, seed=3)}
    masks, own_masks = gaussian_masks(randn(3, 4, 6, seed=4) > 0), binary_masks(randn(3, 4, 6, seed=5) > 0)
    masks.foreground[1] = 0
    expected = 0.0
    for name, finer in (("a", 1), ("b", 2)):
        for weight, own_weight in zip(masks, own_masks):
            square = np.zeros((3, keys[name].shape[-1]))
            for f in range(3):
                w, v = (np.repeat(np.repeat(m[f].numpy(), finer, 0), finer, 1).reshape(-1, 1)
                        for m in (weight, own_weight))
                if w.sum() and v.sum():
                    mean, own_mean = ((m * k[name][:, f].numpy()).sum(0) / m.sum()
                                      for m, k in ((w, keys), (v, own)))
                    square[f] = (mean - own_mean) ** 2
            expected += square.mean()
    own_seen = masked_key_means(own, own_masks)
    assert float(semantic_loss(keys, masks, own_seen)) == pytest.approx(expected, rel=1e-5)
    whole = sum(((keys[n].numpy().mean(0) - own[n].numpy().mean((0, 1))) ** 2).mean()
                for n in keys)
    assert float(semantic_loss(keys, None, masked_key_means(own, None))) == pytest.approx(whole, rel=1e-5)
    assert float(semantic_loss(own, own_masks, own_seen)) == 0


@pytest.mark.parametrize("positions, aspect, grid", [
    (64, 1.0, (8, 8)), (35, 9 / 13, (5, 7)), (96, 8 / 12, (8, 12)), (7, 1.0, (1, 7))])
def test_grids_keep_the_aspect(positions, aspect, grid):
    assert infer_grid(positions, aspect) in (grid, grid[::-1] if positions == 7 else grid)


def test_asked_for_keys_and_attention_to_the_text_are_those_of_the_layers(small):
    """Against the layers' own weights, on what goes into them."""
    unet, z, text = small.unet, randn(1, 4, 3, 8, 12), small.encode_text(["a red star"])
    block = "up_blocks.1"
    seen = {}
    hooks = [module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
             for name, module in unet.named_modules() if name.startswith(block)]
    layer = unet.resolve(AttentionRequest((block,))).temporal[1]
    found = unet.attend(z, 500, text, AttentionRequest(temporal_keys=(layer,), cross=(block,)))
    for hook in hooks:
        hook.remove()
    assert list(found.temporal_keys) == [layer] and not found.temporal
    assert torch.equal(found.temporal_keys[layer], seen[f"{layer}.to_k"])
    attend = f"{block}.attentions.1.transformer_blocks.0.attn2"
    q, k = seen[f"{attend}.to_q"], seen[f"{attend}.to_k"]
    q, k = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k))
    expected = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    assert len(found.cross) == 2
    found = found.cross[attend]
    assert found.shape == (3, 2, 4 * 6, 77)
    assert torch.allclose(found.transpose(0, 1).flatten(1, 2), expected[0], atol=1e-6)


def test_semantic_guidance_descends_both_losses(small):
    """One step of it equals the gradient taken here; the unguided clip is the unguided sample."""
    config = dataclasses.replace(small.config.sample, motion_weight=3e4, semantic_scale=50.0,
                                 semantic_blocks=("up_blocks.1", "up_blocks.2"), mask_threshold=0.4)
    prompt, start, reference = "a red star", randn(1, 4, 4, 8, 8, seed=3), randn(1, 4, 4, 8, 8)
    noise = randn(1, 4, 4, 8, 8, seed=1)
    motion = extract_motion(small, reference, noise=noise)
    subject = make_subject_masks(small, prompt, "star", "a ball", "ball",
                         noised_reference_attention(small, reference, "a ball", config, noise), config)
    guide = semantic_guidance(small, prompt, start, config, subject)
    first, second = list(sample(small, prompt, motion, config, guides=[guide], latents=start))[:2]
    without = next(sample(small, prompt, motion, config, latents=start))
    unguided = list(sample(small, prompt, None, config, latents=start))

    text, wanted = small.encode_text([prompt]), guide.wanted._replace(cross=("up_blocks.1",))
    own, masks = [], subject.masks(first.t)
    for z, t in ((start, first.t), (unguided[0].latents, second.t)):
        seen = small.unet.attend(z, t, text, wanted)
        mask = subject_mask(list(seen.cross.values()), subject_tokens(small, prompt, "star"),
                            (4, 4), 0.4)
        own.append(masked_key_means(seen.temporal_keys, binary_masks(mask)))
    z = start.clone().requires_grad_()
    keys = small.unet.attend(z, first.t, text, guide.wanted).temporal_keys
    assert {name[:11] for name in keys} == {"up_blocks.1", "up_blocks.2"}
    grad, = torch.autograd.grad(semantic_loss(keys, masks, own[0]), z)
    elements, ramp = 4 * 8 * 8 / (16 * 64 * 64), 1 / 2
    noises = [(1 - small.schedule.alpha_bar(t)).sqrt() for t in (first.t, second.t)]
    moved = -noises[0] * noises[1] * 50.0 * ramp * elements * grad
    difference = first.latents - without.latents
    assert (difference - moved).norm() < 1e-2 * moved.norm()

    seen = small.unet.attend(first.latents, second.t, text, guide.wanted)
    assert float(guide.loss(seen, second.t)) == pytest.approx(50 / 3e4 * float(
        semantic_loss(seen.temporal_keys, masks, own[1])), rel=1e-4)


def test_a_weight_of_zero_is_refused_before_any_pass(small):
    for name in ("semantic_scale", "motion_weight"):
        config = dataclasses.replace(small.config.sample, **{"semantic_scale": 1.0, name: 0.0})
        with pytest.raises(InputError, match="must both be above 0"):
            semantic_guidance(small, "a star", randn(1, 4, 4, 8, 8), config)


def test_masks_of_an_inversion_are_those_of_each_step(small):
    config = dataclasses.replace(small.config.sample, inversion_steps=4)
    inverted = invert_reference(small, randn(1, 4, 4, 8, 8), "a ball", config)
    subject = make_subject_masks(small, "a red star", "star", "a ball", "ball", inverted.attend, config)
    first, second = (subject.masks(t) for t in sorted(inverted.latents)[:2])
    assert isinstance(first, Masks) and first.foreground.shape == (4, 4, 4)
    assert not torch.equal(first.foreground, second.foreground)
