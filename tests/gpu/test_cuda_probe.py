"""What the CUDA probe says about a real device; skipped where there is none."""

from __future__ import annotations

import pytest

from edgeflex.profiles.cuda import cuda
from edgeflex.schema import Tier


@pytest.mark.needs_gpu
def test_a_cuda_device_gives_links_and_rates_that_were_measured():
    found = cuda()
    assert found is not None
    ways = {(link.source, link.target) for link in found.links}
    assert {(Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST)} <= ways
    assert all(link.bytes_per_s.value > 1e8 and link.bytes_per_s.origin == "measured" for link in found.links)
    rates = {rate.precision: rate.ops_per_s.value for rate in found.compute}
    assert rates["fp16"] > rates["fp32"] / 2
    if not found.integrated:
        assert found.overlap is not None
        factors = {name: figure.value for name, figure in found.overlap if figure is not None}
        assert set(factors) == {"link_beside_gpu", "gpu_beside_link", "link_beside_cpu", "cpu_beside_link"}
        assert all(1.0 <= factor < 20 for factor in factors.values()), factors
