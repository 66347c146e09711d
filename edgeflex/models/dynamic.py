"""Dynamic models: segments with exits, in memory and as a folder.

A folder holds ``model.json`` (how the structure is rebuilt, and what fitting found) and
``weights.safetensors``. Nothing in it is code.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, fx, nn

from edgeflex import files
from edgeflex.bundle import seen_text
from edgeflex.errors import InputError, UnsupportedError
from edgeflex.models import cut, heads
from edgeflex.models.heads import HeadSpec
from edgeflex.models.sources import load_module, refuse_misfit
from edgeflex.schema import Document, ExitPoint, FormatEdge, Layer, ModelGraph, Noun, Preprocessing

_MODEL_FILE = "model.json"
_WEIGHTS_FILE = "weights.safetensors"


class ExitScore(Noun):
    """How one exit does on the held-out tenth of the training images.

    Heads were stopped early and temperatures fitted on these images, so the figures are for orientation;
    promises rest on images that chose nothing.
    """

    name: str
    stage: str
    temperature: float
    accuracy: float
    ece: float
    share: float
    accuracy_of_leavers: float | None
    ece_of_leavers: float | None


class FitReport(Noun):
    """What fitting exits found; ``final_before_refit`` is the network's own accuracy on these images."""

    train_images: int
    held_out_images: int
    images_digest: str
    seed: int
    tuned_epochs: int
    thresholds: tuple[float | None, ...]
    final_before_refit: float | None
    exits: tuple[ExitScore, ...]


class Recipe(Document):
    """All that is needed, beside the weights, to rebuild a dynamic model."""

    source: str
    stages: tuple[str, ...]
    head: HeadSpec
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = Field(min_length=2)
    temperatures: tuple[float, ...] = ()
    weights_digest: str = ""
    report: FitReport | None = None


@dataclass(frozen=True)
class DynamicModel:
    """A network cut into segments with an exit at the end of each.

    Attributes:
        graph: The model as the planner sees it; ``graph.input_shape`` is without the batch.
        segments: float32, eval mode, BatchNorm folded, any batch size. All but the last map x to
            (features, logits), the last maps x to logits. Logits are already divided by the exit's
            temperature.
        recipe: How to rebuild it; what is saved.
    """

    graph: ModelGraph
    segments: tuple[fx.GraphModule, ...]
    recipe: Recipe

    def exit_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits [B, classes] of every exit for inputs [B, …]."""
        found = []
        with torch.no_grad():
            for segment in self.segments[:-1]:
                x, logits = segment(x)
                found.append(logits)
            found.append(self.segments[-1](x))
        return tuple(found)


def assemble(module: nn.Module, recipe: Recipe) -> DynamicModel:
    """Return ``module`` cut at the recipe's stages, with untrained heads and BatchNorm folded.

    A final linear layer for another number of classes is replaced by an untrained one.

    Raises:
        InputError: Stages are unknown or unclean, or a head does not fit its features.
        UnsupportedError: The network cannot be traced or cut.
    """
    traced = cut.trace(module, recipe.input_shape)
    segments = list(cut.cut(traced, recipe.stages))
    shapes = [stage.output_shape for stage in cut.check_stages(traced, recipe.stages)] if recipe.stages else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number, shape in enumerate(shapes):
            head = heads.make_head(recipe.head, shape, len(recipe.classes))
            segments[number] = heads.attach(segments[number], f"exit{number}", head, shape)
        _fit_classes(segments[-1], len(recipe.classes))
    for segment in segments:
        segment.eval().requires_grad_(requires_grad=False)
    return finish(tuple(segments), recipe)


def finish(segments: tuple[fx.GraphModule, ...], recipe: Recipe) -> DynamicModel:
    """Return the dynamic model of finished segments; the digest and graph are computed here."""
    state = state_of(segments)
    recipe = recipe.model_copy(update={"weights_digest": weights_digest(state)})
    layers, edges = _describe(segments, recipe.input_shape)
    temperatures = recipe.temperatures or (1.0,) * len(segments)
    stages = (*recipe.stages, "")
    graph = ModelGraph(
        name=recipe.source,
        weights_digest=recipe.weights_digest,
        input_shape=recipe.input_shape,
        preprocessing=recipe.preprocessing,
        classes=recipe.classes,
        segment_count=len(segments),
        layers=layers,
        edges=edges,
        exits=tuple(
            ExitPoint(name=exit_name(number, len(segments)), segment=number, stage=stage, temperature=value)
            for number, (stage, value) in enumerate(zip(stages, temperatures, strict=True))
        ),
    )
    return DynamicModel(graph, segments, recipe)


def exit_name(number: int, count: int) -> str:
    """Return ``exit0``, ``exit1``, …, and ``final`` for the last of ``count``."""
    return "final" if number == count - 1 else f"exit{number}"


def state_of(segments: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return all weights by their names in the whole network; each tensor owns its memory."""
    return {name: value.detach().clone() for part in segments for name, value in part.state_dict().items()}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().contiguous().cpu()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def graph_from_module(
    module: nn.Module,
    *,
    source: str,
    input_shape: Sequence[int],
    stages: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] = (),
) -> ModelGraph:
    """Return the graph of a network before it has heads: one exit at the end, layers by segment.

    Raises:
        InputError: Stages are unknown or unclean, or inputs have another shape.
        UnsupportedError: The network cannot be traced, or has layers that cannot be planned.
    """
    segments = cut.cut(cut.trace(module, input_shape), stages)
    layers, edges = _describe(segments, input_shape)
    return ModelGraph(
        name=source,
        weights_digest=weights_digest(state_of(segments)),
        input_shape=tuple(input_shape),
        preprocessing=preprocessing,
        classes=tuple(classes),
        segment_count=len(segments),
        layers=layers,
        edges=edges,
        exits=(ExitPoint(name="final", segment=len(segments) - 1, stage=""),),
    )


