"""One vector a text from the vectors of its tokens, where texts lie end to end: sentence-transformers' pooling modes.

Sums run in float32 whatever the model computes in.
"""

from __future__ import annotations

import torch

MODES = frozenset({"cls", "lasttoken", "mean", "mean_sqrt_len_tokens", "weightedmean", "max"})


def pool(tokens: torch.Tensor, offsets: torch.Tensor, modes: tuple[str, ...]) -> torch.Tensor:
    """Vectors of shape (texts, modes * hidden) in float32, the modes side by side.

    `tokens` has the shape (tokens, hidden). Text i is the tokens from `offsets[i]` to before `offsets[i + 1]`, at
    least one. Nothing here waits for a GPU.
    """
    return torch.cat([_mode(mode, tokens, offsets) for mode in modes], dim=1)


def _mode(mode: str, tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    starts, lengths = offsets[:-1], offsets.diff()
    match mode:
        case "cls":
            return tokens[starts].float()
        case "lasttoken":
            return tokens[offsets[1:] - 1].float()
        case "max":
            return _reduced(tokens.float(), "max", lengths)
        case "mean":
            return _reduced(tokens.float(), "mean", lengths)
        case "mean_sqrt_len_tokens":
            return _reduced(tokens.float(), "sum", lengths) / lengths.sqrt()[:, None]
        case "weightedmean":
            total = len(tokens)
            # The size is given so that it need not be fetched from the device.
            first = torch.repeat_interleave(starts, lengths, output_size=total)
            weights = (torch.arange(1, total + 1, device=tokens.device) - first).float()[:, None]
            return _reduced(tokens.float() * weights, "sum", lengths) / _reduced(weights, "sum", lengths)
        case _:
            raise ValueError(f"no pooling mode {mode}")


def _reduced(values: torch.Tensor, how: str, lengths: torch.Tensor) -> torch.Tensor:
    # unsafe: the lengths are not checked against the values, which would wait for the device.
    return torch.segment_reduce(values, how, lengths=lengths, unsafe=True)
