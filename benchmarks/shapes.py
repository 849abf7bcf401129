"""The architectures whose speed is measured on a GPU, their arithmetic, and models of random weights in their shape.

Speed does not depend on the weights. Matrix multiplications and attention are counted, two operations a
multiplication-and-addition; look-ups, normalizations and pooling count nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTHS = (16, 64, 128, 256, 512)
"""Tokens a text."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`gated`: the wide layer has a second projection, as in gte-large (three matrices instead of two)."""

    name: str
    layers: int
    hidden: int
    heads: int
    wide: int
    gated: bool = False
    vocabulary: int = 30_522

    @property
    def dense(self) -> int:
        """Operations a token outside of attention."""
        return 2 * self.layers * (4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.wide)

    def operations(self, tokens: int) -> int:
        """Of a text of so many tokens: attention's two products grow with the square."""
        return tokens * self.dense + 4 * self.layers * self.hidden * tokens**2


SHAPES = {
    "e5-small-v2": Shape("e5-small-v2", 12, 384, 12, 1536),
    "all-MiniLM-L6-v2": Shape("all-MiniLM-L6-v2", 6, 384, 12, 1536),
    "mxbai-embed-large-v1": Shape("mxbai-embed-large-v1", 24, 1024, 16, 4096),
    "gte-large-en-v1.5": Shape("gte-large-en-v1.5", 24, 1024, 16, 4096, gated=True),
}

TINY = Shape("tiny", 2, 32, 4, 64, vocabulary=500)
TINY_GATED = Shape("tiny, gated", 2, 32, 4, 64, gated=True, vocabulary=500)


def operations(shape: Shape, lengths: Iterable[int]) -> int:
    """Of texts of these lengths, without padding: what a perfect engine has to do."""
    return sum(shape.operations(length) for length in lengths)


def mixed(number: int, longest: int, seed: int = 0) -> list[int]:
    """Token counts from a log-normal distribution around 64 (sigma 0.9), from 4 to `longest`."""
    chance = random.Random(seed)
    return [min(longest, max(4, round(chance.lognormvariate(4.16, 0.9)))) for _ in range(number)]


def build(shape: Shape, folder: Path, positions: int = 512) -> Path:
    """Save a sentence-transformers model of this shape into `folder`; a tokenizer that makes one token of each word.

    Raises ImportError where transformers has no class of that architecture.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    parts = folder / "parts"
    _tokenizer(shape.vocabulary).save_pretrained(parts)
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.wide,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
    }
    if shape.gated:
        from transformers import GteConfig, GteModel

        GteModel(GteConfig(**common)).save_pretrained(parts)
    else:
        from transformers import BertConfig, BertModel

        BertModel(BertConfig(**common)).save_pretrained(parts)
    saved = folder / "model"
    modules = [Transformer(str(parts), max_seq_length=positions), Pooling(shape.hidden, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(saved))
    return saved


def texts(lengths: Iterable[int], vocabulary: int, seed: int = 0) -> list[str]:
    """A text for each length in tokens, the two special ones included; no two are alike."""
    chance = random.Random(seed)
    return [" ".join(f"w{chance.randrange(4, vocabulary)}" for _ in range(length - 2)) for length in lengths]


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{n}": n for n in range(4, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
