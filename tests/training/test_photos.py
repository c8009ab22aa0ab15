"""Tests of the scenes over photographs, their captions, and the training."""
import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mcl.checkpoints.model_file import load_model, save_model
from mcl.errors import InputError
from mcl.networks.tokenizer import Tokenizer
from tests.conftest import random_model
from weights.training import train
from weights.training.clip_metrics import measure, track
from weights.training.clips import VOCABULARY, caption, shade
from weights.training.data import LatentClips, random_frames
from weights.training.held_out import CAMERAS, PATHS, emoji_cases, held_out_cases
from weights.training.photos import (
    BACKGROUND_SIZE,
    add_camera_shake,
    find_photos,
    procedural_background,
    random_photo_scene,
    read_photo,
)
from weights.training.scenes import (
    BACKGROUNDS,
    COLORS,
    EMOJI,
    FONT,
    TEXTURES,
    Scene,
    emoji_sprite,
    projected_center,
    render,
)


@pytest.fixture
def narrow(monkeypatch):
    """Replace the demo model's config by one with fewer channels, and return it."""
    narrow = dataclasses.replace(
        train.TINY, unet=dataclasses.replace(train.TINY.unet, block_out_channels=(16, 24, 32)),
        vae=dataclasses.replace(train.TINY.vae, block_out_channels=(16, 16, 16, 16)))
    monkeypatch.setattr(train, "TINY", narrow)
    return narrow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of forty dim photos of smooth noise, each of another hue."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        small = Image.fromarray(rng.integers(0, 90 + i, (9, 12, 3)).astype(np.uint8))
        small.resize((200, 150), Image.Resampling.BICUBIC).save(folder / f"p{i}.png",
                                                                 compress_level=1)
    return folder


def test_training_and_evaluation_share_no_photo_whatever_its_size(folder, tmp_path):
    training, held_out = (find_photos([folder], held_out) for held_out in (False, True))
    assert not set(training) & set(held_out) and len(training) + len(held_out) == 40
    assert 1 <= len(held_out) < len(training)
    for file in (*training, *held_out):
        picture = Image.open(file)
        picture.resize((40, 30)).save(tmp_path / f"{file.stem}-small.png")
        nested = tmp_path / file.stem.upper() / "contents" / "images"
        nested.mkdir(parents=True)
        picture.resize((400, 300)).save(nested / "400x300.png", compress_level=1)
    for is_held_out, files in ((False, training), (True, held_out)):
        largest = find_photos([folder, tmp_path], is_held_out)
        assert {f.parts[-4].lower() for f in largest} == {f.stem for f in files}


def test_scene_depends_on_the_seed_and_on_training_photos_only(
        folder, monkeypatch, drawn_words):
    photos, files = find_photos([folder], held_out=False), set()
    original = read_photo.__wrapped__
    monkeypatch.setattr("weights.training.photos.read_photo",
                        lambda file: files.add(file) or original(file))
    kinds = set()
    for seed in range(40):
        scene, same = (random_photo_scene(np.random.default_rng(seed), 4, photos)
                       for _ in range(2))
        assert torch.equal(render(scene, 32), render(same, 32))
        is_emoji = scene.shape in EMOJI
        kinds.add((bool(scene.shape), scene.photo is not None, scene.sprite is not None, is_emoji))
        text = caption(scene, np.random.default_rng(0))
        assert text == caption(same, np.random.default_rng(0))
        assert is_emoji == any(w in EMOJI for w in text.split())
        if scene.photo is not None and not is_emoji and (
                not scene.shape or scene.sprite is not None):
            assert text == "a photo"
    assert kinds == {(True, False, False, False), (False, True, False, False),
                     (True, True, False, False), (True, True, True, False),
                     (True, False, True, True), (True, True, True, True)}
    assert files and files <= set(photos)


@pytest.mark.parametrize("has_camera_shake", [False, True])
def test_subject_over_a_photo_is_where_its_path_says(folder, has_camera_shake):
    photos = find_photos([folder], held_out=True)
    for case in held_out_cases(PATHS, 3, 16, 40, photos=photos,
                               has_camera_shake=has_camera_shake):
        frames = render(case.scene, 128)
        without = render(dataclasses.replace(case.scene, shape=""), 128)
        center, is_found = track((frames - without).abs().amax(dim=1) > 0.05)
        assert is_found.all()
        assert (center - projected_center(case.scene)).norm(dim=-1).mean() < 0.06
        is_moving = (without - without[:1]).abs().max() > 0.05
        assert is_moving == has_camera_shake


