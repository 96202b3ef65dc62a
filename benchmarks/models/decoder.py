"""A small language model: a transformer decoder with normalisation in front."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attend to what came before, then transform each position; each around a sum.

    Args:
        width: of a position.
        heads: of attention.
        dropout: of what is added, while training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, positions, width]` to the same shape."""
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Decoder(nn.Module):
    """Tell of each word which one follows.

    Args:
        words: in the vocabulary.
        context: positions at most.
        width: of a position.
        layers: blocks.
        heads: of attention.
        dropout: while training.

    References:
        Vaswani et al., "Attention is all you need" (2017); Radford et al., "Language models are unsupervised multitask
        learners" (2019), for the order of normalisation.
    """

    def __init__(
        self, words: int, context: int = 128, width: int = 128, layers: int = 4, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)

    def forward(self, words: Tensor) -> Tensor:
        """Map indices `[batch, positions]` to logits `[batch, positions, words]`."""
        places = self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(self.dropout(self.words(words) + places))))  # type: ignore[no-any-return]
