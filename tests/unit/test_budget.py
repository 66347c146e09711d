"""Budgets as users write them: the parsed value, what is minimised when nobody says, all faults at once."""

from __future__ import annotations

import pytest

from edgeflex.budget import parse_budget, parse_decoder_budget
from edgeflex.errors import InputError
from edgeflex.schema import LatencyLimit, Tier


def test_a_budget_means_what_was_written():
    found = parse_budget(memory="2MiB", latency=("8ms:p95", "5ms"), max_drop="1%", confidence="90%", disk="3MB")
    assert found.memory_bytes == {Tier.HOST: 2 * 1024**2}
    assert found.latency == (LatencyLimit(limit_s=0.008, statistic="p95"), LatencyLimit(limit_s=0.005))
    assert (found.max_drop, found.confidence, found.disk_bytes) == (0.01, 0.9, 3_000_000)


@pytest.mark.parametrize(
    ("given", "minimize", "statistic"),
    [
        ({"memory": "1MiB", "max_drop": "1%"}, "latency", "mean"),
        ({"memory": "1MiB", "latency": ("8ms:p99",)}, "drop", "p99"),
        ({"latency": ("8ms",), "max_drop": "1%"}, "memory", "mean"),
        ({}, "latency", "mean"),
        ({"memory": "1MiB", "latency": ("8ms",), "max_drop": "1%"}, "drop", "mean"),
        ({"latency": ("8ms",), "minimize": "latency:p95"}, "latency", "p95"),
        ({"minimize": "memory"}, "memory", "mean"),
    ],
)
def test_what_has_no_budget_is_minimised(given, minimize: str, statistic: str):
    found = parse_budget(**given)
    assert (found.minimize, found.statistic) == (minimize, statistic)


def test_all_faults_stand_in_one_error_each_with_its_option():
    with pytest.raises(InputError) as refused:
        parse_budget(
            memory="6 gigs",
            latency=("8", "8ms:p42"),
            max_drop="300%",
            confidence="100%",
            minimize="latency:p42",
            disk="0",
        )
    message = str(refused.value)
    assert "7 faults" in message
    for part in ("--memory: size '6 gigs'", "--latency: time '8'", "p42", "300%", "--confidence", "--minimize", "disk"):
        assert part in message


@pytest.mark.parametrize("minimize", ["speed", "latency:p42", "memory:p95", ":p95", ""])
def test_what_cannot_be_minimised_is_refused(minimize: str):
    with pytest.raises(InputError, match="--minimize"):
        parse_budget(minimize=minimize)


def test_a_decoders_limit_on_perplexity_is_a_share_and_leaves_latency_to_be_minimised():
    found = parse_decoder_budget(memory="2GiB", max_perplexity="2%")
    assert (found.max_perplexity_rise, found.max_kl, found.minimize) == (0.02, None, "latency")
    assert found.kl_limit == pytest.approx(0.019803, abs=1e-6)
    assert parse_decoder_budget(latency=("60ms/token",), max_perplexity="2%").minimize == "memory"
    with pytest.raises(InputError, match="--max-perplexity"):
        parse_decoder_budget(max_perplexity="much")
