"""From a Hugging Face folder to a ``DecoderGraph`` and its matrices under the names of ``schema_moe``.

``open_decoder`` reads the configuration and the headers of the weights, checks that every tensor that the
graph needs is there in its shape and that nothing else is, and gives a ``DecoderSource``, which then reads
matrix by matrix. Both forms of experts are read: one tensor per expert, and all experts of a layer stacked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError, MissingDependencyError
from edgeflex.models.checkpoint import Checkpoint, named, open_checkpoint
from edgeflex.models.decoder_config import read_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FETCHED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json")
_HEAD = "lm_head.weight"
# What old checkpoints keep beside the weights; it follows from the configuration.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Piece:
    """A checkpoint's tensor of ``shape``, or its part ``index`` along the first axis."""

    tensor: str
    shape: tuple[int, ...]
    index: int | None = None

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of what is taken."""
        return self.shape if self.index is None else self.shape[1:]


@dataclass(frozen=True, eq=False)
class _Recipe:
    """Pieces stacked along rows; ``order[i]`` is the stacked row that becomes row i (None: as they are)."""

    pieces: tuple[_Piece, ...]
    order: NDArray[np.intp] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        first = self.pieces[0].part
        return (sum(piece.part[0] for piece in self.pieces), *first[1:])


class DecoderSource:
    """An opened decoder. Reading is free of state and may happen in several threads at once.

    Attributes:
        graph: What it computes.
        folder: Where it lies.
        checkpoint: Its files; ``checkpoint.data_bytes_read`` counts what was read of the numbers.
    """

    def __init__(self, folder: Path, graph: DecoderGraph, checkpoint: Checkpoint, recipes: dict[str, _Recipe]) -> None:
        self.folder = folder
        self.graph = graph
        self.checkpoint = checkpoint
        self._recipes = recipes

    @property
    def names(self) -> tuple[str, ...]:
        """Every matrix and small tensor; ``head`` is there also where it is tied to ``embedding``."""
        return tuple(self._recipes)

    def layer_tensors(self, index: int) -> tuple[str, ...]:
        """Return the names of layer ``index`` without its experts: norms, attention, router, shared experts."""
        start, experts = f"layers.{index}.", f"layers.{index}.experts."
        return tuple(name for name in self._recipes if name.startswith(start) and not name.startswith(experts))

    def expert_tensors(self, index: int, expert: int) -> tuple[str, str]:
        """Return the names of an expert's two matrices."""
        return f"layers.{index}.experts.{expert}.gate_up", f"layers.{index}.experts.{expert}.down"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return ``(rows, columns)`` of a matrix, or ``(length,)`` of a norm or bias.

        Raises:
            KeyError: This decoder has no such tensor.
        """
        return self._recipes[name].shape

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a whole matrix or small tensor; only its own bytes are read.

        Raises:
            KeyError: This decoder has no such tensor.
            InputError: The file changed, cannot be read, or holds NaN or infinity there.
        """
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of a tensor; only their bytes are read.

        Raises:
            KeyError: This decoder has no such tensor.
            IndexError: The tensor has no such rows.
            InputError: As for ``tensor``.
        """
        recipe = self._recipes[name]
        if not 0 <= start <= stop <= recipe.shape[0]:
            raise IndexError(f"{name} has {recipe.shape[0]} rows, and {start} to {stop} were asked for")
        if recipe.order is not None:
            return np.ascontiguousarray(self._stacked(recipe, 0, recipe.shape[0])[recipe.order[start:stop]])
        return self._stacked(recipe, start, stop)

    def gather(self, name: str, wanted: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the rows ``wanted`` of a matrix, reading each only once: embeddings of a text.

        Raises:
            KeyError: This decoder has no such tensor.
            IndexError: The tensor has no such row.
            InputError: As for ``tensor``.
        """
        unique, places = np.unique(np.asarray(wanted, dtype=np.int64), return_inverse=True)
        found = np.empty((len(unique), *self.shape(name)[1:]), np.float32)
        for place, row in enumerate(unique.tolist()):
            found[place] = self.rows(name, row, row + 1)[0]
        return found[places.reshape(-1)]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, for the ``tokenizers`` package.

        Raises:
            InputError: The folder has none in this form.
        """
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"{str(self.folder)!r} has no tokenizer.json, which text needs. "
                "Save the model's fast tokenizer there (AutoTokenizer(...).save_pretrained)."
            )
        return path

    def content_digest(self, heard: Callable[[int], object] | None = None) -> str:
        """Return the SHA-256 over all files of the weights; reads them whole. See ``Checkpoint.content_digest``."""
        return self.checkpoint.content_digest(heard)

    def _stacked(self, recipe: _Recipe, start: int, stop: int) -> NDArray[np.float32]:
        """Read rows ``start`` to ``stop`` of the stacked pieces, in the checkpoint's order."""
        out = np.empty((stop - start, *recipe.shape[1:]), np.float32)
        above = 0
        for piece in recipe.pieces:
            held = piece.part[0]
            first, last = max(start - above, 0), min(stop - above, held)
            if first < last:
                width = int(np.prod(piece.part[1:], dtype=np.int64))
                skipped = (piece.index or 0) * held
                into = out[above + first - start : above + last - start].reshape(-1)
                self.checkpoint.read_into(piece.tensor, (skipped + first) * width, into)
            above += held
        return out


