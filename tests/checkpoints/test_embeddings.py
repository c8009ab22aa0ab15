"""Textual inversion embeddings: every format is read, and others are refused by their name."""
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from mcl import InputError, clone, invert_reference
from mcl.checkpoints.embeddings import add_embeddings, parse_embedding, read_embedding
from mcl.cli import jobs
from mcl.model import Model
from tests.cli.conftest import PROMPT, REFERENCE, run, weights  # noqa: F401
from tests.conftest import randn
from tests.foreign import convert, save

VECTORS = randn(3, 12)
FEW = ["--ref", REFERENCE, "--prompt", PROMPT, "--steps", 2, "--guidance-steps", 1]


def a1111(vectors):
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": vectors, "step": 1,
            "name": "easynegative", "sd_checkpoint": None, "sd_checkpoint_name": "v1"}


FORMATS = {
    "a1111": ("pt", a1111({"*": VECTORS.clone().requires_grad_()})),
    "a1111, parameter": ("pt", a1111({"*": torch.nn.Parameter(VECTORS)})),
    "the first": ("pt", a1111(torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)}))),
    "emb_params": ("safetensors", {"emb_params": VECTORS}),
    "emb_params, pickled": ("bin", {"emb_params": VECTORS}),
    "diffusers, pickled": ("bin", {"<cat-toy>": VECTORS}),
    "diffusers": ("safetensors", {"<cat-toy>": VECTORS}),
    "diffusers, one vector": ("bin", {"<cat-toy>": VECTORS[0]})}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name, small, tmp_path):
    ending, state = FORMATS[name]
    expected = VECTORS[:1] if "one" in name else VECTORS
    assert torch.equal(read_embedding(save(tmp_path / f"a.{ending}", state), small), expected)
    if ending != "safetensors" and name != "the first":
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert torch.equal(read_embedding(tmp_path / "old.pt", small), expected)
    half = save(tmp_path / "half.safetensors", {"emb_params": VECTORS.half()})
    assert torch.equal(read_embedding(half, small), VECTORS.half().float())


@pytest.mark.parametrize("state, message", [
    ({"emb_params": torch.zeros(2, 768)}, r"is for Stable Diffusion 1.5 \(width 768, not 12\)"),
    ({"<cat>": torch.zeros(1024)}, r"is for Stable Diffusion 2 \(width 1024, not 12\)"),
    ({"emb_params": torch.zeros(1, 13)}, r"is for another text encoder \(width 13, not 12\)"),
    ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "Stable Diffusion XL .* not"),
    ({"<cat>": torch.zeros(12), "<dog>": torch.zeros(12)}, "2 tensors .* of an unknown kind"),
    ({"<cat>": torch.full((1, 12), torch.nan)}, "the tensor <cat> is not finite"),
    ({"<cat>": torch.ones(1, 12, dtype=torch.int8)}, "1 tensors .* of an unknown kind"),
    ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 12)},
     "a LoRA for Stable Diffusion 1.5, not for --embedding. Pass it with --lora")])
def test_other_files_are_rejected_by_name(state, message, small, tmp_path):
    with pytest.raises(InputError, match=f"a.safetensors: .*{message}"):
        read_embedding(save(tmp_path / "a.safetensors", state), small)


def test_a_value_that_half_precision_cannot_hold_is_rejected(small, tmp_path):
    path = save(tmp_path / "a.safetensors", {"emb_params": torch.full((1, 12), 1e6)})
    with torch.device("meta"):
        half = Model(small.config).half()
    assert read_embedding(path, small).max() == 1e6
    with pytest.raises(InputError, match="is not finite in torch.float16"):
        read_embedding(path, half)


def test_an_embedding_with_another_option_is_rejected(tmp_path, capsys):
    path = save(tmp_path / "easy.pt", a1111({"*": VECTORS}))
    assert convert("--check", path) == 0
    assert f"{path}: a textual inversion embedding" in capsys.readouterr().out
    assert convert("--base", path, "--out", tmp_path / "o.safetensors") == 2
    assert "embedding, for sample.py, not for --base. Pass it with --embedding\n" in (
        capsys.readouterr().err)


def test_the_word_follows_the_last_colon(tmp_path):
    assert parse_embedding("x/easy.pt") == ("easy", Path("x/easy.pt"))
    assert parse_embedding("x/easy.v2.pt:<cat>") == ("<cat>", Path("x/easy.v2.pt"))
    assert parse_embedding("C:/easy.pt") == ("easy", Path("C:/easy.pt"))
    assert parse_embedding("C:/easy.pt:cat") == ("cat", Path("C:/easy.pt"))
    (tmp_path / "a:b").touch()
    assert parse_embedding(f"{tmp_path}/a:b") == ("a:b", tmp_path / "a:b")


