"""A decoder's bundle answers prompts: what `edgeflex run` does with text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from edgeflex.errors import InputError
from edgeflex.files import StrPath, not_utf8, path_of, read_text
from edgeflex.flow.decoder_bundles import Place, settings_at
from edgeflex.runtimes.decoder import DecoderSession, stream_text
from edgeflex.runtimes.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderRunStats


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None takes the plan's."""

    prompt: str | None = None
    prompt_file: StrPath | None = None
    interactive: bool = False
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stops: tuple[str, ...] = ()
    seed: int = 0
    cache: str | None = None
    policy: str | None = None
    prefetch: int | None = None
    threads: int | None = None
    device: str | None = None
    vram: str | None = None


class Talk:
    """One bundle, opened inside ``with``, and its answers.

    Args:
        bundle: Its folder.
        asked: What the user asked for.
        ask: Called before each line of a conversation, to show that it is waited for.
        progress: Told of what is slow.

    Raises:
        InputError: No prompt or more than one, or settings that are impossible.
    """

    def __init__(
        self, bundle: StrPath, asked: Asked, *, ask: Callable[[], None] | None = None, progress: Progress | None = None
    ) -> None:
        sources = (asked.prompt is not None, asked.prompt_file is not None, asked.interactive)
        if sum(sources) != 1:
            given = "none was" if not any(sources) else "several were"
            raise InputError(f"a decoder answers one prompt, and {given} given. Pass --prompt, --prompt-file or -i.")
        self._asked = asked
        self._ask = ask
        self._sampler = Sampler(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, seed=asked.seed)
        settings = settings_at(
            Place(asked.device, asked.vram, asked.cache),
            policy=asked.policy,
            threads=asked.threads,
            prefetch_depth=asked.prefetch,
        )
        self._first = None if asked.interactive else _text(asked)
        self._session = DecoderSession.from_bundle(path_of(bundle), settings, progress=progress)
        self._said: list[str] = []

    @property
    def said(self) -> str:
        """All answers so far, each on a line of its own, as they are printed."""
        return "\n".join(self._said)

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.close()

    def answers(self) -> Iterator[Iterator[str]]:
        """Return the pieces of each answer; with ``interactive`` one answer for each line of standard input."""
        if self._first is not None:
            yield self._answer(self._first, continued=False)
            return
        continued = False
        for line in _lines(sys.stdin, self._ask):
            if line.strip():
                yield self._answer(line, continued=continued)
                continued = True
        if not continued:
            raise InputError("standard input had no line to answer. Write a line and press Enter.")

    def stats(self) -> DecoderRunStats:
        """Return the record of the last answer."""
        return self._session.stats()

    def _answer(self, prompt: str, *, continued: bool) -> Iterator[str]:
        asked = self._asked
        pieces = stream_text(
            self._session, prompt, asked.max_tokens, sampler=self._sampler, stops=asked.stops, continued=continued
        )
        self._said.append("")
        for piece in pieces:
            self._said[-1] += piece
            yield piece


def _lines(stream: TextIO, ask: Callable[[], None] | None) -> Iterator[str]:
    """Yield what is typed, line by line; ``ask`` is called before each is waited for."""
    try:
        while True:
            if ask is not None:
                ask()
            line = stream.readline()
            if not line:
                return
            yield _whole(line, "standard input")
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", f"byte {error.start}") from None


def _whole(text: str, source: str) -> str:
    """Return ``text``, refusing bytes that the system let through undecoded, as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise not_utf8(source, f"character {error.start}") from None
    return text


def _text(asked: Asked) -> str:
    if asked.prompt_file is None:
        return _whole(asked.prompt or "", "--prompt")
    return read_text(path_of(asked.prompt_file), "prompt")
