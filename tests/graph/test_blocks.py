"""Which modules are blocks: a residual path of their own, called once, no stack."""

import torch
from torch import nn

from tests.graph.networks import InvertedResidual, Layer, Transformer, inputs_of
from trimpoint.demo.resnet import BasicBlock, resnet20
from trimpoint.graph import bypass_, find_blocks


def paths(module, inputs):
    return [block.path for block in find_blocks(module, inputs)]


def test_resnet20_has_seven_of_nine():
    module = resnet20()
    found = find_blocks(module, torch.randn(2, 1, 28, 28))
    assert [block.path for block in found] == [f"stages.{s}.{b}" for s in range(3) for b in range(3) if s == 0 or b]
    assert [block.shape for block in found[-2:]] == [(2, 64, 7, 7)] * 2
    assert found[0].params == 2 * 16 * 16 * 9 + 2 * 2 * 16
    assert len({block.family for block in found}) == 3
    assert found[0].family == "BasicBlock 16×28×28 in stages.0"


def test_transformer_layers_not_their_parts():
    assert paths(Transformer(), inputs_of((2, 5))) == ["layers.0", "layers.1"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    assert paths(nn.Sequential(encoder), torch.randn(2, 4, 8)) == ["0.layers.0", "0.layers.1"]


def test_bert_and_vit_layers():
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    bert, tokens = BertModel(BertConfig(vocab_size=30, **sizes)), {"input_ids": inputs_of((2, 5))}
    assert paths(bert, tokens) == ["encoder.layer.0", "encoder.layer.1"]
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    found = paths(vit, {"pixel_values": torch.randn(2, 3, 8, 8)})
    assert len(found) == 2
    assert all(isinstance(int(path.rpartition(".")[2]), int) for path in found)


def test_blocks_that_make_more_than_their_output_give_way_to_inner_ones():
    from transformers import T5Config, T5EncoderModel

    module = T5EncoderModel(T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2))
    tokens = {"input_ids": inputs_of((2, 5))}
    # The first block makes the position bias of all others; its feed-forward part can still go.
    assert paths(module, tokens) == ["encoder.block.0.layer.1", "encoder.block.1"]
    bypass_(module, "encoder.block.1", tokens)


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            InvertedResidual(8, 12),
            InvertedResidual(8, 16),
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_inverted_residuals_but_no_plain_sequence():
    assert paths(Mobile(), torch.randn(2, 3, 8, 8)) == ["features.1", "features.2"]


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Nested(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)))
        self.feed = Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)))

    def forward(self, x):
        return self.feed(self.mix(x))


def test_the_outermost_block_that_is_no_stack():
    module = nn.Sequential(nn.Linear(6, 8), nn.Sequential(Nested(8), Nested(8)), nn.Linear(8, 2))
    assert paths(module, torch.randn(2, 6)) == ["1.0", "1.1"]
    one = nn.Sequential(nn.Linear(6, 8), nn.Sequential(Nested(8)), nn.Linear(8, 2))
    assert paths(one, torch.randn(2, 6)) == ["1.0"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.once = Layer(8, 2, 12), Layer(8, 2, 12)

    def forward(self, x):
        return self.once(self.shared(self.shared(x)))


def test_a_module_that_is_called_twice_is_no_block():
    assert paths(Twice(), torch.randn(2, 4, 8)) == ["once"]


class Second(nn.Module):
    """Adds its second input to its output, not its first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x, residual):
        return self.linear(x) + residual


class Caller(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.part = nn.Linear(4, 4), Second()

    def forward(self, x):
        return self.part(self.first(x), x)


def test_only_the_first_input_counts():
    assert paths(Caller(), torch.randn(2, 4)) == []


def test_the_root_and_the_model_stay_as_they_are():
    module = BasicBlock(3, 3, 1)
    hooks = [len(part._forward_hooks) for part in module.modules()]
    assert paths(module, torch.randn(2, 3, 4, 4)) == []
    assert [len(part._forward_hooks) for part in module.modules()] == hooks
    assert module.training


class Signed(nn.Module):
    """A block whose residual path is what `combine` makes of the input and its change."""

    def __init__(self, combine):
        super().__init__()
        self.inner, self.combine = nn.Linear(8, 8), combine

    def forward(self, x):
        return self.combine(x, torch.relu(self.inner(x)))


def test_only_a_positive_identity_makes_a_block():
    def is_block(combine):
        module = nn.Sequential(nn.Linear(4, 8), Signed(combine), nn.Linear(8, 3)).eval()
        return paths(module, torch.randn(2, 4)) == ["1"]

    assert is_block(lambda x, y: x + y)
    assert is_block(lambda x, y: x - y)
    assert is_block(lambda x, y: (x + y) * 0.7)
    assert is_block(lambda x, y: (x + y) / 1.4)
    assert is_block(lambda x, y: torch.add(y, x, alpha=2))
    assert not is_block(lambda x, y: y - x)
    assert not is_block(lambda x, y: torch.add(y, x, alpha=-1))
    assert not is_block(lambda x, y: y + x * -1.0)
    assert not is_block(lambda x, y: y + x / -2.0)
    assert not is_block(lambda x, y: y + 0 * x)
    assert not is_block(lambda x, y: y + x * x)
