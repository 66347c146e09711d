"""Room: networks, their cuts and their exits.

A network comes in through ``load_module``, is cut and given exits by ``fit_exits``, and leaves as a
``DynamicModel``: condition-free segments with a graph that the planner can read.
"""

from edgeflex.models.cut import Stage, default_stages, stages, trace
from edgeflex.models.dynamic import (
    DynamicModel,
    ExitScore,
    FitReport,
    Recipe,
    assemble,
    graph_from_module,
    open_model,
    save_model,
)
from edgeflex.models.exits import fit_exits
from edgeflex.models.heads import HeadSpec
from edgeflex.models.sources import load_module, read_weights
from edgeflex.models.training import Tuning, train

__all__ = [
    "DynamicModel",
    "ExitScore",
    "FitReport",
    "HeadSpec",
    "Recipe",
    "Stage",
    "Tuning",
    "assemble",
    "default_stages",
    "fit_exits",
    "graph_from_module",
    "load_module",
    "open_model",
    "read_weights",
    "save_model",
    "stages",
    "trace",
    "train",
]
