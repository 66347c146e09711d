"""Device profiles: shipped from data sheets, or measured on this machine.

The shipped ones say where each figure comes from; what no source gives is absent, and whoever needs it
asks through ``require_figure``, which says so.
"""

from __future__ import annotations

import difflib
import os
from importlib import resources
from typing import TYPE_CHECKING

from edgeflex import files
from edgeflex.errors import InputError
from edgeflex.profiles.kernels import KernelJob, kernel_grid, measure_kernels
from edgeflex.profiles.machine import MachineFacts, conditions, machine, power_w
from edgeflex.profiles.probe import measure, memory_read, summarise
from edgeflex.profiles.storage import storage
from edgeflex.schema import DeviceProfile

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from edgeflex.schema import Figure

__all__ = [
    "KernelJob",
    "MachineFacts",
    "conditions",
    "kernel_grid",
    "load",
    "machine",
    "measure",
    "measure_kernels",
    "memory_read",
    "names",
    "power_w",
    "require_figure",
    "storage",
    "summarise",
]


def _shipped() -> Traversable:
    return resources.files("edgeflex.profiles") / "data"


def names() -> tuple[str, ...]:
    """Return the names of the shipped profiles, sorted."""
    return tuple(
        sorted(entry.name.removesuffix(".json") for entry in _shipped().iterdir() if entry.name.endswith(".json"))
    )


def load(name_or_path: files.StrPath) -> DeviceProfile:
    """Return a shipped profile by name, or the one in a ``device.json``.

    Text that ends with ``.json`` or holds a path separator is a path, all other text a name; a path is a path.

    Raises:
        InputError: No such profile (the message names the nearest and lists all), or the file is absent or
            not a device profile.
    """
    if not isinstance(name_or_path, str) or name_or_path.endswith(".json") or os.sep in name_or_path:
        path = files.path_of(name_or_path)
        return DeviceProfile.parse(files.read_bytes(path, "device profile"), str(path))
    known = names()
    if name_or_path not in known:
        raise _unknown(name_or_path, known)
    text = (_shipped() / f"{name_or_path}.json").read_text(encoding="utf-8")
    return DeviceProfile.parse(text, f"shipped profile {name_or_path}")


def _unknown(name: str, known: tuple[str, ...]) -> InputError:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(
        f"device {name!r} is not known.{guess} Known devices: {', '.join(known)}; or give the path of a "
        "device.json that `edgeflex profile` wrote."
    )


def require_figure(profile: DeviceProfile, figure: Figure | None, what: str) -> Figure:
    """Return ``figure``, or say that ``profile`` does not give it.

    Raises:
        InputError: The figure is absent; ``what`` says what was looked for.
    """
    if figure is None:
        raise InputError(
            f"device {profile.name!r} gives no {what} (origin {profile.origin}). Run `edgeflex profile` on the "
            "device itself and use the device.json that it writes."
        )
    return figure
