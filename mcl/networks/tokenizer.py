"""CLIP's byte-level BPE: prompts to the token ids that Stable Diffusion 1.5 reads.

The rule is that of OpenAI's CLIP (MIT license; its merges file is in this folder), with the
standard library alone: `_pretokenize` replaces a pattern of the `regex` package, and
`normalize_text` replaces `ftfy`.
"""
import functools
import gzip
import html
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch

MAX_LENGTH = 77         # tokens in every encoded prompt, with start and end
START, END = 49406, 49407
MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")

_SPECIAL = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_RUNS = re.compile("L+|N|X+")           # of character classes (`_char_class`)


class Tokenizer:
    """Tokenizer with CLIP's 49,408 tokens, and new words.

    The first tokenizer reads the merges file, in about 0.1 s.

    Attributes:
        new_words: Ids by new word.
    """

    def __init__(self, new_words: Mapping[str, Sequence[int]] | None = None) -> None:
        """Read the vocabulary.

        Args:
            new_words: Ids by word, which `normalize_text` leaves as it is, and which may contain
                spaces and signs. A prompt has the word in small or capital letters, but not as a
                part of a longer word.

        Raises:
            ValueError: If the merges file is missing, damaged or another file.
        """
        self.new_words = new_words or {}
        word = "|".join(map(re.escape, sorted(self.new_words, key=len, reverse=True))) or "(?!)"
        # A word that begins or ends with a letter, digit or _ is not a part of a longer word, such
        # as cat-like or v1.5. A sign, as in <cat>, ends a word.
        self._new_word = re.compile(rf"(?:(?=\W)|(?<!\w)(?<!\w-))({word})(?:(?<=\W)|(?!-?\w|\.\d))")
        self._byte_ids, self._merges = _read_vocabulary(MERGES)
        self._cache = {"<|startoftext|>": [START], "<|endoftext|>": [END]}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Return the token ids of one or b prompts, int64 (b, 77).

        Each row is the start token, the prompt's ids, the end token, and more end tokens as
        padding. (OpenAI's `tokenize` pads with 0.) A prompt of more than 75 ids is cut after the
        first 75, with a warning that lists the words that are dropped or cut.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), MAX_LENGTH), END)
        for row, text in zip(tokens, texts, strict=True):
            pieces = self.split(text)
            ends = list(accumulate(len(ids) for _, ids in pieces))
            dropped = [p for (p, _), end in zip(pieces, ends, strict=True) if end > MAX_LENGTH - 2]
            if dropped:
                warnings.warn(f"the prompt has {ends[-1]} tokens and {MAX_LENGTH - 2} are read; "
                              f"dropped: {' '.join(dropped)}", stacklevel=2)
            ids = [START, *(i for _, ids in pieces for i in ids)][:MAX_LENGTH - 1]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of any length, without start and end."""
        return [i for _, ids in self.split(text) for i in ids]

    def split(self, text: str) -> list[tuple[str, list[int]]]:
        """Return the words, digits and signs of the normalized text, in order, each with its ids.

        The first id of the first piece is at position 1 of the encoded prompt.
        """
        parts = self._new_word.split(normalize_text(text))      # every second one is a new word
        return [(piece, list(self.new_words[piece] if i % 2 else self._encode_piece(piece)))
                for i, part in enumerate(parts)
                for piece in ([part] if i % 2 else _pretokenize(part))]

    def _encode_piece(self, piece: str) -> list[int]:
        """Return the ids of one word, digit or run of signs."""
        if piece not in self._cache:
            ids = [self._byte_ids[byte] for byte in piece.encode()]
            ids[-1] += 256              # the same byte at the end of a piece
            while pairs := [pair for pair in pairwise(ids) if pair in self._merges]:
                # Merges are numbered by rank, so the lowest id is the first to apply.
                merged, best_pair = min((self._merges[pair], pair) for pair in pairs)
                for i in range(len(ids)):
                    if tuple(ids[i:i + 2]) == best_pair:
                        ids[i:i + 2] = [merged]
            self._cache[piece] = ids
        return self._cache[piece]


def normalize_text(text: str) -> str:
    """Return a text as the vocabulary spells it: plain quotes, NFC, single spaces, lower case.

    OpenAI's rule is `ftfy.fix_text`, `html.unescape` twice, single spaces, lower case. This
    function does the part of ftfy that prompts need: it straightens curly quotes, replaces
    ligatures and full- or half-width forms by plain letters, removes control characters, and pairs
    surrogates or replaces them by U+FFFD. It differs from OpenAI's rule in these points:

    - Text that looks wrongly decoded (mojibake, C1 controls) is repaired only by ftfy.
    - Terminal escapes lose only the escape character.
    - HTML entities are unescaped twice, before everything else. ftfy knows more names in capitals,
      repeats until none is left, and leaves entities without a semicolon, or in a text with `<`, to
      `html.unescape`, which is too late for its other rules.
    - U+FB05 becomes `st`. OpenAI's rule gives U+017F and `t`.
    - Characters that are newer than this Python's `unicodedata` count as signs.

    transformers' CLIPTokenizer 5 (earlier: CLIPTokenizerFast) does only NFC, single spaces and
    lower case. It differs in entities, curly quotes, ligatures, widths, control characters and
    surrogates. It lowers a final capital sigma to U+03C3, recognizes `<|endoftext|>` in small
    letters only, but also directly after a sign, does not take U+017F after an apostrophe for `s`,
    and keeps U+0345, which this function and OpenAI's rule drop. Its slow class before version 5
    uses ftfy if it is installed, without the final `html.unescape`; otherwise it splits off each
    punctuation mark.
    """
    text = html.unescape(html.unescape(text))
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = unicodedata.normalize("NFC", text.translate(_translation_table()))
    return " ".join(text.split()).lower()


@functools.cache
def _translation_table() -> dict[int, str]:
    """Return replacements by code point, for `str.translate`."""
    removed = (*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF,
               *range(0xFFF9, 0xFFFD))
    # Ligatures, then forms of full and half width.
    variants = (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4),
                *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0))
    quotes = dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'")
    quotes |= dict.fromkeys(range(0x201C, 0x2020), '"')
    plain = {c: unicodedata.normalize("NFKC", chr(c)).translate(quotes) for c in variants}
    return plain | quotes | dict.fromkeys(removed, "")


def _pretokenize(text: str) -> list[str]:
    """Return the matches of OpenAI's pattern.

    Each is a special token, a contraction, a run of letters, one digit, or a run of signs.
    """
    classes = "".join(map(_char_class, text))
    pieces, position = [], 0
    while position < len(text):
        match = _SPECIAL.match(text, position) or _RUNS.match(classes, position)
        if match:
            pieces.append(text[position:match.end()])
        position = match.end() if match else position + 1
    return pieces


def _char_class(char: str) -> str:
    """Return L for a letter, N for a number, X for a sign, and a space for what is skipped."""
    category = unicodedata.category(char)[0]
    if category in "LN":
        return category
    # As in `regex` when it ignores case: U+001C to U+001F are not white space, and U+0345, a mark
    # whose upper case is a letter, matches nothing.
    return " " if char == "\u0345" or char.isspace() and not "\x1c" <= char <= "\x1f" else "X"


@functools.cache
def _read_vocabulary(path: Path) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """Return the id of each byte, and the id of each merged pair of ids.

    Raises:
        ValueError: If the file is not CLIP's merges file.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]     # written as U+0100 and on
    symbols = [chr(code) for code in (*printable, *range(256, 256 + len(others)))]
    ids = {token: i for i, token in enumerate([*symbols, *(s + "</w>" for s in symbols)])}
    merges: dict[tuple[int, int], int] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in islice(file, 1, 1 + START - 512):   # CLIP does not use the rest of the file
                first, second = line.split()
                merges[ids[first], ids[second]] = ids[first + second] = 512 + len(merges)
        if len(ids) != START or (ids["in"], ids["jekyll</w>"]) != (512, START - 1):
            raise ValueError(f"{len(ids) + 2} tokens")
    except Exception as error:              # a damaged file may cause any
        raise ValueError(f"{path} is not CLIP's merges file of 49,408 tokens ({error!r}): install "
                         f"mcl again, or `git checkout -- {path.name}` in its folder") from error
    return {byte: i for i, byte in enumerate(printable + others)}, merges