def open_decoder(folder: str | Path, *, allow_download: bool = False, headers_only: bool = False) -> DecoderSource:
    """Open the decoder in ``folder``, reading its configuration and the headers of its weights.

    The graph's ``weights_digest`` is ``Checkpoint.fingerprint``: names, sizes and headers of the files and a
    megabyte of evenly spaced samples of their numbers. It is cheap and tells trainings of one architecture
    apart, but it is not a hash of all numbers; ``DecoderSource.content_digest`` is.

    Args:
        folder: A Hugging Face folder: ``config.json`` and safetensors weights; or an id like ``org/name``.
        allow_download: Fetch an id from the Hugging Face hub (into its usual cache).
        headers_only: Read no number at all: the digest then has no samples and differs from the full one.

    Raises:
        InputError: No such folder, an unknown family, settings that are not supported, or weights that are
            missing, damaged, left over, or of another shape.
        MissingDependencyError: An id was given and ``huggingface_hub`` is absent.
    """
    path, name = _located(str(folder), fetch=allow_download, cached_only=headers_only)
    graph = read_graph(path, name)
    checkpoint = open_checkpoint(path)
    if graph.tied_embedding and _HEAD in checkpoint.tensors:
        # transformers then ties only where both are equal; keeping both is right in either case
        graph = graph.model_copy(update={"tied_embedding": False})
    recipes = dict(_recipes(graph, checkpoint))
    _refuse_misfit(recipes, checkpoint)
    digest = checkpoint.fingerprint(sampled=not headers_only)
    return DecoderSource(path, graph.model_copy(update={"weights_digest": digest}), checkpoint, recipes)


def _refuse_misfit(recipes: dict[str, _Recipe], checkpoint: Checkpoint) -> None:
    """Check that the checkpoint holds exactly what is needed, in its shapes."""
    needed = {piece.tensor: piece.shape for recipe in recipes.values() for piece in recipe.pieces}
    held = checkpoint.tensors
    shapes = [
        f"{name} {held[name].shape} instead of {shape}"
        for name, shape in needed.items()
        if name in held and held[name].shape != shape
    ]
    left_over = [name for name in held if name not in needed and not name.endswith(_DERIVED)]
    faults = [
        *named("missing", [name for name in needed if name not in held]),
        *named("unexpected", sorted(left_over)),
        *named("of another shape", shapes),
    ]
    if faults:
        raise InputError.collect(f"weights in {str(checkpoint.folder)!r} do not fit their config.json", faults)