def test_tilted_background_is_smaller_where_it_is_farther():
    n = BACKGROUND_SIZE         # each point's color is its position
    line = torch.linspace(-1, 1, n)
    photo = torch.stack([line.expand(n, n), line[:, None].expand(n, n),
                         torch.zeros(n, n)]) / 2 + 0.5
    one, still, black = torch.ones(1), torch.zeros(1), (0., 0., 0.)
    scene = Scene("", black, "plain", black, black, 1.0, 0.0, torch.zeros(1, 2), one, still,
                  torch.tensor([[.1, -.2]]), 1.25 * one, still, photo, tilt=(0., .3))
    x, y, _ = render(scene, 64)[0] * 2
    places = (torch.arange(64) + 0.5) / 32 - 1
    near = 1.25 * (1 + 0.3 * places[:, None])
    assert torch.allclose(x, places / near + 0.1, atol=0.02)
    assert torch.allclose(y, places[:, None] / near - 0.2 + 0 * x, atol=0.02)


def test_prompt_of_an_emoji_over_a_photo_has_another_emoji(folder, drawn_words):
    for case in emoji_cases(6, 4, 40, find_photos([folder], held_out=True)):
        scene = case.scene
        assert case.shape in EMOJI and scene.shape in EMOJI and case.shape != scene.shape
        assert case.shape in case.prompt and case.kind == "emoji over photographs"
        frames, without = (render(s, 64) for s in (scene, dataclasses.replace(scene, shape="")))
        center, is_found = track((frames != without).any(dim=1))
        assert is_found.all() and (center - projected_center(scene)).norm(dim=-1).max() < 0.1


def test_emoji_is_rendered_once_with_its_outline_and_named_without_a_color(drawn_words):
    one, still = torch.ones(1), torch.zeros(1)
    background, sprite = BACKGROUNDS["navy"], drawn_words("cat")
    scene = Scene("cat", COLORS["red"], "plain", background, background, 1.0, 0.0,
                  torch.tensor([[.4, .2]]), 0.2 * one, still, torch.zeros(1, 2), one, still,
                  sprite=sprite)
    picture = (render(scene, 200)[0] + 1) / 2
    inside = (picture - torch.tensor(background)[:, None, None]).abs().amax(dim=0) > 1e-3
    rows, columns = (torch.nonzero(inside.any(dim=d)).flatten() for d in (1, 0))
    assert abs((rows[0] + rows[-1]) / 2 - 120) < 2 and abs((columns[0] + columns[-1]) / 2 - 140) < 2
    assert abs(len(columns) - 48) <= 3 and abs(len(rows) - 32) <= 3
    assert torch.allclose(picture[:, 112, 124], sprite[:3, 32, 22], atol=1e-3)
    phrases = {caption(scene, np.random.default_rng(seed)) for seed in range(60)}
    words = {word.strip(",") for phrase in phrases for word in phrase.split()}
    assert "a cat on a navy background" in phrases and words <= set(VOCABULARY)
    assert all("cat" in phrase for phrase in phrases) and not words & set(COLORS)


def test_every_emoji_is_one_token_of_its_own():
    tokens = {word: Tokenizer().encode(word) for word in VOCABULARY}
    assert all(len(tokens[word]) == 1 for word in EMOJI)
    others = {i for word in VOCABULARY if word not in EMOJI for i in tokens[word]}
    ids = {i for word in EMOJI for i in tokens[word]}
    assert len(ids) == len(EMOJI) and not ids & others


def test_emoji_of_the_font_are_centered(monkeypatch, tmp_path):
    monkeypatch.setattr("weights.training.scenes.FONT", tmp_path / "none.ttf")
    with pytest.raises(InputError, match="apt-get install fonts-noto-color-emoji"):
        emoji_sprite.__wrapped__("cat")
    monkeypatch.undo()
    if not FONT.exists():
        pytest.skip(f"{FONT} is not installed")
    sprites = {word: emoji_sprite(word) for word in EMOJI}
    for word, sprite in sprites.items():
        rows, columns = (torch.nonzero((sprite[3] > 0.1).any(dim=d)).flatten() for d in (1, 0))
        assert abs(max(len(rows), len(columns)) - 57.6) < 4, word
        assert abs(rows[0] + rows[-1] - 95) < 5 and abs(columns[0] + columns[-1] - 95) < 5, word
        assert (sprite[:3] <= sprite[3] + 1e-6).all()
    assert len({sprite.numpy().tobytes() for sprite in sprites.values()}) == len(EMOJI)


