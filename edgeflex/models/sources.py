"""From what a user writes (``zoo:resnet20``, ``package.module:factory``) to an ``nn.Module`` with weights.

Weights are read without running code: safetensors, or torch files through the restricted unpickler.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pickle
import pickletools
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeflex.errors import InputError
from edgeflex.models import zoo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_NAMED_FAULTS = 4


def load_module(model: str, weights: Path | None = None, *, classes: int | None = None) -> nn.Module:
    """Return the network that ``model`` names, in eval mode, float32, on the CPU.

    Args:
        model: ``zoo:NAME``, or ``package.module:factory`` where the factory returns an ``nn.Module`` (the
            current folder is importable; a parameter ``num_classes`` or ``classes`` is given ``classes``).
        weights: A ``.safetensors``, ``.pt`` or ``.th`` file with the state dict, bare or under
            ``state_dict``, with or without ``module.`` before the keys; None keeps the fresh weights.
        classes: Number of classes, or None for the network's own.

    Raises:
        InputError: Unknown network, a factory that cannot be imported or called, or weights that are
            absent, damaged, hold code, or do not fit.
    """
    module = _zoo_or_factory(model, classes).float().eval()
    if weights is not None:
        load_weights(module, read_weights(weights), str(weights))
    return module


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in ``path``, without a ``state_dict`` wrapping and ``module.`` prefixes.

    Raises:
        InputError: The file is absent, damaged, holds no state dict, or holds code.
    """
    if not path.is_file():
        raise InputError(f"weights {str(path)!r} do not exist. Check the path.")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise InputError(f"weights {str(path)!r} hold a {type(found).__name__}, not a state dict of named tensors.")
    strays = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strays:
        raise InputError(f"weights {str(path)!r} hold no tensor under {', '.join(strays[:_NAMED_FAULTS])}.")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``module``; every key must fit.

    Raises:
        InputError: Keys are missing, unexpected or of another shape; the first few of each are named.
    """
    own = module.state_dict()
    fitting = {name: value for name, value in state.items() if name not in own or own[name].shape == value.shape}
    result = module.load_state_dict(fitting, strict=False)
    # What a module supplies by itself (constant weights that older files lack) is not missing.
    given = {name: value for name, value in own.items() if name in state or name in result.missing_keys}
    refuse_misfit(given, state, source)


def refuse_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Check that ``state`` has exactly the keys and shapes of ``own``.

    Raises:
        InputError: Keys are missing, unexpected or of another shape; the first few of each are named.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    faults = [
        *_fault("missing", [name for name in own if name not in state]),
        *_fault("unexpected", [name for name in state if name not in own]),
        *_fault("of another shape", shapes),
    ]
    if faults:
        raise InputError.collect(f"weights {source!r} do not fit the model", faults)


def _fault(what: str, found: list[str]) -> list[str]:
    if not found:
        return []
    more = f" and {len(found) - _NAMED_FAULTS} more" if len(found) > _NAMED_FAULTS else ""
    return [f"{what}: {', '.join(found[:_NAMED_FAULTS])}{more}"]


def _zoo_or_factory(model: str, classes: int | None) -> nn.Module:
    if model.startswith("zoo:"):
        return zoo.build(model.removeprefix("zoo:"), classes)
    where, colon, factory = model.partition(":")
    if not (where and colon and factory):
        raise InputError(
            f"model {model!r} is neither zoo:NAME ({', '.join(zoo.names())}) nor package.module:factory, and no folder "
            "of that name is here. Check the name."
        )
    return _call(_factory(model, where, factory), model, classes)


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _factory(model: str, where: str, name: str) -> Callable[..., object]:
    try:
        with _current_folder_importable():
            found = importlib.import_module(where)
    except Exception as error:  # noqa: BLE001 - the user's module may raise anything while it is imported
        raise InputError(
            f"model {model!r}: importing {where!r} failed: {type(error).__name__}: {error}. "
            "Run from the folder that holds it, or install it."
        ) from None
    factory = getattr(found, name, None)
    if not callable(factory):
        near = difflib.get_close_matches(name, [key for key in vars(found) if not key.startswith("_")], n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"model {model!r}: module {where!r} has no function {name!r}.{meant}")
    return factory


def _call(factory: Callable[..., object], model: str, classes: int | None) -> nn.Module:
    given = {}
    if classes is not None:
        parameters = inspect.signature(factory).parameters
        given = {name: classes for name in ("num_classes", "classes") if name in parameters}
    try:
        with _current_folder_importable():
            module = factory(**given)
    except Exception as error:  # noqa: BLE001 - the user's factory may raise anything
        raise InputError(f"model {model!r}: the factory failed: {type(error).__name__}: {error}.") from None
    if not isinstance(module, nn.Module):
        raise InputError(f"model {model!r} returned a {type(module).__name__}; an nn.Module is needed.")
    return module


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"weights {str(path)!r} are damaged or no safetensors file: {error}.") from None


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = _code_asked_for(path, str(error))
        if code:
            raise InputError(
                f"weights {str(path)!r} are refused: the file asks to run code ({code}), "
                "and edgeflex never runs code from weights. Save the state dict alone, best as .safetensors."
            ) from None
        raise InputError(f"weights {str(path)!r} are damaged or no torch file. Copy the file again.") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else "the file ends too early"
        raise InputError(
            f"weights {str(path)!r} are damaged or no torch file: {reason}. Copy the file again."
        ) from None


def _code_asked_for(path: Path, message: str) -> str:
    """Return the name that an unpickling would have imported, or nothing if the file is merely broken."""
    match = re.search(r"GLOBAL ([A-Za-z_][\w.]*)", message)
    if match:
        return match.group(1)
    names: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            names = [*names, str(argument)] if "UNICODE" in opcode.name else names
            if opcode.name in {"GLOBAL", "STACK_GLOBAL", "INST"}:
                return str(argument or ".".join(names[-2:])).replace(" ", ".")
    except ValueError:
        return ""
    return ""
