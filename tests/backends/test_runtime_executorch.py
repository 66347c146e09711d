from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from executorch.extension.pybindings import portable_lib
from torch import nn

from edgeflex.bundle import PROGRAM
from edgeflex.errors import BundleError, DeviceError, InputError, UnsupportedError
from edgeflex.runtimes import open_session
from edgeflex.runtimes.executorch import ExecutorchSession, method_names, set_threads, time_program
from edgeflex.runtimes.measure import measure_memory
from edgeflex.schema import SegmentProgram
from tests.toy_bundle import SHAPES, lower, toy_inputs, toy_program, write_toy_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("executorch") / "bundle")


@pytest.fixture(scope="module")
def linear_program() -> bytes:
    return lower({"forward": (nn.Linear(64, 64).eval().requires_grad_(False), torch.zeros(1, 64))})


def test_the_methods_of_a_program_are_its_segments(bundle: Bundle) -> None:
    assert method_names(bundle.file(PROGRAM)) == ("segment0", "segment1", "segment2")


def test_nothing_is_loaded_before_the_session_is_entered(bundle: Bundle) -> None:
    session = open_session(bundle)
    assert session.load_s == 0.0
    with session:
        assert session.load_s > 0.0


def test_an_output_outlives_the_next_methods_run(bundle: Bundle) -> None:
    """The reason for one program per segment: activations are handed on without a copy."""
    x = torch.from_numpy(toy_inputs(1))
    with ExecutorchSession.from_bundle(bundle) as session:
        activations, _, _ = session._step(0, x)
        kept = activations.clone()
        session._step(1, activations)
        session._step(2, torch.rand(SHAPES[2]))
        assert torch.equal(activations, kept)


@pytest.mark.parametrize("raw", [b"", b"\0" * 7, b"not a program at all" * 50, b"\xff" * 4000])
def test_a_foreign_file_is_refused_and_the_process_lives(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "program.pte"
    path.write_bytes(raw)
    with pytest.raises(BundleError, match="not an ExecuTorch program"):
        method_names(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_program_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "program.pte"
    path.write_bytes(toy_program()[: int(keep * len(toy_program()))])
    with pytest.raises(BundleError, match="ExecuTorch refuses the program"):
        method_names(path)


def test_an_absent_program_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        method_names(tmp_path / "none.pte")


def test_a_manifest_that_names_another_method_or_shape_is_refused(bundle: Bundle) -> None:
    path = bundle.file(PROGRAM)
    cases = {
        "no method 'segment9'": SegmentProgram(method="segment9", input_shape=SHAPES[0], output_shape=None, exit="e"),
        "takes .1, 3, 16, 16. and returns 2 tensors, the manifest says .1, 3, 8, 8. and 2": SegmentProgram(
            method="segment0", input_shape=(1, 3, 8, 8), output_shape=SHAPES[1], exit="e"
        ),
        "returns 2 tensors, the manifest says .1, 3, 16, 16. and 1": SegmentProgram(
            method="segment0", input_shape=SHAPES[0], output_shape=None, exit="e"
        ),
    }
    for why, segment in cases.items():
        with pytest.raises(BundleError, match=why), ExecutorchSession(path, (segment,)):
            pass


def test_a_bundle_of_another_backend_is_refused(bundle: Bundle) -> None:
    other = type(bundle)(bundle.path, bundle.manifest.model_copy(update={"backend": "tensorrt"}))
    with pytest.raises(UnsupportedError, match="exported for 'tensorrt'"):
        open_session(other, "executorch")
    with pytest.raises(UnsupportedError, match="runs torch modules"):
        open_session(bundle, "reference")


def test_another_image_size_than_the_programs_is_bad_input(bundle: Bundle) -> None:
    x = toy_inputs(1)[:, :, :-1]
    with open_session(bundle) as session, pytest.raises(InputError, match=r"float32 \[1, 3, 15, 16\]; float32"):
        session.infer(x, (None, None, None))


def test_a_failure_of_the_binding_names_the_method(bundle: Bundle) -> None:
    with ExecutorchSession.from_bundle(bundle) as session, pytest.raises(DeviceError, match="method 'segment1'"):
        session._step(1, torch.zeros(1, 8, 9, 9))


def test_threads_are_set_and_a_running_session_keeps_its_own(bundle: Bundle) -> None:
    with open_session(bundle, threads=2) as session:
        assert portable_lib._threadpool_get_thread_count() == 2
        with pytest.raises(DeviceError, match=r"1 threads were asked for while 1 session\(s\) run with 2"):
            set_threads(1)
        with open_session(bundle, threads=2) as second:
            assert second.segment_count == session.segment_count
    with open_session(bundle, threads=1):
        assert portable_lib._threadpool_get_thread_count() == 1
    for threads in (0, -1):
        with pytest.raises(InputError, match="at least 1"):
            open_session(bundle, threads=threads)


def test_two_sessions_do_not_disturb_each_other(bundle: Bundle) -> None:
    inputs = toy_inputs(2)
    with open_session(bundle) as one, open_session(bundle) as two:
        alone = one.infer(inputs[:1], (None, None, None)).probabilities
        two.infer(inputs[1:], (None, None, None))
        assert np.array_equal(one.infer(inputs[:1], (None, None, None)).probabilities, alone)


def test_timing_a_program_gives_as_many_samples_as_asked(linear_program: bytes) -> None:
    samples = time_program(linear_program, (torch.zeros(1, 64),), threads=1, repeats=7)
    assert len(samples) == 7
    assert all(0.0 < sample < 0.01 for sample in samples)


def test_short_kernels_are_called_often_enough_for_the_clock(linear_program: bytes) -> None:
    calls = 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        return time.perf_counter()

    start = time.perf_counter()
    time_program(linear_program, (torch.zeros(1, 64),), threads=1, repeats=20, clock=clock)
    assert time.perf_counter() - start > 20 * 50e-6
    assert calls == 2 * (20 + 3)


def test_what_cannot_be_timed_is_said() -> None:
    with pytest.raises(InputError, match="has 3 methods"):
        time_program(toy_program(), (torch.zeros(SHAPES[0]),), threads=1, repeats=1)
    with pytest.raises(BundleError, match="not an ExecuTorch program"):
        time_program(b"x" * 100, (), threads=1, repeats=1)


def test_a_wrong_example_is_a_device_error_with_the_method(linear_program: bytes) -> None:
    with pytest.raises(DeviceError, match="method 'forward'"):
        time_program(linear_program, (torch.zeros(1, 65),), threads=1, repeats=1)
    with pytest.raises(InputError, match="at least 1"):
        time_program(linear_program, (torch.zeros(1, 64),), threads=1, repeats=0)


def test_memory_measured_twice_agrees_within_two_per_cent(bundle: Bundle) -> None:
    first, second = measure_memory(bundle), measure_memory(bundle)
    # of a network this small, one page of the allocator is more than two per cent
    assert second.model_bytes == pytest.approx(first.model_bytes, rel=0.02, abs=4096)
    weights_bytes = 4 * (3 * 8 * 9 + 8 * 16 * 9 + 16 * 32 * 9 + 3 * (8 + 16 + 32))
    assert weights_bytes < first.model_bytes < 20 * weights_bytes
    assert first.runtime_bytes > 10 * first.model_bytes


def test_a_failing_measurement_says_what_the_process_said(bundle: Bundle, tmp_path: Path) -> None:
    gone = type(bundle)(tmp_path / "gone", bundle.manifest)
    with pytest.raises(InputError, match=r"^bundle .*is not a folder"):
        measure_memory(gone)
