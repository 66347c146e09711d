"""Bits that know about exits against bits that do not, at equal measured cost, on CIFAR-10 as JPEG.

    python benchmarks/exit_aware.py --work /tmp/exit-aware
    python benchmarks/exit_aware.py --work /tmp/exit-aware --model zoo:resnet56 --weights resnet56-jpeg.safetensors

SIMULATED: weights are rounded to 2, 3, 4 or 8 bits per layer (symmetric, a scale per output channel) and
computed in float32, since XNNPACK has no kernels below 4 bits. So nothing is timed; cost is counted as bit
operations, multiply-accumulates x weight bits, of the segments that an image runs through, divided by the
multiply-accumulates of the whole trunk. Exit heads and shortcuts have 8 bits throughout.

Three ways to choose the bits, all by the same exact solver:

* exit-unaware: rise of the last exit's loss, cost as if every image ran through all layers; one mix for each of
  nine average widths, thresholds searched afterwards.
* edgeflex: bits and thresholds together; cost weighted by the share of images that reach a layer, rise of the
  loss where images leave, at the policy's own exit rates (reach-matched). Solved for each level, and once more
  when what these mixes really lost has told how much accuracy a unit of loss is worth: six mixes.
* reach only, which tells where the gain comes from: as edgeflex, but with the last exit's loss.

Thresholds are searched anew on the quantised outputs for all. A cost level is a share of what the network
costs at full depth with so many bits everywhere. "Own mix" is the one that a way solves for that level, run
unverified; "best of its mixes" is what looks best on the choosing images among all that it ran, which is how
edgeflex picks what it ships.

Every seed splits the 5,000 dev images into images that measure sensitivity, that choose policies and mixes,
and that judge; it also draws the training images of the heads and their order. Costs are made equal on the judging
images by drawing, per image, between two neighbouring policies; this looks at their confidences, never at
their labels. Standard errors are of paired differences; over seeds an image counts once, however often it judged.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

# one thread, so that it disturbs nothing else; before numpy and torch start
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.stats import spearmanr

from edgeflex.costs.policies import ExitOutputs, Policy, anchored, exit_outputs, exits_taken, judge, policy_pool
from edgeflex.costs.table import Sensitivity, loss_scale, matched_losses, scenario_of
from edgeflex.images import ImageFolder, open_images, split
from edgeflex.models import DynamicModel, HeadSpec, fit_exits, load_module, open_model, save_model, zoo
from edgeflex.plans import check, solve
from edgeflex.schema import Budget, CostTable, LatencyLimit, LayerKind
from tests.builders import decision, needed_data, option, table

BITS = (2, 3, 4, 8)
FIXED_BITS = 8
SHARES = {"calibrate": 0.12, "choose": 0.33, "judge": 0.55}
FIT_SHARE = 0.4  # of the training images; heads gain next to nothing from more
STAGES = {"zoo:resnet20": ("layer1.2", "layer2.1", "layer3.0"), "zoo:resnet56": ("layer1.8", "layer2.5", "layer3.2")}
PUBLISHED = {"zoo:resnet20": "resnet20-12fca82f.th", "zoo:resnet56": "resnet56-4bfd9763.th"}
SHARE = 0.65  # of full depth, as in the pilot
LEVELS = (2.5, 3.0, 3.5)  # average bits
ROUNDS = 2
UNAWARE_BITS = (2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0)  # more mixes than levels x rounds give the others
MARGIN_POINTS, MARGIN_BITS = 2.0, 3.0  # what the pilot promised, and up to which average bits
BATCH = 100

Mix = dict[str, int]
Losses = dict[tuple[str, "Width"], tuple[float, ...]]


@dataclass(frozen=True)
class Width:
    """Stands where edgeflex has a precision: so many bits a weight."""

    bits: int


@dataclass(frozen=True)
class Judged:
    """A mix at a cost level: probability of being right per judging image, mean cost, accuracy on choosing images."""

    right: np.ndarray
    cost: float
    chosen: float


# --- one seed's network ----------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return weights [out, ...] on a symmetric grid of ``bits``, a scale per row, clipped for least square error."""
    rows = weight.detach().reshape(len(weight), -1)
    most = 2 ** (bits - 1) - 1
    peak = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, least = rows, torch.full_like(peak, torch.inf)
    for ratio in torch.linspace(0.2, 1.0, 33).tolist():
        scale = peak * ratio / most
        tried = (rows / scale).round().clamp(-most - 1, most) * scale
        error = (tried - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.reshape(weight.shape)


@contextmanager
def quantised(model: DynamicModel, mix: Mix):
    """Round the weights of the layers in ``mix`` for as long as the context lasts."""
    kept = {}
    for layer in model.graph.layers:
        if layer.name in mix:
            module = model.segments[layer.segment].get_submodule(layer.name)
            kept[layer.name] = (module, module.weight.data)
            module.weight.data = rounded(module.weight, mix[layer.name])
    try:
        yield
    finally:
        for module, weight in kept.values():
            module.weight.data = weight


@torch.no_grad()
def run(model: DynamicModel, first: int, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what enters each segment from ``first`` on, and the probabilities at each exit behind."""
    entering, exits = [], []
    for segment in model.segments[first:-1]:
        entering.append(x)
        x, logits = segment(x)
        exits.append(logits.softmax(-1))
    return [*entering, x], [*exits, model.segments[-1](x).softmax(-1)]


@dataclass(frozen=True)
class Network:
    """A fitted network, its share of the dev images and a folder where what was computed stays."""

    model: DynamicModel
    images: ImageFolder
    parts: dict[str, np.ndarray]
    folder: Path

    @cached_property
    def decided(self) -> tuple:
        """Layers whose bits are chosen: all convolutions but the shortcuts."""
        return tuple(
            one for one in self.model.graph.layers if one.shape.kind is LayerKind.CONV2D and one.shape.kernel > 1
        )

    @cached_property
    def trunk_macs(self) -> int:
        """Multiply-accumulates of the layers whose bits are chosen."""
        return sum(one.shape.macs for one in self.decided)

    def full_cost(self, bits: float) -> float:
        """Return the cost of full depth with ``bits`` in every layer whose bits are chosen."""
        return bits + sum(self.fixed_cost)

    @cached_property
    def fixed_cost(self) -> tuple[float, ...]:
        """Cost of the other layers by segment."""
        costs = [0.0] * len(self.model.segments)
        for layer in self.model.graph.layers:
            if layer not in self.decided:
                costs[layer.segment] += FIXED_BITS * layer.shape.macs / self.trunk_macs
        return tuple(costs)

    def segment_cost(self, mix: Mix) -> tuple[float, ...]:
        """Return the cost of each segment."""
        costs = list(self.fixed_cost)
        for layer in self.decided:
            costs[layer.segment] += mix[layer.name] * layer.shape.macs / self.trunk_macs
        return tuple(costs)

    def labels(self, part: str) -> np.ndarray:
        """Return the labels of a part."""
        return self.images.labels[self.parts[part]]

    def _batches(self, parts: tuple[str, ...]) -> list[torch.Tensor]:
        rows = np.concatenate([self.parts[part] for part in parts])
        preprocessing = self.model.graph.preprocessing
        return list(torch.from_numpy(self.images.load(rows, preprocessing)).split(BATCH))

    @cached_property
    def _later(self) -> list[torch.Tensor]:
        return self._batches(("choose", "judge"))

    def outputs(self, mix: Mix) -> dict[str, ExitOutputs]:
        """Return what every exit says with the weights of ``mix``; an empty one is float32."""
        name = hashlib.sha256(repr(sorted(mix.items())).encode()).hexdigest()[:16]
        path = self.folder / f"mix-{name}.npy"
        if not path.exists():
            others = {one.name: FIXED_BITS for one in self.model.graph.layers if one not in self.decided}
            with quantised(self.model, {**others, **mix} if mix else {}):
                found = [torch.stack(run(self.model, 0, x)[1], dim=1) for x in self._later]
            np.save(path, torch.cat(found).numpy())
        probabilities, count = np.load(path), len(self.parts["choose"])
        return {
            "choose": exit_outputs(probabilities[:count], self.labels("choose")),
            "judge": exit_outputs(probabilities[count:], self.labels("judge")),
        }

    def sensitivity(self) -> Sensitivity:
        """Return the outputs with one layer rounded, for each layer and width, on the calibration images."""
        missing = [layer for layer in self.decided if not self._sensitivity_path(layer.name).exists()]
        if missing:
            cached = [run(self.model, 0, x) for x in self._batches(("calibrate",))]
            np.save(self._sensitivity_path(""), torch.cat([torch.stack(exits, dim=1) for _, exits in cached]).numpy())
            for layer in missing:
                rows = torch.stack([self._changed(cached, layer, bits) for bits in BITS])
                np.save(self._sensitivity_path(layer.name), rows.numpy())
        found = {
            (layer.name, Width(bits)): one
            for layer in self.decided
            for bits, one in zip(BITS, np.load(self._sensitivity_path(layer.name)), strict=True)
        }
        return Sensitivity(np.load(self._sensitivity_path("")), self.labels("calibrate"), found)

    def _sensitivity_path(self, layer: str) -> Path:
        return self.folder / f"sensitivity-{layer or 'none'}.npy"

    def _changed(self, cached: list, layer, bits: int) -> torch.Tensor:
        with quantised(self.model, {layer.name: bits}):
            rows = [
                torch.stack(exits[: layer.segment] + run(self.model, layer.segment, entering[layer.segment])[1], dim=1)
                for entering, exits in cached
            ]
        return torch.cat(rows)


def fitted(arguments: argparse.Namespace, weights: Path, folder: Path, seed: int) -> DynamicModel:
    if not (folder / "model").exists():
        train = open_images(needed_data("cifar10-jpeg", "train.zip"))
        rows = split(train, {"fit": FIT_SHARE}, seed)["fit"]
        some = replace(train, items=tuple(train.items[row] for row in rows))
        model = fit_exits(
            load_module(arguments.model, weights), STAGES[arguments.model], HeadSpec(kind="grid"), some,
            zoo.preprocessing(arguments.model.removeprefix("zoo:")), source=arguments.model, seed=seed, epochs=30,
        )  # fmt: skip
        save_model(model, folder / "model")
    return open_model(folder / "model")


def network(arguments: argparse.Namespace, seed: int) -> Network:
    weights = arguments.weights or needed_data("resnet-cifar10", PUBLISHED[arguments.model])
    setting = repr((arguments.model, STAGES[arguments.model], SHARES, FIT_SHARE, BITS)).encode()
    key = hashlib.sha256(setting + weights.read_bytes()).hexdigest()[:12]
    folder = arguments.work / f"{arguments.model.removeprefix('zoo:')}-{key}" / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    dev = open_images(needed_data("cifar10-jpeg", "dev.zip"))
    return Network(fitted(arguments, weights, folder, seed), dev, split(dev, SHARES, seed), folder)


# --- choosing bits ---------------------------------------------------------------------------------------


def rises(sensitivity: Sensitivity, policies: list[Policy]) -> Losses:
    """Return the reach-matched rise of the loss under each policy, never falling as bits fall."""
    found = matched_losses(sensitivity, policies)
    for layer in {name for name, _ in found}:
        floor = np.zeros(len(policies))
        for bits in sorted(BITS, reverse=True):
            floor = np.maximum(floor, found[layer, Width(bits)])
            found[layer, Width(bits)] = tuple(floor)
    return found


def cost_table(net: Network, losses: Losses, policies: list[Policy], reference_error: float, scale: float) -> CostTable:
    """Return the table in which a second stands for one bit operation per multiply-accumulate of the trunk."""
    decisions = []
    for layer in net.decided:
        share = layer.shape.macs / net.trunk_macs
        options = [
            option(
                str(bits),
                loss=tuple(scale * value for value in losses[layer.name, Width(bits)]),
                latency_s=bits * share,
            )
            for bits in BITS
        ]
        decisions.append(decision(layer.name, *options, block=layer.segment))
    scenarios = tuple(scenario_of(one, reference_error, f"policy {index}") for index, one in enumerate(policies))
    return table(*decisions, scenarios=scenarios, fixed_latency_s=net.fixed_cost)


def solved(instance: CostTable, limit: float) -> Mix:
    budget = Budget(latency=(LatencyLimit(limit_s=limit),), minimize="drop")
    solution = solve(instance, budget)
    check(instance, budget, solution)
    return {one.subject: int(one.option) for one in solution.choices}


def scale_of(net: Network, losses: Losses, policies: list[Policy], mixes: list[Mix]) -> float:
    """Return points of accuracy per unit of loss, from mixes that were run."""
    unit = (1.0,) * len(net.model.segments)
    measured = []
    for mix in mixes:
        outputs = net.outputs(mix)["choose"]
        drops = [judge(outputs, anchored(outputs, one.reach), unit).error - one.error for one in policies]
        measured.append(({name: Width(bits) for name, bits in mix.items()}, drops))
    return loss_scale(losses, measured)


@dataclass(frozen=True)
class Chosen:
    """The mixes of all ways, with what explains them; the last round is a joint way's own answer."""

    unaware: dict[float, Mix]
    reach: list[dict[float, Mix]]
    aware: list[dict[float, Mix]]
    rank_agreement: float
    scales: list[float]


def joint_rounds(net: Network, losses: Losses, policies: list[Policy], reference_error: float) -> tuple[list, list]:
    """Return the mixes of each round for every level, and the points per unit of loss that each assumed."""
    ran = [dict.fromkeys((layer.name for layer in net.decided), bits) for bits in (3, 4)]
    rounds, scales = [], []
    for _ in range(ROUNDS):
        scales.append(scale_of(net, losses, policies, ran))
        joint = cost_table(net, losses, policies, reference_error, scales[-1])
        rounds.append({bits: solved(joint, SHARE * net.full_cost(bits)) for bits in LEVELS})
        ran += rounds[-1].values()
    return rounds, scales


def choose_mixes(net: Network) -> Chosen:
    exact = net.outputs({})["choose"]
    names = [layer.name for layer in net.decided]
    shares = net.segment_cost(dict.fromkeys(names, 1))
    never = judge(exact, (None,) * (exact.exits - 1), shares)
    policies = list(policy_pool(exact, shares))
    sensitivity = net.sensitivity()
    last, matched = rises(sensitivity, [never]), rises(sensitivity, policies)
    plain = cost_table(net, last, [never], never.error, 1.0)
    everywhere = {key: values * len(policies) for key, values in last.items()}
    reach, _ = joint_rounds(net, everywhere, policies, never.error)
    aware, scales = joint_rounds(net, matched, policies, never.error)
    middle = min(range(len(policies)), key=lambda index: abs(policies[index].cost - SHARE))
    keys = [(name, Width(3)) for name in names]
    return Chosen(
        unaware={bits: solved(plain, net.full_cost(bits)) for bits in UNAWARE_BITS},
        reach=reach,
        aware=aware,
        rank_agreement=spearmanr([last[key][0] for key in keys], [matched[key][middle] for key in keys]).statistic,
        scales=scales,
    )


# --- judging ---------------------------------------------------------------------------------------------


def _paid(outputs: ExitOutputs, policy: Policy, costs: tuple[float, ...]) -> tuple[float, np.ndarray]:
    """Return the mean cost and who is right."""
    taken = exits_taken(outputs, policy.thresholds)
    return float(np.cumsum(costs)[taken].mean()), outputs.correct[np.arange(len(taken)), taken]


def at_cost(outputs: dict[str, ExitOutputs], costs: tuple[float, ...], limit: float) -> Judged | None:
    """Return the mix at mean cost ``limit`` on the judging images, its policies searched on the choosing images.

    Between two policies that cost less and more, an image draws one of them. None where no policy is so cheap.
    """
    pool = list(policy_pool(outputs["choose"], costs))
    full = judge(outputs["choose"], (None,) * (len(costs) - 1), costs)
    pool += [full] if full.cost > pool[-1].cost else []
    seen = [_paid(outputs["judge"], policy, costs) for policy in pool]
    chosen = float(np.interp(limit, [one.cost for one in pool], [1.0 - one.error for one in pool]))
    for (cost, right), (dearer, more) in pairwise(seen):
        if cost <= limit <= dearer and dearer > cost:
            weight = (limit - cost) / (dearer - cost)
            mean = (1.0 - weight) * cost + weight * dearer
            return Judged((1.0 - weight) * right + weight * more, mean, chosen)
    return None


@dataclass(frozen=True)
class Row:
    """One seed at one level: each way's own mix and its best mix on the choosing images."""

    seed: int
    level: float
    images: np.ndarray
    unaware: Judged
    aware: Judged
    unaware_best: Judged
    reach_best: Judged
    aware_best: Judged


def best(candidates: list[Judged | None]) -> Judged:
    return max((one for one in candidates if one is not None), key=lambda one: one.chosen)


def judged_rows(net: Network, chosen: Chosen, seed: int) -> list[Row]:
    def judged(mix: Mix, limit: float) -> Judged | None:
        return at_cost(net.outputs(mix), net.segment_cost(mix), limit)

    rows = []
    for level in LEVELS:
        limit = SHARE * net.full_cost(level)
        unaware = {bits: judged(mix, limit) for bits, mix in chosen.unaware.items()}
        reach, aware = (
            [judged(mix, limit) for mixes in rounds for mix in mixes.values()]
            for rounds in (chosen.reach, chosen.aware)
        )
        own, other = judged(chosen.aware[-1][level], limit), unaware[level]
        if own is None or other is None:
            raise SystemExit(f"seed {seed}: no policy costs as little as {SHARE:.0%} of {level} bits")
        picked = best(list(unaware.values())), best(reach), best(aware)
        rows.append(Row(seed, level, net.parts["judge"], other, own, *picked))
        costs = np.array([one.cost for one in (other, own, *picked)])
        if np.abs(costs / limit - 1.0).max() > 0.01:
            raise SystemExit(f"seed {seed}: costs {costs} differ from {limit} by more than 1 %")
    return rows


def paired(rows: list[Row], pair: tuple[str, str]) -> tuple[float, float]:
    """Return the mean difference in points and its standard error, clustered by image."""
    total, weight = np.zeros(1 + max(int(row.images.max()) for row in rows)), 0
    for row in rows:
        difference = getattr(row, pair[1]).right.astype(float) - getattr(row, pair[0]).right
        total[row.images] += difference
        weight += len(difference)
    mean, seen = total.sum() / weight, np.zeros_like(total)
    for row in rows:
        seen[row.images] += 1
    return 100 * float(mean), 100 * float(np.sqrt(np.square(total - mean * seen).sum()) / weight)


# --- printing --------------------------------------------------------------------------------------------

OWN, BEST, WITHOUT = ("unaware", "aware"), ("unaware_best", "aware_best"), ("reach_best", "aware_best")


def accuracy(rows: list[Row], name: str) -> float:
    return 100 * float(np.mean([getattr(row, name).right.mean() for row in rows]))


def difference(rows: list[Row], pair: tuple[str, str]) -> str:
    return "{:+.2f} ±{:.2f}".format(*paired(rows, pair))


def print_rows(rows: list[Row]) -> None:
    print(f"\n{'accuracy at equal cost, %':25}{'own mix':^36}   {'best of its mixes on choosing images':^55}")
    header = ("seed", "level", "cost", "unaware", "edgeflex", "points", "unaware", "reach only", "edgeflex", "points")
    widths = (4, 12, 5, 9, 9, 14, 9, 11, 9, 14)
    print(" ".join(f"{name:>{width}}" for name, width in zip((*header, "over reach"), (*widths, 14), strict=True)))
    for seed in [*sorted({row.seed for row in rows}), None]:
        for level in LEVELS:
            some = [row for row in rows if row.level == level and seed in (row.seed, None)]
            print(
                f"{'mean' if seed is None else seed:>4} {f'{level} b x {SHARE:.0%}':>12} {some[0].aware.cost:5.2f} "
                f"{accuracy(some, 'unaware'):9.2f} {accuracy(some, 'aware'):9.2f} {difference(some, OWN):>14} "
                f"{accuracy(some, 'unaware_best'):9.2f} {accuracy(some, 'reach_best'):11.2f} "
                f"{accuracy(some, 'aware_best'):9.2f} {difference(some, BEST):>14} {difference(some, WITHOUT):>14}"
            )


def print_verdict(rows: list[Row]) -> None:
    few = [row for row in rows if row.level <= MARGIN_BITS]
    print(
        f"\nmargin: {MARGIN_POINTS:+.1f} points over exit-unaware bits at up to {MARGIN_BITS:g} bits, mean over seeds"
    )
    for name, pair in (("own mix", OWN), ("best of its mixes", BEST)):
        verdict = "met" if paired(few, pair)[0] >= MARGIN_POINTS else "MISSED"
        print(f"  {name:18} {difference(few, pair):>14}  {verdict};  at all levels {difference(rows, pair):>14}")
    print(f"  of which sensitivity at the exits, beside reach-weighted cost: {difference(few, WITHOUT)}")


def print_seed(net: Network, chosen: Chosen, seed: int, seconds: float) -> None:
    exact = net.outputs({})["judge"]
    print(
        f"\nseed {seed}: {', '.join(f'{len(rows)} {part}' for part, rows in net.parts.items())} images; float32 exits "
        f"{' '.join(f'{100 * one:.1f}' for one in exact.correct.mean(0))} %; rank correlation of the two "
        f"sensitivities at 3 bits {chosen.rank_agreement:.2f}; points per unit of loss "
        f"{', then '.join(f'{100 * one:.0f}' for one in chosen.scales)}; {seconds:.0f} s"
    )
    mixes = [(f"unaware {bits} b", chosen.unaware[bits]) for bits in LEVELS]
    mixes += [(f"edgeflex {bits} b x {SHARE:.0%}", chosen.aware[-1][bits]) for bits in LEVELS]
    for name, mix in mixes:
        by_segment = [
            np.average(
                [mix[one.name] for one in net.decided if one.segment == segment],
                weights=[one.shape.macs for one in net.decided if one.segment == segment],
            )
            for segment in range(len(net.model.segments))
        ]
        print(f"  {name:20} average bits by segment {' '.join(f'{one:.2f}' for one in by_segment)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what is computed stays here, for later runs")
    parser.add_argument("--model", choices=sorted(STAGES), default="zoo:resnet20")
    parser.add_argument("--weights", type=Path, help="the published checkpoint by default")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in range(arguments.seeds):
        began = time.perf_counter()
        net = network(arguments, seed)
        chosen = choose_mixes(net)
        found = judged_rows(net, chosen, seed)
        print_seed(net, chosen, seed, time.perf_counter() - began)
        rows += found
        sys.stdout.flush()
    print_rows(rows)
    print_verdict(rows)


if __name__ == "__main__":
    main()
