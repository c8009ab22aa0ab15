"""The motion representation: extraction, loss, gradient and file."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mcl import (
    AttentionRequest,
    InputError,
    Motion,
    NumericalError,
    extract_motion,
    motion_loss,
    sample,
)
from mcl.networks.unet import UNet3D
from tests.conftest import SMALL, randn, randomize

REQUEST = AttentionRequest(temporal=("up_blocks.1",))


def latents(seed=0):
    return randn(1, 4, 4, 8, 8, seed=seed)


def extract(model, clip, **changes):
    return extract_motion(model, clip, dataclasses.replace(model.config.sample, **changes),
                          noise=randn(*clip.shape, seed=1))


@pytest.mark.parametrize("k", [1, 3, 0])
def test_motion_is_the_top_k_of_the_noised_clips_maps(small, k):
    """Eqs. 4 to 6, written out in numpy: null prompt, one pass at t, with the diagonal."""
    clip = latents()
    motion = extract(small, clip, top_k=k, extraction_timestep=600)
    alpha_bar = float(small.schedule.alphas_cumprod[600])
    z = alpha_bar ** 0.5 * clip + (1 - alpha_bar) ** 0.5 * randn(*clip.shape, seed=1)
    null = small.text_encoder(torch.tensor([[49406] + [49407] * 76]))
    maps = small.unet(z, 600, null, request=REQUEST)[1].temporal
    assert tuple(motion.values) == tuple(maps)
    for name, probs in maps.items():
        top = np.argsort(-probs.numpy(), axis=-1, kind="stable")[..., :k or 4]
        assert np.array_equal(motion.indices[name].numpy(), top)
        assert np.allclose(motion.values[name].numpy(),
                           np.take_along_axis(probs.numpy(), top, axis=-1), atol=1e-6)
    assert motion.metadata == {
        "model": small.sha256, "extraction_timestep": 600, "top_k": k or 4,
        "guidance_blocks": ["up_blocks.1"], "num_frames": 4, "height": 8, "width": 8,
        "context_length": 4, "context_offsets": [0], "grids": dict.fromkeys(maps, [4, 4])}


def test_negative_prompt_does_not_change_the_motion(small):
    plain, negative = (extract(small, latents(), negative_prompt=text) for text in ("", "a ring"))
    for name, values in plain.values.items():
        assert torch.equal(negative.values[name], values)
        assert torch.equal(negative.indices[name], plain.indices[name])


def test_default_noise_is_the_same_for_every_extraction(small):
    first, again = (extract_motion(small, latents()).values for _ in range(2))
    assert all(torch.equal(values, again[name]) for name, values in first.items())


def test_loss_is_the_masked_mean_square_summed_over_layers(small):
    motion = extract(small, latents(), top_k=2, guidance_blocks=("up_blocks.1", "up_blocks.2"))
    text = small.encode_text(["a star"])
    maps = small.unet(latents(seed=5), 800, text,
                      request=AttentionRequest(temporal=tuple(motion.values)))[1].temporal
    expected = {"up_blocks.1": 0.0, "up_blocks.2": 0.0}
    for name in motion.values:
        gathered = np.take_along_axis(maps[name].numpy(), motion.indices[name].numpy(), axis=-1)
        expected[name[:11]] += ((gathered - motion.values[name].numpy()) ** 2).mean()
    assert float(motion_loss(maps, motion)) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert float(motion_loss(maps, motion, {"up_blocks.2": 0.5})) == pytest.approx(
        expected["up_blocks.1"] + 0.5 * expected["up_blocks.2"], rel=1e-5)
    same = {name: probs.gather(-1, motion.indices[name]) for name, probs in maps.items()}
    assert float(motion_loss(maps, Motion(same, motion.indices))) == 0


def test_gradient_of_the_loss_equals_finite_differences_in_float64():
    config = dataclasses.replace(SMALL.unet, block_out_channels=(8, 12))
    unet = randomize(UNet3D(config)).double()
    g = torch.Generator().manual_seed(2)
    z, text = torch.randn(1, 4, 3, 4, 4, generator=g), torch.randn(1, 7, 12, generator=g)
    z, text = z.double(), text.double()
    request = AttentionRequest(temporal=("up_blocks.0",))
    top = {name: probs.topk(1, dim=-1)
           for name, probs in unet(z.flip(2), 400, text, request=request)[1].temporal.items()}
    motion = Motion({n: t.values for n, t in top.items()}, {n: t.indices for n, t in top.items()})

    def loss(x):
        return motion_loss(unet(x, 900, text, request=request)[1].temporal, motion)

    x = z.clone().requires_grad_()
    grad, = torch.autograd.grad(loss(x), x)
    step = 1e-5
    for seed in range(3):
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).double()
        numeric = float(loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
        assert numeric == pytest.approx(float((grad * direction).sum()), rel=1e-5)


def test_motion_is_unchanged_by_saving_and_loading(small, tmp_path):
    motion = extract(small, latents(), top_k=2, guidance_blocks=("up_blocks.1", "up_blocks.2"))
    motion.save(tmp_path / "m.safetensors")
    loaded = Motion.load(tmp_path / "m.safetensors")
    assert loaded.metadata == motion.metadata and tuple(loaded.values) == tuple(motion.values)
    for name in motion.values:
        assert torch.equal(loaded.values[name], motion.values[name])
        assert torch.equal(loaded.indices[name], motion.indices[name])


@pytest.mark.parametrize("changes, message", [
    ({"width": 16}, "width = 8, not 4"), ({"num_frames": 3}, "num_frames = 4, not 3"),
    ({"extraction_timestep": 200}, "extraction_timestep = 400, not 200"),
    ({"top_k": 2}, "top_k = 1, not 2"), ({"top_k": 0}, "top_k = 1, not 4"),
    ({"guidance_blocks": ("up_blocks.2",)}, "'up_blocks.1'.*, not .'up_blocks.2'")])
def test_motion_of_another_size_or_setting_is_rejected_when_sample_is_called(small, changes,
                                                                             message):
    with pytest.raises(InputError, match=message):
        sample(small, "", extract(small, latents()),
               dataclasses.replace(small.config.sample, **changes))


def test_motion_from_another_model_is_rejected(small):
    motion = extract(small, latents())
    motion = dataclasses.replace(motion, metadata=motion.metadata | {"model": "another"})
    with pytest.raises(InputError, match="another model"):
        sample(small, "", motion)


def test_impossible_extractions_are_rejected(small):
    with pytest.raises(InputError, match="top_k = 4 is out of range: it must be 1 to 3, the"):
        extract(small, latents()[:, :, :3], top_k=4)
    for z in (latents()[0], latents().expand(2, -1, -1, -1, -1), latents()[:, :3]):
        with pytest.raises(InputError, match=r"latents have shape .* \(1, 4, f, h, w\)"):
            extract_motion(small, z)
    with pytest.raises(InputError, match="'mid_block' has no temporal attention"):
        extract(small, latents(), guidance_blocks=("mid_block",))
    with pytest.raises(NumericalError, match="attention is not finite: dtype float32 may help"):
        extract_motion(small, latents() * float("nan"))


@pytest.mark.parametrize("content", [b"", b"words, not tensors", b"\x10\0\0\0\0\0\0\0{"])
def test_other_files_are_rejected_by_name(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="m.safetensors: the file is truncated .* Delete it, and"):
        Motion.load(path)
    save_file({"values.x": torch.ones(1)}, path, {"format": "another"})
    with pytest.raises(InputError, match="m.safetensors: not a motion file. Give"):
        Motion.load(path)


@pytest.mark.parametrize("damage, message", [
    (lambda t, m: t.pop(next(n for n in t if n.startswith("indices."))), "'indices.up_blocks.1"),
    (lambda t, m: t.update({"more.x": torch.ones(1)}), "of other layers"),
    (lambda t, m: t.clear(), "'values.up_blocks.1"),
    (lambda t, m: [t.clear(), m.update(grids={})], "of other layers"),
    (lambda t, m: [x.fill_(4) for n, x in t.items() if n.startswith("ind")], "no attention map"),
    (lambda t, m: [x.fill_(-1) for n, x in t.items() if n.startswith("val")], "no attention map"),
    (lambda t, m: [x.fill_(torch.nan) for n, x in t.items() if n.startswith("val")], "no attent"),
    (lambda t, m: t.update({n: x[:3] for n, x in t.items()}), "no attention map"),
    (lambda t, m: t.update({n: x[0] for n, x in t.items()}), "no attention map"),
    (lambda t, m: t.update({n: x[0, 0, 0, 0] for n, x in t.items()}), "no attention map"),
    (lambda t, m: t.update({n: x.double() for n, x in t.items()}), "no attention map"),
    (lambda t, m: m.update(context_length=5), "no attention map"),
    (lambda t, m: m.update(top_k=0), "no attention map"),
    (lambda t, m: m.update(context_offsets=[0, 2]), "no attention map"),
    (lambda t, m: m.update(context_offsets=0), "has no len"),
    (lambda t, m: m.pop("context_length"), "context_length"),
    (lambda t, m: m.pop("grids"), "grids"), (lambda t, m: m.clear(), "grids"),
    (lambda t, m: m.update(grids={}), "of other layers"),
    (lambda t, m: m.update(grids=list(m["grids"])), "list indices"),
    (lambda t, m: m.update(grids=dict.fromkeys(m["grids"], [4, 1e300])), "no attention map")])
def test_damaged_motion_files_are_rejected(small, tmp_path, damage, message):
    path = tmp_path / "m.safetensors"
    extract(small, latents()).save(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {n: file.get_tensor(n).clone() for n in file.keys()}
    metadata = json.loads(header["metadata"])
    damage(tensors, metadata)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path,
              header | {"metadata": json.dumps(metadata)})
    with pytest.raises(InputError, match=f"m.safetensors: a damaged motion file .*{message}"):
        Motion.load(path)


@pytest.mark.parametrize("name, value", [
    ("num_frames", 5), ("height", float("inf")), ("width", None), ("guidance_blocks", "up"),
    ("context_offsets", ["0"]), ("extraction_timestep", {})])
def test_motion_file_with_other_metadata_is_rejected_when_sample_is_called(small, tmp_path, name,
                                                                           value):
    motion = extract(small, latents())
    dataclasses.replace(motion, metadata=motion.metadata | {name: value}).save(tmp_path / "m")
    with pytest.raises(InputError, match=f"the motion was extracted with {name} = "):
        sample(small, "", Motion.load(tmp_path / "m"))


@pytest.mark.parametrize("name, message", [
    ("model", "another model"), ("extraction_timestep", "extraction_timestep = None, not 400")])
def test_motion_file_with_less_metadata_is_rejected_when_sample_is_called(small, tmp_path, name,
                                                                          message):
    motion = extract(small, latents())
    metadata = {key: value for key, value in motion.metadata.items() if key != name}
    dataclasses.replace(motion, metadata=metadata).save(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        sample(small, "", Motion.load(tmp_path / "m"))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"x"'])
def test_motion_file_with_unreadable_metadata_is_rejected(tmp_path, text):
    save_file({"values.x": torch.ones(1)}, tmp_path / "m.safetensors",
              {"format": "mcl-motion-2", "metadata": text})
    with pytest.raises(InputError, match="a damaged motion file"):
        Motion.load(tmp_path / "m.safetensors")
