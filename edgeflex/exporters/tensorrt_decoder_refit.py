"""An expert whose weights are constants of the graph, to be replaced in the engine: the rival of weights as inputs.

Constants are an expert's own file, as external data, so that nothing lies on the disk twice. They stand on the left of
their products, ``W y^T``, because TensorRT's importer turns a constant on the right of ``Gemm(transB=1)`` round while
it reads it: whoever refits it later would have to hand it over turned round too (onnx-tensorrt, ``importGemm``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto, TensorProto, helper

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.onnx_decoder_check import plain_session
from edgeflex.exporters.onnx_decoder_graphs import operator
from edgeflex.exporters.onnx_decoder_stages import OPSET
from edgeflex.exporters.tensorrt_decoder_rows import TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.schema_moe import MatrixRecord

_IR = 10
_MOST_ERROR = 1e-5  # fp32 in another order
_TOKENS = 3


def refit_stage(hidden_dim: int, width: int, pair: Sequence[MatrixRecord]) -> ModelProto:
    """Return SwiGLU, ``out [tokens, hidden]`` of ``y [tokens, hidden]``, with constants ``gate_up`` and ``down``.

    Args:
        hidden_dim: Of a row.
        width: Inner width.
        pair: Where the constants lie, in fp32: ``gate_up [2 width, hidden]`` and ``down [hidden, width]``.
    """
    nodes = [
        operator("Transpose", ["y"], ["columns"], perm=[1, 0]),
        operator("MatMul", ["gate_up", "columns"], ["both"]),
        operator("Split", ["both"], ["gate", "up"], axis=0, num_outputs=2),
        operator("Sigmoid", ["gate"], ["share"]),
        operator("Mul", ["gate", "share"], ["swish"]),
        operator("Mul", ["swish", "up"], ["inner"]),
        operator("MatMul", ["down", "inner"], ["turned"]),
        operator("Transpose", ["turned"], ["out"], perm=[1, 0]),
    ]
    rows = (TOKENS, hidden_dim)
    shapes = {"gate_up": (2 * width, hidden_dim), "down": (hidden_dim, width)}
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, rows)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, rows)],
        [_lying(name, shape, one) for (name, shape), one in zip(shapes.items(), pair, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR)


def _lying(name: str, shape: tuple[int, int], record: MatrixRecord) -> TensorProto:
    """Return a constant that lies in a file of the bundle."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", record.file), ("offset", record.offset), ("length", record.weights_bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def check_refit(folder: Path, path: str, gate_up: NDArray[np.float32], down: NDArray[np.float32]) -> None:
    """Run a written stage of this module on drawn rows, and compare it with the same in NumPy.

    Args:
        folder: The bundle.
        path: Of the stage.
        gate_up: ``[2 width, hidden]`` of the expert whose file holds the constants.
        down: ``[hidden, width]`` likewise.

    Raises:
        MissingDependencyError: ONNX Runtime is absent.
        UnsupportedError: The stage cannot be loaded, or gives something else.
    """
    rows = np.random.default_rng(0).standard_normal((_TOKENS, down.shape[0]), dtype=np.float32)
    found = plain_session(folder / path).run(None, {"y": rows})[0]
    gate, up = np.split(rows @ gate_up.T, 2, axis=1)
    wanted = (gate / (1.0 + np.exp(-gate)) * up) @ down.T
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not error <= _MOST_ERROR:
        raise UnsupportedError(f"{path}: the stage differs by {error:.3g} of its largest number. Export again.")
