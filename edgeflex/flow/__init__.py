"""The corridor: every stage in order, each a function from files to a file. No arithmetic lives here.

``measure`` is what touches hardware, ``decide`` what does not, ``ship`` what a bundle goes through.
"""

from edgeflex.flow.decide import open_calibration, plan, solve_table, sweep
from edgeflex.flow.measure import BACKEND, calibrate, fit_exits, inspect, profile, versions
from edgeflex.flow.ship import bench, export, report, run, verify

__all__ = [
    "BACKEND",
    "bench",
    "calibrate",
    "export",
    "fit_exits",
    "inspect",
    "open_calibration",
    "plan",
    "profile",
    "report",
    "run",
    "solve_table",
    "sweep",
    "verify",
    "versions",
]
