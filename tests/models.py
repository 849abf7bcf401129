"""Small sentence-transformers models of true architecture and random weights, built in a folder within milliseconds.

They stand for families: what differs between them is pooling, prompts, position offsets, extra modules and length
limits, which is what the embedder has to read from a model's files. Their vectors mean nothing.
"""

from __future__ import annotations

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
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

WORDS = (
    "canary warm up query passage a an and cat dog read write csv file row text of the in to is short long vector "
    "table database index search time sort list map key value open close path string number bytes buffer socket"
)

HIDDEN = 32


def bert(
    folder: Path,
    *,
    pooling: str = "mean",
    prompts: Mapping[str, str] | None = None,
    max_seq_length: int | None = 32,
    dense: int | None = None,
    normalize: bool = False,
    positions: int = 64,
    width: int = 64,
    seed: int = 0,
) -> Path:
    """A BERT; `dense` adds a projection to so many dimensions, `width` is what a token takes inside a layer."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(), ":", "-"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
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
    return _assemble(folder, parts, pooling, prompts, max_seq_length, dense, normalize)


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


def _assemble(
    folder: Path,
    parts: Path,
    pooling: str,
    prompts: Mapping[str, str] | None,
    max_seq_length: int | None,
    dense: int | None,
    normalize: bool,
) -> Path:
    modules: list[torch.nn.Module] = [
        Transformer(str(parts), max_seq_length=max_seq_length),
        Pooling(HIDDEN, pooling_mode=pooling),
    ]
    if dense is not None:
        modules.append(Dense(HIDDEN, dense, activation_function=torch.nn.Tanh()))
    if normalize:
        modules.append(Normalize())
    saved = folder / "model"
    SentenceTransformer(modules=modules, prompts=dict(prompts or {}), device="cpu").save(str(saved))
    return saved
