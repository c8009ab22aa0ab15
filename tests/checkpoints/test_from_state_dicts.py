"""Models are built from weights in memory."""
import os
from pathlib import Path

import pytest
import torch

from mcl import InputError, SampleConfig, model_from_state_dicts
from tests import foreign


def without_encodings(version):
    return {key: t for key, t in foreign.motion(version).items() if not key.endswith(".pe")}


def test_a_single_file_state_dict_and_a_motion_module_give_the_model():
    model = model_from_state_dicts(base=foreign.ldm(), motion=foreign.motion(), device="cpu")
    weights = foreign.mini_weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert len(model.state_dict()) == sum("mid_block.motion" not in name for name in weights)
    assert model.config.sample == SampleConfig()
    model.unet.conv_in.bias.add_(1)             # the weights are copies
    assert torch.equal(weights["unet.conv_in.bias"], foreign.part("unet")["conv_in.bias"])
    assert not torch.equal(model.unet.conv_in.bias, weights["unet.conv_in.bias"])


@pytest.mark.parametrize("version, inflated_groupnorm, length", [("v1", False, 24),
                                                                 ("v3", True, 32)])
def test_motion_version_replaces_missing_positional_encodings(version, inflated_groupnorm, length):
    model = model_from_state_dicts(base=foreign.ldm(), motion=without_encodings(version),
                                   motion_version=version, device="cpu")
    assert model.config.unet.inflated_groupnorm == inflated_groupnorm
    assert model.config.unet.motion_max_seq_length == length


def test_motion_version_decides_for_an_adapter_with_the_usual_32_positions():
    state = {key: foreign.sinusoid(32, t.shape[2]) if key.endswith(".pe") else t
             for key, t in foreign.motion_adapter("v1").items()}
    for version, length in ((None, 32), ("v1", 24)):
        model = model_from_state_dicts(base=foreign.ldm(), motion=state, motion_version=version,
                                       device="cpu")
        assert model.config.unet.motion_max_seq_length == length


@pytest.mark.parametrize("motion, version, message", [
    (without_encodings("v3"), None, 'tell v1 from v3. Pass motion_version="v1" or "v3"'),
    (without_encodings("v3"), "v4", "motion_version = 'v4' does not fit its tensors. Pass v1"),
    (without_encodings("v3"), "v2", "motion_version = 'v2' does not fit its tensors. Pass v1 or"),
    (without_encodings("v2"), "v3", "motion_version = 'v3' does not fit its tensors. Pass v2"),
    (foreign.motion("v1"), "v3", "motion_version = 'v3' does not fit its tensors. Pass v1")])
def test_a_missing_or_wrong_motion_version_is_rejected(motion, version, message):
    with pytest.raises(InputError, match=message):
        model_from_state_dicts(base=foreign.ldm(), motion=motion, motion_version=version)


def test_the_working_folder_tells_nothing_about_weights_in_memory(tmp_path, monkeypatch):
    (tmp_path / "AnimateLCM-v1").mkdir()
    monkeypatch.chdir(tmp_path / "AnimateLCM-v1")
    assert "animatelcm" in os.getcwd().lower() and Path("motion").absolute().parent.name
    model = model_from_state_dicts(base=foreign.ldm(), motion=foreign.motion_adapter("v3"),
                                   device="cpu")
    assert model.config.sample == SampleConfig()
    assert model.config.unet.motion_max_seq_length == 32


def test_sample_sets_the_settings_of_the_model():
    sample = SampleConfig(steps=7, guidance_steps=3, width=64, height=64)
    model = model_from_state_dicts(base=foreign.ldm(), motion=foreign.motion(), sample=sample,
                                   device="cpu")
    assert model.config.sample == sample


def test_parts_of_another_method_are_warned_of():
    motion = foreign.motion() | {"img_encoder.x": torch.zeros(1)}
    with pytest.warns(UserWarning, match="motion: ignored tensors of img_encoder, another method"):
        model_from_state_dicts(base=foreign.ldm(), motion=motion, device="cpu")


def test_an_incomplete_model_is_rejected():
    with pytest.raises(InputError, match="mine: the model is not complete. Add the motion module"):
        model_from_state_dicts(base=foreign.ldm(), name="mine")
    with pytest.raises(InputError, match="motion: the tensor .*proj_in.bias is missing"):
        model_from_state_dicts(base=foreign.ldm(), motion={
            key: t for key, t in foreign.motion().items() if not key.endswith("proj_in.bias")})
