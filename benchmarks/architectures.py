"""Networks of many architectures, tiny and with random weights, each with a task on synthetic data.

All but the recurrent ones are classes of `transformers`, built from a configuration of their own: nothing is
downloaded, and nothing of it was written with trimpoint in mind. The recurrent ones are the layers of PyTorch between
an embedding and a classifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from trimpoint.losses import call, cross_entropy, squared_error
from trimpoint.score import Accuracy, MeanSquaredError
from trimpoint.task import Task

Built = tuple[nn.Module, Task]
CLASSES, TOKENS, SAMPLES = 5, 64, 8
_TEXT = {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
_TEXT |= {"intermediate_size": 64, "max_position_embeddings": 64, "num_labels": CLASSES}
_VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Architecture:
    """One network of the table.

    Args:
        name: as its authors call it.
        kind: what it is for.
        build: makes the network and its task.
    """

    name: str
    kind: str
    build: Callable[[], Built]

    def make(self) -> Built:
        """Return the network in evaluation mode, with batch statistics of its data, and the task."""
        network, task = self.build()
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for inputs, _ in task.batches("train", size=SAMPLES) if norms else ():
                call(network, inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return network.eval(), task


def _network(class_name: str, config_name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = getattr(transformers, class_name)(getattr(transformers, config_name)(**config))
    return network.eval()


def _samples(inputs: Callable[[torch.Generator, int], Any], targets: Callable[[torch.Generator, int], Any]) -> Any:
    """Return the roles of a task: for each sample the two functions get a generator and the sample's index."""
    generator = torch.Generator().manual_seed(0)
    made = [(inputs(generator, index), targets(generator, index)) for index in range(3 * SAMPLES)]
    parts = [made[start : start + SAMPLES] for start in range(0, len(made), SAMPLES)]
    return dict(zip(("train", "calibrate", "select"), parts, strict=True))


def _task(inputs: Any, targets: Any, **more: Any) -> Task:
    settings = {"loss": cross_entropy, "score": Accuracy(), "batch_size": 2} | more
    return Task(**_samples(inputs, targets), **settings)


def _label(generator: torch.Generator, _: int) -> int:
    return int(torch.randint(CLASSES, (), generator=generator))


def _image(size: int) -> Callable[[torch.Generator, int], Any]:
    return lambda generator, _: {"pixel_values": torch.randn(3, size, size, generator=generator)}


def _length(index: int) -> int:
    return (9, 12, 16)[index % 3]


