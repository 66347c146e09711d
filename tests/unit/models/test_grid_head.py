"""Heads that pool maps to 2 x 2: they see where something is, and refuse what they cannot divide."""

from __future__ import annotations

import pytest
import torch

from edgeflex.errors import InputError
from edgeflex.models.heads import HeadSpec, make_head, pool


def test_a_grid_head_pools_each_quarter_by_itself():
    features = torch.arange(16, dtype=torch.float32).reshape(1, 1, 4, 4)
    # quarters of 0..15 in rows of four: means of {0,1,4,5}, {2,3,6,7}, {8,9,12,13}, {10,11,14,15}
    assert pool(features, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_a_grid_head_is_four_times_as_wide_as_a_linear_one():
    assert make_head(HeadSpec(kind="grid"), (16, 8, 8), 10).linear.in_features == 64
    assert make_head(HeadSpec(kind="linear"), (16, 8, 8), 10).linear.in_features == 16


@pytest.mark.parametrize("shape", [(16, 7, 7), (16, 1, 1), (16,), (9, 16)])
def test_features_that_no_grid_divides_are_refused(shape):
    with pytest.raises(InputError, match="grid head needs maps"):
        make_head(HeadSpec(kind="grid"), shape, 10)
