"""The motion of a clip: what is kept of it, and the gradient that it gives."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mcl import InputError, Motion, NumericalError, extract_motion, motion_loss
from mcl.networks.unet import UNet3D

from tests.conftest import SMALL, randn, randomize


def latents(seed=0):
    return randn(1, 4, 4, 8, 8, seed=seed)


def extract(model, clip, **changes):
    return extract_motion(model, clip, dataclasses.replace(model.config.sample, **changes),
                          generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 3])
def test_motion_is_the_top_of_each_row_of_the_noised_clips_maps(small, k):
    """Eqs. 4-6, written out in numpy: null prompt, one pass at t, the diagonal included."""
    clip = latents()
    motion = extract(small, clip, top_k=k, extraction_timestep=600)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    alpha_bar = float(small.schedule.alphas_cumprod[600])
    z = alpha_bar ** 0.5 * clip + (1 - alpha_bar) ** 0.5 * noise
    null = small.text_encoder(torch.tensor([[49406] + [49407] * 76]))
    maps = small.unet(z, 600, null, request=AttentionRequest(temporal=("up_blocks.1",)))[1].temporal
    assert tuple(motion.values) == tuple(maps)
    for name, probs in maps.items():
        top = np.argsort(-probs.numpy(), axis=-1, kind="stable")[..., :k]
        assert np.array_equal(motion.indices[name].numpy(), top)
        assert np.allclose(motion.values[name].numpy(),
                           np.take_along_axis(probs.numpy(), top, axis=-1), atol=1e-6)
    assert motion.info["t"] == 600 and motion.info["frames"] == 4


def test_the_negative_prompt_does_not_change_the_motion(small):
    plain, negative = (extract(small, latents(), negative_prompt=text) for text in ("", "a ring"))
    for name, values in plain.values.items():
        assert torch.equal(negative.values[name], values)
        assert torch.equal(negative.indices[name], plain.indices[name])


def test_loss_is_the_masked_mean_square_summed_over_layers(small):
    motion = extract(small, latents(), top_k=2)
    text = small.encode_text(["a star"])
    maps = small.unet(latents(seed=5), 800, text, request=AttentionRequest(temporal=tuple(motion.values)))[1].temporal
    expected = 0.0
    for name in motion.values:
        here = np.take_along_axis(maps[name].numpy(), motion.indices[name].numpy(), axis=-1)
        expected += ((here - motion.values[name].numpy()) ** 2).mean()
    assert float(motion_loss(maps, motion)) == pytest.approx(expected, rel=1e-5)
    kept = {n: m.gather(-1, motion.indices[n]) for n, m in maps.items()}
    assert float(motion_loss(maps, Motion(kept, motion.indices))) == 0


def test_gradient_of_the_loss_is_that_of_finite_differences_in_float64():
    config = dataclasses.replace(SMALL.unet, block_out_channels=(8, 12))
    unet = randomize(UNet3D(config)).double()
    g = torch.Generator().manual_seed(2)
    z, text = torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 7, 12, generator=g)
    z, text = z.double(), text.double()
    top = {name: probs.topk(1, dim=-1) for name, probs in
           unet(z.flip(2), 400, text, request=AttentionRequest(temporal=("up_blocks.0",)))[1].temporal.items()}
    motion = Motion({n: t.values for n, t in top.items()}, {n: t.indices for n, t in top.items()})

    def loss(x):
        seen = unet(x, 900, text, request=AttentionRequest(temporal=tuple(motion.values)))[1]
        return motion_loss(seen.temporal, motion)

    x = z.clone().requires_grad_()
    grad, = torch.autograd.grad(loss(x), x)
    step = 1e-5
    for seed in range(3):
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).double()
        numeric = float(loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
        assert numeric == pytest.approx(float((grad * direction).sum()), rel=1e-5)


def test_motion_survives_its_file(small, tmp_path):
    motion = extract(small, latents(), top_k=2, blocks=("up_blocks.1", "up_blocks.2"))
    motion.save(tmp_path / "m.safetensors")
    again = Motion.load(tmp_path / "m.safetensors")
    assert again.info == motion.info and tuple(again.values) == tuple(motion.values)
    for name in motion.values:
        assert torch.equal(again.values[name], motion.values[name])
        assert torch.equal(again.indices[name], motion.indices[name])


def test_what_cannot_be_extracted_is_refused(small):
    with pytest.raises(InputError, match="top_k = 4 .* frames, 3"):
        extract(small, latents()[:, :, :3], top_k=4)
    for wrong in (latents()[0], latents().expand(2, -1, -1, -1, -1), latents()[:, :3]):
        with pytest.raises(InputError, match=r"latents of shape .* \(1, 4, f, h, w\)"):
            extract(small, wrong)
    with pytest.raises(InputError, match="no temporal attention under 'mid_block'"):
        extract(small, latents(), blocks=("mid_block",))
    with pytest.raises(NumericalError, match="attention is not finite: dtype float32 may mend"):
        extract_motion(small, latents() * float("nan"))


@pytest.mark.parametrize("content", [b"", b"words, not tensors", b"\x10\0\0\0\0\0\0\0{"])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="m.safetensors: not a motion file"):
        Motion.load(path)


@pytest.mark.parametrize("spoil, message", [
    (lambda t, i: t.pop(next(n for n in t if n.startswith("indices."))), "not of the same layers"),
    (lambda t, i: t.update({"more.x": torch.ones(1)}), "not of the same layers"),
    (lambda t, i: t.clear(), "not of the same layers"),
    (lambda t, i: [x.fill_(4) for n, x in t.items() if n.startswith("ind")], "no attention is"),
    (lambda t, i: [x.fill_(-1) for n, x in t.items() if n.startswith("val")], "no attention is"),
    (lambda t, i: [x.fill_(torch.nan) for n, x in t.items() if n.startswith("val")], "no att"),
    (lambda t, i: t.update({n: x[:3] for n, x in t.items()}), r"is \(3, 2, 4, 1\)"),
    (lambda t, i: t.update({n: x[0] for n, x in t.items()}), r"is \(2, 4, 1\)"),
    (lambda t, i: t.update({n: x.double() for n, x in t.items()}), "no attention is"),
    (lambda t, i: i.update(frames=5), "is .*, 4, 1"), (lambda t, i: i.update(k=0), "sizes are"),
    (lambda t, i: i.update(height=float("inf")), "sizes are"),
    (lambda t, i: i.update(blocks="up"), "none"), (lambda t, i: i.pop("t"), "'t'")])
def test_damaged_motions_are_refused(small, tmp_path, spoil, message):
    path = tmp_path / "m.safetensors"
    extract(small, latents()).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {n: file.get_tensor(n).clone() for n in file.keys()}
    info = json.loads(metadata["info"])
    spoil(tensors, info)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path,
              metadata | {"info": json.dumps(info)})
    with pytest.raises(InputError, match=f"m.safetensors: a damaged motion file .*{message}"):
        Motion.load(path)
    for text in ("{", "[]", "[" * 100_000, '"x"'):
        save_file({"values.x": torch.ones(1)}, path, metadata | {"info": text})
        with pytest.raises(InputError, match="a damaged motion file"):
            Motion.load(path)
