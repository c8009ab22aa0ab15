"""Every form of LoRA is compared with LyCORIS' own modules."""
from pathlib import Path

import pytest
import torch
from torch import nn

from mcl import InputError
from mcl.checkpoints.containers import Checkpoint, wrap_tensor
from mcl.checkpoints.detect import detect
from mcl.checkpoints.lora import Lora, apply_deltas, lora_deltas
from tests.lazy import LazyModule

LAYERS = {"linear": lambda: nn.Linear(12, 16), "1x1": lambda: nn.Conv2d(12, 16, 1),
          "3x3": lambda: nn.Conv2d(12, 16, 3, padding=1)}
FORMS = {
    "locon": ("locon.LoConModule", {}), "loha": ("loha.LohaModule", {}),
    "glora": ("glora.GLoRAModule", {}),
    "lokr, second factored": ("lokr.LokrModule", {"lora_dim": 1, "alpha": 3, "factor": 4}),
    "lokr, both factored": ("lokr.LokrModule", {"lora_dim": 1, "alpha": 3, "factor": 4,
                                                  "decompose_both": True}),
    "lokr, both whole": ("lokr.LokrModule", {"lora_dim": 100, "factor": 4})}
DORA = {"": {}, "rows": {"weight_decompose": True, "wd_on_out": True},
           "columns": {"weight_decompose": True, "wd_on_out": False}}
CASES = [(form, layer, dora, tucker) for form in FORMS for layer in LAYERS for dora in DORA
         for tucker in (False, True)
         if (layer == "3x3" or not tucker) and (form != "glora" or not (dora or tucker))]


def merge(state, layer, scale=1.0):
    """Return the layer's parameters after a merge, and the ignored keys."""
    checkpoint = Checkpoint({f"lora_unet_x.{name}": wrap_tensor(t) for name, t in state.items()},
                            (), path=Path("file"))
    lora = Lora(detect(checkpoint), scale)
    parameters = dict(layer.named_parameters())
    deltas, ignored = lora_deltas(lora, {f"unet.x.{name}": tuple(p.shape)
                                         for name, p in parameters.items()})
    return {name: apply_deltas(p.data, [deltas[f"unet.x.{name}"]]
                               if f"unet.x.{name}" in deltas else [], torch.float32)
            for name, p in parameters.items()}, ignored


def trained(kind, layer, **options):
    """Return a LyCORIS module with weights unlike its initial ones, and its state."""
    file, name = kind.split(".")
    kind = getattr(LazyModule(f"lycoris.modules.{file}"), name)
    module = kind("x", layer, 1.0, **{"lora_dim": 4, "alpha": 2} | options)
    for name, p in module.named_parameters():
        if not name.startswith("org_module"):
            noise = 0.3 * torch.randn(p.shape)
            p.data = p.data * (1 + noise) if "dora" in name else noise
    return module, {name: t.detach() for name, t in module.state_dict().items()
                    if not name.startswith("org_module")}


@pytest.mark.parametrize("form, layer, dora, tucker", CASES)
def test_each_form_equals_lycoris(form, layer, dora, tucker):
    torch.manual_seed(0)
    kind, options = FORMS[form]
    layer = LAYERS[layer]()
    module, state = trained(kind, layer, use_tucker=tucker, **options, **DORA[dora])
    x = torch.randn(2, 12, *[5, 5] * isinstance(layer, nn.Conv2d))
    after, ignored = merge(state, layer)
    assert ignored == {}
    with torch.no_grad():
        before, expected = layer(x), module(x)
        result = torch.func.functional_call(layer, after, x)
    assert torch.allclose(result, expected, atol=1e-5)
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind, layer", [
    ("full.FullModule", LAYERS["linear"]), ("full.FullModule", LAYERS["3x3"]),
    ("norms.NormModule", lambda: nn.LayerNorm(12)),
    ("norms.NormModule", lambda: nn.GroupNorm(4, 12))])
