"""Tests of the paper's table: CLIP's scores, and the means of records."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mcl import InputError, write_video
from mcl.checkpoints.model_file import DEFAULT_WEIGHTS
from mcl.evaluation.report import METRICS
from mcl.networks.tokenizer import Tokenizer
from tests.lazy import LazyModule
from weights.training.evaluate import student_t_95

transformers = LazyModule("transformers")
paper_table = LazyModule("tests.benchmarks.paper_table")
ROOT = Path(__file__).parents[2]
SMALL = {"text": 64, "text_layers": 2, "vision": 128, "layers": 2, "patch": 8, "grid": 4, "d": 24}


def clip_config(text, text_layers, vision, layers, patch, grid, d):
    return transformers.CLIPConfig(
        projection_dim=d,
        text_config=dict(hidden_size=text, intermediate_size=4 * text, projection_dim=d,
                         num_hidden_layers=text_layers, num_attention_heads=text // 64),
        vision_config=dict(hidden_size=vision, intermediate_size=4 * vision, projection_dim=d,
                           num_hidden_layers=layers, num_attention_heads=vision // 64,
                           patch_size=patch, image_size=patch * grid))


def make_oracle(sizes):
    """Return a CLIPModel of transformers with weights so large that every part matters."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(clip_config(**sizes)).eval()
    for p in model.parameters():
        p.data += (0.3 if p.ndim < 2 else p[0].numel() ** -0.5) * torch.randn(p.shape)
    return model


