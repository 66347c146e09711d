"""Activations at a cut: int8 where both sides compute in int8, float otherwise, and always the same answer."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import fx

from edgeflex.exporters.executorch import compare_precisions, program_from_prepared, segment_programs, stored_layers
from edgeflex.runtimes.executorch import ExecutorchSession
from edgeflex.runtimes.segments import all_exits
from edgeflex.schema import LayerKind, Precision
from edgeflex.transforms import outputs, prepare, record_ranges
from tests.small_nets import ResidualNet, TwoBlocks, dynamic, images

STATIC, FLOAT = Precision.INT8_STATIC, Precision.FP32


@pytest.mark.parametrize(("before", "after"), list(product((STATIC, FLOAT), repeat=2)))
def test_int8_crosses_a_cut_only_if_both_sides_compute_in_it(tmp_path, before, after):
    model = dynamic(ResidualNet, ("block",))
    ranges = record_ranges(model, [images(64, seed=2)])
    mix = {"stem": before, "block.conv1": before, "block.conv2": before, "down": after, "wide": after}
    prepared = prepare(model, mix, ranges)
    handed = torch.int8 if before is after is STATIC else torch.float32
    assert [one.dtype for one in prepared.examples] == [torch.float32, handed]
    program = program_from_prepared(prepared)
    held = compare_precisions(program, model.graph, mix)
    assert {name: held[name] for name in mix} == mix
    path = tmp_path / "program.pte"
    path.write_bytes(program)
    x = images(16, seed=3)
    with ExecutorchSession(path, segment_programs(prepared, model.graph)) as session:
        found = all_exits(session, [x.numpy()])
    expected = outputs(prepared, x).numpy()
    # one rounding step may fall the other way in int8; the answers must not
    assert np.abs(found - expected).max() < (1e-5 if before is after is FLOAT else 0.05)
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) > 0.95


def test_a_cut_before_a_residual_block_keeps_its_sums_in_int8():
    model = dynamic(TwoBlocks, ("first",))
    ranges = record_ranges(model, [images(64, seed=2)])
    mix = {layer.name: STATIC for layer in model.graph.layers if layer.shape.kind is LayerKind.CONV2D}
    prepared = prepare(model, mix, ranges)
    later = prepared.segments[1].get_submodule("body")
    assert isinstance(later, fx.GraphModule)
    sums = [node for node in later.graph.nodes if node.op == "call_function" and "add" in str(node.target)]
    assert len(sums) == 1
    assert all("dequantize" in str(source.target) for source in sums[0].all_input_nodes)
    stored = [one for one in stored_layers(program_from_prepared(prepared)) if one.kind is LayerKind.CONV2D]
    assert [one.precision for one in stored] == [STATIC] * len(stored)
