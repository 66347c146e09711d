"""Room: plans. Solves a cost table exactly, recounts the answer, and certifies a loss by test.

Importing this room loads neither scipy nor torch.
"""

from edgeflex.plans.audit import check, check_plan, footprint, shortfalls
from edgeflex.plans.guarantee import betting_p_value, certify, samples_needed, upper_bound
from edgeflex.plans.solver import frontier, solve

__all__ = [
    "betting_p_value",
    "certify",
    "check",
    "check_plan",
    "footprint",
    "frontier",
    "samples_needed",
    "shortfalls",
    "solve",
    "upper_bound",
]
