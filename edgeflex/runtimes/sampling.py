"""From logits to a token, and from tokens to text that may be printed.

Text is handed out only when it can no longer change: never half a UTF-8 character, never the beginning of what
may become a stop string. Put together, the pieces are what the tokenizer says of all tokens at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import BundleError, DeviceError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Protocol

    from numpy.typing import NDArray

    class Encoding(Protocol):
        """Encoded text."""

        @property
        def ids(self) -> list[int]:
            """Token numbers."""

    class Decoding(Protocol):
        """What a tokenizer must be able to do here."""

        def encode(self, sequence: str) -> Encoding:
            """Return the tokens of a text."""

        def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str:
            """Return the text of ``ids``."""


# What decoding puts where bytes are no character. At the end of the text it may be the beginning of one, of three
# bytes at most; some tokenizers put one sign for each byte, some one for all.
_BROKEN = "\ufffd"
_MOST_PENDING = 3
_HEAD = 1024  # candidates that are sorted first; nearly always they hold top_p of the mass


class Sampler:
    """Chooses tokens: the likeliest, or drawn after temperature, ``top_k`` and ``top_p``, in this order.

    Args:
        temperature: Logits are divided by it; 0 takes the likeliest token, ties to the lower number.
        top_k: Only so many likeliest tokens are drawn from.
        top_p: Only the smallest set of likeliest tokens whose probability reaches it (nucleus sampling, Holtzman
            et al. 2020, section 3.1); the token that crosses it is in.
        seed: Of the draws; equal seeds and logits give equal tokens.

    Raises:
        InputError: A number lies outside what it can be.
    """

    def __init__(
        self, *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
    ) -> None:
        faults = []
        if not 0.0 <= temperature < np.inf:
            faults.append(f"temperature {temperature}: it must be 0 (greedy) or more")
        if top_k is not None and top_k < 1:
            faults.append(f"top-k {top_k}: it must be at least 1")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            faults.append(f"top-p {top_p}: it must be above 0 and at most 1")
        if seed < 0:
            faults.append(f"seed {seed}: it must be 0 or more")
        if faults:
            raise InputError.collect("the choice of tokens", faults)
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._random = np.random.default_rng(seed) if temperature > 0.0 else None

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Return the next token.

        Args:
            logits: ``[vocabulary]``.

        Raises:
            DeviceError: A logit is not a finite number.
        """
        best = int(logits.argmax())  # NaN counts as the largest
        if not np.isfinite(logits[best]):
            raise DeviceError(
                f"the logit of token {best} is {logits[best]}: the weights or the kernels are wrong. "
                "Run `edgeflex verify`, and export the bundle again."
            )
        if self._random is None:
            return best
        candidates = _largest(logits, self.top_k)
        with np.errstate(over="ignore"):  # next to zero, all but the likeliest are out of reach
            shifted = (logits[candidates].astype(np.float64) - float(logits[best])) / self.temperature
        weights = np.exp(shifted)
        if self.top_p is not None:
            kept = _nucleus(weights, self.top_p)
            candidates, weights = candidates[kept], weights[kept]
        reached = np.cumsum(weights)
        drawn = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return int(candidates[min(drawn, candidates.size - 1)])


def _largest(logits: NDArray[np.float32], count: int | None) -> NDArray[np.intp]:
    """Return the indices of the ``count`` largest logits, ascending; ties to the lower index."""
    if count is None or count >= logits.size:
        return np.arange(logits.size)
    least = np.partition(logits, logits.size - count)[logits.size - count]
    above = np.flatnonzero(logits > least)
    ties = np.flatnonzero(logits == least)[: count - above.size]
    return np.sort(np.concatenate([above, ties]))


def _nucleus(weights: NDArray[np.float64], share: float) -> NDArray[np.intp]:
    """Return the indices of the smallest set of largest weights whose sum reaches ``share`` of all, ascending."""
    goal = share * float(weights.sum())
    head = _largest_weights(weights, min(_HEAD, weights.size))
    reached = np.cumsum(weights[head])
    if reached[-1] < goal and head.size < weights.size:
        head = _largest_weights(weights, weights.size)
        reached = np.cumsum(weights[head])
    return np.sort(head[: int(np.searchsorted(reached, goal)) + 1])


def _largest_weights(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Return the indices of the ``count`` largest weights, the largest first; ties to the lower index."""
    head = np.arange(weights.size)
    if count < weights.size:
        head = np.flatnonzero(weights >= np.partition(weights, weights.size - count)[weights.size - count])
    return head[np.argsort(-weights[head], kind="stable")]


class TextStream:
    """Turns tokens into text piece by piece, and notices stop strings that are split over tokens.

    Attributes:
        stopped: A stop string has come; what was handed out ends before it, and nothing more is handed out.
    """

    def __init__(self, tokenizer: Decoding, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise InputError("a stop string is empty and would stop everything. Leave it out.")
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._context = 0  # where decoding starts: tokens that were handed out, so that the next join rightly
        self._done = 0  # tokens handed out
        self._said = 0  # characters handed out of the tokens after these
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take a token and return the text that is now certain, perhaps none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._certain(_pending))

    def finish(self) -> str:
        """Return what was held back; a character that was never completed appears as U+FFFD."""
        if self.stopped:
            return ""
        rest = self._held + self._certain(lambda _text, _tokens: 0)
        self._held = ""
        return self._cut(rest)[0]

    def _certain(self, pending: Callable[[str, int], int]) -> str:
        """Return the text that came since the last call, without its last characters that may still change."""
        before = len(self._text(self._context, self._done)) + self._said
        after = self._text(self._context, len(self._ids))
        held = pending(after, len(self._ids) - self._done)
        piece = after[before : len(after) - held]
        if held:
            self._said += len(piece)
            return piece
        if piece or self._said:  # tokens without text join nothing: the text after them joins what stands before them
            self._context = self._done
        self._done, self._said = len(self._ids), 0
        return piece

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _release(self, piece: str) -> str:
        text, found = self._cut(self._held + piece)
        if found:
            self._held = ""
            return text
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _cut(self, text: str) -> tuple[str, bool]:
        """Return ``text`` up to the first stop string, and whether there is one."""
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if not places:
            return text, False
        self.stopped = True
        return text[: min(places)], True


def _pending(text: str, tokens: int) -> int:
    """Return how many last characters of ``text`` may be a character of which bytes are missing.

    A token has at least one byte, so that more than three tokens hold something that stays broken.
    """
    broken = len(text) - len(text.rstrip(_BROKEN))
    return broken if tokens <= _MOST_PENDING else min(_MOST_PENDING, broken)


def _overlap(text: str, stop: str) -> int:
    """Return how many last characters of ``text`` are the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


def load_tokenizer(path: Path) -> Decoding:
    """Return the tokenizer of a ``tokenizer.json``.

    Raises:
        BundleError: The file is absent or no tokenizer.
        MissingDependencyError: The package ``tokenizers`` is absent.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "text needs the package 'tokenizers', which is not installed. Run: pip install tokenizers"
        ) from None
    try:
        tokenizer: Decoding = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises bare exceptions for every fault of a file
        raise BundleError(f"{path}: no tokenizer ({error}). Export the bundle again.") from None
    return tokenizer