def make_images(h, w, count=3):
    """Return images (n, h, w, 3) uint8, smooth on one side and noisy on the other."""
    noise = np.random.default_rng(0).integers(0, 256, (count, h, w, 3))
    ramp = np.linspace(0, 255, w)[None, None, :, None]
    return np.where(np.arange(w)[None, None, :, None] < w // 2, noise, ramp).astype(np.uint8)


def to_frames(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """Return the model.safetensors of a small CLIP that transformers saved."""
    path = tmp_path_factory.mktemp("clip")
    make_oracle(SMALL).save_pretrained(path)
    return path / "model.safetensors"


@pytest.mark.parametrize("sizes", [SMALL, SMALL | {"text": 128, "patch": 6, "grid": 5, "d": 40}])
def test_clip_scores_equal_products_of_embeddings_of_normalized_crops(sizes, tmp_path):
    oracle, size = make_oracle(sizes), sizes["patch"] * sizes["grid"]
    oracle.save_pretrained(tmp_path)
    images = make_images(40, 60)
    width = size * 60 // 40
    resized = np.stack([Image.fromarray(image).resize((width, size), Image.Resampling.BICUBIC)
                        for image in images])[:, :, (width - size) // 2:][:, :, :size]
    mean, std = (torch.tensor(v) for v in ((0.48145466, 0.4578275, 0.40821073),
                                           (0.26862954, 0.26130258, 0.27577711)))
    pixels = ((torch.from_numpy(resized) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = oracle(input_ids=Tokenizer()("a red star on a navy background"),
                          pixel_values=pixels)
    a, b, c = expected.image_embeds
    assert max(a @ b, b @ c, a @ c) < 0.99              # the embeddings differ
    for path in (tmp_path, tmp_path / "model.safetensors"):
        scores = paper_table.clip_scores(paper_table.load_clip(path),
                                         "a red star on a navy background", to_frames(images))
        assert scores == pytest.approx((float((a + b + c) @ expected.text_embeds[0] / 3),
                                        float((a @ b + b @ c) / 2)), abs=1e-5)


@pytest.mark.parametrize("name, change, message", [
    ("visual_projection.weight", None, "visual_projection.weight is missing"),
    ("text_model.embeddings.position_embedding.weight", torch.zeros(9, 64), "not a CLIPModel")])
def test_damaged_clip_files_are_rejected(name, change, message, clip_file, tmp_path):
    tensors = load_file(clip_file)
    tensors.pop(name, None)
    path = tmp_path / "model.safetensors"
    save_file(tensors if change is None else tensors | {name: change}, path, {"format": "pt"})
    (tmp_path / "config.json").write_text((clip_file.parent / "config.json").read_text())
    with pytest.raises(InputError, match=f"{path}.*{message}"):
        paper_table.load_clip(path)


def record(reference, prompt, seed=0, **metrics):
    return {"reference": reference, "prompt": prompt, "seed": seed,
            "report": {kind: {name: values[i] for name, values in metrics.items()}
                       for i, kind in enumerate(("clone", "unguided"))}}


def rows(table):
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
            for line in table.splitlines()}


def test_table_has_means_over_references_and_prompts_with_intervals():
    records = [record("a", "x", flicker=(1.0, 0.5)), record("a", "x", 1, flicker=(3.0, 0.5)),
               record("b", "x", flicker=(4.0, None)), record("b", "y", flicker=(6.0, math.nan))]
    # The means 2, 4 and 6 have a deviation of 2; 4.3027 * 2 / sqrt(3) = 4.9683.
    table = rows(paper_table.format_table(records))
    assert table["flicker"] == ["4.0000 ± 4.9683", "0.5000 (of 1)", ""]


@pytest.mark.parametrize("degrees_of_freedom, t", [
    (1, 12.7062), (2, 4.30265), (5, 2.57058), (29, 2.04523), (1000, 1.96234)])
def test_student_t_equals_its_tabulated_values(degrees_of_freedom, t):
    assert student_t_95(degrees_of_freedom) == pytest.approx(t, abs=2e-4)


@pytest.fixture
def make_record(tmp_path):
    """Return a function that writes a clip and its record, as sample.py --report does."""
    def write(name, seed):
        frames = to_frames(make_images(32, 32, 4)).roll(seed, 0)
        write_video(tmp_path / name, frames, 8)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({
            "reference": "ref.mp4", "prompt": "a red star", "seed": seed,
            "settings": {"num_frames": 4, "height": 32, "width": 32},
            "report": {kind: dict.fromkeys(METRICS, value + seed)
                       for kind, value in (("clone", 1.0), ("unguided", 0.5))}}))
        return path, frames
    return write


def test_table_is_made_from_the_records_of_clips(make_record, clip_file, capsys):
    paths, clips = zip(make_record("a", 0), make_record("b", 2), strict=True)
    assert paper_table.main(["--clip", str(clip_file), *map(str, paths)]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["", "---", *paper_table.PAPER_RESULTS, *METRICS]
    assert table["flicker"] == ["2.0000", "1.5000", ""]         # seeds are averaged first
    scores = [paper_table.clip_scores(paper_table.load_clip(clip_file), "a red star", frames)
              for frames in clips]
    for name, values in zip(paper_table.PAPER_RESULTS, zip(*scores, strict=True), strict=True):
        clone, unguided, paper = table[name]
        assert float(clone) == pytest.approx(sum(values) / 2, abs=1e-4)
        assert (unguided, paper) == ("- (of 0)", str(paper_table.PAPER_RESULTS[name]))


@pytest.mark.parametrize("change, message", [
    ({"report": {}}, "cannot be read as a record .*'clone'"), ({"prompt": None}, "cannot be read"),
    ({"settings": {}}, "cannot be read as a record"), ("missing clip", "cannot be read"),
    ("no JSON", "cannot be read as a record")])
def test_files_that_are_no_records_are_reported_in_one_line(change, message, make_record, clip_file,
                                                           capsys):
    path, _ = make_record("a", 0)
    if change == "missing clip":
        path = path.rename(path.with_name("b.mp4.json"))
    else:
        path.write_text(change if isinstance(change, str) else
                        json.dumps(json.loads(path.read_text()) | change))
    assert paper_table.main(["--clip", str(clip_file), str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}: ")
    assert re.search(message, error)


def test_other_weights_are_not_taken_for_clip(make_record, capsys):
    path, _ = make_record("a", 0)
    assert paper_table.main(["--clip", str(DEFAULT_WEIGHTS), str(path)]) == 2
    assert "not a CLIPModel" in capsys.readouterr().err


def test_davis_jobs_have_thirty_references():
    lines = (ROOT / "examples" / "davis.jsonl").read_text().splitlines()
    jobs = [json.loads(line) for line in lines]
    names = [Path(job["ref"]).name for job in jobs]
    assert len(names) == 30 and names == sorted(set(names))
    assert {str(Path(job["ref"]).parent) for job in jobs} == {"DAVIS/JPEGImages/480p"}
    assert len({job["prompt"] for job in jobs}) == 30
