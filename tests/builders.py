"""Plain values for tests, and where shared data lies. Free of torch, so that every test may import it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgeflex.schema import (
    Boundary,
    Budget,
    CostTable,
    Decision,
    Format,
    LatencyLimit,
    Option,
    Rule,
    Scenario,
    Statistic,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def data_folder() -> Path | None:
    """Return the folder of shared data: EDGEFLEX_DATA, else ``../shared/data`` beside the repository."""
    named = os.environ.get("EDGEFLEX_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def needed_data(*parts: str) -> Path:
    """Return a path inside the shared data, or skip the test with the reason."""
    folder = data_folder()
    if folder is None or not folder.joinpath(*parts).exists():
        pytest.skip(f"{'/'.join(parts)} is not in the data folder (set EDGEFLEX_DATA)")
    return folder.joinpath(*parts)


def option(
    name: str,
    *,
    loss: float | tuple[float, ...] = 0.0,
    latency_s: float = 0.0,
    host: int = 0,
    device: int = 0,
    disk: int = 0,
    miss_latency_s: float = 0.0,
    format: Format = Format.FLOAT,  # noqa: A002 - the field's name
) -> Option:
    """Return an option with bytes in at most two tiers."""
    memory = {tier: size for tier, size in ((Tier.HOST, host), (Tier.DEVICE, device)) if size}
    return Option(
        name=name,
        loss=loss if isinstance(loss, tuple) else (loss,),
        latency_s=latency_s,
        memory_bytes=memory,
        disk_bytes=disk,
        miss_latency_s=miss_latency_s,
        format=format,
    )


def decision(
    subject: str, *options: Option, block: int = 0, tie: str | None = None, group: str | None = None
) -> Decision:
    """Return a decision between ``options``."""
    return Decision(subject=subject, block=block, options=options, tie=tie, group=group)


def scenario(*reach: float, name: str = "all", loss: float = 0.0, **miss_rate: float) -> Scenario:
    """Return a scenario that reaches its blocks with probabilities ``reach``."""
    return Scenario(name=name, reach=reach or (1.0,), loss=loss, miss_rate=miss_rate)


def table(
    *decisions: Decision,
    scenarios: tuple[Scenario, ...] | None = None,
    boundaries: tuple[Boundary, ...] = (),
    rules: tuple[Rule, ...] = (),
    fixed_latency_s: tuple[float, ...] | None = None,
) -> CostTable:
    """Return a table of one always reached block unless told otherwise."""
    known = scenarios or (scenario(),)
    return CostTable(
        name="test",
        scenarios=known,
        decisions=decisions,
        boundaries=boundaries,
        rules=rules,
        fixed_latency_s=(0.0,) * len(known[0].reach) if fixed_latency_s is None else fixed_latency_s,
    )


def random_table(seed: int) -> CostTable:
    """Return a small table with whatever a table can hold: ties, boundaries, rules, misses, scenarios."""
    draw = random.Random(seed)
    blocks = draw.randint(1, 3)
    scenarios = tuple(_random_scenario(draw, blocks, index) for index in range(draw.randint(1, 3)))
    decisions = tuple(_random_decision(draw, blocks, index, len(scenarios)) for index in range(draw.randint(2, 5)))
    subjects = [one.subject for one in decisions]
    ends = ["", *subjects]
    boundaries = tuple(
        Boundary(
            source=draw.choice(ends),
            target=draw.choice(ends),
            block=draw.randrange(blocks),
            latency_s=draw.choice([0.0, draw.uniform(0, 3e-4)]),
        )
        for _ in range(draw.choice([0, 0, 2, 4]))
    )
    rules = tuple(_random_rule(draw, subjects) for _ in range(draw.choice([0, 0, 1, 2])))
    return CostTable(
        name=f"random {seed}",
        scenarios=scenarios,
        decisions=decisions,
        boundaries=boundaries,
        rules=rules,
        fixed_latency_s=tuple(draw.uniform(0, 1e-4) for _ in range(blocks)),
        fixed_memory_bytes={Tier.HOST: draw.randint(0, 10**6)} if draw.random() < 0.5 else {},
        fixed_disk_bytes=draw.randint(0, 1000),
    )


def _random_scenario(draw: random.Random, blocks: int, index: int) -> Scenario:
    reach = [1.0]
    for _ in range(blocks - 1):
        reach.append(draw.choice([reach[-1], reach[-1] * draw.random(), 0.0]))
    return Scenario(
        name=f"s{index}", reach=tuple(reach), loss=draw.uniform(-0.01, 0.02), miss_rate={"experts": draw.random()}
    )


def _random_decision(draw: random.Random, blocks: int, index: int, scenarios: int) -> Decision:
    tie = draw.choice([None, None, "t"])
    names = ["a", "b", "c"] if tie else ["a", "b", "c", "d"][: draw.randint(1, 4)]
    draw.shuffle(names)
    group = draw.choice([None, "experts"])
    options = tuple(
        Option(
            name=name,
            loss=tuple(draw.uniform(-0.002, 0.02) for _ in range(draw.choice([1, scenarios]))),
            latency_s=draw.uniform(0, 1e-3),
            memory_bytes={tier: draw.randint(0, 10**8) for tier in draw.sample(list(Tier), draw.randint(0, 2))},
            disk_bytes=draw.choice([0, draw.randint(0, 10**6)]),
            miss_latency_s=draw.uniform(0, 1e-3) if group else 0.0,
            format=draw.choice(list(Format)),
        )
        for name in names
    )
    return Decision(subject=f"d{index}", block=draw.randrange(blocks), options=options, tie=tie, group=group)


def _random_rule(draw: random.Random, subjects: list[str]) -> Rule:
    among = draw.sample(subjects, draw.randint(1, len(subjects)))
    at_least = draw.choice([0, 0, 1])
    return Rule(
        subjects=tuple(among),
        option="a",
        at_least=at_least,
        at_most=draw.choice([None, max(at_least, draw.randint(0, len(among)))]),
    )


def random_budget(seed: int) -> Budget:
    """Return a budget for ``random_table(seed)`` that fits about as often as it does not."""
    draw = random.Random(-1 - seed)
    statistics: list[Statistic] = ["mean", "p50", "p95", "p99", "worst"]
    latency = tuple(
        LatencyLimit(limit_s=draw.uniform(5e-4, 5e-3), statistic=statistic)
        for statistic in draw.sample(statistics, draw.choice([0, 1, 1, 2]))
    )
    memory = {tier: draw.randint(10**7, 4 * 10**8) for tier in draw.sample(list(Tier), draw.choice([0, 1, 2]))}
    return Budget(
        memory_bytes=memory,
        latency=latency,
        disk_bytes=draw.choice([None, None, draw.randint(10**5, 4 * 10**6)]),
        max_drop=draw.choice([None, draw.uniform(0.0, 0.08)]),
        minimize=draw.choice(["latency", "memory", "drop"]),
        statistic=draw.choice(statistics),
    )


# --- published instances -------------------------------------------------------------------------------


def hawq_table(instance: dict[str, Any], quantity: str) -> tuple[CostTable, int, int]:
    """Return HAWQ-v3's ResNet-18 table with ``quantity`` as bytes, and its total at 4 and at 8 bits.

    ``quantity`` is size, bops or latency; units are whole (bytes, bit operations, nanoseconds), so that one
    memory budget stands for any of them. Loss is Hessian trace times squared weight error.
    """
    if quantity == "latency":
        costs = [[round(s * 1e6) for s in instance[f"latency_int{bits}"]] for bits in (4, 8)]
    elif quantity == "bops":
        costs = [[count * bits * bits // 64 for count in instance["bops"]] for bits in (4, 8)]
    else:
        costs = [[count * bits // 8 for count in instance["parameters"]] for bits in (4, 8)]
    ties = {layer: f"shortcut {first}" for first, *rest in instance["tied_layers"] for layer in (first, *rest)}
    errors = [instance["delta_weights_4bit_square"], instance["delta_weights_8bit_square"]]
    layers = [
        decision(
            f"layer {index}",
            *(
                option(name, loss=trace * errors[row][index], host=costs[row][index])
                for row, name in enumerate(("int4", "int8"))
            ),
            tie=ties.get(index),
        )
        for index, trace in enumerate(instance["Hutchinson_trace"])
    ]
    return table(*layers), sum(costs[0]), sum(costs[1])


HAWQ_PUBLISHED = {
    ("size", 0.25): 0.11830,
    ("size", 0.5): 0.07451,
    ("size", 0.75): 0.03344,
    ("bops", 0.25): 0.46042,
    ("bops", 0.5): 0.21569,
    ("bops", 0.75): 0.07996,
    ("latency", 0.25): 0.46042,
    ("latency", 0.5): 0.20267,
    ("latency", 0.75): 0.07996,
}


def mixtral_table(instance: dict[str, Any], blocks: Sequence[str], *, side_rules: bool = True) -> CostTable:
    """Return MC-MoE's Mixtral experts in ``blocks`` with bits as bytes.

    Loss is frequency times routing weight to the 1.5 times quantisation error, frequency and weight as shares
    of their block, times 1,000, as in the official solver; its side rules ask for at least one expert of 3 bits
    and one of 2 bits a block.
    """
    decisions: list[Decision] = []
    rules: list[Rule] = []
    for block in blocks:
        frequency, weight = instance["frequency"][block], instance["routing_weight"][block]
        subjects = [f"{block}.{expert}" for expert in range(len(frequency))]
        for expert, subject in enumerate(subjects):
            share = frequency[expert] / sum(frequency) * (weight[expert] / sum(weight)) ** 1.5 * 1000
            errors = instance["quant_loss"][block][str(expert)]
            options = (option(bits, loss=share * errors[bits], host=int(bits)) for bits in ("1", "2", "3"))
            decisions.append(decision(subject, *options))
        if side_rules:
            rules += [Rule(subjects=tuple(subjects), option=bits, at_least=1) for bits in ("3", "2")]
    return table(*decisions, rules=tuple(rules))


def synthetic_table(
    layers: int, seed: int, *, tiers: tuple[Tier, ...] = (Tier.HOST,), bits: Sequence[int]
) -> CostTable:
    """Return ``layers`` decisions between bit-widths, and tiers where more than one is given.

    Sizes span a factor of four, sensitivities are log-normal and fall fourfold a bit, slower tiers take longer.
    """
    draw = random.Random(seed)
    slowdown = {Tier.DEVICE: 1.0, Tier.HOST: 3.0, Tier.FLASH: 20.0}
    decisions = []
    for layer in range(layers):
        weights, sensitivity = draw.uniform(0.5e6, 2e6), draw.lognormvariate(0, 1) * 1e-4
        options = tuple(
            Option(
                name=f"int{width} {tier.value}",
                loss=(sensitivity * 4.0 ** (2 - width) * draw.uniform(0.8, 1.2),),
                latency_s=weights * width / 8 * 1e-10 * slowdown[tier] * draw.uniform(0.9, 1.1),
                memory_bytes={tier: int(weights * width / 8)},
            )
            for width in bits
            for tier in tiers
        )
        decisions.append(decision(f"layer {layer}", *options))
    return table(*decisions)