def save_model(model: DynamicModel, folder: Path, *, overwrite: bool = False, seen: Iterable[str] = ()) -> None:
    """Write ``model`` into ``folder``, whole or not at all, with the digests of the images that fitted it.

    Raises:
        InputError: ``folder`` is not empty and ``overwrite`` is false, or cannot be written.
        DeviceError: The disk is full.
    """
    state = {name: value.contiguous() for name, value in state_of(model.segments).items()}
    with files.staged_folder(folder, overwrite=overwrite) as staging:
        files.write_atomic(staging / _MODEL_FILE, model.recipe.model_dump_json(indent=2))
        files.write_atomic(staging / _WEIGHTS_FILE, save(state))
        files.write_atomic(staging / "seen.txt", seen_text(seen))


def open_model(folder: Path) -> DynamicModel:
    """Return the model that ``save_model`` wrote; the file the weights once came from is not needed.

    Raises:
        InputError: The folder is absent or damaged, the weights are not the saved ones, or the network's
            code (a factory) cannot be imported.
    """
    if not folder.is_dir():
        raise InputError(f"model {str(folder)!r} is no folder. Make one with edgeflex fit-exits.")
    recipe = Recipe.parse(files.read_bytes(folder / _MODEL_FILE, "model description"), str(folder / _MODEL_FILE))
    state = _saved_state(folder / _WEIGHTS_FILE, recipe)
    module = load_module(recipe.source, classes=len(recipe.classes) or None)
    segments = assemble(module, recipe).segments
    refuse_misfit(state_of(segments), state, str(folder / _WEIGHTS_FILE))
    for segment in segments:
        segment.load_state_dict({name: state[name] for name in segment.state_dict()})
    return finish(segments, recipe)


def _saved_state(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    try:
        state = load(files.read_bytes(path, "model weights"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}. Fit or copy the model again.") from None
    found = weights_digest(state)
    if found != recipe.weights_digest:
        raise InputError(
            f"{path} holds other weights (digest {found[:12]}) than {_MODEL_FILE} says "
            f"({recipe.weights_digest[:12]}). Fit or copy the model again."
        )
    return state


def _describe(
    segments: Sequence[fx.GraphModule], input_shape: Sequence[int]
) -> tuple[tuple[Layer, ...], tuple[FormatEdge, ...]]:
    layers: tuple[Layer, ...] = ()
    edges: tuple[FormatEdge, ...] = ()
    x = torch.zeros(1, *input_shape)
    for number, segment in enumerate(segments):
        out = cut.propagate(segment, x)
        if number < len(segments) - 1:
            x = _features(out)
        more_layers, more_edges = cut.describe(segment, number, head_prefix=f"exit{number}")
        layers, edges = layers + more_layers, edges + more_edges
    repeated = sorted(name for name, count in Counter(layer.name for layer in layers).items() if count > 1)
    if repeated:
        raise UnsupportedError(
            f"layers {', '.join(repeated[:5])} are called more than once; every planned layer must be called once."
        )
    return layers, edges


def _features(out: object) -> Tensor:
    found = out[0] if isinstance(out, tuple) else out
    if not isinstance(found, Tensor):
        raise UnsupportedError(f"a segment returns a {type(found).__name__}; a tensor is needed.")
    return found


def _fit_classes(segment: fx.GraphModule, classes: int) -> None:
    name = cut.final_linear(segment)
    linear = segment.get_submodule(name)
    if isinstance(linear, nn.Linear) and linear.out_features != classes:
        parent, _, last = name.rpartition(".")
        setattr(segment.get_submodule(parent), last, nn.Linear(linear.in_features, classes))
