"""Words of textual inversion in prompts: where they are found, and what the text encoder reads."""
import types

import pytest
import torch

from mcl.checkpoints.embeddings import add_embeddings
from mcl.networks.tokenizer import Tokenizer
from mcl.semantic import subject_tokens
from tests.conftest import randn
from tests.foreign import save

NEW = 49408
WORDS = {"easynegative": [NEW, NEW + 1], "bad-hands-5": [NEW + 2], "<cat-toy>": [NEW + 3],
         "bad": [NEW + 4], "my": [NEW + 5], "my style": [NEW + 6],
         "v1": [NEW + 7]}


@pytest.mark.parametrize("prompt, words", [
    ("easynegative", ["easynegative"]), ("EasyNegative, (EASYNEGATIVE:1.2)", ["easynegative"] * 2),
    ("easynegatives", []), ("myeasynegative", []), ("easynegative2", []), ("easynegative_v2", []),
    ("very-easynegative", []), ("easynegative-v2", []), ("easynegative.", ["easynegative"]),
    ("a bad-hands-5", ["bad-hands-5"]), ("bad-hands-5, bad", ["bad-hands-5", "bad"]),
    ("bad-hands-50", []), ("bad-hands", []), ("a BAD cat", ["bad"]), ("badly", []),
    ("a <cat-toy>'s", ["<cat-toy>"]), ("<Cat-Toy><cat-toy>", ["<cat-toy>"] * 2),
    ("(<cat-toy>)", ["<cat-toy>"]), ("a cat-toy", []), ("&lt;cat-toy&gt;-like", ["<cat-toy>"]),
    ("photo<cat-toy>s", ["<cat-toy>"]), ("in my  STYLE", ["my style"]), ("my styles", ["my"]),
    ("v1", ["v1"]), ("v1.5", [])])
def test_new_words_are_found_as_whole_words(prompt, words):
    plain, pieces = Tokenizer(), Tokenizer(WORDS).split(prompt)
    assert [(word, ids) for word, ids in pieces if ids[0] >= NEW] == [
        (word, WORDS[word]) for word in words]
    assert all(plain.encode(word) == ids for word, ids in pieces if ids[0] < NEW)
    if not words:
        assert pieces == plain.split(prompt)


def test_each_vector_of_a_word_is_one_of_the_75_tokens():
    tokenizer = Tokenizer({"word": range(NEW, NEW + 70)})
    assert tokenizer("a cat, a word")[0, 5:75].tolist() == [*range(NEW, NEW + 70)]
    with pytest.warns(UserWarning, match="has 76 tokens and 75 are read; dropped: dog"):
        tokenizer("a cat, a b word dog")


def test_the_subject_may_be_a_new_word(small, tmp_path):
    save(tmp_path / "a.pt", {"emb_params": randn(3, 12)})
    model = add_embeddings(small, [("<cat-toy>", tmp_path / "a.pt")])
    assert subject_tokens(model, "a red <Cat-Toy> on a mat", "<cat-toy>") == [3, 4, 5]
    assert subject_tokens(model, "a red <cat-toy> on a mat", "mat") == [8]


def test_the_text_encoder_reads_what_diffusers_reads(small, transformers_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    loaders = pytest.importorskip("diffusers.loaders")
    config = small.config.text_encoder
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, hidden_act="quick_gelu",
        intermediate_size=config.intermediate_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads)).eval().requires_grad_(False)
    names = oracle.state_dict().keys()
    oracle.load_state_dict({
        name if name in names else name.removeprefix("text_model."): t
        for name, t in small.text_encoder.state_dict().items()})

    class Pipeline(loaders.TextualInversionLoaderMixin, types.SimpleNamespace):
        pass

    pipeline = Pipeline(tokenizer=transformers_tokenizer, text_encoder=oracle, components={},
                        hf_device_map=None, device="cpu", dtype=torch.float32)
    a1111 = {"string_to_token": {"*": torch.tensor(265)}, "name": "easynegative", "step": 1,
             "string_to_param": {"*": torch.nn.Parameter(randn(3, 12))}}
    files = [("easynegative", save(tmp_path / "easynegative.pt", a1111)),
             ("<cat-toy>", save(tmp_path / "c.safetensors", {"<cat-toy>": randn(12, seed=1)})),
             ("bad-hands-5", save(tmp_path / "b.bin", {"emb_params": randn(2, 12, seed=2)}))]
    pipeline.load_textual_inversion(str(files[0][1]), weight_name="easynegative.pt")
    pipeline.load_textual_inversion({"<cat-toy>": randn(12, seed=1)})
    pipeline.load_textual_inversion({"bad-hands-5": randn(2, 12, seed=2)})
    model = add_embeddings(small, files)
    for prompt in ("a photo of a <cat-toy>", "EasyNegative, a red <cat-toy>, bad-hands-5, blurry"):
        text = pipeline.maybe_convert_prompt(prompt.lower(), transformers_tokenizer)
        ids = transformers_tokenizer(text, padding="max_length", return_tensors="pt",
                                     max_length=77).input_ids
        assert torch.equal(model.tokenizer(prompt), ids)
        embeddings = model.encode_text([prompt])
        assert torch.allclose(embeddings, oracle(ids)[0], atol=1e-5)
        assert not torch.allclose(embeddings, small.encode_text([prompt]), atol=0.1)
