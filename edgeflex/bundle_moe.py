"""The parcel of a mixture-of-experts decoder: thousands of files, none of them read before it is needed.

Opening checks what is cheap: the manifest, every file's place and size, and that every matrix lies inside its
file. A file's content is hashed by ``DecoderBundle.check`` before its first use. Layout: ``manifest.json``,
``weights/embedding.ptd``, ``weights/head.ptd`` (none when tied), ``weights/layers.I/dense.ptd``,
``weights/layers.I/expert.E.ptd``, ``programs/*.pte`` and ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from edgeflex.bundle import MANIFEST_NAME, require_manifest
from edgeflex.errors import BundleError, InputError
from edgeflex.files import read_bytes, sha256_file, write_atomic
from edgeflex.schema import SCHEMA_VERSION, FileEntry
from edgeflex.schema_moe import DecoderManifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from edgeflex.schema_moe import MatrixRecord

TOKENIZER = "tokenizer"
CONFIG = "config"
BundleKind = Literal["decoder", "exits"]

_REMEDY = "Export it again with `edgeflex export`, or copy it again."
_MOST_NAMED = 20


@dataclass(frozen=True)
class DecoderBundle:
    """A bundle whose files are all there in their sizes; contents are checked file by file.

    Attributes:
        path: The folder.
        manifest: What is in it, and what was promised about it.
    """

    path: Path
    manifest: DecoderManifest

    @cached_property
    def files(self) -> Mapping[str, FileEntry]:
        """Every file by its relative path."""
        return {entry.path: entry for entry in self.manifest.files}

    @cached_property
    def matrices(self) -> Mapping[str, MatrixRecord]:
        """Every matrix and small tensor by its name."""
        return {record.name: record for record in self.manifest.matrices}

    def check(self, file: str) -> Path:
        """Return the path of ``file`` (relative, as in the manifest) after hashing it in full.

        Raises:
            BundleError: The manifest does not name it, or it is missing, changed or outside the folder.
        """
        entry = self.files.get(file)
        if entry is None:
            raise BundleError(f"{self.path}: the manifest names no file {file!r}. {_REMEDY}")
        fault = _place_fault(file) or _size_fault(self.path, _resolved(self.path), entry) or _content_fault(self, entry)
        if fault:
            raise BundleError(f"bundle {str(self.path)!r} is damaged: {file}: {fault}. {_REMEDY}")
        return self.path / file

    def check_all(self, heard: Callable[[int], object] | None = None) -> None:
        """Hash every file.

        Args:
            heard: Called with the bytes of each file just checked.

        Raises:
            BundleError: Files are damaged; all of them stand in one error.
        """
        faults = []
        for entry in self.manifest.files:
            if fault := _content_fault(self, entry):
                faults.append(f"{entry.path}: {fault}")
            if heard is not None:
                heard(entry.size_bytes)
        _refuse(self.path, faults)

    def role(self, role: str) -> Path:
        """Return the checked path of the file with this role, such as ``TOKENIZER``.

        Raises:
            BundleError: There is none, or it is damaged.
        """
        for entry in self.manifest.files:
            if entry.role == role:
                return self.check(entry.path)
        raise BundleError(f"{self.path}: the manifest names no {role!r} file. {_REMEDY}")


def bundle_kind(path: Path) -> BundleKind:
    """Tell a decoder's bundle from a multi-exit network's by its manifest's ``kind``.

    Raises:
        InputError: ``path`` is no folder.
        BundleError: The manifest is absent, no JSON object, or of a kind that this edgeflex does not know.
    """
    document, _ = _read_document(path)
    kind = document.get("kind", "exits")
    if kind not in {"decoder", "exits"}:
        raise BundleError(
            f"{path}: a bundle of kind {kind!r}; this edgeflex knows 'decoder' and 'exits'. "
            "Install the edgeflex that wrote it."
        )
    return "decoder" if kind == "decoder" else "exits"


def open_decoder_bundle(path: Path) -> DecoderBundle:
    """Return the decoder's bundle in ``path``; files are looked at, not read.

    Files that the manifest does not name are ignored: the store of packed weights lies there too.

    Raises:
        InputError: ``path`` is no folder.
        BundleError: The manifest is absent, damaged, of another version or kind, or a file is missing, of another
            size or outside the folder, or a matrix reaches beyond its file; all such faults stand in one error.
    """
    document, raw = _read_document(path)
    source = path / MANIFEST_NAME
    if document.get("kind") != "decoder":
        raise BundleError(f"{source}: no decoder's bundle. Name the folder that `edgeflex export` wrote for a decoder.")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{source}: schema version {document.get('schema_version')!r}; this edgeflex reads version "
            f"{SCHEMA_VERSION}. Export it again with this edgeflex, or install the one that wrote it."
        )
    try:
        manifest = DecoderManifest.parse(raw, str(source))
    except InputError as error:
        raise BundleError(f"{error}. {_REMEDY}") from None
    _refuse(path, [*_seal_faults(manifest), *_file_faults(path, manifest.files), *_record_faults(manifest)])
    return DecoderBundle(path, manifest)


def seal_file(folder: Path, relative: str, role: str | None = None) -> FileEntry:
    """Return the entry of a file just written into ``folder``; the role is its path unless given."""
    file = folder / relative
    return FileEntry(path=relative, role=role or relative, size_bytes=file.stat().st_size, sha256=sha256_file(file))


def write_decoder_manifest(folder: Path, manifest: DecoderManifest) -> DecoderBundle:
    """Write the manifest into ``folder``, with its ``layout_digest``, and return the bundle, opened again.

    Raises:
        BundleError: The folder does not hold what the manifest names.
        DeviceError: The disk is full.
    """
    sealed = manifest.model_copy(update={"layout_digest": _layout_digest(manifest)})
    document = json.dumps(sealed.model_dump(mode="json"), sort_keys=True, indent=1)
    write_atomic(folder / MANIFEST_NAME, document + "\n")
    return open_decoder_bundle(folder)


def _read_document(path: Path) -> tuple[dict[str, Any], bytes]:
    if not path.is_dir():
        raise InputError(f"bundle {str(path)!r} is not a folder. Name the folder that `edgeflex export` wrote.")
    source = path / MANIFEST_NAME
    require_manifest(source)
    try:
        raw = read_bytes(source, "the bundle's manifest")
        document = json.loads(raw)
    except InputError as error:
        raise BundleError(f"{error} {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source}: not JSON ({error}). {_REMEDY}") from None
    if not isinstance(document, dict):
        raise BundleError(f"{source}: not a JSON object. {_REMEDY}")
    return document, raw


def _refuse(path: Path, faults: list[str]) -> None:
    if not faults:
        return
    rest = f"; and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
    raise BundleError(f"bundle {str(path)!r} is damaged: {'; '.join(faults[:_MOST_NAMED])}{rest}. {_REMEDY}")


def _seal_faults(manifest: DecoderManifest) -> Iterator[str]:
    """Give what of a manifest is not as it was written: a changed number there can mean other text, and no error."""
    if manifest.plan.graph_digest != manifest.graph.digest():
        yield f"{MANIFEST_NAME}: its graph is not the one that was planned"
    if manifest.layout_digest not in {None, _layout_digest(manifest)}:
        yield f"{MANIFEST_NAME}: what it says of matrices or programs was changed"


def _layout_digest(manifest: DecoderManifest) -> str:
    """Return the SHA-256 of where every matrix lies, and of what every program is for."""
    digest = hashlib.sha256()
    for one in manifest.matrices:
        place = (one.name, one.precision.value, one.rows, one.columns, one.file, one.offset, one.scales_offset)
        digest.update(f"{place!r}\n".encode())
    for program in manifest.programs:
        precision = program.precision.value if program.precision is not None else None
        use = (program.role, program.layer, precision, program.path, program.data)
        digest.update(f"{use!r}\n".encode())
    return digest.hexdigest()


def _file_faults(path: Path, entries: Iterable[FileEntry]) -> Iterator[str]:
    listed = tuple(entries)
    counts = Counter(entry.path for entry in listed)
    yield from (f"{name}: named {count} times" for name, count in sorted(counts.items()) if count > 1)
    root = _resolved(path)
    for entry in listed:
        fault = _place_fault(entry.path) or _size_fault(path, root, entry)
        if fault:
            yield f"{entry.path}: {fault}"


def _place_fault(relative: str) -> str:
    """Return why the text of a path may not be used below a bundle, or nothing."""
    pure = PurePosixPath(relative)
    absolute = pure.is_absolute() or bool(PureWindowsPath(relative).anchor)
    if not pure.parts or absolute or ".." in pure.parts or "\\" in relative or "\0" in relative:
        return "the path is not relative and inside the folder"
    return ""


def _resolved(path: Path) -> dict[Path, bool]:
    """Return the start of what is known of folders: the bundle's own is inside itself."""
    return {path: True}


