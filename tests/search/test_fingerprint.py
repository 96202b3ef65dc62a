import linecache
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint import Task
from trimpoint.errors import UnknownNameError
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.score import Accuracy
from trimpoint.search import fingerprint
from trimpoint.search.fingerprint import code_digest, combined, method_code, model_digest, parts
from trimpoint.target import Target


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def data(seed: int) -> TensorDataset:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def task(**more) -> Task:
    return Task(**({"train": data(0), "select": data(1), "certify": data(2)} | more))


def differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
    return {name for name in {**a, **b} if a.get(name) != b.get(name)}


def test_the_same_things_have_the_same_hash():
    first = parts(network(), task(), Target(), {"seed": 0})
    assert first == parts(network(), task(), Target(), {"seed": 0})
    assert combined(first) == combined(dict(reversed(first.items())))


def test_each_part_changes_only_its_own_hash():
    first = parts(network(), task(), Target(), {"seed": 0})
    for name, other in {
        "model": parts(network(1), task(), Target(), {"seed": 0}),
        "`select` data": parts(network(), task(select=data(5)), Target(), {"seed": 0}),
        "task version": parts(network(), task(version="2"), Target(), {"seed": 0}),
        "target": parts(network(), task(), Target(threads=2), {"seed": 0}),
        "search settings": parts(network(), task(), Target(), {"seed": 1}),
        "code": parts(network(), task(loss=lambda outputs, targets: outputs.sum()), Target(), {"seed": 0}),
    }.items():
        assert differing(first, other) == {name}
        assert combined(first) != combined(other)


def test_certification_data_is_never_opened():
    class Closed:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            raise AssertionError("it was opened")

    assert parts(network(), task(certify=Closed()), Target(), {}) == parts(network(), task(), Target(), {})


def test_a_buffer_counts_as_much_as_a_weight():
    changed = network()
    changed[1].running_mean[0] = 1.0
    assert model_digest(changed) != model_digest(network())


def test_code_counts_and_its_layout_does_not(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    text = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x{}\n"
    digests = []
    for name, end in (("tp_one", ""), ("tp_two", " + 1"), ("tp_one", "  # a comment")):
        (tmp_path / f"{name}.py").write_text(text.format(end))
        importlib.invalidate_caches()
        module = importlib.reload(importlib.import_module(name))
        module.Net.__module__ = name
        digests.append(code_digest(module.Net(), task()))
    assert digests[0] == digests[2]
    assert digests[0] != digests[1]


def write(directory, name, text, monkeypatch):
    """Make a module that can be imported, and forget what was imported by that name."""
    import importlib

    monkeypatch.syspath_prepend(directory)
    (directory / f"{name}.py").write_text(text)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    linecache.clearcache()


def test_the_code_of_a_criterion_of_ones_own_counts(tmp_path, monkeypatch):
    text = (
        "def rule(group, evidence):\n    return evidence.weights(group){}\n\nclass Rule:\n    pass\n\nmade = Rule()\n"
    )
    found = []
    for end in ("", "  # a comment", " * 2"):
        write(tmp_path, "tp_rule", text.format(end), monkeypatch)
        methods = [PruneChannels(importance="tp_rule:rule")]
        found.append(parts(network(), task(), Target(), {}, methods))
    assert found[0] == found[1]
    assert differing(found[0], found[2]) == {"code of `tp_rule:rule`"}
    assert method_code([PruneChannels(importance="tp_rule:made")]).keys() == {"code of `tp_rule:made`"}
    assert method_code([PruneChannels()]) == {}
    with pytest.raises(UnknownNameError, match="ruled"):
        method_code([PruneChannels(importance="tp_rule:ruled")])


def test_methods_of_other_packages_and_scores_of_ones_own_count(monkeypatch):
    class Louder(PruneChannels):
        pass

    class Half(Accuracy):
        pass

    monkeypatch.setattr(fingerprint, "all_methods", lambda: {"prune-channels": PruneChannels, "louder": Louder})
    assert set(method_code(())) == {"code of `louder`"}
    monkeypatch.setattr(Louder, "traits", replace(Louder.traits, status="experimental"))
    assert set(method_code(())) == set()
    assert set(method_code([Louder()])) == {"code of `louder`"}
    assert code_digest(network(), task(score=Half())) != code_digest(network(), task(score=Accuracy()))
