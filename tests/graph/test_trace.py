"""Tracing: owners of parameters, paths of modules, and what is said when it does not work."""

import copy

import pytest
import torch
from torch import nn

from tests.graph.networks import build
from trimpoint.errors import TraceError
from trimpoint.graph import trace


def test_tied_and_shared_parameters_have_all_their_owners():
    module, inputs = build("Tied")
    owners = set(trace(module, inputs).owners.values())
    assert (("embedding", "weight"), ("head", "weight")) in owners
    assert (("", "positions"),) in owners
    module, inputs = build("Shared")
    assert (("conv", "weight"), ("again", "weight")) in set(trace(module, inputs).owners.values())


def test_nodes_know_their_module():
    module, inputs = build("Depthwise")
    found = trace(module, inputs)
    paths = {found.modules[node.name] for node in found.program.graph.nodes if "conv" in node.name}
    assert paths == {"stem", "block.expand.0", "block.depth.0", "block.project.0", "twice"}


def test_the_model_is_not_changed():
    module, inputs = build("Flat")
    module.train()
    before = copy.deepcopy(module.state_dict())
    found = trace(module, inputs)
    assert module.training
    assert not found.module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_batch_of_one_is_doubled():
    module, inputs = build("Flat")
    assert trace(module, inputs[:1]).inputs.shape == (2, 3, 8, 8)
    named = trace(Named(), {"x": torch.randn(1, 4), "scale": torch.randn(1, 4)})
    assert named.inputs["scale"].shape == (2, 4)
    assert trace(Named(), (torch.randn(3, 4), torch.randn(3, 4))).inputs[0].shape == (3, 4)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, scale):
        return {"logits": self.linear(x * scale)}


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Holder(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.linear, self.part = nn.Linear(4, 4), part

    def forward(self, x):
        return self.part(self.linear(x))


def test_what_cannot_be_traced_is_named_and_nothing_else_is_said(capfd):
    with pytest.raises(TraceError) as caught:
        trace(Holder(Branching()), torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")
    assert "`part` (Branching)" in caught.value.message
    assert "test_trace.py" in caught.value.message
    assert "if x.sum() > 0:" in caught.value.message
    assert "Task(core=" in caught.value.hint


def test_a_model_that_does_not_run_is_named():
    with pytest.raises(
        TraceError, match=r"does not run on the example inputs: RuntimeError: .* in the module `linear`"
    ):
        trace(Holder(nn.Identity()), torch.randn(2, 5))


def test_a_model_that_returns_its_cache_is_told_to_stop():
    class DynamicCache:
        pass

    class Decoder(nn.Module):
        def __init__(self, named):
            super().__init__()
            self.head, self.named = nn.Linear(4, 2), named

        def forward(self, x):
            y = self.head(x)
            if self.named:
                return {"logits": y, "past_key_values": DynamicCache()}
            return y, DynamicCache()

    for named in (True, False):
        with pytest.raises(TraceError, match="use_cache = False"):
            trace(Decoder(named), torch.randn(2, 4))