def test_procedural_backgrounds_differ_and_have_detail():
    backgrounds = [procedural_background(np.random.default_rng(seed)) for seed in range(12)]
    for background in backgrounds:
        assert background.shape == (3, BACKGROUND_SIZE, BACKGROUND_SIZE)
        assert 0 <= background.min() and background.max() <= 1 and background.std() > 0.03
    assert len({background.numpy().tobytes() for background in backgrounds}) == 12


def test_camera_shake_moves_the_background_by_its_curves(folder):
    one, still = torch.ones(1), torch.zeros(6)
    steady = Scene("", (0., 0., 0.), "plain", (0., 0., 0.), (0., 0., 0.), 1.0, 0.0,
                   torch.zeros(6, 2), one, still, torch.zeros(6, 2), torch.ones(6), still)
    shaken = add_camera_shake(steady, np.random.default_rng(3))
    pan, zoom, roll = shaken.pan, shaken.zoom, shaken.roll
    assert 0.02 <= pan.abs().max() <= 0.12 and pan.std() > 0
    line = (torch.arange(BACKGROUND_SIZE) + 0.5) / BACKGROUND_SIZE * 4 - 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    photo = torch.stack([x / 4 + .5, y / 4 + .5, 0 * x])    # position as color

    def world_points(pan, zoom, roll):
        scene = dataclasses.replace(steady, pan=pan, zoom=zoom, roll=roll, photo=photo)
        return (((render(scene, 65) + 1) / 2)[:, :2] - .5) * 4

    assert torch.allclose(world_points(pan, zoom, roll)[:, :, 32, 32], pan, atol=1e-3)
    edge = world_points(torch.zeros(6, 2), zoom, roll)[:, :, 32, 64] * 65 / 64
    assert torch.allclose(edge.norm(dim=-1), 1 / zoom, atol=1e-3)
    assert torch.allclose(torch.atan2(edge[:, 1], edge[:, 0]), roll, atol=1e-3)


@pytest.mark.parametrize("motion", [PATHS[0], *CAMERAS])
def test_perfect_clone_of_a_reference_over_a_photo_has_perfect_metrics(folder, motion):
    case, = held_out_cases((motion,), 1, 5, 40, photos=find_photos([folder], held_out=True))
    background = BACKGROUNDS[case.background]
    texture = next((t for t in TEXTURES if t in case.prompt), "plain")
    assert (texture == "plain") == bool(case.scene.shape)
    frames = render(dataclasses.replace(
        case.scene, shape=case.shape, color=COLORS[case.color], photo=None, texture=texture,
        background=background, second_color=shade(background)), 128)
    follows = "direction" if case.scene.shape else "camera"
    values = measure(frames, case)
    assert values[follows] > 0.97 and values["ground"] == values["colour"] == 1
    assert measure(frames.flip(0), case)[follows] < 0


def test_missing_photos_are_reported_with_the_command_that_installs_them(tmp_path, capsys):
    with pytest.raises(InputError, match="apt-get install gnome-backgrounds"):
        find_photos([tmp_path], held_out=False)
    code = train.main(["--out", str(tmp_path / "run"), "--photos", str(tmp_path)])
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_training_continues_with_an_existing_model(
        folder, tmp_path, monkeypatch, narrow, drawn_words, capsys):
    def changed(before, after):
        weights = before.state_dict()
        names = [name for name, w in after.state_dict().items() if not w.equal(weights[name])]
        return {re.match(r"vae\.\w+|\w+", name)[0] for name in names}

    monkeypatch.setattr("weights.training.data.CLIPS_PER_SHARD", 4)
    out, weights, old = (tmp_path / name for name in ("run", "new.safetensors", "old.safetensors"))
    save_model(random_model(narrow), old, torch.float16, sources={}, quantize_min_numel=1 << 16)
    command = ["--out", out, "--start", old, "--photos", folder, "--weights", weights,
               "--motion-batch-size", "1", "--vae-batch-size", "8", "--decoder-steps", "1",
               "--num-clips"]
    assert train.main([*map(str, command), "0"]) == 2
    assert "has no clips. Draw some" in capsys.readouterr().err
    command.append("4")
    assert train.main([*map(str, command), "--motion-steps", "1"]) == 0
    shard = (out / "latents" / "000000.pt").read_bytes()
    start, first = (load_model(file, "cpu") for file in (old, weights))
    assert changed(start, first) == {"unet", "text_encoder", "vae.decoder", "vae.post_quant_conv"}
    assert set(EMOJI) < set(first.config.training_vocabulary)
    assert train.main([*map(str, command), "--motion-steps", "2"]) == 0
    assert torch.load(out / "motion.pt", weights_only=True)["step"] == 2
    assert (out / "latents" / "000000.pt").read_bytes() == shard
    assert load_model(weights, "cpu").sha256 != first.sha256


