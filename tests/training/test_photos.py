"""The world of photographs: what is drawn, where it is, and which pictures training never sees."""
import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mcl.checkpoints.model_file import DEFAULT_WEIGHTS, load_model
from mcl.errors import InputError
from weights.training import train
from weights.training.clips import VOCABULARY, caption, tone
from weights.training.data import Clips, pictures
from weights.training.clip_metrics import measure, track
from weights.training.held_out import CAMERAS, PATHS, held_out_cases, word_cases
from weights.training.photos import (GROUND, drawn_ground, find_photos, mixed_scene, read_photo,
                             shake)
from weights.training.scenes import COLORS, GROUNDS, TEXTURES, Scene, render, projected_center
from weights.training.vocabulary import EMOJI, FONT, emoji
from mcl.networks.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty dim pictures of noise in broad patches, each of a hue of its own."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        small = Image.fromarray(rng.integers(0, 90 + i, (9, 12, 3)).astype(np.uint8))
        small.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"p{i}.png")
    return folder


def test_training_and_evaluation_share_no_photograph_under_any_name_of_its_sizes(folder, tmp_path):
    training, held_out = (find_photos([folder], held_out) for held_out in (False, True))
    assert not set(training) & set(held_out) and len(training) + len(held_out) == 40
    assert 1 <= len(held_out) < len(training)
    for file in (*training, *held_out):
        picture = Image.open(file)
        picture.resize((80, 60)).save(tmp_path / f"{file.stem}-small.png")
        nested = tmp_path / file.stem.upper() / "contents" / "images"
        nested.mkdir(parents=True)
        picture.resize((800, 600)).save(nested / "800x600.png")
    for held, files in ((False, training), (True, held_out)):
        found = find_photos([folder, tmp_path], held)
        assert {f.parts[-4].lower() for f in found} == {f.stem for f in files}   # the largest


def test_a_clip_is_the_same_by_its_seed_and_drawn_from_no_other_photograph(
        folder, monkeypatch, drawn_words):
    photos, read = find_photos([folder], held_out=False), set()
    monkeypatch.setattr("weights.training.photos.read_photo", lambda file: read.add(file) or original(file))
    original = read_photo.__wrapped__
    kinds = set()
    for seed in range(60):
        one, same = (mixed_scene(np.random.default_rng(seed), 4, photos) for _ in range(2))
        assert torch.equal(render(one, 32), render(same, 32))
        word = one.shape in EMOJI
        kinds.add((bool(one.shape), one.photo is not None, one.skin is not None, word))
        said = caption(one, np.random.default_rng(0))
        assert said == caption(same, np.random.default_rng(0))
        assert word == any(w in EMOJI for w in said.split())
        if one.photo is not None and not word and (not one.shape or one.skin is not None):
            assert said == "a photo"
    assert kinds == {(True, False, False, False), (False, True, False, False),
                     (True, True, False, False), (True, True, True, False),
                     (True, False, True, True), (True, True, True, True)}
    assert read and read <= set(photos)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_thing_before_a_photograph_is_where_its_path_says(folder, by_hand):
    photos = find_photos([folder], held_out=True)
    for case in held_out_cases(PATHS, 3, 16, 40, photos=photos, by_hand=by_hand):
        with_it = render(case.scene, 128)
        without = render(dataclasses.replace(case.scene, shape=""), 128)
        center, found = track((with_it - without).abs().amax(dim=1) > 0.05)
        assert found.all()
        assert (center - projected_center(case.scene)).norm(dim=-1).mean() < 0.06
        moving = (without - without[:1]).abs().max() > 0.05
        assert moving == by_hand


