"""Every error that edgeflex raises on purpose, and the exit code of each.

    EdgeflexError                 1
    ├── InputError                2   a file, a model or an option is malformed
    ├── InfeasibleError           3   no plan fits the budget
    ├── CheckFailedError          3   a promise was measured and is broken
    ├── UnsupportedError          4   the backend cannot express what was asked
    ├── MissingDependencyError    5   an optional package is absent
    ├── BundleError               6   a bundle is damaged or not ours
    └── DeviceError               7   the device refused, or ran out of memory or space

Only ``cli`` turns them into text and exit codes. Anything else that is raised is a bug and keeps its
traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class EdgeflexError(Exception):
    """Base of all expected failures; its text says what, the limit, and what to do."""

    exit_code: ClassVar[int] = 1

    def details(self) -> dict[str, object]:
        """Return the fields that ``--json`` prints beside the message."""
        return {}


class InputError(EdgeflexError):
    """A file, model or option is malformed; all faults of one input stand in one error."""

    exit_code = 2

    @classmethod
    def collect(cls, subject: str, faults: Sequence[str]) -> InputError:
        """Return one error that lists every fault found in ``subject``."""
        if len(faults) == 1:
            return cls(f"{subject}: {faults[0]}")
        listed = "".join(f"\n  - {fault}" for fault in faults)
        return cls(f"{subject}: {len(faults)} faults{listed}")


class InfeasibleError(EdgeflexError):
    """No plan fits.

    Attributes:
        binding: Names of the budgets that cannot be met together.
        least: For each budget, the least value reachable with all others kept (bytes or seconds).
        relaxation: The cheapest single change that makes a plan possible, as text.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        binding: Sequence[str] = (),
        least: Mapping[str, float] | None = None,
        relaxation: str = "",
    ) -> None:
        """Keep the answer's fields beside its text."""
        super().__init__(message)
        self.binding = tuple(binding)
        self.least = dict(least or {})
        self.relaxation = relaxation

    def details(self) -> dict[str, object]:
        """Return binding budgets, least reachable values and the cheapest relaxation."""
        return {
            "binding": list(self.binding),
            "least": self.least,
            "relaxation": self.relaxation,
        }


class CheckFailedError(EdgeflexError):
    """A promise was checked by measurement and does not hold."""

    exit_code = 3


class UnsupportedError(EdgeflexError):
    """The chosen backend cannot express this model or plan."""

    exit_code = 4


class MissingDependencyError(EdgeflexError):
    """An optional package is absent; the message ends with the pip line that mends it."""

    exit_code = 5


class BundleError(EdgeflexError):
    """A bundle is damaged, incomplete, of another version, or reaches outside its folder."""

    exit_code = 6


class DeviceError(EdgeflexError):
    """The device refused the work, or ran out of memory or space."""

    exit_code = 7
