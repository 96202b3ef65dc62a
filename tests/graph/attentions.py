"""Models with attention written in many ways, small and with weights large enough for heads to matter."""

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LENGTH = 24, 4, 5


class Fused(nn.Module):
    """One projection for queries, keys and values, reshaped at once."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class Einsum(nn.Module):
    """Einstein sums, a learned scale and bias for each head, a mask for all."""

    def __init__(self):
        super().__init__()
        self.h = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part(x).view(batch, length, self.h, -1) for part in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale + self.bias
        weights = scores.masked_fill(~self.mask, -1e9).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class Batched(nn.Module):
    """Heads folded into the batch, products of batches of matrices."""

    def __init__(self):
        super().__init__()
        self.count, self.size = HEADS, WIDTH // HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def fold(y: Tensor) -> Tensor:
            y = y.view(batch, length, self.count, self.size).transpose(1, 2)
            return y.reshape(batch * self.count, length, self.size)

        q, k, v = fold(self.q(x)), fold(self.k(x)), fold(self.v(x))
        mixed = torch.bmm(torch.baddbmm(x.new_zeros(1, 1, 1), q, k.mT).softmax(-1), v)
        mixed = mixed.view(batch, self.count, length, self.size).transpose(1, 2)
        return self.out(mixed.reshape(batch, length, self.count * self.size))


class Grouped(nn.Module):
    """Queries of several heads share one head of keys and values, and rotate by position."""

    def __init__(self, shared: int = 2):
        super().__init__()
        self.heads, self.shared = HEADS // shared, shared
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // shared) for _ in range(2))
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1, 0.01]))
        self.norm = nn.LayerNorm(WIDTH // HEADS)

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part(x).view(batch, length, -1, WIDTH // HEADS).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.rotated(self.norm(q)), self.rotated(k)
        sizes = (batch, self.heads, self.shared, length, WIDTH // HEADS)
        k, v = (y[:, :, None].expand(sizes).flatten(1, 2) for y in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))


class Constant(nn.Module):
    """The number of heads is written into the code."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], 4, 6).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Talking(nn.Module):
    """Return the weights of attention, averaged over heads, beside the result."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x)


class Plain(nn.Module):
    """An `nn.MultiheadAttention` between two layers."""

    def __init__(self, **more: object):
        super().__init__()
        self.inlet, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        return self.head(x + self.attention(x, x, x)[0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _sequence() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH)


def _tokens() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": torch.randint(3, 40, (2, LENGTH)), "attention_mask": mask}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


_TEXT = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_TEXT |= {"intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 3}
_VISION = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 32}
_HUGGING_FACE = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT, _tokens),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 32},
        _tokens,
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_VISION, "image_size": 16, "patch_size": 8},
        _pixels,
    ),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**_VISION, "image_size": 16, "patch_size": 8, "use_relative_position_bias": True, "num_labels": 3},
        _pixels,
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": WIDTH, "depths": [2], "num_heads": [HEADS], "window_size": 4},
        _pixels,
    ),
    "t5": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 40, "d_model": WIDTH, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": HEADS},
        _tokens,
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **_VISION,
            "conv_dim": (16, 16),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 16,
            "mask_time_length": 2,
        },
        _sound,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 40,
            "n_positions": 16,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _tokens,
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS, "use_cache": False},
        _tokens,
    ),
}
_OWN = {"fused": Fused, "einsum": Einsum, "batched": Batched, "grouped": Grouped, "plain": Plain, "encoder": encoder}
NAMES = (*_OWN, *_HUGGING_FACE)


def make(name: str):
    """Return a model in evaluation mode and inputs for it; the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in _OWN:
            module, inputs = _OWN[name](), _sequence()
        else:
            kind, config, settings, draw = _HUGGING_FACE[name]
            module, inputs = getattr(transformers, kind)(getattr(transformers, config)(**settings)), draw()
        return strengthen(module), inputs


def strengthen(module: nn.Module) -> nn.Module:
    """Give matrices weights at which attention is far from even, in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return module.eval()
