"""The nouns of decoders on a machine with a GPU: where experts live, what is held there, and what a run did.

Units as in ``schema``.
"""

from collections.abc import Mapping
from typing import Literal

from edgeflex.schema import DeviceProfile, Noun

PolicyName = str


class HeldBytes(Noun):
    """Bytes by what they are for, and nothing else. Their sum is what is promised."""

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return sum(int(getattr(self, name)) for name in type(self).model_fields)


class GpuMemory(HeldBytes):
    """Bytes of a GPU's memory; ``context_bytes`` is what the driver and its libraries keep for themselves."""

    dense_bytes: int
    arena_bytes: int
    kv_bytes: int
    activations_bytes: int
    context_bytes: int


PlacementName = Literal["resident", "static", "cpu", "cache"]


class PlacementTrial(Noun):
    """One way to place experts that was run in virtual time at the plan's budget; seconds per decoded token."""

    placement: PlacementName
    policy: PolicyName
    exclusive: bool
    token_s: float


class GpuPlacement(Noun):
    """Where experts live on a machine with a GPU, decided in virtual time.

    ``resident``: all in the GPU's memory. ``static``: a fixed list there, the rest is copied for an event or computed
    by the processor, whichever ends sooner. ``cpu``: a fixed list there, the processor computes all others. ``cache``:
    experts come and go. ``rule`` is what a run does with misses. ``order`` are (layer, expert), the most used first,
    which a fixed list is filled from. Bytes are per decoded token: copied for an event, copied ahead, read from flash.
    ``origin`` is ``measured`` only where every figure is. ``crossing`` is the least share of experts in the GPU's
    memory, among those tried, from which on a fixed list is as quick as a cache, within half a percent, or quicker.
    """

    device: str
    origin: Literal["measured", "datasheet"]
    profile: DeviceProfile
    given_link_bytes_per_s: float | None = None
    given_ram_bytes_per_s: float | None = None
    placement: PlacementName
    policy: PolicyName
    rule: Literal["auto", "upload", "static"]
    vram_cache_bytes: int
    ram_cache_bytes: int
    exclusive: bool
    one_memory: bool
    memory: GpuMemory
    order: tuple[tuple[int, int], ...] = ()
    upload_bytes: float
    ahead_bytes: float
    flash_bytes: float
    waited: Mapping[str, float]
    trials: tuple[PlacementTrial, ...]
    tried: int
    crossing: float | None = None
    assumptions: tuple[str, ...]


# --- measured ----------------------------------------------------------------------------------------


class EventTime(Noun):
    """One event that lacked experts on a device, in seconds: when it was over, and how long each resource worked.

    Resources stand in the order gpu, cpu, link, disk.
    """

    layer: int
    decoding: bool
    predicted_s: float
    actual_s: float
    predicted_busy_s: tuple[float, float, float, float]
    actual_busy_s: tuple[float, float, float, float]


class PredictionError(Noun):
    """How far predictions were from what was measured, relative to that; ``bias`` above 0: predicted too long."""

    samples: int
    bias: float
    mean_error: float
    p90_error: float


class DeviceRecord(Noun):
    """What a device with a memory of its own did with experts while it was benchmarked.

    Counts are of decoding in all repeats, ``host_experts`` of prompts too. Of some passes each event that lacked
    experts was watched: ``pass_s`` are those passes' seconds, ``event_s`` those of their events; ``busy_s`` are seconds
    of work by resource in events (of the link also between them), ``waited_s`` seconds of events without;
    ``exposed_s`` seconds of copying during which nobody computed. ``sample`` are such events, drawn from ``sampled``,
    prompts' among them; ``errors`` are of its decoded part, by resource and of whole events (``event``), and ``prompt``
    of events of prompts.
    ``bound_token_s`` is what no cache and no scheduler can beat on the measured curves, dense parts not counted.
    ``peak_bytes`` is None where nobody counted.
    """

    name: str
    rule: str
    policy: str
    exclusive: bool
    pinned: bool
    requested_bytes: int | None
    planned_bytes: int
    peak_bytes: int | None
    vram_bytes: int
    ram_bytes: int
    tokens: int
    token_s: float
    lookups: int
    gpu_hits: int
    host_experts: int
    upload_bytes: int
    ahead_bytes: int
    flash_bytes: int
    passes: int
    pass_s: float
    events: int
    event_s: float
    busy_s: Mapping[str, float]
    waited_s: Mapping[str, float]
    exposed_s: float
    bound_token_s: float | None
    sample: tuple[EventTime, ...]
    sampled: int
    errors: Mapping[str, PredictionError] = {}

    @property
    def hidden_share(self) -> float | None:
        """The share of copying during which something was computed; None where nothing was copied."""
        link_s = self.busy_s.get("link", 0.0)
        return max(0.0, 1.0 - self.exposed_s / link_s) if link_s > 0 else None

    @property
    def bound_share(self) -> float | None:
        """The bound over the mean time of a token; None without either."""
        return self.bound_token_s / self.token_s if self.bound_token_s is not None and self.token_s > 0 else None
