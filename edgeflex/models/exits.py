"""Fitting exits: heads on a frozen trunk from cached features, or trunk and heads together.

A tenth of the training images is held out (by the images' digests): heads stop early on it, temperatures
are fitted on it, and the report is about it. Everything slow is written to a journal as it is done, so a
killed run goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from edgeflex import files
from edgeflex.errors import InputError
from edgeflex.images import split
from edgeflex.models import cut, temperature
from edgeflex.models.dynamic import (
    DynamicModel,
    ExitScore,
    FitReport,
    Recipe,
    assemble,
    exit_name,
    finish,
    state_of,
    weights_digest,
)
from edgeflex.models.heads import ExitHead, HeadSpec, pool
from edgeflex.models.training import TrainableHead, Tuning, fold_into_linear, tune
from edgeflex.progress import Progress, Silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.images import ImageFolder
    from edgeflex.schema import Preprocessing

_HELD_OUT_SHARE = 0.1
_CHUNK_IMAGES = 1000
_BATCH = 125
_PATIENCE = 8
# Below this all decoded training images stay in memory while the trunk is tuned.
_PRELOAD_BYTES = 1 << 30


@dataclass(frozen=True)
class _Fit:
    """What one fitting is about; its digest names the journal."""

    images: ImageFolder
    preprocessing: Preprocessing
    recipe: Recipe
    seed: int
    epochs: int
    tuned_epochs: int
    tuning: Tuning
    flip: bool
    refit_final: bool

    def key(self, module: nn.Module) -> str:
        parts = [
            self.recipe.canonical_json(),
            self.tuning.canonical_json(),
            self.images.digest(),
            weights_digest(state_of([module])),
            f"{self.seed} {self.epochs} {self.tuned_epochs} {self.flip} {self.refit_final}",
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Samples:
    """Features of fitting images (all views) and of held-out images, with labels."""

    fit: Tensor
    fit_labels: Tensor
    held: Tensor
    held_labels: Tensor


def fit_exits(
    module: nn.Module,
    stage_names: Sequence[str],
    head: HeadSpec,
    train_images: ImageFolder,
    preprocessing: Preprocessing,
    *,
    source: str,
    seed: int = 0,
    epochs: int = 60,
    flip: bool = False,
    refit_final: bool = True,
    tune_trunk_epochs: int = 0,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> DynamicModel:
    """Return ``module`` with a trained, calibrated exit after each stage and at its end.

    Args:
        module: The network, as ``load_module`` gives it; it is not changed.
        stage_names: Where exits stand, in the order of execution.
        head: What stands there.
        train_images: Labelled images; nine tenths train, one tenth is held out.
        preprocessing: How images become inputs.
        source: The text that ``load_module`` took, kept so that the model can be rebuilt.
        seed: Seed of the split, of heads and of every order.
        epochs: Most passes over the cached features per head; heads stop early.
        flip: Also train the heads on mirrored images. Wrong for digits and text.
        refit_final: Fit the network's last linear layer to these images too.
        tune_trunk_epochs: Passes in which trunk and heads are first trained together; heads are then kept
            as they come out of it.
        tuning: How that is done.
        progress: Told what is being done.
        journal: Folder in which finished work is kept for a later run; None keeps nothing.

    Raises:
        InputError: Stages, head or images do not fit the network.
        UnsupportedError: The network cannot be cut, or does not end with a linear layer.
    """
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    recipe = Recipe(
        source=source,
        stages=tuple(stage_names),
        head=head,
        input_shape=shape,
        preprocessing=preprocessing,
        classes=train_images.classes,
    )
    if not recipe.stages:
        raise InputError("no stage is named, so there is no exit to fit. Name stages with --stages.")
    fit = _Fit(
        train_images, preprocessing, recipe, seed, epochs, tune_trunk_epochs, tuning or Tuning(), flip, refit_final
    )
    parts = _parts(train_images, seed, exits=len(recipe.stages) + 1)
    with _journal_folder(journal, fit.key(module)) as folder:
        return _fitted(module, fit, parts, folder, progress or Silent())


def _fitted(
    module: nn.Module, fit: _Fit, parts: Mapping[str, NDArray[np.int64]], folder: Path, progress: Progress
) -> DynamicModel:
    bare = assemble(module, fit.recipe)
    classes = len(fit.recipe.classes)
    own_final = cut.final_linear(cut.cut(cut.trace(module, fit.recipe.input_shape), ())[0])
    own_classes = getattr(module.get_submodule(own_final), "out_features", None)
    if own_classes != classes and not (fit.refit_final or fit.tuned_epochs):
        raise InputError(
            f"the network tells {own_classes} classes apart, the images have {classes}. "
            "Let its last layer be re-fitted."
        )
    before = _final_accuracy(bare, fit, parts["held"]) if own_classes == classes else None
    if fit.tuned_epochs:
        model = _with_tuned_trunk(module, fit, parts["fit"], folder, progress)
    else:
        _fit_heads(bare, fit, parts, folder, progress)
        model = bare
    return _calibrated(model, fit, parts, before)


# --- the images --------------------------------------------------------------------------------------------


def _parts(images: ImageFolder, seed: int, *, exits: int) -> dict[str, NDArray[np.int64]]:
    parts = split(images, {"held": _HELD_OUT_SHARE, "fit": 1.0 - _HELD_OUT_SHARE}, seed)
    least = 10 * exits
    if len(parts["held"]) < least or len(parts["fit"]) < least:
        raise InputError(
            f"{len(images)} training images leave {len(parts['held'])} to hold out; {exits} exits need at least "
            f"{least}. Give about {12 * least} images or more."
        )
    return parts


def _inputs(fit: _Fit, indices: NDArray[np.int64], *, mirrored: bool = False) -> Tensor:
    x = torch.from_numpy(fit.images.load(indices.tolist(), fit.preprocessing))
    return x.flip(-1) if mirrored else x


@contextmanager
def _journal_folder(journal: Path | None, key: str) -> Iterator[Path]:
    with ExitStack() as stack:
        if journal is None:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeflex-fit-")))
            return
        folder = journal / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.explain_os_error(error, folder) from None
        yield folder


# --- heads on a frozen trunk -------------------------------------------------------------------------------


def _fit_heads(
    model: DynamicModel, fit: _Fit, parts: Mapping[str, NDArray[np.int64]], folder: Path, progress: Progress
) -> None:
    """Train every head in place, from features that are computed once."""
    held_count = len(parts["held"])
    cached = _features(model, fit, np.concatenate([parts["held"], parts["fit"]]), folder, progress)
    labels = torch.from_numpy(fit.images.labels)
    fit_labels = labels[parts["fit"]].repeat(len(cached))
    total = len(model.segments) - (0 if fit.refit_final else 1)
    with progress.task("fit heads", total) as advance:
        for number in range(total):
            plain, *mirrored = [view[str(number)] for view in cached]
            held, rest = plain[:held_count], plain[held_count:]
            every = torch.cat([rest, *(view[held_count:] for view in mirrored)])
            samples = _Samples(every, fit_labels, held, labels[parts["held"]])
            _fit_head(model, fit, number, samples, folder)
            advance(1)


def _fit_head(model: DynamicModel, fit: _Fit, number: int, samples: _Samples, folder: Path) -> None:
    last = number == len(model.segments) - 1
    segment = model.segments[number]
    name = cut.final_linear(segment) if last else f"exit{number}"
    target = segment.get_submodule(name)
    path = folder / f"head{number}.safetensors"
    if path.exists():
        target.load_state_dict(_read(path))
        return
    if last:
        trained: nn.Module = _train_linear(target, fit, samples, seed=fit.seed + number)
    elif fit.recipe.head.kind == "conv":
        trained = _train_conv_head(fit, samples, seed=fit.seed + number)
    else:
        trained = ExitHead(None, _train_linear(None, fit, samples, seed=fit.seed + number))
    target.load_state_dict(trained.state_dict())
    files.write_atomic(path, save(_contiguous(target.state_dict())))


def _train_linear(start: nn.Module | None, fit: _Fit, samples: _Samples, *, seed: int) -> nn.Linear:
    """Return a linear layer fitted to features [n, D], beginning with the weights of ``start`` or zeros.

    Features are standardised by the statistics of the fitting images, which are then folded in.
    """
    norm = nn.BatchNorm1d(samples.fit.shape[1])
    mean, variance = samples.fit.mean(0), samples.fit.var(0, unbiased=False)
    norm.running_mean, norm.running_var = mean, variance
    deviation = torch.sqrt(variance + norm.eps)
    linear = nn.Linear(samples.fit.shape[1], len(fit.recipe.classes))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        if isinstance(start, nn.Linear):
            linear.weight.copy_(start.weight * deviation)
            linear.bias.copy_(start.weight @ mean + start.state_dict().get("bias", torch.zeros(())))
    standard = _Samples(
        (samples.fit - mean) / deviation,
        samples.fit_labels,
        (samples.held - mean) / deviation,
        samples.held_labels,
    )
    _descend(linear, standard, epochs=fit.epochs, seed=seed, learning_rate=1e-2 if start is None else 2e-3)
    return fold_into_linear(norm, linear)


def _train_conv_head(fit: _Fit, samples: _Samples, *, seed: int) -> ExitHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = TrainableHead(fit.recipe.head, samples.fit.shape[1:], len(fit.recipe.classes))
    _descend(head, samples, epochs=fit.epochs, seed=seed, learning_rate=3e-3)
    return head.folded()


def _descend(module: nn.Module, samples: _Samples, *, epochs: int, seed: int, learning_rate: float) -> None:
    """Train with Adam until the held-out loss stops falling; the best epoch's weights are restored."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    best, kept, waited = _held_loss(module, samples), copy.deepcopy(module.state_dict()), 0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    for _ in range(epochs):
        module.train()
        for rows in torch.randperm(len(samples.fit), generator=generator).split(256):
            if len(rows) < 2:
                continue
            optimizer.zero_grad()
            functional.cross_entropy(module(samples.fit[rows].float()), samples.fit_labels[rows]).backward()
            optimizer.step()
        schedule.step()
        loss, waited = _held_loss(module, samples), waited + 1
        if loss < best:
            best, kept, waited = loss, copy.deepcopy(module.state_dict()), 0
        if waited >= _PATIENCE:
            break
    module.load_state_dict(kept)
    module.eval()