def test_a_ground_that_leans_is_seen_smaller_the_farther_it_is():
    line = torch.linspace(-1, 1, GROUND)
    photo = torch.stack([line.expand(GROUND, GROUND), line[:, None].expand(GROUND, GROUND),
                         torch.zeros(GROUND, GROUND)]) / 2 + 0.5     # the place itself, as a colour
    one, still, black = torch.ones(1), torch.zeros(1), (0., 0., 0.)
    scene = Scene("", black, "plain", black, black, 1.0, 0.0, torch.zeros(1, 2), one, still,
                  torch.tensor([[.1, -.2]]), 1.25 * one, still, photo, slant=(0., .3))
    x, y, _ = render(scene, 64)[0] * 2                      # of the world, in half widths
    places = (torch.arange(64) + 0.5) / 32 - 1
    near = 1.25 * (1 + 0.3 * places[:, None])
    assert torch.allclose(x, places / near + 0.1, atol=0.02)
    assert torch.allclose(y, places[:, None] / near - 0.2 + 0 * x, atol=0.02)


def test_an_emoji_before_a_photograph_is_asked_for_as_another(folder, drawn_words):
    for case in word_cases(6, 4, 40, find_photos([folder], held_out=True)):
        scene = case.scene
        assert case.shape in EMOJI and scene.shape in EMOJI and case.shape != scene.shape
        assert case.shape in case.prompt and case.kind == "emoji over photographs"
        frames, bare = (render(s, 64) for s in (scene, dataclasses.replace(scene, shape="")))
        center, found = track((frames != bare).any(dim=1))
        assert found.all() and (center - projected_center(scene)).norm(dim=-1).max() < 0.1


def test_an_emoji_is_seen_once_with_its_own_outline_and_named_without_a_colour(drawn_words):
    one, still = torch.ones(1), torch.zeros(1)
    ground, skin = GROUNDS["navy"], drawn_words("cat")
    scene = Scene("cat", COLORS["red"], "plain", ground, ground, 1.0, 0.0,
                  torch.tensor([[.4, .2]]), 0.2 * one, still, torch.zeros(1, 2), one, still,
                  skin=skin)
    picture = (render(scene, 200)[0] + 1) / 2
    inside = (picture - torch.tensor(ground)[:, None, None]).abs().amax(dim=0) > 1e-3
    rows, columns = (torch.nonzero(inside.any(dim=d)).flatten() for d in (1, 0))
    assert abs((rows[0] + rows[-1]) / 2 - 120) < 2 and abs((columns[0] + columns[-1]) / 2 - 140) < 2
    assert abs(len(columns) - 48) <= 3 and abs(len(rows) - 32) <= 3
    assert torch.allclose(picture[:, 112, 124], skin[:3, 32, 22], atol=1e-3)
    phrases = {caption(scene, np.random.default_rng(seed)) for seed in range(60)}
    words = {word.strip(",") for phrase in phrases for word in phrase.split()}
    assert "a cat on a navy background" in phrases and words <= set(VOCABULARY)
    assert all("cat" in phrase for phrase in phrases) and not words & set(COLORS)


def test_every_emoji_is_one_token_that_no_other_word_of_the_captions_has():
    tokens = {word: Tokenizer().encode(word) for word in VOCABULARY}
    assert all(len(tokens[word]) == 1 for word in EMOJI)
    others = {i for word in VOCABULARY if word not in EMOJI for i in tokens[word]}
    ids = {i for word in EMOJI for i in tokens[word]}
    assert len(ids) == len(EMOJI) and not ids & others


def test_the_font_draws_each_of_its_emoji_in_the_middle(monkeypatch, tmp_path):
    monkeypatch.setattr("weights.training.vocabulary.FONT", tmp_path / "none.ttf")
    with pytest.raises(InputError, match="apt-get install fonts-noto-color-emoji"):
        emoji.__wrapped__("cat")
    monkeypatch.undo()
    if not FONT.exists():
        pytest.skip(f"{FONT} is not there")
    pictures = {word: emoji(word) for word in EMOJI}
    for word, picture in pictures.items():
        seen = picture[3] > 0.1
        rows, columns = (torch.nonzero(seen.any(dim=d)).flatten() for d in (1, 0))
        assert abs(max(len(rows), len(columns)) - 57.6) < 4, word
        assert abs(rows[0] + rows[-1] - 95) < 5 and abs(columns[0] + columns[-1] - 95) < 5, word
        assert (picture[:3] <= picture[3] + 1e-6).all()
    assert len({picture.numpy().tobytes() for picture in pictures.values()}) == len(EMOJI)


