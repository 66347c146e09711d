"""The corridor: every stage in order, each a function from files to a file. No arithmetic lives here.

``measure`` is what touches hardware, ``decide`` what does not, ``ship`` what a bundle goes through; ``decoders``,
``device_plans`` and ``decoder_bundles`` are all of it for mixture-of-experts decoders, ``traces`` which experts they
use, ``conversation`` their answers.
"""

from edgeflex.flow.decide import open_calibration, plan, solve_table, sweep
from edgeflex.flow.decoder_bundles import (
    Place,
    bench_decoder,
    export_decoder,
    record_trace,
    report_decoder,
    verify_decoder,
)
from edgeflex.flow.decoders import (
    calibrate_decoder,
    context_of,
    decoder_sizes,
    inspect_decoder,
    is_decoder,
    is_decoder_bundle,
    is_decoder_calibration,
    is_decoder_document,
    plan_decoder,
    profile_decoder,
)
from edgeflex.flow.device_plans import plan_decoder_on_gpu
from edgeflex.flow.measure import BACKEND, calibrate, doctor, fit_exits, inspect, profile, versions
from edgeflex.flow.ship import bench, build, export, pace, report, run, verify
from edgeflex.flow.traces import simulate_device, simulate_trace

__all__ = [
    "BACKEND",
    "Place",
    "bench",
    "bench_decoder",
    "build",
    "calibrate",
    "calibrate_decoder",
    "context_of",
    "decoder_sizes",
    "doctor",
    "export",
    "export_decoder",
    "fit_exits",
    "inspect",
    "inspect_decoder",
    "is_decoder",
    "is_decoder_bundle",
    "is_decoder_calibration",
    "is_decoder_document",
    "open_calibration",
    "pace",
    "plan",
    "plan_decoder",
    "plan_decoder_on_gpu",
    "profile",
    "profile_decoder",
    "record_trace",
    "report",
    "report_decoder",
    "run",
    "simulate_device",
    "simulate_trace",
    "solve_table",
    "sweep",
    "verify",
    "verify_decoder",
    "versions",
]
