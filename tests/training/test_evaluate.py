"""The measures of cloning: what they say to a perfect clone, and to one of another motion."""
import dataclasses
import json

import imageio.v3 as imageio
import pytest
import torch

from mcl import InputError
from mcl.config import TINY
from weights.training import evaluate
from weights.training.clips import tone
from weights.training.evaluate import door, measured, save_strip, sheet, strip_name, table
from weights.training.clip_metrics import measure, psnr
from weights.training.held_out import CAMERAS, PATHS, held_out_cases, word_cases
from weights.training.scenes import COLORS, GROUNDS, render
from weights.training.vocabulary import EMOJI, emoji


def perfect(case, scene=None):
    """What was asked for, drawn with a scene's motion."""
    ground = GROUNDS[case.ground]
    return render(dataclasses.replace(scene or case.scene, shape=case.shape, ground=ground,
                                      color=COLORS[case.color], second=tone(ground)), 128)


@pytest.mark.parametrize("case", held_out_cases(PATHS, 6, 16, 40), ids=lambda case: case.motion)
def test_a_perfect_clone_of_an_object_is_measured_as_one(case):
    found = measure(perfect(case), case)
    assert found["direction"] > 0.97 and found["position error"] < 0.06    # not all are centred
    assert (found["found"], found["colour"], found["ground"]) == (1, 1, 1)
    assert found["shape"] >= 0.9
    turned = measure(perfect(case).flip(-1, -2), case)
    assert turned["direction"] < -0.9 and turned["position error"] > 0.3


@pytest.mark.parametrize("case", held_out_cases(CAMERAS, 3, 16, 40), ids=lambda case: case.motion)
def test_a_perfect_clone_of_a_camera_is_measured_as_one(case):
    frames = perfect(case)
    found = measure(frames, case)
    assert found["camera"] > 0.97 and found["ground"] == 1
    ground = GROUNDS[case.ground]
    swapped = render(dataclasses.replace(case.scene, ground=tone(ground), second=ground), 128)
    assert measure(swapped, case)["ground"] == 1        # the same two tones in each other's place
    assert measure(frames.flip(0), case)["camera"] < 0


def test_the_door_counts_who_passes_and_who_is_followed():
    found = [(.5, .1, {"direction": .9}), (.5, .1, {"direction": .6}),
             (.3, .1, {"direction": .2, "camera": .8}), (.5, .2, {"direction": .6})]
    records = [{"movement": moved, "denoising error": error, **figures}
               for moved, error, figures in found]
    wanted = dataclasses.replace(TINY, min_reference_motion=.4, max_denoising_error=.15)
    assert door(records, wanted) == ("not warned of: 2 of 4 references, of which 1 are followed; "
                                     "of the others 1 are")


def test_a_perfect_clone_with_an_emoji_is_measured_as_one_and_another_as_none(drawn_words):
    for case in word_cases(6, 4, 40):
        drawn, other = (render(dataclasses.replace(
            case.scene, shape=word, skin=drawn_words(word), ground=GROUNDS[case.ground]), 128)
            for word in (case.shape, next(w for w in EMOJI if w != case.shape)))
        found = measure(drawn, case)
        assert found["direction"] > 0.97 and found["position error"] < 0.06
        assert (found["found"], found["shape"], found["ground"]) == (1, 1, 1)
        assert measure(other, case)["shape"] == 0 and "colour" not in found
        star = dataclasses.replace(case.scene, shape="star", ground=GROUNDS[case.ground])
        assert measure(render(star, 128), case)["shape"] == 0


