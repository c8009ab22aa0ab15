"""Fixture of the networks' tests: transformers' tokenizer with CLIP's vocabulary."""
import gzip
import json

import pytest

from mcl.networks.tokenizer import MERGES


@pytest.fixture(scope="session")
def transformers_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    merges = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:48895]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in [*visible, *range(256, 256 + 68)]]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols),
                  *(merge.replace(" ", "") for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return transformers.CLIPTokenizerFast.from_pretrained(folder)