def _inside(path: Path, known: dict[Path, bool], place: Path) -> bool:
    """Say whether ``place``, links followed, lies below the bundle; each folder is looked up once."""
    if place not in known:
        known[place] = place.resolve().is_relative_to(path.resolve())
    return known[place]


def _size_fault(path: Path, known: dict[Path, bool], entry: FileEntry) -> str:
    file = path / entry.path
    try:
        found = os.lstat(file)
        inside = _inside(path, known, file.parent)
        if stat.S_ISLNK(found.st_mode):
            inside, found = inside and file.resolve().is_relative_to(path.resolve()), file.stat()
    except FileNotFoundError:
        return "the file is missing"
    except (OSError, RuntimeError) as error:  # links that lead in a circle, folders that may not be read
        return getattr(error, "strerror", None) or "the path is a link that leads nowhere"
    if not inside:
        return "the path leads outside the folder through a link"
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    if found.st_size != entry.size_bytes:
        return f"{found.st_size} bytes, the manifest says {entry.size_bytes}"
    return ""


def _content_fault(bundle: DecoderBundle, entry: FileEntry) -> str:
    try:
        same = sha256_file(bundle.path / entry.path) == entry.sha256
    except OSError as error:
        return error.strerror or str(error)
    return "" if same else "the content differs from the manifest's SHA-256"


def _record_faults(manifest: DecoderManifest) -> Iterator[str]:
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    names = Counter(record.name for record in manifest.matrices)
    yield from (f"matrix {name}: named {count} times" for name, count in sorted(names.items()) if count > 1)
    for record in manifest.matrices:
        if record.file not in sizes:
            yield f"matrix {record.name}: lies in {record.file!r}, which the manifest does not name"
        elif not _fits(record, sizes[record.file]):
            yield f"matrix {record.name}: reaches beyond {record.file} or lacks its scales"


def _fits(record: MatrixRecord, size_bytes: int) -> bool:
    """Say whether a matrix of positive shape and its scales lie inside a file of ``size_bytes``."""
    if record.rows < 1 or record.columns < 1 or record.offset < 0:
        return False
    if record.offset + record.weights_bytes > size_bytes:
        return False
    if not record.scales_bytes:
        return record.scales_offset is None
    return record.scales_offset is not None and 0 <= record.scales_offset <= size_bytes - record.scales_bytes
