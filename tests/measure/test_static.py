import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trimpoint.demo.resnet import resnet20
from trimpoint.errors import DataError, ModelError
from trimpoint.measure.static import count_macs, count_params
from trimpoint.task import call

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")


def reference(module, inputs):
    """MACs of one sample by PyTorch's own counter, with everything that it cannot count taken apart into products."""
    module.eval()
    counter = FlopCounterMode(display=False)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter:
        call(module, inputs)
    torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() / 2


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))

    def forward(self, x):
        scores = torch.einsum("bij,bkj->bik", x, x)
        return torch.baddbmm(scores, x, x.transpose(1, 2)) @ x @ self.weight


class First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


CASES = {
    "linear": (nn.Linear(7, 5), torch.randn(1, 3, 7)),
    "convolution": (nn.Conv2d(4, 6, 3, 2, 1), torch.randn(1, 4, 9, 11)),
    "groups": (nn.Conv2d(8, 12, 3, groups=4), torch.randn(1, 8, 9, 9)),
    "depthwise": (nn.Conv2d(8, 8, 5, groups=8), torch.randn(1, 8, 9, 9)),
    "dilated-1d": (nn.Conv1d(3, 5, 3, dilation=2), torch.randn(1, 3, 20)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2), torch.randn(1, 4, 5, 5)),
    "transposed-groups": (nn.ConvTranspose2d(4, 8, 4, 2, groups=2), torch.randn(1, 4, 5, 5)),
    "products": (Products(), torch.randn(1, 3, 5)),
    "attention": (Attention(), (torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))),
    "multihead": (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(1, 6, 16)),
    "lstm": (First(nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True)), torch.randn(1, 7, 6)),
    "gru": (First(nn.GRU(6, 5, batch_first=True)), torch.randn(1, 7, 6)),
    "resnet20": (resnet20(), torch.randn(1, 1, 28, 28)),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_agree_with_pytorchs_flop_counter(name):
    module, inputs = CASES[name]
    count = count_macs(module, inputs)
    assert count.total == reference(module, inputs) > 0
    assert sum(count.by_module.values()) == sum(count.by_operator.values()) == count.total


def test_macs_of_resnet20_by_module():
    count = count_macs(resnet20(), torch.randn(1, 1, 28, 28))
    assert count.by_module["stem.conv"] == 28 * 28 * 16 * 9
    assert count.by_module["head"] == 640
    assert count.by_operator["addmm"] == 640
    assert count.not_counted["relu"] == 19
    assert not {"view", "t", "cat", "detach"} & set(count.not_counted)


def test_macs_of_a_hugging_face_bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config)
    inputs = {
        "input_ids": torch.randint(0, 50, (1, 12)),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 12, dtype=torch.long),
    }
    count = count_macs(model, inputs)
    assert count.total == reference(model, inputs)
    linear = 12 * (4 * 32 * 32 + 2 * 32 * 64)
    attention = 2 * 12 * 12 * 32
    assert count.total == 2 * (linear + attention) + 32 * 32 + 32 * 3
    assert count.by_module["bert.encoder.layer.0.intermediate.dense"] == 12 * 32 * 64
    assert {"gelu", "native_layer_norm"} <= set(count.not_counted)


def test_only_one_sample_counts_and_the_model_is_left_alone():
    model = resnet20()
    model.stages[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    assert count_macs(model, torch.randn(5, 1, 28, 28)).total == count_macs(model, torch.randn(1, 1, 28, 28)).total
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_shared_modules_count_each_time_they_run():
    shared = nn.Linear(4, 4)
    count = count_macs(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 4))
    assert count.total == 32
    assert count.by_module == {"0": 32}


def test_what_cannot_be_counted_is_listed():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x).abs() + x.cumsum(-1)[..., :1]

    count = count_macs(Spectrum(), torch.randn(1, 16))
    assert count.total == 0
    assert {"_fft_r2c", "cumsum"} <= set(count.not_counted)


def test_a_model_that_does_not_run_is_a_model_error():
    with pytest.raises(ModelError, match="does not run on an example of"):
        count_macs(nn.Linear(3, 2), torch.randn(1, 4))
    with pytest.raises(DataError, match="batch dimension"):
        count_macs(nn.Linear(3, 2), ())


def test_parameters_tied_and_shared_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.first = self.second = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(3))

    count = count_params(Tied())
    assert count.by_module == {"": 3, "embed": 40, "first": 20}
    assert count.total == 63
    assert count_params(resnet20()).total == sum(math.prod(p.shape) for p in resnet20().parameters())
    assert count_params(nn.ReLU()).total == 0