def _text(generator: torch.Generator, index: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, TOKENS, (_length(index),), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _next_tokens(generator: torch.Generator, index: int) -> Tensor:
    return torch.randint(3, TOKENS, (_length(index),), generator=generator)


def _pad(samples: Sequence[Any]) -> Any:
    """Collate sequences by padding them to the longest; −100 pads targets that are sequences themselves."""
    longest = max(len(inputs["input_ids"]) for inputs, _ in samples)
    padded = {
        name: torch.stack([F.pad(inputs[name], (0, longest - len(inputs[name]))) for inputs, _ in samples])
        for name in samples[0][0]
    }
    targets = [torch.as_tensor(target) for _, target in samples]
    if targets[0].ndim and not targets[0].is_floating_point():
        targets = [F.pad(target, (0, longest - len(target)), value=-100) for target in targets]
    return padded, torch.stack(targets)


def _images(class_name: str, config_name: str, *, size: int = 64, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        return _network(class_name, config_name, num_labels=CLASSES, **config), _task(_image(size), _label)

    return build


def _texts(class_name: str, config_name: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        return _network(class_name, config_name, **(_TEXT | config)), _task(_text, _label, collate=_pad)

    return build


def _decoder(class_name: str, config_name: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        network = _network(class_name, config_name, use_cache=False, vocab_size=TOKENS, **config)
        return network, _task(_text, _next_tokens, collate=_pad)

    return build


def _pixels(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], targets)


def _boxes(outputs: Any, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs["pred_boxes"], targets) + outputs["logits"].square().mean()


def _states(outputs: Any, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs["last_hidden_state"].mean(1), targets)


def _forecasts(outputs: Any, targets: Tensor) -> Tensor:
    return squared_error(outputs["prediction_outputs"], targets)


def _vit() -> Built:
    network = _network("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, num_labels=5, **_VISION)
    return network, _task(_image(32), _label)


def _dinov2() -> Built:
    sizes = {key: value for key, value in _VISION.items() if key != "intermediate_size"}
    network = _network(
        "Dinov2ForImageClassification", "Dinov2Config", image_size=32, patch_size=8, num_labels=CLASSES, **sizes
    )
    return network, _task(_image(32), _label)


def _segformer() -> Built:
    network = _network(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        depths=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 32, 64],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=CLASSES,
    )
    mask = lambda generator, _: torch.randint(CLASSES, (16, 16), generator=generator)  # noqa: E731
    return network, _task(_image(64), mask, loss=_pixels)


def _yolos() -> Built:
    network = _network(
        "YolosForObjectDetection",
        "YolosConfig",
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=4,
        num_labels=CLASSES,
        **_VISION,
    )
    boxes = lambda generator, _: torch.rand(4, 4, generator=generator)  # noqa: E731
    return network, _task(_image(32), boxes, loss=_boxes, score=MeanSquaredError())


def _t5() -> Built:
    network = _network(
        "T5EncoderModel", "T5Config", vocab_size=TOKENS, d_model=32, d_kv=16, d_ff=64, num_layers=4, num_heads=2
    )
    target = lambda generator, _: torch.randn(32, generator=generator)  # noqa: E731
    return network, _task(_text, target, collate=_pad, loss=_states, score=MeanSquaredError())


def _wav2vec2() -> Built:
    network = _network(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 4, 4),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=32,
        mask_time_length=2,
        num_labels=CLASSES,
        **_VISION,
    )
    sound = lambda generator, _: {"input_values": torch.randn(2_000, generator=generator)}  # noqa: E731
    return network, _task(sound, _label)


def _ast() -> Built:
    network = _network(
        "ASTForAudioClassification", "ASTConfig", num_mel_bins=32, max_length=32, patch_size=8, num_labels=5, **_VISION
    )
    sound = lambda generator, _: {"input_values": torch.randn(32, 32, generator=generator)}  # noqa: E731
    return network, _task(sound, _label)


def _patchtst() -> Built:
    network = _network(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        num_input_channels=2,
        context_length=32,
        prediction_length=8,
        patch_length=4,
        patch_stride=4,
        num_hidden_layers=4,
        d_model=32,
        num_attention_heads=2,
        ffn_dim=64,
        loss="mse",
    )
    past = lambda generator, _: {"past_values": torch.randn(32, 2, generator=generator)}  # noqa: E731
    future = lambda generator, _: torch.randn(8, 2, generator=generator)  # noqa: E731
    return network, _task(past, future, loss=_forecasts, score=MeanSquaredError())


def _whisper() -> Built:
    network = _network(
        "WhisperForAudioClassification",
        "WhisperConfig",
        num_mel_bins=16,
        max_source_positions=16,
        d_model=32,
        encoder_layers=4,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        classifier_proj_size=16,
        num_labels=CLASSES,
    )
    sound = lambda generator, _: {"input_features": torch.randn(16, 32, generator=generator)}  # noqa: E731
    return network, _task(sound, _label)


class _Recurrent(nn.Module):
    """Tokens to logits by a recurrent layer of PyTorch; its states are averaged over the tokens."""

    def __init__(self, kind: type[nn.RNNBase], **config: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 32)
        self.layers = kind(32, 32, batch_first=True, **config)
        self.classifier = nn.Linear(32 * (2 if self.layers.bidirectional else 1), CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens and mask, both `[batch, length]`, to logits."""
        states, _ = self.layers(self.embedding(input_ids))
        weight = attention_mask[..., None].to(states.dtype)
        return self.classifier((states * weight).sum(1) / weight.sum(1))  # type: ignore[no-any-return]


def _recurrent(kind: type[nn.RNNBase], **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        return _Recurrent(kind, **config).eval(), _task(_text, _label, collate=_pad)

    return build


_STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2]}
_PATCHES = {"image_size": 32, "patch_size": 8}
ARCHITECTURES = (
    Architecture(
        "ResNet",
        "image",
        _images("ResNetForImageClassification", "ResNetConfig", embedding_size=16, layer_type="basic", **_STAGES),
    ),
    Architecture(
        "MobileNetV2", "image", _images("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35)
    ),
    Architecture(
        "ConvNeXt", "image", _images("ConvNextForImageClassification", "ConvNextConfig", num_stages=2, **_STAGES)
    ),
    Architecture("ViT", "image", _vit),
    Architecture("DINOv2", "image", _dinov2),
    Architecture(
        "Swin",
        "image",
        _images(
            "SwinForImageClassification",
            "SwinConfig",
            size=32,
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    Architecture("SegFormer", "segmentation", _segformer),
    Architecture("YOLOS", "detection", _yolos),
    Architecture("BERT", "text", _texts("BertForSequenceClassification", "BertConfig")),
    Architecture(
        "DistilBERT",
        "text",
        _texts("DistilBertForSequenceClassification", "DistilBertConfig", dim=32, n_layers=4, n_heads=2, hidden_dim=64),
    ),
    Architecture("ALBERT", "text", _texts("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16)),
    Architecture(
        "DeBERTa-v2",
        "text",
        _texts(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
        ),
    ),
    Architecture("T5 encoder", "text", _t5),
    Architecture(
        "GPT-2", "decoder", _decoder("GPT2LMHeadModel", "GPT2Config", n_positions=64, n_embd=32, n_layer=4, n_head=2)
    ),
    Architecture(
        "Llama",
        "decoder",
        _decoder("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=64, **_VISION),
    ),
    Architecture("Wav2Vec2", "speech", _wav2vec2),
    Architecture("AST", "speech", _ast),
    Architecture("PatchTST", "time series", _patchtst),
    Architecture(
        "RegNet", "image", _images("RegNetForImageClassification", "RegNetConfig", embedding_size=16, **_STAGES)
    ),
    Architecture(
        "EfficientNet",
        "image",
        _images(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            width_coefficient=0.25,
            depth_coefficient=0.3,
            hidden_dim=320,
        ),
    ),
    Architecture(
        "ConvNeXt-V2", "image", _images("ConvNextV2ForImageClassification", "ConvNextV2Config", num_stages=2, **_STAGES)
    ),
    Architecture(
        "MobileViT",
        "image",
        _images(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 16, 16, 24, 24, 32, 64],
            num_attention_heads=2,
        ),
    ),
    Architecture(
        "PVT",
        "image",
        _images(
            "PvtForImageClassification",
            "PvtConfig",
            image_size=64,
            hidden_sizes=[16, 16, 32, 32],
            depths=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            num_attention_heads=[1, 2, 2, 2],
        ),
    ),
    Architecture("DeiT", "image", _images("DeiTForImageClassification", "DeiTConfig", size=32, **_PATCHES, **_VISION)),
    Architecture("BEiT", "image", _images("BeitForImageClassification", "BeitConfig", size=32, **_PATCHES, **_VISION)),
    Architecture("RoBERTa", "text", _texts("RobertaForSequenceClassification", "RobertaConfig")),
    Architecture("ELECTRA", "text", _texts("ElectraForSequenceClassification", "ElectraConfig", embedding_size=16)),
    Architecture("MPNet", "text", _texts("MPNetForSequenceClassification", "MPNetConfig")),
    Architecture(
        "GPT-NeoX",
        "decoder",
        _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", max_position_embeddings=64, **_VISION),
    ),
    Architecture(
        "OPT",
        "decoder",
        _decoder(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
    ),
    Architecture(
        "Qwen3",
        "decoder",
        _decoder(
            "Qwen3ForCausalLM", "Qwen3Config", head_dim=16, num_key_value_heads=1, max_position_embeddings=64, **_VISION
        ),
    ),
    Architecture("Whisper encoder", "speech", _whisper),
    Architecture("LSTM", "recurrent", _recurrent(nn.LSTM, num_layers=2)),
    Architecture("GRU", "recurrent", _recurrent(nn.GRU, num_layers=2, bidirectional=True)),
)
"""Every network of the table, in its order."""
