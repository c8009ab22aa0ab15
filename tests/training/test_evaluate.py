"""Tests of the evaluation: metrics of perfect and of wrong clones, the table, resumed runs."""
import dataclasses
import functools
import json

import pytest
import torch

import mcl
from weights.training import evaluate
from weights.training.clip_metrics import measure, psnr
from weights.training.clips import shade
from weights.training.evaluate import clone_case, format_table, read_records, suitability_summary
from weights.training.held_out import CAMERAS, PATHS, emoji_cases, held_out_cases
from weights.training.scenes import BACKGROUNDS, COLORS, EMOJI, emoji_sprite, render
from weights.training.train import TINY


def perfect(case):
    """Return the frames of a perfect clone: the prompt, rendered with the reference's motion."""
    background = BACKGROUNDS[case.background]
    return render(dataclasses.replace(
        case.scene, shape=case.shape, color=COLORS[case.color], background=background,
        second_color=shade(background)), 128)


@pytest.mark.parametrize("case", held_out_cases(PATHS, 6, 8, 40), ids=lambda case: case.motion)
def test_perfect_clone_of_a_moving_object_has_perfect_metrics(case):
    values = measure(perfect(case), case)
    assert values["direction"] > 0.97 and values["position error"] < 0.06    # not all are centred
    assert (values["found"], values["colour"], values["ground"]) == (1, 1, 1)
    assert values["shape"] >= 0.9
    turned = measure(perfect(case).flip(-1, -2), case)
    assert turned["direction"] < -0.9 and turned["position error"] > 0.3


@pytest.mark.parametrize("case", held_out_cases(CAMERAS, 3, 5, 40), ids=lambda case: case.motion)
def test_perfect_clone_of_a_moving_camera_has_perfect_metrics(case):
    frames = perfect(case)
    values = measure(frames, case)
    assert values["camera"] > 0.97 and values["ground"] == 1
    color = BACKGROUNDS[case.background]
    swapped = dataclasses.replace(case.scene, background=shade(color), second_color=color)
    assert measure(render(swapped, 128), case)["ground"] == 1
    assert measure(frames.flip(0), case)["camera"] < 0


def test_suitability_summary_counts_references_that_pass_and_clones_that_follow():
    rows = [(.5, .1, {"direction": .9}), (.5, .1, {"direction": .6}),
            (.3, .1, {"direction": .2, "camera": .8}), (.5, .2, {"direction": .6})]
    records = [{"movement": motion, "denoising error": error, **values}
               for motion, error, values in rows]
    config = dataclasses.replace(TINY, min_reference_motion=.4, max_denoising_error=.15)
    assert suitability_summary(records, config) == (
        "2 of 4 references pass without a warning, 1 of them are followed; of the others 1 are")


def test_right_emoji_is_recognized_and_another_one_is_not(drawn_words):
    for case in emoji_cases(1, 4, 40):
        background = BACKGROUNDS[case.background]
        right, wrong = (render(dataclasses.replace(
            case.scene, shape=word, sprite=drawn_words(word), background=background), 128)
            for word in (case.shape, next(w for w in EMOJI if w != case.shape)))
        values = measure(right, case)
        assert values["direction"] > 0.97 and values["position error"] < 0.06
        assert (values["found"], values["shape"], values["ground"]) == (1, 1, 1)
        assert measure(wrong, case)["shape"] == 0 and "colour" not in values
        star = dataclasses.replace(case.scene, shape="star", background=background)
        assert measure(render(star, 128), case)["shape"] == 0


