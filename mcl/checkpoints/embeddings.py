"""Textual inversion embeddings: vectors that prompts use as the tokens of a new word.

A file has the vectors of one word, one or more: "string_to_param" of A1111, "emb_params" in
safetensors, or diffusers' "<word>".
"""
import copy
import os
from pathlib import Path

import torch

from ..errors import InputError
from ..model import Model
from ..networks.tokenizer import Tokenizer, normalize_text
from .detect import TEXT_WIDTHS, detect_file
from .model_file import check_finite


def parse_embedding(text: str) -> tuple[str, Path]:
    """Return ("word", easy.pt) for "easy.pt:word"; the default word is the file's stem."""
    path, _, word = text.rpartition(":")
    is_word = path and word and not {*"/\\"} & {*word} and not os.path.exists(text)
    return (word, Path(path)) if is_word else (Path(text).stem, Path(text))


def add_embeddings(model: Model, embeddings: list[tuple[str, Path]]) -> Model:
    """Return a model with the same networks whose prompts have new words.

    Args:
        model: The model.
        embeddings: Words, each with its file.

    Raises:
        InputError: If a file is damaged, is no embedding or is one of another family of models, or
            two words are the same.
    """
    model, ids, vectors = copy.copy(model), dict[str, range](), list[torch.Tensor]()
    for word, path in embeddings:
        key, start = normalize_text(word), model.config.text_encoder.vocab_size + len(vectors)
        if not key or key in ids:
            raise InputError(f"{path}: the word {word!r} is empty or used twice. Give FILE:WORD")
        vectors += read_embedding(path, model)
        ids[key] = range(start, model.config.text_encoder.vocab_size + len(vectors))
    model.tokenizer, model.new_vectors = Tokenizer(ids), torch.stack(vectors) if vectors else None
    return model


def read_embedding(path: Path, model: Model) -> torch.Tensor:
    """Return the vectors (n, d) of a file. Raises InputError as `add_embeddings` does."""
    (name, tensor), = detect_file(path, "--embedding").tensors.items()
    if (size := tensor.shape[-1]) != (width := model.config.text_encoder.hidden_size):
        family = {768: "Stable Diffusion 1.5", **TEXT_WIDTHS}.get(size, "another text encoder")
        raise InputError(f"{path}: is for {family} (width {size}, not {width}). Give another file")
    check_finite(path, name, tensor.read().to(model.dtype))
    return tensor.read().reshape(-1, width).float()