@pytest.mark.parametrize("words, message", [
    (["cat", "Cat"], "the word 'Cat' is empty or used twice"), ([" "], "the word ' ' is empty")])
def test_words_must_differ(words, message, small, tmp_path):
    path = save(tmp_path / "a.pt", {"emb_params": VECTORS})
    with pytest.raises(InputError, match=f"a.pt: {message}.*. Give FILE:WORD"):
        add_embeddings(small, [(word, path) for word in words])


def clone_small(model, prompt="a star", **options):
    return clone(randn(4, 3, 32, 32).tanh(), prompt, model=model, steps=2, guidance_steps=1,
                 **options).latents


def test_clone_reads_the_words_of_all_prompts(small, tmp_path):
    path = save(tmp_path / "a.pt", {"emb_params": VECTORS})
    embeddings = {"<cat>": path}
    plain = clone_small(small)
    assert torch.equal(clone_small(small, embeddings=embeddings), plain)
    for options in ({"prompt": "a <cat>"}, {"negative_prompt": "a <cat>"},
                    {"ref_prompt": "<cat>", "method": "inversion", "inversion_steps": 2}):
        result = clone_small(small, **options, embeddings={"<cat>": str(path)})
        assert not torch.equal(result, clone_small(small, **options))
    assert small.new_vectors is None and not small.tokenizer.new_words


def test_inverted_latents_of_another_embedding_are_not_used_again(small, tmp_path):
    first, second = (add_embeddings(small, [("cat", save(tmp_path / f"{i}.pt", {
        "emb_params": randn(2, 12, seed=i)}))]) for i in range(2))
    config = dataclasses.replace(small.config.sample, inversion_steps=2)
    latents, cache = randn(1, 4, 4, 8, 8), tmp_path / "cache"
    for model in (first, first):
        invert_reference(model, latents, "a cat", config, cache_dir=cache)
    with pytest.raises(InputError, match="cache: was made with other inputs"):
        invert_reference(second, latents, "a cat", config, cache_dir=cache)


def test_a_known_word_of_an_embedding_is_not_unknown(embedded, tmp_path):
    width = embedded.config.text_encoder.hidden_size
    path = save(tmp_path / "a.pt", {"emb_params": randn(2, width)})
    model = add_embeddings(embedded, [("zebrafish", path)])
    assert model.out_of_vocabulary("a red zebrafish zebra") == ["zebra"]


def test_the_record_lists_the_embeddings_and_a_changed_one_is_run_again(
        weights, tmp_path, monkeypatch, capsys):                        # noqa: F811
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "star.pt", a1111({"*": VECTORS}))
    lines = [{"out": "a.gif", "embedding": ["star.pt", "star.pt:red"]}, {"out": "b.gif"}]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--weights", weights, *FEW, "--jobs", "jobs.jsonl"]
    assert run(*argv) == 0
    record = json.loads(Path("a.gif.json").read_text())
    assert record["embeddings"] == [["star.pt", "star"], ["star.pt", "red"]]
    assert record["inputs"]["star.pt"] == jobs.sha256_of(tmp_path / "star.pt")
    assert run("--weights", weights, *FEW, "--out", "alone.gif") == 0
    alone = Path("alone.gif").read_bytes()
    assert Path("b.gif").read_bytes() == alone != Path("a.gif").read_bytes()
    capsys.readouterr()
    for changed, up_to_date in ((False, 2), (True, 1)):
        if changed:
            save(tmp_path / "star.pt", a1111({"*": VECTORS + 1}))
        assert run(*argv) == 0
        assert f"2 clips; {up_to_date} were up to date" in capsys.readouterr().err


def test_the_command_checks_embeddings_before_it_samples(weights, tmp_path, capsys):  # noqa: F811
    good = save(tmp_path / "easy.pt", {"emb_params": VECTORS})
    wide = save(tmp_path / "wide.pt", {"emb_params": torch.zeros(1, 768)})
    argv = ["--weights", weights, *FEW, "--out", tmp_path / "a.gif"]
    for options, message in (
            (["--embedding", wide], f"{wide}: is for Stable Diffusion 1.5 (width 768, not 12)"),
            (["--embedding", f"{good}:a", good, f"{good}:A"], "the word 'A' is empty or used twi"),
            (["--embedding", tmp_path / "none.pt"], "none.pt: no such file")):
        assert run(*argv, *options) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "a.gif").exists()
    with warnings.catch_warnings():
        assert run(*argv, "--embedding", good) == 0
    assert "easy is in no prompt: its embedding has no effect" in capsys.readouterr().err