def test_new_model_is_trained_from_nothing(folder, tmp_path, monkeypatch, narrow, drawn_words):
    monkeypatch.setattr("weights.training.data.CLIPS_PER_SHARD", 4)
    command = ["--out", tmp_path / "run", "--photos", folder, "--weights", tmp_path / "new",
               "--vae-steps", "2", "--vae-batch-size", "8", "--num-clips", "4",
               "--image-steps", "2", "--image-batch-size", "2", "--motion-steps", "0",
               "--decoder-steps", "0"]
    assert train.main([*map(str, command)]) == 0
    encoded, clips = (LatentClips(tmp_path / "run" / "latents") for _ in range(2))
    vae = train.train_vae([], train.Options(out=tmp_path / "run", vae_steps=2), "cpu")
    plain = copy.deepcopy(vae)
    model = train.init_model(vae, clips)
    assert not clips.latents.equal(encoded.latents)
    back = plain.decoder(plain.post_quant_conv(encoded.latents[0, :2].float()))
    whitened = model.vae.decoder(model.vae.post_quant_conv(clips.latents[0, :2].float()))
    assert (whitened - back).abs().max() < 0.02 * back.std()
    weights = torch.load(tmp_path / "run" / "image.pt", weights_only=True)["module"]
    assert all(weights[f"unet.{name}"].equal(weight) for name, weight in
               model.unet.state_dict().items() if "motion_modules" in name)
    model.unet.load_state_dict({name.removeprefix("unet."): weight
                                for name, weight in weights.items() if name.startswith("unet.")})
    assert model.unet.conv_out.weight.any()
    latents, text = torch.randn(1, 4, 2, 16, 16), model.encode_text(["a red star"])
    both, _ = model.unet(latents, torch.tensor([500]), text)
    alone, _ = model.unet(latents[:, :, :1], torch.tensor([500]), text)
    assert torch.allclose(both[:, :, :1], alone, atol=1e-5)     # frames are independent


def test_captions_name_the_background_of_their_frames(folder, drawn_words):
    photos, checked = find_photos([folder], held_out=False), 0
    for seed in range(5):
        x, captions = random_frames(seed, 30, photos)
        assert x.shape == (30, 3, 128, 128) and len(captions) == 30
        for picture, text in zip(x, captions):
            names = BACKGROUNDS.keys() & set(text.replace(",", "").split())
            if names and not any(texture in text for texture in TEXTURES):
                corners = (picture[:, [0, 0, -1, -1], [0, -1, 0, -1]].T + 1) / 2
                near = (corners - torch.tensor(BACKGROUNDS[names.pop()])).abs().amax(dim=1) < 0.01
                checked += 1
                assert near.sum() >= 2              # a subject may hide the others
    assert checked > 10


def test_only_embeddings_of_new_words_are_trained(embedded):
    model = copy.deepcopy(embedded)
    vectors = model.text_encoder.requires_grad_(True).text_model.embeddings.token_embedding.weight
    new = [i for word in list(EMOJI)[:9] for i in model.tokenizer.encode(word)]
    old = vectors.abs().amax(dim=1) > 0
    old[new] = False
    before, vectors.data[new] = vectors.detach().clone(), 0
    train.init_new_tokens(model)
    assert vectors[new].norm(dim=1).min() > 1 and vectors[old].equal(before[old])
    model.text_encoder(model.tokenizer(["a red star", f"a {list(EMOJI)[0]}"])).sum().backward()
    assert vectors.grad[new[0]].any() and not vectors.grad[old].any()
