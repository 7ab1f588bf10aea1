"""BLIND-VALM in torch and float64: fairseq's decoder, and CLIP by transformers.

Written from the equations of the reference, one row at a time, and held against its golden cases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tests import make_golden

_MARKS = ".;!:,/-"  # strongest first, behind the end of a text and id 0


class Blind:
    """A decoder with one fusion layer and the text tower that grounds it.

    clip: transformers' CLIPTextModelWithProjection. pieces: CLIP's ids of the pieces that may end a
    segment, by their text. rule: reference, or causal.
    """

    def __init__(
        self, decoder: Decoder, clip: Any, *, pieces: Mapping[str, int], rule: str
    ) -> None:
        self._decoder, self._clip = decoder, make_golden.in_double(clip)
        text = self._clip.config
        self._start, self._end = text.vocab_size - 2, text.vocab_size - 1
        self._cut = functools.partial(
            looking_ahead if rule == "reference" else causal,
            longest=text.max_position_embeddings - 2,
            pieces={**pieces, "end": self._end},
        )

    def log_p(self, tokens: Sequence[int]) -> np.ndarray:
        """Of every token behind a row, [V]."""
        with torch.no_grad():
            logits = self._decoder.logits(tokens, self._features(tokens))
            return functional.log_softmax(logits[-1], dim=-1).numpy()

    def _features(self, tokens: Sequence[int]) -> Any:
        """What CLIP says at each token [T, E]: every segment on its own, between start and end."""
        ids = [self._end if token == 2 else token - 4 for token in tokens]
        found, begin = [], 0
        for length in self._cut(ids):
            segment = [self._start, *ids[begin : begin + length], self._end]
            hidden = self._clip.text_model(input_ids=torch.tensor([segment])).last_hidden_state
            features = self._clip.text_projection(hidden)[0, 1:-1]
            found.append(features / features.norm(dim=-1, keepdim=True))
            begin += length
        return torch.cat(found)


def looking_ahead(ids: Sequence[int], *, longest: int, pieces: Mapping[str, int]) -> list[int]:
    """The reference's segments: behind the strongest mark of the next `longest`, until few rest."""
    strongest = [pieces["end"], 0, *(pieces[mark] for mark in _MARKS)]
    lengths = []
    while len(ids) > longest:
        window = list(ids[:longest])
        marks = [mark for mark in strongest if mark in window]
        lengths.append(window.index(marks[0]) + 1 if marks else longest)
        ids = ids[lengths[-1] :]
    return [*lengths, len(ids)]


def causal(ids: Sequence[int], *, longest: int, pieces: Mapping[str, int]) -> list[int]:
    """Segments that end behind a mark as soon as they are long enough for it."""
    least = {pieces["end"]: 1}
    for marks, share in (((*".!?", "..."), 4 / 25), (";:)", 3 / 7), (",", 3 / 4)):
        least |= {pieces[mark]: round(longest * share) for mark in marks}
    lengths = [0]
    for token in ids:
        lengths[-1] += 1
        if lengths[-1] >= least.get(token, longest):
            lengths.append(0)
    return [length for length in lengths if length]


class Decoder:
    """fairseq's decoder with one fusion layer, `fused`."""

    def __init__(self, tensors: Mapping[str, np.ndarray], *, heads: int, fused: int) -> None:
        self._tensors = {name: torch.tensor(x, dtype=torch.double) for name, x in tensors.items()}
        self._heads, self._fused = heads, fused

    def logits(self, tokens: Sequence[int], z_TE: Any) -> Any:
        """[T, V], grounded on features z [T, E]."""
        return self._logits(torch.tensor(tokens), torch.as_tensor(z_TE, dtype=torch.double))

    def _logits(self, tokens: Any, z_TE: Any) -> Any:
        table = self._tensors["embed_tokens.weight"]
        count, width = len(tokens), table.shape[1]
        half = width // 2
        frequency = torch.exp(torch.arange(half).double() * (-math.log(1e4) / (half - 1)))
        angle = (torch.arange(count).double() + 2)[:, None] * frequency
        x_TD = table[tokens] * math.sqrt(width) + torch.cat([angle.sin(), angle.cos()], dim=1)
        layer = 0
        while f"layers.{layer}.fc1.weight" in self._tensors:
            name = f"layers.{layer}"
            h_TD = self._norm(f"{name}.self_attn_layer_norm", x_TD)
            x_TD = x_TD + self._attention(f"{name}.self_attn", h_TD, z_TE, layer == self._fused)
            h_TD = self._norm(f"{name}.final_layer_norm", x_TD)
            h_TF = functional.gelu(self._linear(f"{name}.fc1", h_TD))
            x_TD = x_TD + self._linear(f"{name}.fc2", h_TF)
            layer += 1
        return self._norm("layer_norm", x_TD) @ table.T

    def _attention(self, name: str, x_TD: Any, z_TE: Any, fused: bool) -> Any:
        """In the fusion layer each query has one key more, of its own feature."""
        width = x_TD.shape[1]
        q, k, v = (self._split(self._linear(f"{name}.{x}_proj", x_TD)) for x in "qkv")
        scale = width**-0.5 if fused else (width / self._heads) ** -0.5
        later = torch.ones(len(x_TD), len(x_TD)).triu(1).bool()
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(later, -torch.inf)
        if fused:
            memory = self._norm(f"{name}.img_layer_norm", z_TE)
            image_k, image_v = (
                self._split(
                    memory @ self._tensors[f"{name}.{x}_proj.weight"].T
                    + self._tensors[f"{name}.img_{x}_proj.bias"]
                )
                for x in "kv"
            )
            own = scale * (q * image_k).sum(-1, keepdim=True)
            weights = torch.softmax(torch.cat([scores, own], dim=-1), dim=-1)
            out = weights[..., :-1] @ v + weights[..., -1:] * image_v
        else:
            out = torch.softmax(scores, dim=-1) @ v
        return self._linear(f"{name}.out_proj", out.transpose(0, 1).reshape(len(x_TD), width))

    def _split(self, x_TD: Any) -> Any:
        """[N, T, H]."""
        return x_TD.reshape(len(x_TD), self._heads, -1).transpose(0, 1)

    def _linear(self, name: str, x: Any) -> Any:
        return x @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"]

    def _norm(self, name: str, x: Any) -> Any:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, 1e-5)
