"""What users write about their budgets (``--memory 2MiB --latency 8ms:p95``) to a ``Budget``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from edgeflex.errors import InputError
from edgeflex.schema import Budget, LatencyLimit, Tier
from edgeflex.schema_moe import DecoderBudget
from edgeflex.units import parse_share, parse_size_bytes, parse_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CONFIDENCE = "95%"
_CONTEXT_TOKENS, _PROMPT_TOKENS = 1024, 256
_STATISTICS = ("mean", "p50", "p95", "p99", "worst")


def _known_statistic(statistic: str) -> str:
    if statistic and statistic not in _STATISTICS:
        raise InputError(f"statistic {statistic!r} is unknown. Choose one of {', '.join(_STATISTICS)}.")
    return statistic


def _latency_limit(text: str) -> LatencyLimit:
    seconds, _, statistic = text.partition(":")
    limit = {"limit_s": parse_time_s(seconds), "statistic": _known_statistic(statistic) or "mean"}
    return LatencyLimit.model_validate(limit)


def _confidence(text: str) -> float:
    level = parse_share(text)
    if not 0 < level < 1:
        raise InputError(f"{text!r} must lie between 0 and 100 %, both excluded. Write it as 95%.")
    return level


def _objective(text: str) -> tuple[str, str]:
    what, _, statistic = text.partition(":")
    if what not in {"latency", "memory", "drop"}:
        raise InputError(f"{text!r} is unknown. Choose latency, memory or drop.")
    if statistic and what != "latency":
        raise InputError(f"{text!r}: only latency has a statistic. Write it as {what}.")
    return what, _known_statistic(statistic)


def _read(faults: list[str], option: str, text: str | None, parse: Callable[[str], Any]) -> Any:
    """Return what ``text`` means, None where it is absent or means nothing; why goes into ``faults``."""
    if text is None:
        return None
    try:
        return parse(text)
    except InputError as error:
        faults.append(f"{option}: {error}")
        return None


def parse_budget(
    *,
    memory: str | None = None,
    latency: Sequence[str] = (),
    max_drop: str | None = None,
    confidence: str | None = None,
    minimize: str | None = None,
    disk: str | None = None,
) -> Budget:
    """Return the budget that the texts mean.

    Args:
        memory: Most bytes in host memory, for instance ``2MiB``.
        latency: Limits such as ``8ms`` (of the mean) or ``8ms:p95``.
        max_drop: Most accuracy to lose, for instance ``1%``.
        confidence: Of the accuracy promise; when absent, 95 %.
        minimize: ``latency``, ``latency:STATISTIC``, ``memory`` or ``drop``; when absent, the first of latency,
            drop and memory that has no budget.
        disk: Most bytes of the program file.

    Raises:
        InputError: Texts that mean nothing; all of them stand in one error.
    """
    faults: list[str] = []
    read = partial(_read, faults)
    memory_bytes = read("--memory", memory, parse_size_bytes)
    disk_bytes = read("--disk", disk, parse_size_bytes)
    limits = [read("--latency", text, _latency_limit) for text in latency]
    drop = read("--max-drop", max_drop, parse_share)
    level = read("--confidence", _CONFIDENCE if confidence is None else confidence, _confidence)
    what, statistic = read("--minimize", minimize, _objective) or ("", "")
    if faults:
        raise InputError.collect("the budget", faults)
    if not what:
        free = [("latency", not limits), ("drop", drop is None), ("memory", memory_bytes is None)]
        what = next((name for name, missing in free if missing), "drop")
    return Budget.model_validate(
        {
            "memory_bytes": {} if memory_bytes is None else {Tier.HOST: memory_bytes},
            "latency": limits,
            "disk_bytes": disk_bytes,
            "max_drop": drop,
            "confidence": level,
            "minimize": what,
            "statistic": statistic or (limits[0].statistic if limits else "mean"),
        }
    )


def _token_time_s(text: str) -> float:
    seconds, _, per = text.partition("/")
    if ":" in text:
        raise InputError(f"{text!r}: a decoder's latency is the mean time per token. Write it as 60ms/token.")
    if per not in {"", "token"}:
        raise InputError(f"{text!r} is a time per {per!r}. A decoder's latency is per token: write it as 60ms/token.")
    return parse_time_s(seconds)


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 100.0:
        raise InputError(f"{text!r} is no divergence in nats per token. Write it as 0.05.")
    return value


def _decoder_objective(text: str) -> str:
    if text not in {"latency", "kl", "memory"}:
        raise InputError(f"{text!r} is unknown. Choose latency, kl or memory.")
    return text


def parse_decoder_budget(
    *,
    memory: str | None = None,
    vram: str | None = None,
    latency: Sequence[str] = (),
    first_token: str | None = None,
    max_kl: str | None = None,
    max_perplexity: str | None = None,
    disk: str | None = None,
    minimize: str | None = None,
    prompt_tokens: int | None = None,
    context_tokens: int | None = None,
    most_tokens: int | None = None,
) -> DecoderBudget:
    """Return the budget of a mixture-of-experts decoder that the texts mean.

    Args:
        memory: Most bytes in host memory, for instance ``2GiB``.
        vram: Most bytes of a GPU's memory; plans for one.
        latency: At most one time per decoded token, ``60ms/token`` or ``60ms``.
        first_token: Most time to the first token of a prompt of ``prompt_tokens``.
        max_kl: Most divergence from fp32, nats per token.
        max_perplexity: Most rise of perplexity over fp32's, for instance ``2%``.
        disk: Most bytes of the bundle.
        minimize: ``latency``, ``kl`` or ``memory``; when absent, the first of latency, kl and memory without a
            budget.
        prompt_tokens: Length of the prompt that ``first_token`` is about; when absent, 256 or half of the context.
        context_tokens: Length of the key-value cache; when absent, 1024 or ``most_tokens``, if that is fewer.
        most_tokens: Longest context that the decoder knows.

    Raises:
        InputError: Texts that mean nothing; all of them stand in one error.
    """
    faults: list[str] = []
    read = partial(_read, faults)
    if len(latency) > 1:
        faults.append(f"--latency: {len(latency)} limits were given; a decoder has one, per token")
    limits: dict[str, Any] = {
        "memory_bytes": read("--memory", memory, parse_size_bytes),
        "vram_bytes": read("--vram", vram, parse_size_bytes),
        "token_s": read("--latency", latency[0] if latency else None, _token_time_s),
        "first_token_s": read("--first-token", first_token, parse_time_s),
        "disk_bytes": read("--disk", disk, parse_size_bytes),
        "max_kl": read("--max-kl", max_kl, _nats),
        "max_perplexity_rise": read("--max-perplexity", max_perplexity, parse_share),
    }
    goal = read("--minimize", minimize, _decoder_objective)
    if context_tokens is None:
        context_tokens = min(_CONTEXT_TOKENS, most_tokens or _CONTEXT_TOKENS)
    elif most_tokens is not None and context_tokens > most_tokens:
        faults.append(f"--context: {context_tokens} tokens are more than the {most_tokens} that this decoder knows")
    if prompt_tokens is None:
        prompt_tokens = min(_PROMPT_TOKENS, context_tokens // 2)
    if prompt_tokens > context_tokens:
        faults.append(f"--prompt-tokens: {prompt_tokens} do not fit into --context {context_tokens}")
    if faults:
        raise InputError.collect("the budget", faults)
    if goal is None:
        accuracy = "max_kl" if limits["max_perplexity_rise"] is None else "max_perplexity_rise"
        free = (("latency", "token_s"), ("kl", accuracy), ("memory", "memory_bytes"))
        goal = next((name for name, field in free if limits[field] is None), "latency")
    return DecoderBudget.model_validate(
        {**limits, "minimize": goal, "prompt_tokens": prompt_tokens, "context_tokens": context_tokens}
    )