@torch.no_grad()
def _held_loss(module: nn.Module, samples: _Samples) -> float:
    module.eval()
    logits = torch.cat([module(part.float()) for part in samples.held.split(512)])
    return float(functional.cross_entropy(logits, samples.held_labels))


def _features(
    model: DynamicModel, fit: _Fit, indices: NDArray[np.int64], folder: Path, progress: Progress
) -> list[dict[str, Tensor]]:
    """Return, per view, what feeds each head ([n, D] pooled, or half-precision maps for conv heads)."""
    views = (False, True) if fit.flip else (False,)
    chunks = [indices[start : start + _CHUNK_IMAGES] for start in range(0, len(indices), _CHUNK_IMAGES)]
    found: list[dict[str, Tensor]] = []
    with progress.task("compute features", len(indices) * len(views)) as advance:
        for mirrored in views:
            parts = []
            for number, chunk in enumerate(chunks):
                path = folder / f"features{int(mirrored)}-{number}.safetensors"
                if not path.exists():
                    files.write_atomic(path, save(_chunk_features(model, fit, chunk, mirrored=mirrored)))
                parts.append(_read(path))
                advance(len(chunk))
            found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return found


@torch.no_grad()
def _chunk_features(model: DynamicModel, fit: _Fit, chunk: NDArray[np.int64], *, mirrored: bool) -> dict[str, Tensor]:
    maps = fit.recipe.head.kind == "conv"
    last = model.segments[-1].get_submodule(cut.final_linear(model.segments[-1]))
    seen: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {}
    handle = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        for start in range(0, len(chunk), _BATCH):
            x = _inputs(fit, chunk[start : start + _BATCH], mirrored=mirrored)
            for number, segment in enumerate(model.segments[:-1]):
                x, _ = segment(x)
                rows.setdefault(str(number), []).append(x.half() if maps else pool(x, fit.recipe.head.grid))
            model.segments[-1](x)
            rows.setdefault(str(len(model.segments) - 1), []).append(seen.pop())
    finally:
        handle.remove()
    return _contiguous({name: torch.cat(parts) for name, parts in rows.items()})