# --- where a decoder lies ----------------------------------------------------------------------------


def _located(place: str, *, fetch: bool, cached_only: bool) -> tuple[Path, str]:
    """Return the folder of a decoder and the name to show."""
    path = Path(place)
    usable = place and "\0" not in place
    if usable and path.is_dir():
        return path, path.resolve().name
    if not usable or path.exists() or not _HUB_ID.fullmatch(place):
        raise InputError(f"model {place!r} is not a folder. Name one with config.json and safetensors weights.")
    if not fetch:
        raise InputError(
            f"model {place!r} is not a folder here. If it is an id on the Hugging Face hub, fetch it first "
            f"(hf download {place} --local-dir DIR) and name that folder."
        )
    return _fetched(place, cached_only=cached_only), place


def _fetched(name: str, *, cached_only: bool) -> Path:
    """Return the snapshot of a hub id, fetching what is not in the cache yet."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MissingDependencyError(f"fetching {name!r} needs huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FETCHED), local_files_only=cached_only))
    except LocalEntryNotFoundError:
        hint = "a dry run fetches nothing" if cached_only else "the hub cannot be reached"
        raise InputError(f"model {name!r} is not in the local cache, and {hint}. Fetch it first.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name!r} could not be fetched: {reason}. Check the name and the network; "
            "models behind a licence need 'hf auth login' first."
        ) from None


# --- from our names to a checkpoint's ----------------------------------------------------------------


def _recipes(graph: DecoderGraph, checkpoint: Checkpoint) -> Iterator[tuple[str, _Recipe]]:
    """Yield every name of ``graph`` with what it is made of."""
    table = (graph.vocabulary, graph.hidden_dim)
    yield "embedding", _whole("model.embed_tokens.weight", *table)
    for layer in graph.layers:
        ours, theirs = f"layers.{layer.index}.", f"model.layers.{layer.index}."
        parts = (
            _norms(graph.hidden_dim, theirs),
            _attention(graph.attention, graph.hidden_dim, theirs + "self_attn."),
            _feed_forward(layer, graph.hidden_dim, theirs, checkpoint),
        )
        yield from ((ours + name, recipe) for part in parts for name, recipe in part)
    yield "norm", _whole("model.norm.weight", graph.hidden_dim)
    yield "head", _whole("model.embed_tokens.weight" if graph.tied_embedding else _HEAD, *table)


def _whole(tensor: str, *shape: int) -> _Recipe:
    return _Recipe((_Piece(tensor, shape),))


def _norms(hidden: int, theirs: str) -> Iterator[tuple[str, _Recipe]]:
    yield "input_norm", _whole(theirs + "input_layernorm.weight", hidden)
    yield "post_norm", _whole(theirs + "post_attention_layernorm.weight", hidden)


def _attention(attention: Attention, hidden: int, theirs: str) -> Iterator[tuple[str, _Recipe]]:
    yield from (_latent if attention.kind == "latent" else _grouped)(attention, hidden, theirs)
    yield "o", _whole(theirs + "o_proj.weight", hidden, attention.heads * attention.value_dim)


def _grouped(attention: Attention, hidden: int, theirs: str) -> Iterator[tuple[str, _Recipe]]:
    rows = {
        "q": attention.heads * attention.head_dim,
        "k": attention.kv_heads * attention.head_dim,
        "v": attention.kv_heads * attention.value_dim,
    }
    yield "qkv", _Recipe(tuple(_Piece(f"{theirs}{one}_proj.weight", (count, hidden)) for one, count in rows.items()))
    if attention.bias:
        yield "qkv_bias", _Recipe(tuple(_Piece(f"{theirs}{one}_proj.bias", (rows[one],)) for one in rows))
    if attention.query_key_norm != "none":
        for one in ("q", "k"):
            width = rows[one] if attention.query_key_norm == "projection" else attention.head_dim
            yield f"{one}_norm", _whole(f"{theirs}{one}_norm.weight", width)


def _latent(attention: Attention, hidden: int, theirs: str) -> Iterator[tuple[str, _Recipe]]:
    plain = attention.head_dim - attention.rotary_dim
    rows = attention.heads * attention.head_dim
    turned = _half_split(attention.rotary_dim)
    one_head = np.concatenate([np.arange(plain), plain + turned])
    starts = np.arange(attention.heads)[:, None] * attention.head_dim
    yield "q", _Recipe((_Piece(theirs + "q_proj.weight", (rows, hidden)),), (starts + one_head).reshape(-1))
    down = attention.latent_dim + attention.rotary_dim
    order = np.concatenate([np.arange(attention.latent_dim), attention.latent_dim + turned])
    yield "kv_a", _Recipe((_Piece(theirs + "kv_a_proj_with_mqa.weight", (down, hidden)),), order)
    yield "kv_norm", _whole(theirs + "kv_a_layernorm.weight", attention.latent_dim)
    up = attention.heads * (plain + attention.value_dim)
    yield "kv_b", _whole(theirs + "kv_b_proj.weight", up, attention.latent_dim)


def _half_split(dim: int) -> NDArray[np.intp]:
    """Return where half-split rotary dimensions lie in interleaved order: pair i is (2i, 2i + 1) there."""
    return np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)])


def _feed_forward(
    layer: DecoderLayer, hidden: int, theirs: str, checkpoint: Checkpoint
) -> Iterator[tuple[str, _Recipe]]:
    if layer.routing is None:
        yield from _swiglu("mlp", theirs + "mlp.", layer.dense_dim, hidden)
        return
    # Mixtral's own name for the block, before transformers 5
    old = theirs + "block_sparse_moe."
    block = old if f"{old}gate.weight" in checkpoint.tensors else theirs + "mlp."
    yield "router", _whole(block + "gate.weight", layer.routing.experts, hidden)
    if layer.shared_dim:
        # one shared expert (Qwen2-MoE) or several stored as one (DeepSeek)
        yield from _swiglu(
            "shared", f"{block}shared_expert{'' if layer.shared_gate else 's'}.", layer.shared_dim, hidden
        )
    if layer.shared_gate:
        yield "shared_gate", _whole(block + "shared_expert_gate.weight", 1, hidden)
    yield from _experts(layer, layer.routing.experts, hidden, block + "experts.", checkpoint)


def _swiglu(
    ours: str, theirs: str, width: int, hidden: int, parts: str = "gate_proj up_proj down_proj"
) -> Iterator[tuple[str, _Recipe]]:
    """Yield a feed-forward's two matrices; ``parts`` are the checkpoint's names of gate, up and down."""
    gate, up, down = (f"{theirs}{part}.weight" for part in parts.split())
    yield f"{ours}.gate_up", _Recipe((_Piece(gate, (width, hidden)), _Piece(up, (width, hidden))))
    yield f"{ours}.down", _whole(down, hidden, width)


def _experts(
    layer: DecoderLayer, count: int, hidden: int, theirs: str, checkpoint: Checkpoint
) -> Iterator[tuple[str, _Recipe]]:
    width = layer.expert_dim
    stacked = theirs + "gate_up_proj"
    parts = "w1 w3 w2" if f"{theirs}0.w1.weight" in checkpoint.tensors else "gate_proj up_proj down_proj"
    for expert in range(count):
        ours = f"experts.{expert}"
        if stacked not in checkpoint.tensors:
            yield from _swiglu(ours, f"{theirs}{expert}.", width, hidden, parts)
            continue
        yield f"{ours}.gate_up", _Recipe((_Piece(stacked, (count, 2 * width, hidden), expert),))
        yield f"{ours}.down", _Recipe((_Piece(theirs + "down_proj", (count, hidden, width), expert),))
