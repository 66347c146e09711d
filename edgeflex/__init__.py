"""edgeflex: dynamic models under memory and latency budgets, with proof.

The corridor is in ``edgeflex.flow``, the nouns in ``edgeflex.schema``. Importing this package loads
neither torch nor scipy.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
