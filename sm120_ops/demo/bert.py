"""The BERT encoder in plain torch, named as the checkpoint names its weights.

Every matrix product with a weight is an ``nn.Linear``, which is what ``sm120_ops.nn.convert``
replaces. Attention itself and the norms stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sm120_ops.demo.weights import ModelFilesError, read_weights


class BertConfig(NamedTuple):
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def from_file(cls, path: Path) -> BertConfig:
        data: dict[str, Any] = json.loads(path.read_text())
        if data.get("model_type") != "bert" or data.get("hidden_act") != "gelu":
            raise ModelFilesError(
                f"{path}: expected model_type 'bert' with hidden_act 'gelu', got "
                f"{data.get('model_type')!r} with {data.get('hidden_act')!r}"
            )
        return cls(*(data[field] for field in cls._fields))


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        token_type = self.token_type_embeddings.weight[0]  # one sentence: every token is of type 0
        words = self.word_embeddings(ids)
        out: torch.Tensor = self.LayerNorm(words + self.position_embeddings(position) + token_type)
        return out


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape

        def split_heads(y: torch.Tensor) -> torch.Tensor:  # [B, L, H] -> [B, heads, L, H / heads]
            return y.reshape(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = (split_heads(f(x)) for f in (self.query, self.key, self.value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(batch, length, hidden)


class ResidualOutput(nn.Module):
    """``LayerNorm(x + dense(y))``, the end of both halves of a layer."""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.LayerNorm(self.dense(y) + x)
        return out


class Layer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": SelfAttention(config),
                "output": ResidualOutput(config.hidden_size, config),
            }
        )
        self.intermediate = nn.ModuleDict(
            {"dense": nn.Linear(config.hidden_size, config.intermediate_size)}
        )
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        out: torch.Tensor = self.output(nn.functional.gelu(self.intermediate["dense"](x)), x)
        return out


class SentenceEncoder(nn.Module):
    """ids and mask [B, L] -> unit embeddings [B, hidden]: the mean over the real tokens."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids)
        attend = mask.bool()[:, None, None, :]  # broadcast over heads and query positions
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x, attend)
        weight = mask.to(x.dtype).unsqueeze(-1)
        mean = (x * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(mean.float(), dim=-1)

    @classmethod
    def from_directory(cls, directory: Path) -> SentenceEncoder:
        """The model in FP32 from a directory in Hugging Face's layout."""
        model = cls(BertConfig.from_file(directory / "config.json"))
        weights = {name.removeprefix("bert."): w for name, w in read_weights(directory).items()}
        # The pooler is trained for next-sentence prediction and takes no part in an embedding.
        unused = ("pooler.", "embeddings.position_ids", "cls.")
        wanted = {n: w.float() for n, w in weights.items() if not n.startswith(unused)}
        try:
            model.load_state_dict(wanted)
        except RuntimeError as error:
            raise ModelFilesError(f"{directory}: weights do not fit the config: {error}") from error
        return model.eval()