def test_missing_emoji_font_is_reported_before_sampling(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("weights.training.scenes.FONT", tmp_path / "none.ttf")
    monkeypatch.setattr("weights.training.evaluate.clone_case", None)
    emoji_sprite.cache_clear()
    assert evaluate.main(["--clips", "1", "--emoji-clips", "1"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "apt-get install fonts-noto-color-emoji" in line


def test_subject_that_changes_is_not_steady():
    case = held_out_cases(("circle",), 1, 8, 40)[0]
    right, other = perfect(case), perfect(dataclasses.replace(case, shape="ring"))
    assert measure(other, case)["steady"] == 1 and measure(other, case)["shape"] == 0
    assert measure(torch.cat([right[:5], other[5:]]), case)["steady"] == 5 / 8


def test_psnr_of_an_error_of_a_tenth_of_the_range_is_20():
    frames = torch.zeros(2, 3, 8, 8)
    assert psnr(frames + 0.2, frames) == pytest.approx(20, abs=1e-4)


def test_prompt_of_a_camera_has_the_reference_texture_or_another_one():
    for case in held_out_cases(CAMERAS, 6, 16, 40):
        assert case.scene.texture in case.prompt
    for case in held_out_cases(CAMERAS, 6, 16, 40, other_textures=True):
        assert case.scene.texture not in case.prompt


def test_table_has_means_over_clips_with_confidence_intervals():
    base = {"row": "unguided", "kind": "object", "colour": 1.0, "ground": 1.0, "flicker": 0.0}
    records = [base | {"clip": clip, "seed": seed, "direction": d, "position error": 0.5,
                       "shape": shape}
               for clip, seed, d, shape in (("a", 0, 0.0, 1.0), ("a", 1, 0.4, 1.0),
                                            ("b", 0, 0.6, 0.4))]
    records.append(base | {"clip": "c", "seed": 0, "kind": "camera", "camera": 0.9, "shape": 1.0,
                           "direction": 9.0, "position error": 9.0})
    records.append(base | {"clip": "d", "seed": 0, "kind": "still", "direction": None,
                           "position error": 0.1, "shape": 1.0})
    first, second = (line.split(" | ") for line in format_table(records).splitlines()[2:])
    assert first[0] == "| unguided" and second[0] == "| unguided: still"
    assert first[1] == "0.400 ± 2.541"      # clips 0.2 and 0.6; 12.706 * 0.283 / sqrt(2)
    assert first[2:4] == ["0.500 ± 0.000", "0.900"]         # one camera clip has no interval
    assert first[4].startswith("0.933") and first[-1] == "3 x 1.3 |"
    assert second[1:4] == ["-", "0.100", "-"] and second[-1] == "1 x 1.0 |"


def test_damaged_records_are_rejected(tmp_path):
    record = {"row": "default", "clip": "circle"}
    path = tmp_path / "study.jsonl"
    assert read_records(path, {"row"}) == []
    path.write_text(2 * (json.dumps(record) + "\n"))
    assert read_records(path, {"row"}) == [record, record]
    for content, message in (('{"mod\n{}\n', "cannot be read"), ("[1]\n", "a record has no row"),
                             ("{}\n", "has no row"), ('{"row": 1}\nnull\n', "has no row")):
        path.write_text(content)
        with pytest.raises(mcl.InputError, match=message):
            read_records(path, {"row"})


def load_for_few_frames(*args, **kwargs):
    """Load a model whose own settings have few frames."""
    model = mcl.load_model(*args, **kwargs)
    model.config = dataclasses.replace(model.config, sample=dataclasses.replace(
        model.config.sample, num_frames=4))
    return model


def test_measured_clips_are_not_measured_again(tmp_path, monkeypatch, capsys):
    calls = []

    def clone_case(model, case, reference, settings, is_guided, seed):
        calls.append((case.motion, is_guided, seed))
        return perfect(case) if is_guided else perfect(case).flip(0, -1, -2)

    monkeypatch.setattr(evaluate, "clone_case", clone_case)
    monkeypatch.setattr(evaluate, "student_t_95", functools.cache(evaluate.student_t_95))
    monkeypatch.setattr(evaluate, "load_model", functools.cache(load_for_few_frames))
    command = ["--seed", "200", "--clips", "2", "--camera-clips", "0", "--still-clips", "0",
               "--out", str(tmp_path / "f.jsonl")]
    assert evaluate.main(command) == 0
    expected = [(m, g, 0) for m in ("figure eight", "square") for g in (False, True)]
    assert sorted(calls) == expected
    output = capsys.readouterr().out
    assert "2 of 2 references pass without a warning, 2 of them are followed" in output
    assert evaluate.main(command) == 0 and len(calls) == 4
    assert capsys.readouterr().out == output
    assert evaluate.main([*command, "--seeds", "2", "--guided-only"]) == 0
    assert sorted(calls[4:]) == [("figure eight", True, 1), ("square", True, 1)]
    capsys.readouterr()
    assert evaluate.main([*command, "--set", "top_k=4", "num_frames=5"]) == 0
    assert sorted(calls[6:]) == expected
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:6]] == [
        "| default", "| default, unguided", "| top_k = 4, num_frames = 5",
        "| top_k = 4, num_frames = 5, unguided"]
    assert evaluate.main([*command, "--dtype", "bfloat16"]) == 2
    assert "records of another model or dtype" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [
    {}, {"method": "inversion", "inversion_steps": 3}, {"semantic_scale": 10.0}])
def test_cases_are_cloned_by_the_public_function(embedded, settings):
    case, = held_out_cases(("circle",), 1, 4, 40)
    settings |= {"steps": 2, "guidance_steps": 1, "num_frames": 4, "height": 64, "width": 64}
    reference = render(case.scene, 128)
    subject = {"subject": (case.scene.shape, case.shape)} if "semantic_scale" in settings else {}
    expected = mcl.clone(reference, case.prompt, model=embedded, seed=2040,
                         ref_prompt=case.ref_prompt, **subject, **settings).frames
    assert torch.equal(clone_case(embedded, case, reference, settings, True, 2), expected)
    config = dataclasses.replace(embedded.config.sample, steps=2, guidance_steps=1, num_frames=4,
                                 height=64, width=64)
    *_, state = mcl.sample(embedded, case.prompt, None, config,
                           generator=torch.Generator().manual_seed(40))
    assert torch.equal(clone_case(embedded, case, reference, settings, False),
                       embedded.vae.decode(state.latents))


def test_published_weights_have_the_config_of_the_training(embedded):
    assert embedded.config == TINY