# --- trunk and heads together ------------------------------------------------------------------------------


def _with_tuned_trunk(
    module: nn.Module, fit: _Fit, indices: NDArray[np.int64], folder: Path, progress: Progress
) -> DynamicModel:
    tuned = _for_classes(copy.deepcopy(module), fit)
    preload = len(indices) * int(np.prod(fit.recipe.input_shape)) * 4 <= _PRELOAD_BYTES
    every = _inputs(fit, indices) if preload else None

    def batch(rows: NDArray[np.int64]) -> Tensor:
        return every[rows] if every is not None else _inputs(fit, indices[rows])

    trained = tune(
        tuned,
        fit.recipe.stages,
        fit.recipe.head,
        batch,
        fit.images.labels[indices],
        input_shape=fit.recipe.input_shape,
        classes=len(fit.recipe.classes),
        epochs=fit.tuned_epochs,
        seed=fit.seed,
        tuning=fit.tuning,
        journal=folder,
        progress=progress,
    )
    model = assemble(tuned.eval(), fit.recipe)
    for number, head in enumerate(trained):
        model.segments[number].get_submodule(f"exit{number}").load_state_dict(head.state_dict())
    return model


def _for_classes(module: nn.Module, fit: _Fit) -> nn.Module:
    """Give ``module`` a fresh last layer if it has another number of classes than the images."""
    name = cut.final_linear(cut.cut(cut.trace(module, fit.recipe.input_shape), ())[0])
    linear = module.get_submodule(name)
    if isinstance(linear, nn.Linear) and linear.out_features != len(fit.recipe.classes):
        parent, _, last = name.rpartition(".")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fit.seed)
            fresh = nn.Linear(linear.in_features, len(fit.recipe.classes))
        setattr(module.get_submodule(parent), last, fresh)
    return module


