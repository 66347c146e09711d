"""The parcel that an exporter seals and a runtime opens: a folder with a manifest that names every file.

Nothing of a bundle is used before its size and its SHA-256 are those of the manifest. This module knows
files, not tensors. Layout: ``manifest.json``, the program (``program.pte`` with a method per segment; or
``segment0.onnx`` with its weights in ``segment0.data``, and so on), ``expected.safetensors`` (reference outputs for
two inputs) and ``seen.txt`` (digests of the images that fitted, chose or certified anything).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from edgeflex.errors import BundleError, InputError
from edgeflex.files import read_bytes, sha256_file, write_atomic
from edgeflex.schema import SCHEMA_VERSION, BundleManifest, FileEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MANIFEST_NAME = "manifest.json"
PROGRAM = "program"
# Roles of a program in several files start so: program:segment0, program:segment0.data
PROGRAM_PART = "program:"
EXPECTED = "expected"
SEEN = "seen"

_REMEDY = "Export it again with `edgeflex export`, or copy it again."


def program_bytes(manifest: BundleManifest) -> int:
    """Return the bytes of the program's files together, as the manifest gives them."""
    return sum(
        entry.size_bytes for entry in manifest.files if entry.role == PROGRAM or entry.role.startswith(PROGRAM_PART)
    )


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    Attributes:
        path: The folder.
        manifest: What is in it, and what was promised about it.
    """

    path: Path
    manifest: BundleManifest

    def file(self, role: str) -> Path:
        """Return the path of the file with this role.

        Raises:
            BundleError: The bundle holds no file with this role.
        """
        for entry in self.manifest.files:
            if entry.role == role:
                return self.path / entry.path
        held = ", ".join(sorted(entry.role for entry in self.manifest.files)) or "none"
        raise BundleError(f"{self.path}: the manifest names no {role!r} file (it names: {held}). {_REMEDY}")


def open_bundle(path: Path) -> Bundle:
    """Return the bundle in ``path`` after every file of it was checked.

    Files that the manifest does not name are ignored.

    Raises:
        InputError: ``path`` is no folder.
        BundleError: The manifest is absent, damaged or of another version, or a file is missing, changed or
            outside the folder; all such faults stand in one error.
    """
    if not path.is_dir():
        raise InputError(f"bundle {str(path)!r} is not a folder. Name the folder that `edgeflex export` wrote.")
    manifest = _read_manifest(path / MANIFEST_NAME)
    faults = _duplicates(manifest.files)
    for entry in manifest.files:
        fault = _fault(path, entry)
        if fault:
            faults.append(f"{entry.path}: {fault}")
    if faults:
        listed = "; ".join(faults)
        raise BundleError(f"bundle {str(path)!r} is damaged: {listed}. {_REMEDY}")
    return Bundle(path=path, manifest=manifest)


def seal(folder: Path, entries: Mapping[str, str]) -> tuple[FileEntry, ...]:
    """Return the entry of every file, measured now.

    Args:
        folder: The bundle being written.
        entries: Relative path of each file, by role.

    Raises:
        BundleError: A path is absolute, leaves the folder or is no file.
    """
    sealed: list[FileEntry] = []
    for role, relative in sorted(entries.items()):
        fault = _place_fault(folder, relative)
        if fault:
            raise BundleError(f"cannot seal {relative!r} into {str(folder)!r}: {fault}. Write it inside first.")
        file = folder / relative
        sealed.append(FileEntry(path=relative, role=role, size_bytes=file.stat().st_size, sha256=sha256_file(file)))
    return tuple(sealed)


def write_manifest(folder: Path, manifest: BundleManifest) -> Bundle:
    """Write the manifest into ``folder`` and return the bundle, read back and checked.

    Raises:
        BundleError: The folder does not hold what the manifest names.
        DeviceError: The disk is full.
    """
    document = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1)
    write_atomic(folder / MANIFEST_NAME, document + "\n")
    return open_bundle(folder)


def seen_text(digests: Iterable[str]) -> str:
    """Return the text of ``seen.txt``: sorted digests, each once, one per line."""
    return "".join(f"{digest}\n" for digest in sorted(set(digests)))


def seen_digests(bundle: Bundle) -> frozenset[str]:
    """Return the digests of the images that fitted, chose or certified anything in this bundle."""
    return frozenset(bundle.file(SEEN).read_text(encoding="ascii").split())


def require_manifest(path: Path) -> None:
    """Refuse a folder without the manifest that makes it a bundle.

    Raises:
        BundleError: ``path`` does not exist.
    """
    if not path.exists():
        raise BundleError(
            f"{str(path.parent)!r} holds no {path.name}: it is no bundle, or not a whole one. Name the folder that "
            "`edgeflex export` wrote, or export it again."
        )


def _read_manifest(path: Path) -> BundleManifest:
    require_manifest(path)
    try:
        raw = read_bytes(path, "the bundle's manifest")
        document = json.loads(raw)
    except InputError as error:
        raise BundleError(f"{error} {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON ({error}). {_REMEDY}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version!r}; this edgeflex reads version {SCHEMA_VERSION}. "
            "Export it again with this edgeflex, or install the one that wrote it."
        )
    try:
        return BundleManifest.parse(raw, str(path))
    except InputError as error:
        raise BundleError(f"{error}. {_REMEDY}") from None


def _duplicates(entries: Iterable[FileEntry]) -> list[str]:
    listed = tuple(entries)
    counts = Counter(entry.role for entry in listed) + Counter(entry.path for entry in listed)
    return [f"{name}: named {count} times" for name, count in sorted(counts.items()) if count > 1]


def _place_fault(folder: Path, relative: str) -> str:
    """Return why ``relative`` may not be used below ``folder``, or nothing."""
    parts = PurePosixPath(relative).parts
    absolute = PurePosixPath(relative).is_absolute() or bool(PureWindowsPath(relative).anchor)
    if not parts or absolute or ".." in parts or "\\" in relative or "\0" in relative:
        return "the path is not relative and inside the folder"
    file = folder / relative
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead in a circle
        return "the path is a link that leads nowhere"
    if not inside:
        return "the path leads outside the folder through a link"
    if not file.is_file():
        return "the file is missing"
    return ""


def _fault(folder: Path, entry: FileEntry) -> str:
    fault = _place_fault(folder, entry.path)
    if fault:
        return fault
    file = folder / entry.path
    try:
        size_bytes = file.stat().st_size
        if size_bytes != entry.size_bytes:
            return f"{size_bytes} bytes, the manifest says {entry.size_bytes}"
        if sha256_file(file) != entry.sha256:
            return "the content differs from the manifest's SHA-256"
    except OSError as error:
        return error.strerror or str(error)
    return ""
