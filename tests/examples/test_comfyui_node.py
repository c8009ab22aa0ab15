"""The ComfyUI node, called as ComfyUI calls it: by its class attributes, in inference mode."""
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from einops import rearrange

import mcl

NODE = Path(__file__).parents[2] / "examples" / "comfyui_node.py"


def import_node():
    spec = importlib.util.spec_from_file_location("comfyui_node", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def progress(monkeypatch):
    """A stand-in for comfy.utils; the list holds the total and then one entry for each update."""
    calls = []

    class ProgressBar:
        def __init__(self, total):
            calls.append(total)

        def update(self, value):
            calls.append(value)

    utils = types.ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    return calls


def call(module, **inputs):
    """Call the node as ComfyUI's executor does: defaults, FUNCTION by name, inference mode."""
    node_class = module.NODE_CLASS_MAPPINGS["MotionCloneNode"]
    required = node_class.INPUT_TYPES()["required"]
    defaults = {name: spec[1]["default"] for name, spec in required.items() if len(spec) > 1}
    assert set(inputs) <= set(required) and node_class.RETURN_TYPES == ("IMAGE",)
    with torch.inference_mode():
        frames = torch.rand(5, 40, 48, 3, generator=torch.Generator().manual_seed(0))
        result = getattr(node_class(), node_class.FUNCTION)(
            **defaults | {"reference": frames} | inputs)
    assert isinstance(result, tuple) and len(result) == 1
    return frames, result[0]


def test_node_returns_the_frames_of_clone_and_reports_each_step(progress, small, monkeypatch):
    module = import_node()
    monkeypatch.setattr(module, "load_model", {"small.safetensors": small}.get)
    frames, images = call(module, steps=8, seed=3, motion_weight=9000.0,
                          weights="small.safetensors")
    assert images.shape == (4, 32, 32, 3) and 0 <= images.min() < images.max() <= 1
    assert progress == [8, *[1] * 8]
    clip = mcl.clone(rearrange(frames, "f h w c -> f c h w") * 2 - 1,
                     "a red star on a navy background", seed=3, steps=8, guidance_steps=6,
                     guidance_warmup_steps=4, guidance_cooldown_steps=4, motion_weight=9000.0,
                     model=small)
    expected = rearrange(clip.frames.clamp(-1, 1), "f c h w -> f h w c") / 2 + 0.5
    assert torch.equal(images, expected)


def test_node_works_without_comfyui_and_keeps_the_model_of_a_path(tmp_path):
    module = import_node()
    _, images = call(module, steps=1)
    assert images.shape == (16, 128, 128, 3) and images.isfinite().all()
    assert module.load_model("") is module.load_model("")
    with pytest.raises(mcl.InputError, match="missing"):
        call(module, weights=str(tmp_path / "missing.safetensors"))