def test_grounds_that_are_drawn_are_all_different_and_busy():
    grounds = [drawn_ground(np.random.default_rng(seed)) for seed in range(12)]
    for ground in grounds:
        assert ground.shape == (3, GROUND, GROUND) and 0 <= ground.min() and ground.max() <= 1
        assert ground.std() > 0.03
    assert len({ground.numpy().tobytes() for ground in grounds}) == 12


def test_a_shaken_camera_shifts_the_ground_by_what_it_reports(folder):
    pan, zoom, roll = shake(np.random.default_rng(3), 6)
    one, still = torch.ones(1), torch.zeros(6)
    assert 0.02 <= pan.abs().max() <= 0.12 and pan.std() > 0
    y, x = torch.meshgrid(*2 * [(torch.arange(GROUND) + 0.5) / GROUND * 4 - 2], indexing="ij")
    photo = torch.stack([x / 4 + .5, y / 4 + .5, 0 * x])    # tells each point by its colour

    def seen(pan, zoom, roll):
        scene = Scene("", (0., 0., 0.), "plain", (0., 0., 0.), (0., 0., 0.), 1.0, 0.0,
                      torch.zeros(6, 2), one, still, pan, zoom, roll, photo)
        return (((render(scene, 65) + 1) / 2)[:, :2] - .5) * 4          # world points

    assert torch.allclose(seen(pan, zoom, roll)[:, :, 32, 32], pan, atol=1e-3)
    edge = seen(torch.zeros(6, 2), zoom, roll)[:, :, 32, 64] * 65 / 64
    assert torch.allclose(edge.norm(dim=-1), 1 / zoom, atol=1e-3)
    assert torch.allclose(torch.atan2(edge[:, 1], edge[:, 0]), roll, atol=1e-3)


@pytest.mark.parametrize("motion", [PATHS[0], *CAMERAS])
def test_a_perfect_clone_of_a_reference_over_a_photograph_is_measured_as_one(folder, motion):
    case, = held_out_cases((motion,), 1, 16, 40, photos=find_photos([folder], held_out=True))
    ground = GROUNDS[case.ground]
    texture = next((t for t in TEXTURES if t in case.prompt), "plain")
    assert (texture == "plain") == bool(case.scene.shape)       # a camera is seen by a texture
    frames = render(dataclasses.replace(
        case.scene, shape=case.shape, color=COLORS[case.color], photo=None, texture=texture,
        ground=ground, second=tone(ground)), 128)
    follows = "direction" if case.scene.shape else "camera"
    assert measure(frames, case)[follows] > 0.97
    assert measure(frames.flip(0), case)[follows] < 0
    assert measure(frames, case)["ground"] == measure(frames, case)["colour"] == 1


def test_without_photographs_one_line_says_what_to_install(tmp_path, capsys):
    with pytest.raises(InputError, match="apt-get install gnome-backgrounds"):
        find_photos([tmp_path], held_out=False)
    code = train.main(["--out", str(tmp_path / "run"), "--photos", str(tmp_path)])
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_world_is_drawn_and_trained_on_from_a_model_that_is_there(
        folder, tmp_path, monkeypatch, drawn_words, capsys):
    def changed(before, after):
        weights = before.state_dict()
        names = [name for name, w in after.state_dict().items() if not w.equal(weights[name])]
        return {re.match(r"vae\.\w+|\w+", name)[0] for name in names}

    monkeypatch.setattr("weights.training.data.SHARD", 4)
    out, weights = tmp_path / "run", tmp_path / "new.safetensors"
    command = ["--out", out, "--start", DEFAULT_WEIGHTS, "--photos", folder, "--weights", weights,
               "--clips", "4", "--motion-batch", "1", "--vae-batch", "8", "--decoder-steps", "1"]
    assert train.main([*map(str, command), "--clips", "0"]) == 2
    assert "has no clips; draw some" in capsys.readouterr().err
    assert train.main([*map(str, command), "--motion-steps", "1"]) == 0
    drawn = (out / "latents" / "000000.pt").read_bytes()
    start, first = (load_model(file, "cpu") for file in (DEFAULT_WEIGHTS, weights))
    assert changed(start, first) == {"unet", "text_encoder", "vae.decoder", "vae.post_quant_conv"}
    assert set(EMOJI) < set(first.config.training_vocabulary)
    assert train.main([*map(str, command), "--motion-steps", "2"]) == 0
    assert torch.load(out / "motion.pt", weights_only=True)["step"] == 2
    assert (out / "latents" / "000000.pt").read_bytes() == drawn
    assert load_model(weights, "cpu").sha256 != first.sha256


