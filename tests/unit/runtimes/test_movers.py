"""Background reads: bytes land where they should, or whoever waits is told why not."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.runtimes.movers import BLOCK_BYTES, Mover, Record, takes_direct

RECORDS = 20
BLOCKS = 5


def arena(blocks: int):
    return np.frombuffer(mmap.mmap(-1, blocks * BLOCK_BYTES), dtype=np.uint8)


@pytest.fixture
def stored(tmp_path):
    """Return twenty records of five blocks in one file, with their bytes."""
    raw = np.random.default_rng(0).integers(0, 256, RECORDS * BLOCKS * BLOCK_BYTES, dtype=np.uint8).tobytes()
    path = tmp_path / "layer.bin"
    path.write_bytes(raw)
    size = BLOCKS * BLOCK_BYTES
    parts = [raw[index * size : (index + 1) * size] for index in range(RECORDS)]
    records = [
        Record(f"expert {index}", path, index * size, size, hashlib.sha256(part).hexdigest())
        for index, part in enumerate(parts)
    ]
    return records, parts


def modes(path):
    return [False, True] if takes_direct(path) else [False]


@pytest.mark.parametrize("chunk_blocks", [1, 2, 256])
@pytest.mark.parametrize("readers", [1, 4])
def test_every_byte_lands_in_its_place(stored, readers, chunk_blocks):
    records, parts = stored
    for direct in modes(records[0].file):
        memory = arena(RECORDS * BLOCKS)
        with Mover(memory, direct=direct, readers=readers, chunk_bytes=chunk_blocks * BLOCK_BYTES) as mover:
            order = np.random.default_rng(1).permutation(RECORDS)
            reads = [
                mover.submit(records[index], place * BLOCKS * BLOCK_BYTES, check=True)
                for place, index in enumerate(order)
            ]
            for read in reads:
                read.wait()
            assert all(read.done for read in reads)
        assert memory.tobytes() == b"".join(parts[index] for index in order)
        assert mover.read_bytes == len(memory)
        assert mover.mode == ("direct" if direct else "buffered")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads on this system")
def test_direct_reads_leave_nothing_in_the_page_cache_and_buffered_ones_drop_it(stored):
    records, _ = stored
    path = records[0].file
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for direct in modes(path):
        with Mover(arena(BLOCKS), direct=direct) as mover:
            mover.submit(records[3], 0, check=True).wait()
        assert cached_pages(path) <= BLOCKS * 2  # readahead of the buffered kind may keep a little


def cached_pages(path) -> int:
    """Return how many pages of a file are in memory (mincore)."""
    import ctypes

    size = path.stat().st_size
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    flags = (ctypes.c_ubyte * (size // BLOCK_BYTES))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) == 0
    return sum(flag & 1 for flag in flags)


def test_a_flipped_bit_is_found(stored):
    records, parts = stored
    raw = bytearray(b"".join(parts))
    raw[7 * len(parts[0]) + 11] ^= 4
    records[7].file.write_bytes(raw)
    with Mover(arena(BLOCKS), direct=False, chunk_bytes=BLOCK_BYTES) as mover:
        mover.submit(records[6], 0, check=True).wait()
        with pytest.raises(BundleError, match=r"expert 7 .*SHA-256 differs.*made again"):
            mover.submit(records[7], 0, check=True).wait()


def test_the_record_of_another_expert_is_found(stored):
    records, _ = stored
    swapped = records[2]._replace(offset=records[3].offset)
    with Mover(arena(BLOCKS), direct=False) as mover, pytest.raises(BundleError, match="expert 2"):
        mover.submit(swapped, 0, check=True).wait()


@pytest.mark.parametrize("check", [True, False])
def test_a_truncated_file_is_found_with_or_without_its_hash(stored, check):
    records, _ = stored
    os.truncate(records[0].file, records[-1].offset + BLOCK_BYTES + 100)
    for direct in modes(records[0].file):
        with Mover(arena(BLOCKS), direct=direct) as mover, pytest.raises(BundleError, match="truncated"):
            mover.submit(records[-1], 0, check=check).wait()


def test_a_missing_file_is_found(stored):
    records, _ = stored
    records[0].file.unlink()
    with Mover(arena(BLOCKS), direct=False) as mover, pytest.raises(BundleError, match="No such file"):
        mover.submit(records[0], 0, check=True).wait()


@pytest.mark.parametrize(("number", "hint"), [(errno.EIO, "Check the disk"), (errno.EMFILE, "ulimit")])
def test_a_fault_in_the_background_is_raised_in_the_foreground(stored, number, hint):
    records, _ = stored
    calls = iter(range(100))

    def failing(descriptor, buffers, offset):
        if next(calls) == 3:
            raise OSError(number, os.strerror(number))
        return os.preadv(descriptor, buffers, offset)

    with Mover(arena(BLOCKS * 2), direct=False, chunk_bytes=BLOCK_BYTES, readers=2, read_into=failing) as mover:
        first = mover.submit(records[0], 0, check=True)
        with pytest.raises(DeviceError, match=hint):
            first.wait()
        with pytest.raises(DeviceError):
            first.wait()  # and again, never as if nothing had been
        mover.submit(records[1], BLOCKS * BLOCK_BYTES, check=True).wait()  # the thread lives on


def test_reads_that_bring_less_than_asked_are_continued(stored):
    records, parts = stored

    def lazy(descriptor, buffers, offset):
        view = buffers[0]
        return os.preadv(descriptor, [view[: max(BLOCK_BYTES, len(view) // 2 + 17)]], offset)

    memory = arena(BLOCKS)
    with Mover(memory, direct=False, read_into=lazy) as mover:
        mover.submit(records[4], 0, check=True).wait()
    assert memory.tobytes() == parts[4]


def test_a_bug_in_a_reader_reaches_whoever_waits(stored):
    records, _ = stored

    def broken(*_):
        raise ZeroDivisionError

    with Mover(arena(BLOCKS), direct=False, read_into=broken) as mover, pytest.raises(ZeroDivisionError):
        mover.submit(records[0], 0, check=True).wait()


def test_several_reads_are_in_flight_at_once(stored):
    records, _ = stored
    together = threading.Barrier(4, timeout=20)

    def meeting(descriptor, buffers, offset):
        together.wait()
        return os.preadv(descriptor, buffers, offset)

    with Mover(arena(BLOCKS * 4), direct=False, readers=4, read_into=meeting) as mover:
        reads = [mover.submit(records[index], index * BLOCKS * BLOCK_BYTES, check=True) for index in range(4)]
        for read in reads:
            read.wait()


def test_few_files_are_open_at_a_time(tmp_path):
    records = []
    for index in range(50):
        path = tmp_path / f"layer-{index}.bin"
        path.write_bytes(bytes([index]) * BLOCK_BYTES)
        digest = hashlib.sha256(bytes([index]) * BLOCK_BYTES).hexdigest()
        records.append(Record(str(index), path, 0, BLOCK_BYTES, digest))
    open_now, most = 0, 0

    def opened(path, flags):
        nonlocal open_now, most
        most = max(most, len(list(Path("/proc/self/fd").iterdir())))
        return os.open(path, flags)

    before = len(list(Path("/proc/self/fd").iterdir()))
    with Mover(arena(50), direct=False, opened=opened) as mover:
        for index, record in enumerate(records):
            mover.submit(record, index * BLOCK_BYTES, check=True).wait()
    assert most - before <= 13
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_closing_waits_for_what_is_on_its_way_and_may_be_repeated(stored):
    records, parts = stored

    def slow(descriptor, buffers, offset):
        time.sleep(0.02)
        return os.preadv(descriptor, buffers, offset)

    memory = arena(BLOCKS)
    mover = Mover(memory, direct=False, read_into=slow)
    mover.submit(records[0], 0, check=True)
    mover.close()
    mover.close()
    assert memory.tobytes() == parts[0]


def test_draining_waits_for_reads_that_nobody_waits_for(stored):
    records, parts = stored

    def slow(descriptor, buffers, offset):
        time.sleep(0.02)
        return os.preadv(descriptor, buffers, offset)

    memory = arena(BLOCKS * 3)
    with Mover(memory, direct=False, readers=2, read_into=slow) as mover:
        for index in range(3):
            mover.submit(records[index], index * BLOCKS * BLOCK_BYTES, check=False)
        mover.drain()
        assert memory.tobytes() == b"".join(parts[:3])
        mover.submit(records[5], 0, check=True).wait()


def test_an_interrupted_drain_leaves_readers_that_read_on_and_end(stored):
    records, parts = stored
    gate, began = threading.Event(), threading.Event()

    def waiting(descriptor, buffers, offset):
        began.set()
        gate.wait(20)
        return os.preadv(descriptor, buffers, offset)

    def interrupt() -> None:
        began.wait(20)
        time.sleep(0.1)  # until the other reader waits for the one that reads
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    memory = arena(BLOCKS)
    mover = Mover(memory, direct=False, readers=2, read_into=waiting)
    try:
        first = mover.submit(records[0], 0, check=True)
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            mover.drain()
    finally:
        signal.signal(signal.SIGINT, before)
    gate.set()
    first.wait()  # which goes to the same bytes
    again = mover.submit(records[1], 0, check=True)
    deadline = time.monotonic() + 10
    while not again.done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert again.done
    assert memory.tobytes() == parts[1]
    mover.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_changed_since_its_first_read_is_hashed_again(stored, replaced):
    records, parts = stored
    path = records[0].file
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    memory = arena(BLOCKS)
    with Mover(memory, direct=False) as mover:
        mover.submit(records[0], 0, check=True).wait()
        if replaced:  # a file that is open stays what it was; others take its place among those that are
            for index in range(20):
                other = path.with_name(f"other-{index}.bin")
                other.write_bytes(parts[1])
                mover.submit(records[1]._replace(file=other, offset=0), 0, check=True).wait()
            path.unlink()
        path.write_bytes(raw)
        with pytest.raises(BundleError, match="SHA-256 differs"):
            mover.submit(records[0], 0, check=False).wait()
        mover.submit(records[1], 0, check=False).wait()  # sound still
    assert memory.tobytes() == parts[1]


def test_threads_that_the_system_refuses_are_an_error_with_a_remedy(monkeypatch):
    start = threading.Thread.start
    begun: list[threading.Thread] = []

    def refusing(thread):
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    with pytest.raises(DeviceError, match=r"no thread .*ulimit -u"):
        Mover(arena(BLOCKS), direct=False)
    assert not any(thread.is_alive() for thread in begun)


def test_parts_that_are_no_whole_blocks_are_refused():
    with pytest.raises(InputError):
        Mover(arena(1), direct=False, chunk_bytes=1000)
