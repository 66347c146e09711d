"""What a run of a decoder may choose beside its plan, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgeflex.errors import InputError
from edgeflex.runtimes.engines import DEVICE_POLICY
from edgeflex.runtimes.policies import POLICIES, unknown_policies
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from edgeflex.schema_moe import DecoderPlan


class Settled(NamedTuple):
    """What a run does: its own choices, and the plan's where it made none; see ``Settings``."""

    policy: str
    cache_bytes: int
    threads: int
    prefetch_depth: int
    context_tokens: int
    chunk_tokens: int


@dataclass(frozen=True)
class Settings:
    """What a run may choose beside its bundle; None takes the plan's.

    Args:
        cache_bytes: Limit on the bytes of experts in memory.
        policy: Of the expert cache; on a device also ``reuse``, which is then used unless another is named.
        threads: Of the kernels.
        prefetch_depth: Layers ahead whose experts are guessed and read early; 0 reads nothing early.
        prefetch_by: How they are guessed: from ``statistics`` of what layers used together, or by the ``router`` of
            those layers, run early.
        context_tokens: Tokens of prompt and answer together.
        chunk_tokens: Tokens of a prompt that are read in one pass.
        seed: Of the policy ``random``.
        static: For the policy ``static``: (layer, expert) pairs, the most valuable first.
        prefetch_worth: Share of the early read bytes that must get used; below it reading early stops.
        record: Keep every event, for a trace.
        device: Where the decoder runs: None is the processor, ``cuda`` a GPU through PyTorch, ``cpu-torch`` the
            processor in a GPU's place. On a device ``cache_bytes`` is what the processor's memory holds of experts.
        vram_bytes: Limit on all that is taken of the device's memory; None takes most of what is free.
        device_rule: What becomes of experts that the device lacks: the quickest mix (``auto``), all copied
            (``upload``), all computed by the processor (``cpu``), or a fixed placement (``static``).
        device_precision: Of the device's products, ``fp32`` or ``bf16``.
        device_parts: What ``runtimes.cuda_session.open_device`` takes beside; for tests of faults.
    """

    cache_bytes: int | None = None
    policy: str | None = None
    threads: int | None = None
    prefetch_depth: int | None = None
    context_tokens: int | None = None
    chunk_tokens: int | None = None
    seed: int = 0
    static: Iterable[tuple[int, int]] | None = None
    prefetch_worth: float = 0.5
    prefetch_by: Literal["statistics", "router"] = "statistics"
    record: bool = False
    device: str | None = None
    vram_bytes: int | None = None
    device_rule: str = "auto"
    device_precision: str | None = None
    device_parts: Mapping[str, object] | None = None

    def settled(self, plan: DecoderPlan) -> Settled:
        """Return these choices, with the plan's where there are none.

        Raises:
            InputError: A setting is impossible; all that are stand in one error.
        """
        context_tokens = plan.context_tokens if self.context_tokens is None else self.context_tokens
        chunk_tokens = plan.prefill_chunk_tokens if self.chunk_tokens is None else self.chunk_tokens
        planned_bytes = plan.alone_cache_bytes if self.device is None else plan.cache_bytes
        settled = Settled(
            policy=self.policy or plan.policy,
            cache_bytes=planned_bytes if self.cache_bytes is None else self.cache_bytes,
            threads=plan.threads if self.threads is None else self.threads,
            prefetch_depth=plan.prefetch_depth if self.prefetch_depth is None else self.prefetch_depth,
            context_tokens=context_tokens,
            chunk_tokens=min(chunk_tokens, context_tokens),
        )
        faults = [*_too_small(settled), *self._of_another_place()]
        ordered = self.static is not None or self.device is not None
        known = [name for name in POLICIES if ordered or name != "static"]
        if settled.policy == "static" and not ordered:
            faults.append(f"policy 'static' has no order of worth here. Name one of: {', '.join(known)}.")
        else:
            faults += unknown_policies([settled.policy], known if self.device is None else [*known, DEVICE_POLICY])
        if faults:
            raise InputError.collect("the run's settings", faults)
        return settled

    def _of_another_place(self) -> list[str]:
        """Return what was named for a device without one, or for the processor beside one."""
        faults = []
        if self.device is not None and self.prefetch_depth is not None:
            faults.append(
                "reading experts early is for the processor, and a device was named: it copies ahead by itself; leave "
                "--prefetch out"
            )
        if self.device is None and self.vram_bytes is not None:
            size = format_bytes(self.vram_bytes)
            faults.append(f"--vram {size} is of a GPU's memory. Name it with --device cuda, or leave it out")
        return faults


def _too_small(settled: Settled) -> list[str]:
    return [
        f"{value} {what}: at least {least} is needed"
        for value, what, least in (
            (settled.threads, "threads", 1),
            (settled.prefetch_depth, "layers of prefetch", 0),
            (settled.context_tokens, "tokens of context", 2),
            (settled.chunk_tokens, "tokens of a prompt's chunk", 1),
        )
        if value < least
    ]
