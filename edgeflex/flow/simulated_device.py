"""A machine with a GPU that need not be at hand: a calibration's trace on its figures, in virtual time."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from edgeflex.errors import InputError
from edgeflex.flow.decoders import PLANNED
from edgeflex.schema import Interval, Link, Tier
from edgeflex.units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.flow.traces import Replays
    from edgeflex.plans.decoder_costs import Times
    from edgeflex.plans.decoder_device import DeviceBound, DevicePoint, Division, Serving
    from edgeflex.plans.decoder_gpu import Machine as Planned
    from edgeflex.runtimes.curves import Curve
    from edgeflex.runtimes.strategies import Machine, Strategy
    from edgeflex.runtimes.trace import Trace
    from edgeflex.runtimes.virtual import VirtualRun
    from edgeflex.schema import DeviceProfile, Figure
    from edgeflex.schema_moe import DecoderGraph, DecoderRates

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    End = Literal["slow", "likely", "fast"]

_REPLAYED_USES = 16_000  # of experts, prompts included: enough for a mean, few enough for many runs
_EVENTS = 20_000  # of all runs of one plan together
_LEAST_RUNS = 10
_OTHER_TEXT = 0.10  # how far other text may be from the trace, as ``plans.decoder_predict.Doubts.traffic``
_CHUNK = 64  # tokens of a prompt's pass where none is asked about
_ROWS = (1, 4, 16, 64, 256)
# seconds of measured kernels on another day, as ``plans.decoder_predict.Doubts.rates``
_KERNELS: dict[End, float] = {"slow": 1.1, "likely": 1.0, "fast": 0.9}
# from an expert's end on the processor until the GPU has its rows: a call, a small copy and its launch
_RETURN_S: dict[End, float] = {"slow": 30e-6, "likely": 15e-6, "fast": 7.5e-6}


def of_calibrated_computer(profile: DeviceProfile, rates: DecoderRates) -> bool:
    """Return whether a machine's processor is the calibrated one; a card alone is put into that computer."""
    return profile.cpu_model is None or profile.cpu_model == rates.device


def is_upward(link: Link) -> bool:
    """Return whether a link leads from the processor's memory to the GPU's."""
    return (link.source, link.target) == (Tier.HOST, Tier.DEVICE)


def two_memories(profile: DeviceProfile) -> DeviceProfile:
    """Return a machine of one memory as if the GPU's were its own; what is read into it costs no copy beyond that."""
    host = next((spec for spec in profile.tiers if spec.tier is Tier.HOST), None)
    if host is None or host.read_bytes_per_s is None:
        raise InputError(f"device {profile.name!r} has no rate of its memory. Profile it, or name another.")
    link = Link(source=Tier.HOST, target=Tier.DEVICE, bytes_per_s=host.read_bytes_per_s)
    own = host.model_copy(update={"tier": Tier.DEVICE})
    tiers = (*(spec for spec in profile.tiers if spec.tier is not Tier.DEVICE), own)
    return profile.model_copy(update={"unified_memory": False, "tiers": tiers, "links": (link,)})