# --- temperatures and report -------------------------------------------------------------------------------


def _held_logits(model: DynamicModel, fit: _Fit, indices: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    batches = [indices[start : start + _BATCH] for start in range(0, len(indices), _BATCH)]
    rows = [model.exit_logits(_inputs(fit, chunk)) for chunk in batches]
    return [torch.cat(parts).double().numpy() for parts in zip(*rows, strict=True)]


def _final_accuracy(model: DynamicModel, fit: _Fit, indices: NDArray[np.int64]) -> float:
    logits = _held_logits(model, fit, indices)[-1]
    return float((logits.argmax(1) == fit.images.labels[indices]).mean())


def _calibrated(
    model: DynamicModel, fit: _Fit, parts: Mapping[str, NDArray[np.int64]], before: float | None
) -> DynamicModel:
    labels = fit.images.labels[parts["held"]]
    logits = _held_logits(model, fit, parts["held"])
    temperatures, thresholds = temperature.fit_temperatures(logits, labels)
    for number, (segment, value) in enumerate(zip(model.segments, temperatures, strict=True)):
        last = number == len(temperatures) - 1
        linear = segment.get_submodule(cut.final_linear(segment) if last else f"exit{number}.linear")
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.div_(value)
    report = FitReport(
        train_images=len(parts["fit"]),
        held_out_images=len(labels),
        images_digest=fit.images.digest(),
        seed=fit.seed,
        tuned_epochs=fit.tuned_epochs,
        thresholds=thresholds,
        final_before_refit=before,
        exits=_scores(fit.recipe, logits, labels, temperatures, thresholds),
    )
    recipe = fit.recipe.model_copy(update={"temperatures": temperatures, "report": report})
    return finish(model.segments, recipe)


def _scores(
    recipe: Recipe,
    logits: Sequence[NDArray[np.float64]],
    labels: NDArray[np.int64],
    temperatures: Sequence[float],
    thresholds: Sequence[float | None],
) -> tuple[ExitScore, ...]:
    confidence = temperature.confidences(logits, temperatures)
    taken = temperature.exits_taken(confidence, thresholds)
    scores = []
    for number, (stage, part) in enumerate(zip((*recipe.stages, ""), logits, strict=True)):
        right, here, leaves = part.argmax(1) == labels, confidence[:, number], taken == number
        some = bool(leaves.any())
        scores.append(
            ExitScore(
                name=exit_name(number, len(logits)),
                stage=stage,
                temperature=temperatures[number],
                accuracy=float(right.mean()),
                ece=temperature.calibration_error(here, right),
                share=float(leaves.mean()),
                accuracy_of_leavers=float(right[leaves].mean()) if some else None,
                ece_of_leavers=temperature.calibration_error(here[leaves], right[leaves]) if some else None,
            )
        )
    return tuple(scores)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load(files.read_bytes(path, "journal entry"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"journal entry {path} is damaged: {error}. Remove it to compute it again.") from None


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().clone() for name, value in state.items()}
