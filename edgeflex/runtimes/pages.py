"""Memory of this process alone, in huge pages where the system gives them.

An anonymous ``mmap`` of Python's is shared by default: it gets no huge pages and counts as no process's own bytes.
"""

from __future__ import annotations

import logging
import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def private_pages(size_bytes: int) -> NDArray[np.uint8]:
    """Return page-aligned zeros, at least ``size_bytes`` of them and at least a page.

    Huge pages mean fewer address look-ups while weights stream.

    Raises:
        OSError: No memory; also ValueError or OverflowError for sizes that no system has.
    """
    memory = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            logger.debug("no huge pages here: %s", error)
    return np.frombuffer(memory, dtype=np.uint8)