@dataclass
class SimulatedDevice:
    """Runs a calibration's trace in virtual time; every question is run once. See ``VirtualDevice`` of the planner.

    The first quarter of the decoded tokens says which experts are popular, and the rest is judged.

    Args:
        graph: Of the decoder.
        rates: Of the computer that calibrated.
        profile: ``completed``.
        replays: Of the calibration's trace.
        uses: Share of decoded tokens that use each expert, [layers, experts].
        prompt_tokens: Of the prompt whose first token is asked about.
        link_bytes_per_s: Given instead of the profile's, or None.
        ram_bytes_per_s: Likewise.
        most_uses: Of experts in the part of the trace that is run.
    """

    graph: DecoderGraph
    rates: DecoderRates
    profile: DeviceProfile
    replays: Replays
    uses: Floats
    prompt_tokens: int
    link_bytes_per_s: float | None = None
    ram_bytes_per_s: float | None = None
    most_uses: int = _REPLAYED_USES

    def __post_init__(self) -> None:
        """Start with nothing run."""
        self._runs: dict[tuple[object, ...], VirtualRun] = {}
        self._machines: dict[tuple[bytes, End], Machine] = {}
        self._bounds: dict[tuple[bytes, Division], DeviceBound] = {}
        self._worth: dict[bytes, tuple[Floats, Floats]] = {}

    # --- what the planner asks ---------------------------------------------------------------------------

    @property
    def most_runs(self) -> int:
        """Runs that a plan may take."""
        return max(_LEAST_RUNS, _EVENTS // max(1, len(self.trace.events)))

    def point(self, sizes: Ints, division: Division, serving: Serving) -> DevicePoint:
        """Return what the trace comes to, per decoded token."""
        from edgeflex.plans.decoder_device import DevicePoint

        run = self._run(sizes, division, serving, "likely")
        return DevicePoint(
            token_s=run.mean_s,
            hit_rate=run.hit_rate,
            upload_bytes=run.upload_bytes,
            ahead_bytes=run.ahead_bytes,
            flash_bytes=run.flash_bytes,
            waited={str(resource): share for resource, share in run.waited.items()},
        )

    def interval(self, sizes: Ints, division: Division, serving: Serving) -> Interval:
        """Return the seconds of a token, from all rates at their upper to all at their lower end, and a part for text.

        That part is twice the mean's standard error over the judged tokens, and a tenth for other text, in squares.
        """
        value = self._run(sizes, division, serving, "likely")
        low, high = (self._run(sizes, division, serving, end).mean_s for end in ("fast", "slow"))
        spread = statistics.pstdev(value.token_s) / max(value.mean_s, 1e-12) if len(value.token_s) > 1 else 0.0
        doubt = min(0.5, math.hypot(_OTHER_TEXT, 2.0 * spread / math.sqrt(len(value.token_s))))
        return Interval(
            value=value.mean_s,
            low=min(value.mean_s, low) * (1.0 - doubt),
            high=max(value.mean_s, high) * (1.0 + doubt),
        )

    def first_token(self, sizes: Ints, division: Division, serving: Serving, chunk_tokens: int) -> Interval:
        """Return the seconds to the first token, the bundle being open; what was not read then is read first."""
        seconds = {end: self._first_s(sizes, division, serving, chunk_tokens, end) for end in _KERNELS}
        value = seconds["likely"]
        return Interval(value=value, low=min(seconds.values()), high=max(seconds.values()))

    def bound(self, sizes: Ints, division: Division) -> DeviceBound:
        """Return what no cache and no scheduler can beat on the judged part."""
        from edgeflex.plans.decoder_device import DeviceBound
        from edgeflex.runtimes.tier_bounds import time_bound

        key = (sizes.tobytes(), division)
        if key not in self._bounds:
            machine = self._machine(sizes, "likely")
            found = time_bound(
                self.trace,
                machine.curves,
                division.vram_bytes,
                division.ram_bytes,
                exclusive=division.exclusive,
                sizes=sizes,
                dense_s=self._layers * machine.dense(1) + machine.token_s,
                first_step=self._first_step,
            )
            misses = found.traffic.gpu_misses
            rate = None if misses is None else 1.0 - misses / max(1, found.traffic.lookups)
            self._bounds[key] = DeviceBound(found.token_s, rate)
        return self._bounds[key]

    def estimate_s(self, sizes: Ints, division: Division) -> float:
        """Return a guess from use counts, as if a fixed list of the most used experts lay in each memory."""
        machine = self._machine(sizes, "likely")
        held, found = self._by_worth(sizes)
        curves, both = machine.curves, division.vram_bytes + division.ram_bytes
        if not division.exclusive:
            both = max(division.vram_bytes, division.ram_bytes)
        on_gpu, in_either = (self._share(held, found, size) for size in (division.vram_bytes, both))
        size = self._mean_size(sizes)
        missed = min(curves.cpu_s(1), curves.link_s(size) + curves.gpu_s(1))
        expert_s = on_gpu * curves.gpu_s(1) + (1.0 - on_gpu) * missed
        if in_either < 1.0:
            expert_s += (1.0 - in_either) * curves.disk_s(size)
        layers = self._layers * machine.dense(1) + machine.token_s
        return layers + float(self.uses.sum()) * expert_s

    def described(self) -> Planned:
        """Return the machine as the planner takes it."""
        from edgeflex.plans.decoder_gpu import Machine as Planned
        from edgeflex.runtimes.virtual import popular

        reads = {spec.tier: spec.read_bytes_per_s for spec in self._seen.tiers}
        gpu = reads.get(Tier.DEVICE)
        links = [one.bytes_per_s.value for one in self._seen.links if is_upward(one)]
        self._refuse_gaps()
        return Planned(
            profile=self.profile,
            device=self,
            gpu_bytes_per_s=gpu.value if gpu is not None else 1.0,
            link_bytes_per_s=self.link_bytes_per_s or max(links, default=1.0),
            one_memory=bool(self.profile.unified_memory),
            threads=self.threads,
            order=popular(self.replays.trace(_CHUNK), 1 << 62),
            assumptions=tuple(self._assumptions()),
            given_link_bytes_per_s=self.link_bytes_per_s,
            given_ram_bytes_per_s=self.ram_bytes_per_s,
        )

    def _refuse_gaps(self) -> None:
        """Refuse a profile that lacks a rate; all that are missing are named."""
        from edgeflex.runtimes.boards import ExpertShape, curves_of

        shape = ExpertShape(1 << 20, 1 << 21)
        curves_of(self._seen, shape, ram_bytes_per_s=self.ram_bytes_per_s, link_bytes_per_s=self.link_bytes_per_s)

    # --- the trace -----------------------------------------------------------------------------------------

    @cached_property
    def trace(self) -> Trace:
        """The part of the trace that is run."""
        whole = trimmed(self.replays.trace(_CHUNK), self.most_uses)
        if not whole.decode_tokens:
            raise InputError("the calibration's routing has no decoded token to plan from. Calibrate on more text.")
        return whole

    @cached_property
    def _first_step(self) -> int:
        from edgeflex.runtimes.virtual import first_judged_step

        return first_judged_step(self.trace)

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        from edgeflex.runtimes.virtual import popular

        return popular(self.trace, self._first_step)

    @property
    def _layers(self) -> int:
        return sum(layer.routing is not None for layer in self.graph.layers)

    def _run(self, sizes: Ints, division: Division, serving: Serving, end: End) -> VirtualRun:
        from edgeflex.runtimes.virtual import run_virtual

        key = (sizes.tobytes(), division, serving, end)
        if key not in self._runs:
            self._runs[key] = run_virtual(
                self.trace,
                self._machine(sizes, end),
                _strategy(serving),
                vram_bytes=division.vram_bytes,
                ram_bytes=division.ram_bytes,
                exclusive=division.exclusive,
                sizes=sizes,
                order=self._order,
                first_step=self._first_step,
            )
        return self._runs[key]

    def _first_s(self, sizes: Ints, division: Division, serving: Serving, chunk: int, end: End) -> float:
        """Return the seconds of a prompt: its passes with the tiers filled, and the reads that fill them before.

        A fixed list is read when the bundle is opened; a cache begins empty.
        """
        from edgeflex.runtimes.virtual import run_virtual

        key = (sizes.tobytes(), division, serving, end, chunk)
        prompt = self.replays.first_prompt(chunk)
        if key not in self._runs:
            self._runs[key] = run_virtual(
                prompt,
                self._machine(sizes, end),
                _strategy(serving),
                vram_bytes=division.vram_bytes,
                ram_bytes=division.ram_bytes,
                exclusive=division.exclusive,
                sizes=sizes,
                order=self._order,
            )
        seconds = self._runs[key].prompt_s * self.replays.scale
        if serving.policy == "static":
            return seconds
        used = {(int(layer), int(expert)) for layer, expert in zip(prompt.layer, prompt.expert, strict=True)}
        read = min(sum(int(sizes[one]) for one in used) * self.replays.scale, float(sizes.sum()))
        return seconds + read / self._machine(sizes, end).curves.disk_bytes_per_s

    # --- its figures ---------------------------------------------------------------------------------------

    @cached_property
    def _seen(self) -> DeviceProfile:
        return two_memories(self.profile) if self.profile.unified_memory else self.profile

    @property
    def threads(self) -> int:
        """Threads of the processor: the quickest of those measured where it is the calibrated one."""
        if not of_calibrated_computer(self.profile, self.rates):
            return max(1, self.profile.cores or 1)
        return min(self._times.threads, key=lambda n: (float(self._kernels_s(n)[0]), n))

    def _machine(self, sizes: Ints, end: End) -> Machine:
        """Return the machine for experts of these sizes: all costs are those of the expert of mean size, by use."""
        from edgeflex.runtimes.boards import ExpertShape, curves_of

        key = (sizes.tobytes(), end)
        if key in self._machines:
            return self._machines[key]
        slower = self._in_slices(sizes)
        shape = ExpertShape(self._mean_size(sizes), self._mean_macs, self._layer_bytes, self._slices, slower)
        given = {"ram_bytes_per_s": self.ram_bytes_per_s, "link_bytes_per_s": self.link_bytes_per_s}
        found = curves_of(self._seen, shape, end=end, **given)
        head = curves_of(self._seen, replace(shape, dense_bytes=self._head_bytes), end=end, **given)
        if of_calibrated_computer(self.profile, self.rates):
            found = replace(found, curves=replace(found.curves, cpu=self._cpu(sizes, end)))
        # either part of a divided expert pays a launch, and the processor's is brought to the GPU
        self._machines[key] = replace(found, token_s=head.dense(1), part_s=found.part_s + _RETURN_S[end])
        return self._machines[key]

    def _mean_size(self, sizes: Ints) -> int:
        return round(float((self.uses * sizes).sum() / max(self.uses.sum(), 1e-12)))

    @cached_property
    def _mean_macs(self) -> int:
        dims = [layer.expert_dim for layer in self.graph.layers if layer.routing is not None]
        return round(3 * self.graph.hidden_dim * sum(dims) / max(1, len(dims)))

    @cached_property
    def _slices(self) -> int:
        """In how many slices experts lie at the least, so that they are divided nowhere else."""
        from edgeflex.runtimes.division import slices_of

        return min((slices_of(layer.expert_dim) for layer in self.graph.layers if layer.routing is not None), default=1)

    def _in_slices(self, sizes: Ints) -> float:
        """Return how much longer the processor takes over experts in slices than over whole ones, the mean by use."""
        from edgeflex.plans.decoder_gpu_memory import slot_bytes
        from edgeflex.runtimes.division import cpu_in_slices

        total = weight = 0.0
        for place, shapes in self._pairs():
            for precision in PLANNED:
                share = float(self.uses[place][sizes[place] == slot_bytes(precision, shapes)].sum())
                total, weight = total + share * cpu_in_slices(precision), weight + share
        return total / weight if weight else 1.0

    @cached_property
    def _layer_bytes(self) -> int:
        """Bytes that a layer reads beside its experts: matrices as bfloat16, and keys and values of the prompt."""
        attention, number_bytes = self.graph.attention, 2
        shapes = self.graph.matrix_shapes()
        dense = [one for name, one in shapes.items() if name.startswith("layers.") and ".experts." not in name]
        weights = sum(rows * columns for rows, columns in dense)
        width = attention.kv_heads * (attention.head_dim + attention.value_dim)
        read = weights + len(self.graph.layers) * width * self.prompt_tokens
        return number_bytes * read // max(1, self._layers)

    @property
    def _head_bytes(self) -> int:
        return 2 * self.graph.vocabulary * self.graph.hidden_dim

    @cached_property
    def _times(self) -> Times:
        from edgeflex.plans.decoder_costs import Times

        return Times(self.rates)

    def _pairs(self) -> Iterator[tuple[int, tuple[tuple[int, int], tuple[int, int]]]]:
        hidden = self.graph.hidden_dim
        for place, layer in enumerate(self.graph.layers):
            if layer.routing is not None:
                yield place, ((2 * layer.expert_dim, hidden), (hidden, layer.expert_dim))

    def _kernels_s(self, threads: int, sizes: Ints | None = None) -> Floats:
        """Return the processor's seconds of an expert of mean use for ``_ROWS``, as measured by the calibration."""
        import numpy as np

        from edgeflex.plans.decoder_gpu_memory import slot_bytes

        rows, total, weight = np.array(_ROWS, dtype=np.float64), np.zeros(len(_ROWS)), 0.0
        for place, shapes in self._pairs():
            for precision in PLANNED:
                if not all(self._times.has(shape, precision) for shape in shapes):
                    continue
                mine = slice(None) if sizes is None else sizes[place] == slot_bytes(precision, shapes)
                share = float(self.uses[place][mine].sum())
                if share:
                    total += share * sum(
                        self._times.seconds(shape, precision, threads, rows, expert=True) for shape in shapes
                    )
                    weight += share
        return total / max(weight, 1e-12)

    def _cpu(self, sizes: Ints, end: End) -> Curve:
        import numpy as np

        from edgeflex.runtimes.curves import Curve

        seconds = np.maximum.accumulate(self._kernels_s(self.threads, sizes)) * _KERNELS[end] + _RETURN_S[end]
        return Curve(tuple(zip(map(float, _ROWS), seconds.tolist(), strict=True)))

    def _by_worth(self, sizes: Ints) -> tuple[Floats, Floats]:
        """Return running sums of bytes and of shares of use, the most used expert first."""
        import numpy as np

        key = sizes.tobytes()
        if key not in self._worth:
            order = np.argsort(-self.uses, axis=None, kind="stable")
            held = np.concatenate([[0.0], np.cumsum(sizes.ravel()[order])])
            found = np.concatenate([[0.0], np.cumsum(self.uses.ravel()[order])])
            self._worth[key] = held, found / max(float(found[-1]), 1e-12)
        return self._worth[key]

    @staticmethod
    def _share(held: Floats, found: Floats, size_bytes: int) -> float:
        import numpy as np

        return float(np.interp(size_bytes, held, found))

    def _assumptions(self) -> Iterator[str]:
        rows = [(f"memory of the {one.tier.value}", one.read_bytes_per_s) for one in self.profile.tiers]
        rows += [("copies to the GPU", one.bytes_per_s) for one in self.profile.links if is_upward(one)]
        rows += [("reads from flash", max((x.bytes_per_s for x in self.profile.storage), key=_value, default=None))]
        for name, figure in rows:
            given = {"memory of the host": self.ram_bytes_per_s, "copies to the GPU": self.link_bytes_per_s}.get(name)
            if given is None and figure is not None:
                yield f"{name}: {format_bytes(figure.value)} per second, {figure.origin}, {figure.source}"
        for name, given in (("memory of the host", self.ram_bytes_per_s), ("copies to the GPU", self.link_bytes_per_s)):
            if given is not None:
                yield f"{name}: {format_bytes(given)} per second, as given"
        if of_calibrated_computer(self.profile, self.rates):
            took = f"what {self.rates.device} took when it was measured with {format_count(self.threads, 'thread')}"
            yield f"the processor's experts take {took}, and 15 µs until the GPU has their rows"
        else:
            yield "the processor's experts take what its memory's rate allows; no kernel was timed there"
        if self._slices > 1:
            parts = f"one missing expert of an event may be divided between processor and GPU, in {self._slices} slices"
            yield f"{parts}, where RAM holds every expert"
        yield "of a data sheet's rate 80 % is reached, 60 to 95 %; launches take half to twice what is usual"
        yield "the driver's context on the GPU, and PyTorch in the processor's memory, are taken at 512 MiB and 1 GiB"


def _value(figure: Figure) -> float:
    return figure.value


def _strategy(serving: Serving) -> Strategy:
    from edgeflex.runtimes.strategies import Strategy
    from edgeflex.runtimes.virtual import HORIZON

    if serving.placement == "cpu":
        return Strategy("static")
    if serving.policy == "lru":
        return Strategy("lru")
    if serving.placement == "cache":
        return Strategy("ours", horizon=HORIZON)
    return Strategy("ours", static=True)


def trimmed(trace: Trace, most_uses: int) -> Trace:
    """Return the beginning of a trace: whole texts, and of the last one the prompt and what fits of the rest.

    The first text's prompt does not count, so that there is enough decoding after it.

    Args:
        trace: Of texts, each a prompt and what was decoded after it.
        most_uses: Of experts; about so many are kept.
    """
    import numpy as np

    kept = np.zeros(len(trace.turn), dtype=np.bool_)
    left = most_uses
    for turn in np.unique(trace.turn):
        mine = trace.turn == turn
        count = int(mine.sum())
        if count <= left:
            kept |= mine
            left -= count
            continue
        prompts = int((mine & (trace.phase == 0)).sum())
        share = max(0.0, left - prompts) / max(1, count - prompts)
        if not kept.any():
            share = max(share, min(1.0, most_uses / max(1, count - prompts)))
        if share > 0.0:
            steps = np.unique(trace.step[mine & (trace.phase == 1)])
            last = steps[: max(1, int(share * len(steps)))][-1] if len(steps) else -1
            kept |= mine & ((trace.phase == 0) | (trace.step <= last))
        break
    columns = ("turn", "phase", "step", "layer", "iter", "slot", "expert", "weight")
    return replace(trace, **{name: getattr(trace, name)[kept] for name in columns})