def test_full_matrices_biases_and_norms_equal_lycoris(kind, layer):
    torch.manual_seed(0)
    layer = layer()
    module, state = trained(kind, layer)
    if kind == "full.FullModule":
        state = dict(zip(("diff", "diff_b"), module.get_diff_weight()))
        module._org_weight, module.org_bias = [layer.weight.data], [layer.bias.data]
    expected = module.get_merged_weight(1.0)
    after, _ = merge({name: t.detach() for name, t in state.items()}, layer)
    assert torch.allclose(after["weight"], expected[0], atol=1e-6)
    assert torch.allclose(after["bias"], expected[1], atol=1e-6)
    half, _ = merge({name: t.detach() for name, t in state.items()}, layer, 0.5)
    assert torch.allclose(half["bias"], (after["bias"] + layer.bias) / 2, atol=1e-6)


def test_glora_with_the_swapped_names_of_before_2024():
    torch.manual_seed(0)
    layer = LAYERS["linear"]()
    _, state = trained("glora.GLoRAModule", layer)
    current, _ = merge(state, layer)
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    former, _ = merge({swap.get(name[:2], name[:2]) + name[2:]: t for name, t in state.items()},
                      layer)
    assert torch.equal(former["weight"], current["weight"])


@pytest.mark.parametrize("strength", [0.5, -0.5, 2.0])
def test_peft_magnitudes_are_norms_of_rows_and_the_scale_interpolates(strength):
    torch.manual_seed(0)
    layer = LAYERS["3x3"]()
    state = {"lora_A.weight": torch.randn(4, 12, 3, 3), "lora_B.weight": torch.randn(16, 4, 1, 1),
             "lora_magnitude_vector": torch.rand(1, 16, 1, 1)}
    after, _ = merge(state, layer)
    assert torch.allclose(after["weight"].flatten(1).norm(dim=1),
                          state["lora_magnitude_vector"].flatten(), atol=1e-5)
    scaled, _ = merge(state, layer, strength)
    expected = layer.weight + strength * (after["weight"] - layer.weight)
    assert torch.allclose(scaled["weight"], expected, atol=1e-5)


def test_tensors_of_other_networks_are_ignored_for_a_reason():
    layer = nn.Linear(12, 16, bias=False)
    checkpoint = Checkpoint({name: wrap_tensor(torch.ones(shape)) for name, shape in {
        "lora_unet_x.diff": (16, 12), "lora_unet_x.diff_b": (16,),
        "lora_te_text_projection.lora_down.weight": (4, 12),
        "bundle_emb.cat.string_to_param.*": (2, 12)}.items()}, ())
    deltas, ignored = lora_deltas(Lora(detect(checkpoint)),
                                  {"unet.x.weight": tuple(layer.weight.shape)})
    assert list(deltas) == ["unet.x.weight"]
    assert ignored == {
        "lora_unet_x.diff_b": "of a bias that this layer does not have",
        "lora_te_text_projection.lora_down.weight": "of CLIP, but not of its text encoder",
        "bundle_emb.cat.string_to_param.*":
            "an embedding bundled with the LoRA, whose word prompts do not know"}


@pytest.mark.parametrize("state", [
    {"hada_w1_a": (16, 4), "hada_w1_b": (4, 12)}, {"lokr_w1": (4, 4)},
    {"lokr_w1": (4, 4), "lokr_w2": (4, 4)},
    {"lora_down.weight": (4, 12), "lora_up.weight": (16, 4), "diff": (16, 12)},
    {"lora_down.weight": (4, 16), "lora_up.weight": (12, 4)}, {"alpha": ()},
    {"diff": (16, 12), "dora_scale": (3, 1)},
    {"a1.weight": (), "a2.weight": (4, 12), "b1.weight": (16, 4), "b2.weight": (4, 12)}])
def test_factors_that_do_not_fit_are_rejected(state):
    with pytest.raises(InputError, match=r"^file: lora_unet_x has .*of a weight \(16, 12\)"):
        merge({name: torch.ones(shape) for name, shape in state.items()}, LAYERS["linear"]())
