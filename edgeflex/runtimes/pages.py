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


HUGE_PAGE_BYTES = 1 << 21


def private_pages(size_bytes: int) -> NDArray[np.uint8]:
    """Return page-aligned zeros, as many as ``size_bytes`` and at least a page.

    Huge pages mean fewer address look-ups while weights stream. From one huge page up they start at such a page's
    border, and only those that lie wholly inside are asked for: one that reached beyond would hold up to 2 MiB that
    nobody counts.

    Raises:
        OSError: No memory; also ValueError or OverflowError for sizes that no system has.
    """
    wanted = max(size_bytes, mmap.PAGESIZE)
    huge = wanted // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, wanted + (HUGE_PAGE_BYTES if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, dtype=np.uint8)
    skip = -whole.ctypes.data % HUGE_PAGE_BYTES if huge else 0
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE, skip, huge)
        except OSError as error:
            logger.debug("no huge pages here: %s", error)
    return whole[skip : skip + wanted]
