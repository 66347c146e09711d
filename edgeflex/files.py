"""Writing that is whole or absent, reading that explains itself, and hashes.

Every file that edgeflex keeps goes through here, so that a killed run leaves nothing half-written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflex.errors import DeviceError, EdgeflexError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# What names a file or a folder where callers of ours do: text, or a path.
StrPath = str | os.PathLike[str]

_CHUNK_BYTES = 1 << 20
_NAME_PART = 48  # characters, of at most 4 bytes each; file systems take 255 bytes


def path_of(given: StrPath) -> Path:
    """Return what a caller names as a path.

    Raises:
        InputError: It is neither text nor a path.
    """
    try:
        return Path(given)
    except TypeError:
        raise InputError(
            f"{given!r} is of type {type(given).__name__}, which names no file or folder. Give text or a pathlib.Path."
        ) from None


def path_or_none(given: StrPath | None) -> Path | None:
    """Return ``path_of`` what a caller names, None where nothing is named."""
    return None if given is None else path_of(given)


def place_of(given: StrPath) -> str:
    """Return what a caller names as text, unchanged where it is text: it may be a name that is no path.

    Raises:
        InputError: It is neither text nor a path.
    """
    return given if isinstance(given, str) else str(path_of(given))


def explain_os_error(error: OSError, path: Path) -> EdgeflexError:
    """Return the edgeflex error that says what the system said about ``path``."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DeviceError(f"{path}: the disk is full{_free(path)}. Free some space or write elsewhere with -o.")
    reason = error.strerror or str(error)
    return InputError(f"{path}: {reason}. Check the path and its permissions.")


def _free(path: Path) -> str:
    """Return what is free where ``path`` would lie, as text, or nothing where the system does not say."""
    for folder in path.absolute().parents:
        with suppress(OSError):
            return f" ({shutil.disk_usage(folder).free} bytes free in {folder})"
    return ""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the whole new one.

    A pipe or device, such as ``/dev/null``, is written to and not replaced.

    Raises:
        DeviceError: The disk is full.
        InputError: The path cannot be written.
    """
    raw = data.encode() if isinstance(data, str) else data
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a folder, and a file is needed")
        if path.exists() and not path.is_file():
            path.write_bytes(raw)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_beside(path, raw)
    except OSError as error:
        raise explain_os_error(error, path) from None


def _write_beside(path: Path, raw: bytes) -> None:
    """Write ``raw`` beside ``path`` and put it in place once it is on the disk."""
    # a name of its own: two writers may have one process number, in containers that share a folder, or be threads
    temporary = path.with_name(f".{_apart(path)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        # when the path itself is impossible, removing it fails like writing it did
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _apart(path: Path) -> str:
    """Return a name that says whose it is, is nobody else's, and is as long as any file system takes."""
    return f"{path.name[:_NAME_PART]}.{secrets.token_hex(4)}"


def read_bytes(path: Path, what: str) -> bytes:
    """Return the bytes of ``path``.

    Raises:
        InputError: It is absent, a folder, or unreadable; ``what`` says what was looked for.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} {str(path)!r} does not exist. Check the path.") from None
    except OSError as error:
        raise explain_os_error(error, path) from None


def read_text(path: Path, what: str) -> str:
    """Return the text of ``path``.

    Raises:
        InputError: ``read_bytes`` refuses it, or it is not UTF-8.
    """
    raw = read_bytes(path, what)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), f"byte {error.start}") from None


def not_utf8(source: str, place: str) -> InputError:
    """Return the error of text that is none: ``place`` says where in ``source``."""
    return InputError(f"{source}: {place} is not UTF-8 text. Convert it (iconv -t UTF-8) and try again.")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that would lose something, before any work is done.

    Raises:
        InputError: ``path`` is a file, a non-empty folder without ``overwrite``, or one that holds the current
            or the home folder, which even ``overwrite`` never replaces.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"output {str(path)!r} is a file; a folder is needed. Name another with -o.")
        filled = path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise explain_os_error(error, path) from None
    if not filled:
        return
    if not overwrite:
        raise InputError(f"output folder {str(path)!r} is not empty. Name another with -o or pass --overwrite.")
    if any(place.resolve().is_relative_to(path.resolve()) for place in _kept_places(path)):
        raise InputError(
            f"output folder {str(path)!r} holds the current or the home folder and is not replaced, not even with "
            "--overwrite. Name another with -o."
        )


def _kept_places(path: Path) -> Iterator[Path]:
    with suppress(OSError):  # the current folder may be gone
        yield path.cwd()
    with suppress(RuntimeError):  # a user without a home
        yield path.home()


@contextmanager
def staged_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to fill that becomes ``path`` only if the block ends well.

    What was there before stays until the new folder stands in its place. What came there meanwhile is refused as what
    was there before would have been.

    Raises:
        InputError: ``refuse_output`` refuses ``path``, or it cannot be written.
        DeviceError: The disk is full.
    """
    refuse_output(path, overwrite=overwrite)
    target = path.resolve()
    name = _apart(target)
    staging, former = target.with_name(f".{name}.partial"), target.with_name(f".{name}.former")
    try:
        staging.mkdir(parents=True)
        yield staging
        refuse_output(path, overwrite=overwrite)
        _swap(staging, target, former)
    except OSError as error:
        raise explain_os_error(error, _place_of(error, staging, path)) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, target: Path, former: Path) -> None:
    """Put ``staging`` where ``target`` is; whatever happens, one whole folder stands there afterwards."""
    if not target.exists():
        staging.replace(target)
        return
    target.replace(former)
    try:
        staging.replace(target)
    except BaseException:
        if not target.exists():
            former.replace(target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _place_of(error: OSError, staging: Path, path: Path) -> Path:
    """Return the file that an error is about, in the words of the caller: below ``path``, not its staging."""
    if not isinstance(error.filename, str):
        return path
    place = type(path)(error.filename)
    return path / place.relative_to(staging) if place.is_relative_to(staging) else place
