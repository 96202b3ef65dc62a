import numpy as np
import pytest
import torch
from torch import nn

from tests.runtimes import networks
from trimpoint.data import as_numpy
from trimpoint.errors import DataError, ParityError
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.verify import check_parity, parity_batches, require_parity

RUNTIME = get_runtime("onnxruntime")


@pytest.fixture
def opened(cases, tmp_path):
    module, inputs, exported, _ = cases["cnn"]
    return module, inputs, RUNTIME.open(tmp_path, RUNTIME.lower(exported, tmp_path))


def test_another_model_is_caught(opened):
    _, inputs, session = opened
    other = networks.convolutional()
    other[0].weight.data[0] *= 1.5
    with pytest.raises(
        ParityError, match=r"answers in onnxruntime must be within 0.001 .* Got 0\.\d+ \(output 'output'"
    ):
        require_parity(other, session, [inputs()])


def test_numbers_against_their_definitions(opened):
    _, inputs, session = opened
    other = networks.convolutional()
    other[9].bias.data[0] += 0.3
    x = inputs(16)
    parity = check_parity(other, session, [x])
    with torch.no_grad():
        want, have = other(x).double().numpy(), session(as_numpy(x)).astype(float)
    assert parity.max_abs == pytest.approx(0.3, rel=1e-4)
    assert parity.max_rel == pytest.approx(np.abs(want - have).max() / np.abs(want).max())
    assert parity.cosine == pytest.approx((want * have).sum() / np.linalg.norm(want) / np.linalg.norm(have))
    assert parity.agreement == (want.argmax(1) == have.argmax(1)).mean()
    assert parity.sqnr_db == pytest.approx(10 * np.log10((want**2).sum() / ((want - have) ** 2).sum()))


def test_answers_of_another_shape_are_caught(opened):
    _, inputs, session = opened
    with pytest.raises(ParityError, match=r"shape of output 'output', batch 0 must be \[4, 5\]. Got \[4, 4\]"):
        check_parity(nn.Sequential(nn.Flatten(), nn.Linear(144, 5)), session, [inputs()])


def test_parity_needs_inputs(opened):
    module, _, session = opened
    with pytest.raises(DataError, match="at least one batch"):
        check_parity(module, session, [])


def test_the_module_keeps_its_mode(opened):
    module, inputs, session = opened
    module.train()
    require_parity(module, session, [inputs()])
    assert module.training
    module.eval()


def test_batches_have_the_shapes_that_are_asked_for(cases, tmp_path):
    _, inputs, exported, _ = cases["transformer"]
    session = RUNTIME.open(tmp_path, RUNTIME.lower(exported, tmp_path))
    batches = parity_batches(inputs(4, 7), session, batches=(1, 3), lengths={"length": (2, 9)})
    assert [batch["input_ids"].shape for batch in batches] == [(1, 2), (3, 2), (1, 9), (3, 9)]
    assert [batch["attention_mask"].shape for batch in batches] == [(1, 2), (3, 2), (1, 9), (3, 9)]
