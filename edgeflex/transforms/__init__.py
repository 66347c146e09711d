"""Room: a model and precisions become modules that backends can take."""

from edgeflex.transforms.explicit import ExplicitLayer, prepare_explicit, prepare_explicit_segment
from edgeflex.transforms.prepare import (
    PreparedModel,
    Ranges,
    outputs,
    prepare,
    prepare_segment,
    quantized_layer,
    record_ranges,
)
from edgeflex.transforms.quantize import (
    QuantizedWeight,
    activation_grid,
    quantize_weight,
)

__all__ = [
    "ExplicitLayer",
    "PreparedModel",
    "QuantizedWeight",
    "Ranges",
    "activation_grid",
    "outputs",
    "prepare",
    "prepare_explicit",
    "prepare_explicit_segment",
    "prepare_segment",
    "quantize_weight",
    "quantized_layer",
    "record_ranges",
]
