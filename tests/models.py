"""Small sentence-transformers models of true architecture and random weights, built in a folder within milliseconds.

They stand for families: what differs between them is pooling, prompts, position offsets, extra modules and length
limits, which is what the embedder has to read from a model's files. Their vectors mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

WORDS = (
    "canary warm up query passage a an and cat dog read write csv file row text of the in to is short long vector "
    "table database index search time sort list map key value open close path string number bytes buffer socket"
)

HIDDEN = 32


def bert(
    folder: Path,
    *,
    pooling: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    prompts: Mapping[str, str] | None = None,
    max_seq_length: int | None = 32,
    dense: int | None = None,
    normalize: bool = False,
    positions: int = 64,
    width: int = 64,
    seed: int = 0,
) -> Path:
    """A BERT; `dense` adds a projection to so many dimensions, `width` is what a token takes inside a layer."""
    fast = _words()
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=width,
        max_position_embeddings=positions,
    )
    torch.manual_seed(seed)
    parts = folder / "parts"
    BertModel(config).save_pretrained(parts)
    fast.save_pretrained(parts)
    return _assemble(folder, parts, pooling, prompts, max_seq_length, dense, normalize, include_prompt)


def mpnet(folder: Path) -> Path:
    """An MPNet: positions relative to each other, and attention of its own that takes no other function."""
    fast = _words()
    config = MPNetConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=36,
        pad_token_id=0,
    )
    torch.manual_seed(2)
    parts = folder / "parts"
    MPNetModel(config).save_pretrained(parts)
    fast.save_pretrained(parts)
    return _assemble(folder, parts, "mean", None, 32, None, True)


def modernbert(folder: Path) -> Path:
    """A ModernBERT: rotary positions, and layers that see a window of their neighbours only."""
    fast = _words()
    config = ModernBertConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )
    torch.manual_seed(3)
    parts = folder / "parts"
    ModernBertModel(config).save_pretrained(parts)
    fast.save_pretrained(parts)
    return _assemble(folder, parts, "mean", None, 32, None, True)


def with_code(folder: Path) -> Path:
    """A model that brings code of its own, as gte-large-en-v1.5 does."""
    saved = bert(folder)
    (saved / "modeling_tiny.py").write_text(
        "from transformers import BertModel\n\n\nclass TinyModel(BertModel):\n    pass\n"
    )
    file = saved / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_tiny.TinyModel"}}))
    return saved


def xlm_roberta(folder: Path, *, max_seq_length: int | None = None, prompts: Mapping[str, str] | None = None) -> Path:
    """An e5-like XLM-R: SentencePiece pieces, and positions that start at padding_idx + 1.

    34 positions, of which 32 can be used; the files do not say so, as those of some published models do not.
    """
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *("▁" + word for word in WORDS.split()), "▁", "e", "s", ":"]
    tokenizer = Tokenizer(Unigram([(piece, -float(i + 1)) for i, piece in enumerate(pieces)], unk_id=3))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
    )
    config = XLMRobertaConfig(
        vocab_size=len(pieces),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    torch.manual_seed(1)
    parts = folder / "parts"
    XLMRobertaModel(config).save_pretrained(parts)
    fast.save_pretrained(parts)
    return _assemble(folder, parts, "mean", prompts, max_seq_length, None, True)


def _words() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(), ":", "-"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _assemble(
    folder: Path,
    parts: Path,
    pooling: str | tuple[str, ...],
    prompts: Mapping[str, str] | None,
    max_seq_length: int | None,
    dense: int | None,
    normalize: bool,
    include_prompt: bool = True,
) -> Path:
    pooled = Pooling(HIDDEN, pooling_mode=pooling, include_prompt=include_prompt)
    modules: list[torch.nn.Module] = [Transformer(str(parts), max_seq_length=max_seq_length), pooled]
    if dense is not None:
        modules.append(Dense(pooled.get_embedding_dimension(), dense, activation_function=torch.nn.Tanh()))
    if normalize:
        modules.append(Normalize())
    saved = folder / "model"
    SentenceTransformer(modules=modules, prompts=dict(prompts or {}), device="cpu").save(str(saved))
    return saved
