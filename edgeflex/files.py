"""Writing that is whole or absent, reading that explains itself, and hashes.

Every file that edgeflex keeps goes through here, so that a killed run leaves nothing half-written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeflex.errors import DeviceError, EdgeflexError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CHUNK_BYTES = 1 << 20


def explain_os_error(error: OSError, path: Path) -> EdgeflexError:
    """Return the edgeflex error that says what the system said about ``path``."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free_bytes = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        return DeviceError(
            f"{path}: the disk is full ({free_bytes} bytes free). Free some space or write elsewhere with -o."
        )
    reason = error.strerror or str(error)
    return InputError(f"{path}: {reason}. Check the path and its permissions.")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the whole new one.

    Raises:
        DeviceError: The disk is full.
        InputError: The path cannot be written.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise explain_os_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


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
        InputError: ``path`` is a file, or a non-empty folder without ``overwrite``.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"output {str(path)!r} is a file; a folder is needed. Name another with -o.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"output folder {str(path)!r} is not empty. Name another with -o or pass --overwrite.")


@contextmanager
def staged_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to fill that becomes ``path`` only if the block ends well.

    Raises:
        InputError: ``path`` is a file, or a non-empty folder without ``overwrite``.
        DeviceError: The disk is full.
    """
    refuse_output(path, overwrite=overwrite)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if path.exists():
            shutil.rmtree(path)
        staging.replace(path)
    except OSError as error:
        raise explain_os_error(error, path) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
