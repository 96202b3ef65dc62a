import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.runtimes import networks
from trimpoint.errors import ExportError, ModelError
from trimpoint.runtimes.export import export


def test_signature_keeps_the_structures_of_the_module(cases):
    signature = cases["transformer"][2].signature
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.inputs] == [
        ("attention_mask", "int64", ("batch", "length")),
        ("input_ids", "int64", ("batch", "length")),
    ]
    assert signature.output_structure == {"dict": {"logits": "tensor", "hidden": "tensor"}}
    assert [spec.shape for spec in signature.outputs] == [("batch", 3), ("batch", "length", 16)]
    assert cases["pair"][2].signature.output_structure == {"tuple": ["tensor", {"tuple": ["tensor", "tensor"]}]}
    assert cases["transformer"][2].notes == ()


def test_files_hold_no_paths_and_no_debris(cases):
    for _, _, exported, _ in cases.values():
        model = onnx.load_model_from_string(exported.onnx)
        onnx.checker.check_model(model, full_check=True)
        for tensor in model.graph.initializer:
            tensor.ClearField("raw_data")  # random bytes spell any short word
        described = model.SerializeToString()
        for word in (b"/site-packages", b".py", b"stack_trace", b"namespace", b"pkg.torch", str(Path.cwd()).encode()):
            assert word not in described
        assert not model.metadata_props
        assert not model.graph.value_info
        assert not model.producer_name


def test_every_convolution_and_product_of_resnet8_has_its_module(cases):
    module, _, exported, _ = cases["resnet8"]
    model = onnx.load_model_from_string(exported.onnx)
    found = [exported.scopes[node.name] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    wanted = [name for name, part in module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert sorted(found) == sorted(wanted)
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
    assert len(exported.onnx) < weights * 4 + 8_000


def test_equal_modules_give_equal_bytes_in_another_process():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, hashlib\n"
        "from tests.runtimes import networks\n"
        "from trimpoint.runtimes.export import export\n"
        "torch.manual_seed(5)\n"
        "data = export(networks.Recurrent(), torch.randn(3, 5, 8), {'input': {0: 'batch'}}).onnx\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    root = str(Path(networks.__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=True)
    torch.manual_seed(5)
    data = export(networks.Recurrent(), torch.randn(3, 5, 8), {"input": {0: "batch"}}).onnx
    assert run.stdout.strip() == hashlib.sha256(data).hexdigest()
    assert run.stderr == ""


def test_a_second_export_reads_no_sources_of_translations(cases, monkeypatch):
    module, inputs, before, _ = cases["cnn"]
    read, getsource = [], inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda what: read.append(what.__module__) or getsource(what))
    again = export(module, inputs(), {"input": networks.BATCH})
    assert again.onnx == before.onnx
    assert not [name for name in read if name.startswith("onnxscript.")]


def test_the_module_is_not_changed():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export(module, torch.randn(1, 4), {"input": {0: "batch"}})
    assert module.training
    assert module[1].training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_length_that_the_model_fixes_is_noted():
    exported = export(networks.FixedLength(), torch.randn(3, 6, 4), {"input": networks.OPEN})
    assert exported.signature.inputs[0].shape == ("batch", 6, 4)
    assert exported.notes == (
        "input: dimension 1 (length) is fixed at 6: You marked length as dynamic but your code specialized it to be a "
        "constant (6)",
    )


def test_a_batch_that_the_model_fixes_is_noted_and_becomes_one():
    exported = export(networks.FixedBatch(), torch.randn(3, 4), {"input": networks.BATCH})
    assert exported.signature.inputs[0].shape == (1, 4)
    assert exported.notes[0].startswith("input: dimension 0 (batch) is fixed at 1: ")
    session = onnxruntime.InferenceSession(exported.onnx)
    assert session.run(None, {"input": torch.randn(1, 4).numpy()})[0].shape == (1, 4)


def test_weights_that_are_not_finite_are_refused():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"'0\.weight' must be finite. Got 1 of 4 values"):
        export(module, torch.randn(1, 2), {"input": networks.BATCH})


def test_control_flow_on_data_names_module_and_line():
    with pytest.raises(ExportError, match=r"depends on its data in module '1', at .*networks.py:\d+") as caught:
        export(nn.Sequential(nn.Linear(4, 4), networks.Branch()), torch.randn(2, 4), {"input": networks.BATCH})
    assert "torch.where" in caught.value.hint


def test_inputs_that_do_not_fit_are_the_models_error():
    with pytest.raises(ModelError, match=r"does not run on example inputs of \[2, 3\] float32: RuntimeError"):
        export(nn.Linear(4, 4), torch.randn(2, 3), {"input": networks.BATCH})


def test_outputs_that_are_no_tensors_are_left_out_with_a_note():
    class Mixed(nn.Module):
        def forward(self, x):
            return {"y": x * 2, "name": "mixed"}

    exported = export(Mixed(), torch.randn(2, 3), {"input": networks.BATCH})
    assert exported.signature.output_structure == {"dict": {"y": "tensor"}}
    assert exported.notes == ("output.name: left out, it is a str and not a tensor",)


def test_nothing_is_printed(capfd):
    export(nn.Linear(2, 2), torch.randn(2, 2), {"input": networks.BATCH})
    assert capfd.readouterr() == ("", "")


@torch.library.custom_op("trimpoint_tests::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@halve.register_fake
def _(x):
    return torch.empty_like(x)


class Halving(nn.Module):
    def forward(self, x):
        return halve(x) + 1


def test_an_unknown_operator_is_named_with_its_place_and_the_ways_out():
    module = nn.Sequential(nn.Linear(3, 3), Halving())
    with pytest.raises(ExportError) as caught:
        export(module, torch.randn(2, 3), {"input": networks.BATCH})
    message = caught.value.message
    assert "`trimpoint_tests.halve.default` cannot be exported to ONNX in module '1', at " in message
    assert "test_export.py:" in message
    assert "`return halve(x) + 1`" in message
    for way in ("custom_translations", "Task(core=...)", "another runtime"):
        assert way in caught.value.hint


def test_a_custom_operator_is_translated_end_to_end():
    from onnxscript import FLOAT, opset20

    def halve_onnx(x: FLOAT):
        return opset20.Mul(x, opset20.Constant(value_float=0.5))

    module = nn.Sequential(nn.Linear(3, 3), Halving()).eval()
    exported = export(
        module,
        torch.randn(2, 3),
        {"input": networks.BATCH},
        custom_translations={torch.ops.trimpoint_tests.halve: halve_onnx},
    )
    x = torch.randn(5, 3)
    answer = onnxruntime.InferenceSession(exported.onnx).run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(answer), module(x).detach())


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, mask):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None].bool())
        return seen.transpose(1, 2).flatten(2)


def test_keys_of_attention_are_turned_by_one_operator_at_every_length():
    torch.manual_seed(0)
    module = _Attention().eval()
    inputs = {"x": torch.randn(2, 7, 16), "mask": torch.ones(2, 7, dtype=torch.int64)}
    exported = export(module, inputs, {name: {0: "batch", 1: "length"} for name in inputs})
    model = onnx.load_model_from_string(exported.onnx)
    assert not [node for node in model.graph.node if node.op_type == "Transpose" and len(node.attribute[0].ints) == 3]
    session = onnxruntime.InferenceSession(exported.onnx)
    for batch, length in ((1, 1), (3, 5)):
        x, mask = torch.randn(batch, length, 16), torch.ones(batch, length, dtype=torch.int64)
        mask[0, 3:] = 0
        (found,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x, mask).detach())
