from __future__ import annotations

import errno
import os
from contextlib import contextmanager

import pytest

from edgeflex.errors import DeviceError, InputError
from edgeflex.profiles import storage


def test_a_quick_probe_gives_positive_rates_and_leaves_nothing_behind(tmp_path):
    reads = storage(tmp_path, quick=True)
    cases = {(read.pattern, read.block_bytes, read.queue_depth) for read in reads}
    assert cases == {(p, b, d) for p in ("sequential", "random") for b in (4096, 1 << 20) for d in (1, 8)}
    assert all(read.bytes_per_s.value > 0 and read.bytes_per_s.origin == "measured" for read in reads)
    assert all(read.bytes_per_s.spread is not None for read in reads)
    assert list(tmp_path.iterdir()) == []


def test_without_o_direct_the_figures_say_so(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert not any(read.direct for read in storage(tmp_path, quick=True))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_file_and_no_open_descriptor(tmp_path):
    class Impatient:
        @contextmanager
        def task(self, title, total):
            def advance(count):
                raise KeyboardInterrupt

            yield advance

        def note(self, text):
            raise AssertionError(text)

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
    with pytest.raises(KeyboardInterrupt):
        storage(tmp_path, quick=True, progress=Impatient())
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
    assert list(tmp_path.iterdir()) == []
    assert after == before


def test_ctrl_c_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(descriptor, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage(tmp_path, quick=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_device_error_and_leaves_no_file(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DeviceError, match="the disk is full"):
        storage(tmp_path, quick=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Check the path"):
        storage(tmp_path / "file" / "folder", quick=True)
