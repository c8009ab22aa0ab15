"""The world of photographs: what is drawn, where it is, and which pictures training never sees."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from mcl.checkpoint import EMBEDDED, load_model
from mcl.errors import InputError
from mcl.tiny import train
from mcl.tiny.clips import caption, tone
from mcl.tiny.evaluate import CAMERAS, PATHS, held_out_cases, measure, track
from mcl.tiny.photos import GROUND, find_photos, mixed_scene, read_photo, shake
from mcl.tiny.scenes import COLOURS, GROUNDS, TEXTURES, Scene, render, seen_centre


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


def test_a_clip_is_the_same_by_its_seed_and_drawn_from_no_other_photograph(folder, monkeypatch):
    photos, read = find_photos([folder], held_out=False), set()
    monkeypatch.setattr("mcl.tiny.photos.read_photo", lambda file: read.add(file) or original(file))
    original = read_photo.__wrapped__
    kinds = set()
    for seed in range(24):
        one, same = (mixed_scene(np.random.default_rng(seed), 4, photos) for _ in range(2))
        assert torch.equal(render(one, 32), render(same, 32))
        kinds.add((bool(one.shape), one.photo is not None, one.skin is not None))
        if one.photo is not None and one.shape and one.skin is None:
            assert caption(one, np.random.default_rng(0)) == caption(same, np.random.default_rng(0))
        elif one.photo is not None:
            assert caption(one, np.random.default_rng(0)) == "a photo"
    assert kinds == {(True, False, False), (False, True, False), (True, True, False),
                     (True, True, True)}
    assert read and read <= set(photos)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_thing_before_a_photograph_is_where_its_path_says(folder, by_hand):
    photos = find_photos([folder], held_out=True)
    for case in held_out_cases(PATHS, 3, 16, 40, photos=photos, by_hand=by_hand):
        with_it = render(case.scene, 128)
        without = render(dataclasses.replace(case.scene, shape=""), 128)
        centre, found = track((with_it - without).abs().amax(dim=1) > 0.05)
        assert found.all()
        assert (centre - seen_centre(case.scene)).norm(dim=-1).mean() < 0.06
        moving = (without - without[:1]).abs().max() > 0.05
        assert moving == by_hand


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
        case.scene, shape=case.shape, colour=COLOURS[case.colour], photo=None, texture=texture,
        ground=ground, second=tone(ground)), 128)
    follows = "direction" if case.scene.shape else "camera"
    assert measure(frames, case)[follows] > 0.97
    assert measure(frames.flip(0), case)[follows] < 0
    assert measure(frames, case)["ground"] == measure(frames, case)["colour"] == 1


def test_without_photographs_one_line_says_what_to_install(tmp_path, capsys):
    with pytest.raises(InputError, match="apt-get install gnome-backgrounds"):
        find_photos([tmp_path], held_out=False)
    code = train.main(["--out", str(tmp_path / "run"), "--stage", "photos", "--photos",
                       str(tmp_path)])
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_world_is_drawn_and_trained_on_from_a_model_that_is_there(
        folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mcl.tiny.data.SHARD", 4)
    out, weights = tmp_path / "run", tmp_path / "new.safetensors"
    command = ["--out", out, "--stage", "photos", "world", "--start", EMBEDDED, "--photos", folder,
               "--weights", weights, "--world-clips", "4", "--motion-batch", "1"]
    assert train.main([*map(str, command), "--world-steps", "1"]) == 0
    drawn = (out / "world" / "000000.pt").read_bytes()
    first, start = load_model(weights, "cpu"), load_model(EMBEDDED, "cpu")
    changed = {name.split(".")[0] for name, weight in first.state_dict().items()
               if not weight.equal(start.state_dict()[name])}
    assert changed == {"unet"} and "photo" in first.config.vocabulary
    assert train.main([*map(str, command), "--world-steps", "2"]) == 0
    assert torch.load(out / "world.pt", weights_only=True)["step"] == 2
    assert (out / "world" / "000000.pt").read_bytes() == drawn
    assert load_model(weights, "cpu").sha256 != first.sha256
