"""Stages without weights: rows put together for experts, and what these gave added up, so that both stay on the device.

A chunk of a prompt chooses many experts, each for some of its rows. ``gather`` puts the rows in the order in which the
experts take them; ``sum`` adds their outputs in the order of the router's choice, in fp32, whatever was computed first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.onnx_decoder_check import plain_session
from edgeflex.exporters.onnx_decoder_graphs import constant_tensor, operator
from edgeflex.exporters.onnx_decoder_stages import OPSET

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import NodeProto, ValueInfoProto

TOKENS, ROWS = "tokens", "rows"  # dynamic axes: tokens of a chunk, and their rows once for each expert
GATHER_STAGE = "stages/gather.onnx"
_IR = 10
_MOST_ERROR = 1e-6  # products and sums in fp32, in another order at most


def gather_stage(hidden_dim: int) -> ModelProto:
    """Return ``out [rows, hidden] = y [tokens, hidden]`` at ``rows``, INT32."""
    inputs = [_value("y", (TOKENS, hidden_dim)), _value("rows", (ROWS,), TensorProto.INT32)]
    return _model([operator("Gather", ["y", "rows"], ["out"], axis=0)], inputs, _value("out", (ROWS, hidden_dim)))


def sum_stage(hidden_dim: int, top_k: int, *, dense: bool) -> ModelProto:
    """Return ``hidden = residual + (chosen experts' outputs by weight, in order, + dense)``, all ``[tokens, hidden]``.

    Args:
        hidden_dim: Of a row.
        top_k: Experts of a token, whose outputs are rows ``places [tokens, top_k]`` (INT32) of ``outputs [rows,
            hidden]``, to be multiplied by ``weights [tokens, top_k]``; 0 where the layer does not route.
        dense: There is a part that all tokens share: the dense layer's, or the shared experts'.
    """
    inputs, constants, nodes = [_value("residual", (TOKENS, hidden_dim))], [], []
    parts: list[str] = []
    if top_k:
        inputs += [_value("outputs", (ROWS, hidden_dim)), _value("places", (TOKENS, top_k), TensorProto.INT32)]
        inputs.append(_value("weights", (TOKENS, top_k)))
        constants.append(constant_tensor(np.array([-1], np.int64), "last"))
        constants.append(constant_tensor(np.array([1], np.int64), "choice"))
        parts = [f"part_{place}" for place in range(top_k)]
        nodes += [
            operator("Gather", ["outputs", "places"], ["chosen"], axis=0),
            operator("Unsqueeze", ["weights", "last"], ["factors"]),
            operator("Mul", ["chosen", "factors"], ["weighted"]),
            operator("Split", ["weighted"], [f"{one}_alone" for one in parts], axis=1, num_outputs=top_k),
            *(operator("Squeeze", [f"{one}_alone", "choice"], [one]) for one in parts),
        ]
    if dense:
        inputs.append(_value("dense", (TOKENS, hidden_dim)))
        parts.append("dense")
    total = parts[0]
    for place, part in enumerate(parts[1:]):
        nodes.append(operator("Add", [total, part], [f"total_{place}"]))
        total = f"total_{place}"
    nodes.append(operator("Add", ["residual", total], ["hidden"]))
    return _model(nodes, inputs, _value("hidden", (TOKENS, hidden_dim)), constants)


def check_rows(folder: Path, path: str, top_k: int) -> None:
    """Run a written stage of this module on drawn rows, and compare it with the same in NumPy.

    Raises:
        MissingDependencyError: ONNX Runtime is absent.
        UnsupportedError: The stage cannot be loaded, or gives something else.
    """
    session = plain_session(folder / path)
    shapes = {one.name: one.shape for one in session.get_inputs()}
    draw, tokens = np.random.default_rng(top_k), 3
    sizes = {TOKENS: tokens, ROWS: tokens * max(1, top_k)}
    feeds: dict[str, Any] = {}
    for name, shape in shapes.items():
        known = [sizes.get(axis, axis) for axis in shape]
        if name in {"rows", "places"}:
            most = tokens if name == "rows" else sizes[ROWS]
            feeds[name] = draw.integers(0, most, size=known, dtype=np.int32)
        else:
            feeds[name] = draw.standard_normal(known, dtype=np.float32)
    found = session.run(None, feeds)[0]
    wanted = _gathered(feeds) if path == GATHER_STAGE else _summed(feeds, top_k)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not error <= _MOST_ERROR:
        raise UnsupportedError(f"{path}: the stage differs by {error:.3g} of its largest number. Export again.")


def _gathered(feeds: dict[str, Any]) -> Any:
    return feeds["y"][feeds["rows"]]


def _summed(feeds: dict[str, Any], top_k: int) -> Any:
    parts = [feeds["outputs"][feeds["places"][:, k]] * feeds["weights"][:, k : k + 1] for k in range(top_k)]
    parts += [feeds["dense"]] if "dense" in feeds else []
    return feeds["residual"] + sum(parts[1:], start=parts[0])


def _value(name: str, shape: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    output: ValueInfoProto,
    constants: list[TensorProto] | None = None,
) -> ModelProto:
    graph = helper.make_graph(nodes, "stage", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR)
