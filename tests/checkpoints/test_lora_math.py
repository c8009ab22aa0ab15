"""Every form of LoRA against LyCORIS' own modules, and what else a LoRA's file may hold."""
from pathlib import Path

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import nn

from mcl import InputError
from mcl.checkpoints.detect import detect
from mcl.checkpoints.lazy import Checkpoint, LazyTensor
from mcl.checkpoints.lora import Lora, deltas, merged

LAYERS = {"linear": lambda: nn.Linear(12, 16), "1x1": lambda: nn.Conv2d(12, 16, 1),
          "3x3": lambda: nn.Conv2d(12, 16, 3, padding=1)}
FORMS = {
    "locon": (LoConModule, {}), "loha": (LohaModule, {}), "glora": (GLoRAModule, {}),
    "lokr, second factored": (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4}),
    "lokr, both factored": (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4,
                                         "decompose_both": True}),
    "lokr, both whole": (LokrModule, {"lora_dim": 100, "factor": 4})}
LENGTHS = {"": {}, "rows": {"weight_decompose": True, "wd_on_out": True},
           "columns": {"weight_decompose": True, "wd_on_out": False}}
CASES = [(form, layer, length, tucker) for form in FORMS for layer in LAYERS for length in LENGTHS
         for tucker in (False, True)
         if (layer == "3x3" or not tucker) and (form != "glora" or not (length or tucker))]


def lazy(tensor):
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def found(state, layer, scale=1.0):
    """The layer's parameters after a merge, and what was dropped."""
    checkpoint = Checkpoint({f"lora_unet_x.{name}": lazy(t) for name, t in state.items()}, ())
    lora = Lora(detect(Path("file"), checkpoint), scale)
    parameters = dict(layer.named_parameters())
    changes, dropped = deltas(lora, {f"unet.x.{name}": tuple(p.shape)
                                     for name, p in parameters.items()})
    return {name: merged(p.data, [changes[f"unet.x.{name}"]] if f"unet.x.{name}" in changes else [],
                         torch.float32) for name, p in parameters.items()}, dropped


def trained(kind, layer, **options):
    """A module of LyCORIS with other weights than the initial ones, and its state."""
    module = kind("x", layer, 1.0, **{"lora_dim": 4, "alpha": 2} | options)
    for name, p in module.named_parameters():
        if not name.startswith("org_module"):
            noise = 0.3 * torch.randn(p.shape)
            p.data = p.data * (1 + noise) if "dora" in name else noise
    return module, {name: t.detach() for name, t in module.state_dict().items()
                    if not name.startswith("org_module")}


@pytest.mark.parametrize("form, layer, length, tucker", CASES)
def test_each_form_gives_what_its_trainer_gives(form, layer, length, tucker):
    torch.manual_seed(0)
    kind, options = FORMS[form]
    layer = LAYERS[layer]()
    module, state = trained(kind, layer, use_tucker=tucker, **options, **LENGTHS[length])
    x = torch.randn(2, 12, *[5, 5] * isinstance(layer, nn.Conv2d))
    after, dropped = found(state, layer)
    assert dropped == {}
    with torch.no_grad():
        before, expected = layer(x), module(x)
        result = torch.func.functional_call(layer, after, x)
    assert torch.allclose(result, expected, atol=1e-5)
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind, layer", [
    (FullModule, LAYERS["linear"]), (FullModule, LAYERS["3x3"]),
    (NormModule, lambda: nn.LayerNorm(12)), (NormModule, lambda: nn.GroupNorm(4, 12))])
def test_whole_matrices_biases_and_norms(kind, layer):
    torch.manual_seed(0)
    layer = layer()
    module, state = trained(kind, layer)
    if kind is FullModule:
        state = dict(zip(("diff", "diff_b"), module.get_diff_weight()))
        module._org_weight, module.org_bias = [layer.weight.data], [layer.bias.data]
    expected = module.get_merged_weight(1.0)
    after, _ = found({name: t.detach() for name, t in state.items()}, layer)
    assert torch.allclose(after["weight"], expected[0], atol=1e-6)
    assert torch.allclose(after["bias"], expected[1], atol=1e-6)
    half, _ = found({name: t.detach() for name, t in state.items()}, layer, 0.5)
    assert torch.allclose(half["bias"], (after["bias"] + layer.bias) / 2, atol=1e-6)


def test_glora_under_its_former_names():
    """Before 2024 the first of each pair was what is now the second."""
    torch.manual_seed(0)
    layer = LAYERS["linear"]()
    _, state = trained(GLoRAModule, layer)
    now, _ = found(state, layer)
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    former, _ = found({swap.get(name[:2], name[:2]) + name[2:]: t for name, t in state.items()},
                      layer)
    assert torch.equal(former["weight"], now["weight"])


@pytest.mark.parametrize("strength", [0.5, -0.5, 2.0])
def test_the_magnitudes_of_peft_are_of_rows_and_the_scale_is_the_share_of_the_change(strength):
    torch.manual_seed(0)
    layer = LAYERS["3x3"]()
    state = {"lora_A.weight": torch.randn(4, 12, 3, 3), "lora_B.weight": torch.randn(16, 4, 1, 1),
             "lora_magnitude_vector": torch.rand(1, 16, 1, 1)}
    after, _ = found(state, layer)
    assert torch.allclose(after["weight"].flatten(1).norm(dim=1),
                          state["lora_magnitude_vector"].flatten(), atol=1e-5)
    scaled, _ = found(state, layer, strength)
    expected = layer.weight + strength * (after["weight"] - layer.weight)
    assert torch.allclose(scaled["weight"], expected, atol=1e-5)


def test_what_belongs_elsewhere_is_dropped_for_a_reason():
    layer = nn.Linear(12, 16, bias=False)
    checkpoint = Checkpoint({name: lazy(torch.ones(shape)) for name, shape in {
        "lora_unet_x.diff": (16, 12), "lora_unet_x.diff_b": (16,),
        "lora_te_text_projection.lora_down.weight": (4, 12),
        "bundle_emb.cat.string_to_param.*": (2, 12)}.items()}, ())
    changes, dropped = deltas(Lora(detect(Path("file"), checkpoint)),
                              {"unet.x.weight": tuple(layer.weight.shape)})
    assert list(changes) == ["unet.x.weight"]
    assert dropped == {
        "lora_unet_x.diff_b": "of a bias that this layer does not have",
        "lora_te_text_projection.lora_down.weight": "of CLIP, but not of its text encoder",
        "bundle_emb.cat.string_to_param.*":
            "an embedding bundled with it, whose word prompts here do not know"}


@pytest.mark.parametrize("state, message", [
    ({"hada_w1_a": (16, 4), "hada_w1_b": (4, 12)}, "the factors of another form"),
    ({"lokr_w1": (4, 4)}, "the factors of another form"),
    ({"lokr_w1": (4, 4), "lokr_w2": (4, 4)}, "made for another model"),
    ({"lora_down.weight": (4, 12), "lora_up.weight": (16, 4), "diff": (16, 12)}, "another form"),
    ({"diff": (16, 12), "dora_scale": (3, 1)}, "made for another model"),
    ({"a1.weight": (), "a2.weight": (4, 12), "b1.weight": (16, 4), "b2.weight": (4, 12)},
     "another form"),
    ({"oft_blocks": (2, 6, 6)}, "an OFT or IA3")])
def test_forms_that_do_not_fit_are_refused(state, message):
    with pytest.raises(InputError, match=message):
        found({name: torch.ones(shape) for name, shape in state.items()}, LAYERS["linear"]())