def test_without_the_font_of_the_emoji_nothing_is_sampled(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("weights.training.vocabulary.FONT", tmp_path / "none.ttf")
    monkeypatch.setattr("weights.training.evaluate.clone", None)
    emoji.cache_clear()
    assert evaluate.main(["--clips", "1", "--word-clips", "1"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "apt-get install fonts-noto-color-emoji" in line


def test_a_subject_that_changes_is_not_steady():
    case = held_out_cases(("circle",), 1, 8, 40)[0]
    own, other = perfect(case), perfect(dataclasses.replace(case, shape="ring"))
    assert measure(other, case)["steady"] == 1 and measure(other, case)["shape"] == 0
    assert measure(torch.cat([own[:5], other[5:]]), case)["steady"] == 5 / 8


def test_the_psnr_of_an_error_of_a_tenth_of_the_range_is_20():
    frames = torch.zeros(2, 3, 8, 8)
    assert psnr(frames + 0.2, frames) == pytest.approx(20, abs=1e-4)


def test_a_camera_keeps_its_texture_or_is_given_another():
    for case in held_out_cases(CAMERAS, 6, 16, 40):
        assert case.scene.texture in case.prompt
    for case in held_out_cases(CAMERAS, 6, 16, 40, other_textures=True):
        assert case.scene.texture not in case.prompt


def test_the_table_has_means_over_clips_and_their_intervals():
    base = {"row": "unguided", "kind": "object", "colour": 1.0, "ground": 1.0, "flicker": 0.0}
    records = [base | {"clip": clip, "seed": seed, "direction": d, "position error": 0.5,
                       "shape": shape}
               for clip, seed, d, shape in (("a", 0, 0.0, 1.0), ("a", 1, 0.4, 1.0),
                                            ("b", 0, 0.6, 0.4))]
    records.append(base | {"clip": "c", "seed": 0, "kind": "camera", "camera": 0.9, "shape": 1.0,
                           "direction": 9.0, "position error": 9.0})
    records.append(base | {"clip": "d", "seed": 0, "kind": "still", "direction": None,
                           "position error": 0.1, "shape": 1.0})
    first, second = (line.split(" | ") for line in table(records).splitlines()[2:])
    assert first[0] == "| unguided" and second[0] == "| unguided: still"
    assert first[1] == "0.400 ± 2.541"      # clips 0.2 and 0.6; 12.706 * 0.283 / sqrt(2)
    assert first[2:4] == ["0.500 ± 0.000", "0.900"]         # one camera clip has no interval
    assert first[4].startswith("0.933") and first[-1] == "3 x 1.3 |"
    assert second[1:4] == ["-", "0.100", "-"] and second[-1] == "1 x 1.0 |"


def test_the_sheet_has_the_best_on_the_left_and_the_worst_on_the_right(tmp_path):
    records = [{"row": "default", "clip": f"a {i}", "seed": 0, "kind": kind, "direction": .7,
                name: score}
               for i, (kind, name, score) in enumerate([("object", "direction", .5),
                                                        ("camera", "camera", .9),
                                                        ("object", "direction", -.2)])]
    for i, r in enumerate(records):
        clip = torch.full((4, 3, 16, 16), -0.5 + 0.5 * i)
        save_strip(tmp_path / strip_name(r), [torch.full_like(clip, -1.0), clip])
    sheet(records, tmp_path, 1)
    picture = imageio.imread(tmp_path / "sheet.png")
    assert picture.shape == (2 * 8 + 8, 2 * (2 * 8 + 8), 3)     # two frames of four, at half size
    reference, clone = picture[6, :, 0], picture[14, :, 0]
    assert reference[6] == 0 and clone[6] == 128 and clone[24 + 6] == 191


def test_an_evaluation_goes_on_from_a_line_that_was_cut_off(tmp_path):
    whole = {"model": "m", "row": "default", "kind": "object", "clip": "circle", "seed": 0}
    path = tmp_path / "study.jsonl"
    assert measured(path, {"model": "m"}) == []
    path.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:30])
    assert measured(path, {"model": "m"}) == [whole]
    with pytest.raises(InputError, match="figures of another model"):
        measured(path, {"model": "n"})
    for content, message in (('{"mod\n{}\n', "line 1: is cut off"),
                             ("[1]\n", "no figures of an evaluation")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            measured(path, {"model": "m"})


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    made = []

    def clone(model, case, config, guided, seed):
        made.append((case.motion, guided, seed))
        return perfect(case) if guided else perfect(case).flip(0, -1, -2)

    monkeypatch.setattr(evaluate, "clone", clone)
    command = ["--seed", "200", "--clips", "1", "--camera-clips", "1", "--still-clips", "0",
               "--out", str(tmp_path / "f.jsonl"), "--save", str(tmp_path)]
    assert evaluate.main(command) == 0
    assert sorted(made) == [(m, g, 0) for m in ("figure eight", "pan") for g in (False, True)]
    said, clips = capsys.readouterr().out, len(list(tmp_path.glob("*, 0.png")))
    assert "not warned of: 2 of 2 references, of which 2 are followed" in said and clips == 4
    assert (tmp_path / "sheet.png").exists()
    assert evaluate.main(command) == 0 and len(made) == 4
    assert capsys.readouterr().out == said
    assert evaluate.main([*command, "--seeds", "2", "--guided-only"]) == 0
    assert sorted(made[4:]) == [("figure eight", True, 1), ("pan", True, 1)]
    capsys.readouterr()
    assert evaluate.main([*command, "--set", "top_k=8", "frames=8"]) == 0
    assert sorted(made[6:]) == [(m, g, 0) for m in ("figure eight", "pan") for g in (False, True)]
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:6]] == [
        "| default", "| default, unguided", "| top_k = 8, frames = 8",
        "| top_k = 8, frames = 8, unguided"]
    assert evaluate.main([*command, "--save", command[-3]]) == 2
    assert "f.jsonl: is a file; give the name of a folder" in capsys.readouterr().err
    assert evaluate.main([*command, "--dtype", "bfloat16"]) == 2
    assert "figures of another model or dtype" in capsys.readouterr().err
