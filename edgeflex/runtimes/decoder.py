"""Runs a decoder's bundle: dense weights in memory, experts through the cache, tokens one by one.

``DecoderSession`` needs NumPy, this processor's native engine, ONNX Runtime or TensorRT (the bundle's backend says
which) and, for text, the package ``tokenizers``; it imports neither torch nor ExecuTorch's binding. What it generates
does not depend on the size of the cache, the policy, prefetching or threads.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.bundle_moe import TOKENIZER, open_decoder_bundle
from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.files import sha256_file
from edgeflex.progress import Silent
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.engines import DeviceRequest, open_device, open_engine, require_engine
from edgeflex.runtimes.expert_cache import ExpertCache
from edgeflex.runtimes.generation import Run, alone, counted_since
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.policies import make_policy
from edgeflex.runtimes.prefetch import EarlyRouter, Predictor
from edgeflex.runtimes.recorder import memory_now
from edgeflex.runtimes.residency import Pass, Residency, cache_limit, trace_of
from edgeflex.runtimes.sampling import Sampler, TextStream, load_tokenizer
from edgeflex.schema import Conditions
from edgeflex.schema_moe import DecoderRunStats

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.progress import Progress
    from edgeflex.runtimes.engines import DecoderEngine, DeviceStats
    from edgeflex.runtimes.generation import StoppedBy
    from edgeflex.runtimes.packed import PackedStore
    from edgeflex.runtimes.prefetch import Guesser
    from edgeflex.runtimes.sampling import Decoding
    from edgeflex.runtimes.trace import Trace
    from edgeflex.schema_moe import DecoderManifest

logger = logging.getLogger(__name__)

_DRAIN_PASSES = 32  # the engine's log of events is emptied at least so often


class DecoderSession:
    """A bundle ready to answer; a context manager that loads inside ``with``. One generation at a time.

    Threads that share a session wait for each other's calls, and for each other's tokens one by one.

    Attributes:
        control: Held while engine and cache are used.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        settings: What differs from the plan.
        progress: Told about packing, which happens once per bundle and processor.
        mover: Makes the readers of the arena; a test of faults gives its own.
        clock: Seconds, rising.

    Raises:
        InputError: A setting is impossible.
        UnsupportedError: No engine runs the bundle's backend.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        settings: Settings | None = None,
        *,
        progress: Progress | None = None,
        mover: Callable[..., Mover] = Mover,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        plan, chosen = manifest.plan, settings or Settings()
        self.control = threading.RLock()
        self.folder = folder
        self.manifest = manifest
        settled = chosen.settled(plan)
        self.policy, self.cache_bytes = settled.policy, settled.cache_bytes
        self.threads, self.prefetch_depth = settled.threads, settled.prefetch_depth
        self.context_tokens, self.chunk_tokens = settled.context_tokens, settled.chunk_tokens
        require_engine(folder, manifest)
        self._settings = chosen
        self._progress = progress or Silent()
        self._make_mover = mover
        self._clock = clock
        self._memory = memory_now()
        self._engine: DecoderEngine | None = None
        self._experts: Residency | None = None
        self._store: PackedStore | None = None
        self._dense: NDArray[np.uint8] | None = None
        self._device_stats: Callable[[], DeviceStats] | None = None
        self._unseen_bytes: Callable[[], int] = int
        self._load_s = 0.0
        self._position = 0
        self._unread: list[int] = []  # answered, and not yet in the key-value cache
        self._disturbed = False
        self._run: Run | None = None

    @classmethod
    def from_bundle(
        cls, path: str | Path, settings: Settings | None = None, *, progress: Progress | None = None
    ) -> DecoderSession:
        """Return a session over the bundle in ``path``, to be entered with ``with``.

        Raises:
            InputError: ``path`` is no folder, or a setting is impossible.
            UnsupportedError: No engine runs the bundle's backend.
            BundleError: The manifest is absent or damaged or not a decoder's, or a file is missing or of another size.
        """
        bundle = open_decoder_bundle(Path(path))
        return cls(bundle.path, bundle.manifest, settings, progress=progress)

    # --- opening and closing --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Load the dense weights, packing all weights first where that was never done for this processor.

        Raises:
            BundleError: A file is missing or damaged.
            DeviceError: The disk is full or fails, or memory is short.
            InputError: The cache does not hold one expert, or the policy is unknown.
        """
        start = self._clock()
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        self._load_s = self._clock() - start
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    @alone
    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self._experts is not None:
            self._experts.close()
        if self._engine is not None:
            self._engine.close()
        self._engine = self._experts = self._store = self._device_stats = None
        self._dense = None
        self._unseen_bytes = int
        self._run, self._position, self._unread = None, 0, []

    @property
    def load_s(self) -> float:
        """Seconds that loading took; 0 before ``with``."""
        return self._load_s

    @property
    def position(self) -> int:
        """Tokens in the key-value cache."""
        return self._position

    @property
    def unseen_bytes(self) -> int:
        """Bytes of the machine's memory that the session holds and the system does not count as this process's.

        A GPU that shares the machine's memory takes it through its driver.
        """
        return self._unseen_bytes()

    @property
    def reading(self) -> str:
        """How experts are read: ``direct`` (past the page cache) or ``buffered`` (dropped from it after reading)."""
        return self._opened()[1].reading

    @alone
    def trace(self) -> Trace:
        """Return the routing of all generations so far, for which ``Settings.record`` asked.

        Raises:
            InputError: Nothing was recorded.
        """
        _, experts = self._opened()
        if not self._disturbed:
            experts.settle()
        return trace_of(experts.events, self.store, self.manifest.graph.name)

    @property
    def store(self) -> PackedStore:
        """Where weights are read from."""
        if self._store is None:
            raise _closed()
        return self._store

    def tokenizer(self) -> Decoding:
        """Return the bundle's tokenizer.

        Raises:
            BundleError: The bundle has none, or it is damaged.
            MissingDependencyError: The package ``tokenizers`` is absent.
        """
        entry = next((one for one in self.manifest.files if one.role == TOKENIZER), None)
        if entry is None:
            raise BundleError(f"{self.folder}: the bundle holds no tokenizer. Export it again, or pass token numbers.")
        path = self.folder / entry.path
        if not path.is_file() or sha256_file(path) != entry.sha256:
            raise BundleError(f"{path}: missing, or not what the manifest says. Copy the bundle again.")
        return load_tokenizer(path)

    # --- answering ------------------------------------------------------------------------------------

    @alone
    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampler: Callable[[NDArray[np.float32]], int] | None = None,
        stops: Callable[[int], bool] | None = None,
        *,
        continued: bool = False,
    ) -> Generator[int, None, None]:
        """Check the prompt now, and return an iterator that gives tokens as they are made.

        It ends after an end token (which is given too), after ``max_tokens``, when ``stops`` says so, when the
        context is full, and on Ctrl-C with what was said so far; ``stats().stopped_by`` tells which.

        Args:
            prompt: Token numbers, at least one.
            max_tokens: At most so many.
            sampler: Chooses from logits ``[vocabulary]``; greedily by default.
            stops: Told each token, says whether to end after it.
            continued: The prompt follows what was read and said before, which stays in the context.

        Raises:
            InputError: The prompt is empty or too long, or a token does not exist.
            DeviceError: The session is closed.
        """
        _, experts = self._opened()
        position, unread = (self._position, self._unread) if continued else (0, [])
        tokens = [*unread, *prompt]
        self._check_prompt(prompt, position + len(tokens), max_tokens)
        if self._disturbed:
            experts.reset(self._new_cache() if self._settings.device is None else experts.cache)
            self._disturbed = False
        self._position, self._unread = position, unread
        number = 0 if self._run is None else self._run.number + 1
        run = Run(number, len(prompt), experts.cache.stats(), experts.uses(), experts.cache.occupancy())
        self._run = run
        return self._answer(run, tokens, max_tokens, sampler or Sampler(), stops)

    def _answer(
        self,
        run: Run,
        prompt: Sequence[int],
        max_tokens: int,
        sampler: Callable[[NDArray[np.float32]], int],
        stops: Callable[[int], bool] | None,
    ) -> Generator[int, None, None]:
        try:
            while True:
                with self.control:
                    token = self._next(run, prompt, sampler)
                    ended = self._ended(run, token, max_tokens, stops)
                    self._disturbed = False
                    run.stopped_by = ended or "interrupt"  # what is true if the caller leaves here
                yield token
                if ended:
                    return
        except KeyboardInterrupt:
            run.stopped_by = "interrupt"

    def _next(self, run: Run, prompt: Sequence[int], sampler: Callable[[NDArray[np.float32]], int]) -> int:
        """Read the prompt, or else the last token, and return the token that follows."""
        if self._run is not run:
            raise DeviceError("another generation was begun on this session, or it was closed. Begin anew.")
        engine, experts = self._opened()
        self._disturbed = True  # until a pass has ended well
        engine.times()
        experts.wait_s = 0.0
        start = self._clock()
        if run.tokens:
            experts.begin(Pass(run.number, self._position, 0, decoding=True))
            self._forward(engine, experts, run.tokens[-1:])
            if len(run.tokens) % _DRAIN_PASSES == 0:
                experts.settle()
        else:
            self._read(engine, experts, run, prompt)
        token = sampler(engine.logits())
        self._unread = [token]
        run.note(token, self._clock() - start, engine.times(), experts.wait_s)
        return token

    def _read(self, engine: DecoderEngine, experts: Residency, run: Run, prompt: Sequence[int]) -> None:
        """Read a prompt in chunks, all of it or nothing; the logits of its last token are there afterwards."""
        before = self._position, self._unread
        try:
            for first in range(0, len(prompt), self.chunk_tokens):
                experts.begin(Pass(run.number, self._position, first // self.chunk_tokens, decoding=False))
                self._forward(engine, experts, prompt[first : first + self.chunk_tokens])
            experts.settle()
        except BaseException:
            self._position, self._unread = before
            raise

    def _forward(self, engine: DecoderEngine, experts: Residency, tokens: Sequence[int]) -> None:
        """Run one forward pass."""
        missing = engine.forward(np.asarray(tokens, dtype=np.int32), self._position)
        while missing is not None:
            experts.serve(missing)
            missing = engine.resume()
        self._position += len(tokens)
        self._unread = []

    def _ended(self, run: Run, token: int, max_tokens: int, stops: Callable[[int], bool] | None) -> StoppedBy | None:
        if token in self.manifest.graph.end_tokens:
            return "end"
        if stops is not None and stops(token):
            return "stop"
        if len(run.tokens) >= max_tokens:
            return "length"
        return "context" if self._position >= self.context_tokens else None

    # --- what happened --------------------------------------------------------------------------------

    @alone
    def stats(
        self, *, device: str = "this machine", before: Conditions | None = None, after: Conditions | None = None
    ) -> DecoderRunStats:
        """Return the record of the last generation; call it while the session is open.

        ``times`` has one entry per token after the first, whose time is ``first_token_s``; the caller's own time
        between tokens is in neither. Cache counters are of this generation alone. ``peak_memory_bytes`` are the
        anonymous bytes that the session added to ``runtime_memory_bytes``, which were there when it was made, and
        ``unseen_bytes``.

        Raises:
            DeviceError: The session is closed, or nothing was generated.
        """
        _, experts = self._opened()
        run = self._run
        if run is None:
            raise DeviceError("there are no statistics: nothing was generated yet. Call generate first.")
        if not self._disturbed:
            experts.settle()
        stays = experts.cache.occupancy().since(run.stays)
        return DecoderRunStats(
            manifest_digest=self.manifest.digest(),
            device=device,
            threads=self.threads,
            prompt_tokens=run.prompt_tokens,
            tokens=tuple(run.tokens),
            times=tuple(run.times),
            first_token_s=run.first_token_s,
            load_s=self._load_s,
            peak_memory_bytes=max(0, memory_now().anonymous_bytes - self._memory.anonymous_bytes) + self.unseen_bytes,
            runtime_memory_bytes=self._memory.anonymous_bytes,
            cache=counted_since(run.before, experts.cache.stats()),
            before=before or Conditions(),
            after=after or Conditions(),
            expert_uses=tuple(map(tuple, (experts.uses() - run.uses).tolist())),
            decode_events=stays.events,
            expert_residency=stays.resident,
            stopped_by=run.stopped_by,
        )

    @alone
    def device_stats(self) -> DeviceStats:
        """Return what the device did with experts since the session was opened; call it between generations.

        Raises:
            DeviceError: The session is closed, runs on no device, or its last pass did not end.
        """
        self._opened()
        if self._device_stats is None or self._disturbed:
            raise DeviceError(
                "no counts of a device: the session runs on the processor, or its last answer was broken off. "
                "Name a device in its settings, and answer once to the end."
            )
        return self._device_stats()

    # --- inside ---------------------------------------------------------------------------------------

    def _check_prompt(self, prompt: Sequence[int], end: int, max_tokens: int) -> None:
        vocabulary = self.manifest.graph.vocabulary
        faults = []
        if not len(prompt):
            faults.append("it is empty; give at least one token")
        if end > self.context_tokens:
            faults.append(
                f"it ends at token {end} and the context holds {self.context_tokens}; shorten it, or export with more "
                "tokens of context"
            )
        unknown = [token for token in prompt if not 0 <= token < vocabulary]
        if unknown:
            faults.append(f"token {unknown[0]} does not exist; there are {vocabulary} (0 to {vocabulary - 1})")
        if max_tokens < 1:
            faults.append(f"{max_tokens} tokens were asked for; at least 1 is needed")
        if faults:
            raise InputError.collect("the prompt", faults)

    def _opened(self) -> tuple[DecoderEngine, Residency]:
        if self._engine is None or self._experts is None:
            raise _closed()
        return self._engine, self._experts

    def _load(self) -> None:
        if self._settings.device is not None:
            self._load_device(self._settings.device)
            return
        opened = open_engine(
            self.folder,
            self.manifest,
            context_tokens=self.context_tokens,
            chunk_tokens=self.chunk_tokens,
            threads=self.threads,
            progress=self._progress,
        )
        self._engine, self._store, self._unseen_bytes = opened.engine, opened.store, opened.unseen_bytes
        cache = self._new_cache()
        self._dense = opened.load()
        self._experts = Residency(
            opened.engine,
            opened.store,
            cache,
            self._layers(),
            predictor=self._predictor(opened.engine, opened.store),
            record=self._settings.record,
            mover=self._make_mover,
            clock=self._clock,
        )
        logger.debug("experts: %s reads, %d bytes of cache", self._experts.reading, cache.capacity_bytes)

    def _load_device(self, device: str) -> None:
        chosen = self._settings
        request = DeviceRequest(
            device,
            chosen.vram_bytes,
            self.cache_bytes,
            chosen.policy or "",
            self.context_tokens,
            self.chunk_tokens,
            self.threads,
            rule=chosen.device_rule,
            precision=chosen.device_precision,
            seed=chosen.seed,
            static=chosen.static,
            record=chosen.record,
        )
        parts = {"mover": self._make_mover, "clock": self._clock, **(chosen.device_parts or {})}
        opened = open_device(self.folder, self.manifest, request, self._progress, **parts)
        self._engine, self._store, self._experts, self._device_stats = opened

    def _layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.manifest.graph.layers if layer.routing is not None)

    def _top_k(self) -> int:
        return max(
            (layer.routing.top_k for layer in self.manifest.graph.layers if layer.routing is not None), default=0
        )

    def _new_cache(self) -> ExpertCache:
        layers, experts = self.store.sizes.shape
        policy = make_policy(
            self.policy,
            layers=layers,
            experts=experts,
            top_k=self._top_k(),
            seed=self._settings.seed,
            static=self._settings.static,
        )
        limit = cache_limit(self.store, self.cache_bytes)
        return ExpertCache(limit, self.store.sizes, policy, prefetch_worth=self._settings.prefetch_worth)

    def _predictor(self, engine: DecoderEngine, store: PackedStore) -> Guesser | None:
        layers = self._layers()
        depth = min(self.prefetch_depth, len(layers) - 1)  # there is nothing further ahead, but counts take memory
        if depth < 1:
            return None
        if self._settings.prefetch_by == "router":
            return EarlyRouter(layers, depth, engine.guess)
        return Predictor(layers, store.sizes.shape[1], self._top_k(), depth)


def stream_text(
    session: DecoderSession,
    prompt: str,
    max_tokens: int,
    *,
    sampler: Sampler | None = None,
    stops: Sequence[str] = (),
    tokenizer: Decoding | None = None,
    continued: bool = False,
) -> Iterator[str]:
    """Answer text with text, piece by piece; a piece is never half a character and never part of a stop string.

    Raises:
        InputError: The prompt is empty or too long.
        BundleError: The bundle has no tokenizer.
    """
    known = tokenizer or session.tokenizer()
    stream = TextStream(known, stops)
    pieces: list[str] = []

    def said(token: int) -> bool:
        pieces.append(stream.feed(token))
        return stream.stopped

    for _ in session.generate(known.encode(prompt).ids, max_tokens, sampler, said, continued=continued):
        if pieces and any(pieces):
            yield "".join(pieces)
        pieces.clear()
    rest = "".join(pieces) + stream.finish()
    if rest:
        yield rest


def _closed() -> DeviceError:
    return DeviceError("the session is closed. Run inside `with DecoderSession.from_bundle(...)`.")
