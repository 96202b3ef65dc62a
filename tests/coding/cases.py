"""Small files of the kinds that are coded, made on the spot."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def weights(rng: np.random.Generator, rows: int, columns: int, *, zeros: float, values: int) -> np.ndarray:
    """Return a float matrix in which a share is zero, more so in some rows and columns, and few values occur."""
    odd = np.outer(rng.random(rows) ** 2, rng.random(columns) ** 2)
    chance = np.clip((1 - zeros) * odd / odd.mean(), 0, 1)
    table = np.linspace(-0.3, 0.3, values).astype(np.float32) + np.float32(0.01)
    drawn = table[np.clip(rng.normal(values / 2, values / 5, (rows, columns)), 0, values - 1).astype(int)]
    return np.where(rng.random((rows, columns)) < chance, drawn, np.float32(0)).astype(np.float32)


def model_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """Return an ONNX file that holds these tensors as initialisers and in one attribute."""
    initialisers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    constant = helper.make_node(
        "Constant", [], ["c"], value=numpy_helper.from_array(np.arange(300, dtype=np.int64), "held")
    )
    graph = helper.make_graph([constant, helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y], initialisers)
    return helper.make_model(graph).SerializeToString(deterministic=True)


def every_kind(seed: int = 0) -> dict[str, np.ndarray]:
    """Return tensors of all formats, sizes and shapes that matter."""
    rng = np.random.default_rng(seed)
    floats = rng.normal(0, 0.1, (40, 60)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 3.0e38] * 40, np.float32)
    return {
        "sparse": weights(rng, 60, 90, zeros=0.9, values=16),
        "dense": floats,
        "pruned": np.where(np.abs(floats) < 0.12, np.float32(0), floats),
        "zeros": np.zeros((30, 50), np.float32),
        "constant": np.full((7, 100), 0.25, np.float32),
        "special": special,
        "int8": rng.integers(-127, 128, (32, 3, 5, 5)).astype(np.int8),
        "uint8": np.clip(rng.normal(128, 9, (64, 65)), 0, 255).astype(np.uint8),
        "int32": rng.integers(-(2**31), 2**31 - 1, (300,)).astype(np.int32),
        "int64": np.arange(5000, dtype=np.int64) * 10**15,
        "uint64": np.full((700,), 2**64 - 1, np.uint64),
        "half": rng.normal(0, 1, (33, 65)).astype(np.float16),
        "double": rng.normal(0, 1, (20, 30)),
        "flags": rng.random((40, 40)) < 0.2,
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "bias": rng.normal(0, 1, 300).astype(np.float32),
        "recurrent": rng.normal(0, 0.1, (1, 64, 20)).astype(np.float32),
    }
