"""Places in the arena: whatever fits by bytes gets one, and moves keep everybody's bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflex.errors import DeviceError
from edgeflex.runtimes.slots import Slots

BLOCK = 4096


def apply(memory: bytearray, moves) -> None:
    for _, source, target, size in moves:
        memory[target : target + size] = bytes(memory[source : source + size])


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 1 << 30)), max_size=60),
    st.integers(1, 24),
    st.sampled_from([(1, 2), (2, 3), (3, 3), (1, 5), (2, 7)]),
    st.booleans(),
)
def test_what_fits_by_bytes_gets_a_place_and_everyone_keeps_its_bytes(script, capacity, sizes, sided):
    slots = Slots(capacity * BLOCK, min(sizes) * BLOCK if sided else 0)
    memory = bytearray(capacity * BLOCK)
    held: dict[int, tuple[int, int]] = {}
    for number, (large, _, pick) in enumerate(script):
        size = sizes[large] * BLOCK
        if size > capacity * BLOCK:
            continue
        while size > slots.free_bytes:
            gone = sorted(held)[pick % len(held)]
            slots.remove((0, gone))
            del held[gone]
        offset, moves = slots.place((0, number), size)
        apply(memory, moves)
        memory[offset : offset + size] = bytes([number % 251]) * size
        held[number] = (size, number % 251)
        assert offset % BLOCK == 0
        spans = sorted((slots.offset((0, key)), slots.offset((0, key)) + one) for key, (one, _) in held.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert not spans or (spans[0][0] >= 0 and spans[-1][1] <= capacity * BLOCK)
        for key, (one, value) in held.items():
            assert set(memory[slots.offset((0, key)) : slots.offset((0, key)) + one]) == {value}
        assert slots.free_bytes == capacity * BLOCK - sum(one for one, _ in held.values())


@given(st.lists(st.integers(0, 1 << 30), max_size=80))
def test_one_size_never_moves(picks):
    slots = Slots(5 * 3 * BLOCK)
    held: list[int] = []
    for number, pick in enumerate(picks):
        if len(held) == 5:
            slots.remove((0, held.pop(pick % 5)))
        assert slots.place((0, number), 3 * BLOCK)[1] == ()
        held.append(number)


def test_only_the_cheapest_run_is_moved():
    slots = Slots(8 * BLOCK)
    for key, size in (((0, 0), 1), ((0, 1), 2), ((0, 2), 1), ((0, 3), 1), ((0, 4), 1)):
        slots.place(key, size * BLOCK)
    slots.remove((0, 0))  # holes of one block at 0 and 4, and of two at 6
    slots.remove((0, 3))
    offset, moves = slots.place((0, 5), 3 * BLOCK)
    assert [(move.key, move.source, move.target) for move in moves] == [((0, 4), 5 * BLOCK, 4 * BLOCK)]
    assert offset == 5 * BLOCK


def test_more_than_is_free_is_refused():
    slots = Slots(2 * BLOCK)
    slots.place((0, 0), BLOCK)
    with pytest.raises(DeviceError, match="do not fit"):
        slots.place((0, 1), 2 * BLOCK)
    assert (0, 0) in slots
    assert (0, 1) not in slots
