"""Files of a decoder's calibration: whatever is wrong with their bytes is told, and never a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex.costs.decoder_files import load, save
from edgeflex.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("packed", [False, True])
def test_no_damage_to_arrays_is_a_crash(tmp_path: Path, packed: bool):
    draw = np.random.default_rng(0)
    path = tmp_path / "routing.npz"
    save(path, {"expert": draw.integers(0, 60, 300), "weight": draw.random(300).astype(np.float32)}, packed=packed)
    raw = path.read_bytes()
    step = max(1, len(raw) // 250)
    told = []
    for place in range(0, len(raw), step):
        for damaged in (raw[:place], raw[:place] + bytes([raw[place] ^ 0x2D]) + raw[place + 1 :]):
            path.write_bytes(damaged)
            try:
                load(path)
            except InputError as error:
                told.append(str(error))
    assert len(told) > 250
    assert all("damaged" in one for one in told)