def test_a_first_model_is_trained_from_nothing(folder, tmp_path, monkeypatch, drawn_words):
    monkeypatch.setattr("weights.training.data.SHARD", 4)
    command = ["--out", tmp_path / "run", "--photos", folder, "--weights", tmp_path / "new",
               "--vae-steps", "2", "--vae-batch", "8", "--clips", "4", "--image-steps", "2",
               "--image-batch", "2", "--motion-steps", "0", "--decoder-steps", "0"]
    assert train.main([*map(str, command)]) == 0
    encoded, clips = Clips(tmp_path / "run" / "latents"), Clips(tmp_path / "run" / "latents")
    vae = train.train_vae(tmp_path / "run", [], train.Hyperparameters(vae_steps=2), "cpu")
    plain = copy.deepcopy(vae)
    model = train.first_model(vae, clips)
    assert not clips.latents.equal(encoded.latents)         # they are balanced, and the VAE so too
    back = plain.decoder(plain.post_quant_conv(encoded.latents[0, :2].float()))
    found = model.vae.decoder(model.vae.post_quant_conv(clips.latents[0, :2].float()))
    assert (found - back).abs().max() < 0.02 * back.std()
    made = torch.load(tmp_path / "run" / "image.pt", weights_only=True)["module"]
    assert all(made[f"unet.{name}"].equal(weight) for name, weight in
               model.unet.state_dict().items() if "motion_modules" in name)
    model.unet.load_state_dict({name.removeprefix("unet."): weight for name, weight in made.items()
                                if name.startswith("unet.")})
    assert model.unet.conv_out.weight.any()                 # has learnt
    latents, text = torch.randn(1, 4, 2, 16, 16), model.encode_text(["a red star"])
    both, _ = model.unet(latents, torch.tensor([500]), text)
    alone, _ = model.unet(latents[:, :, :1], torch.tensor([500]), text)
    assert torch.allclose(both[:, :, :1], alone, atol=1e-5)     # no frame sees another yet


def test_pictures_are_those_of_their_captions(folder, drawn_words):
    photos, checked = find_photos([folder], held_out=False), 0
    for seed in range(8):
        x, captions = pictures(seed, 30, photos)
        assert x.shape == (30, 3, 128, 128) and len(captions) == 30
        for picture, said in zip(x, captions):
            grounds = GROUNDS.keys() & set(said.replace(",", "").split())
            if grounds and not any(texture in said for texture in TEXTURES):
                corners = (picture[:, [0, 0, -1, -1], [0, -1, 0, -1]].T + 1) / 2
                near = (corners - torch.tensor(GROUNDS[grounds.pop()])).abs().amax(dim=1) < 0.01
                checked += 1
                assert near.sum() >= 2              # a subject may hide the others
    assert checked > 10


def test_new_words_get_vectors_that_learn_and_the_old_ones_keep_theirs(embedded):
    model = copy.deepcopy(embedded)
    vectors = model.text_encoder.requires_grad_(True).text_model.embeddings.token_embedding.weight
    new = [i for word in list(EMOJI)[:9] for i in model.tokenizer.encode(word)]
    old = vectors.abs().amax(dim=1) > 0
    old[new] = False
    before, vectors.data[new] = vectors.detach().clone(), 0
    train.learn_words(model)
    assert vectors[new].norm(dim=1).min() > 1 and vectors[old].equal(before[old])
    model.text_encoder(model.tokenizer(["a red star", f"a {list(EMOJI)[0]}"])).sum().backward()
    assert vectors.grad[new[0]].any() and not vectors.grad[old].any()
