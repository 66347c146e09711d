"""Accuracy, parity and size of a bundle against its manifest, on images that chose nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.bundle import EXPECTED, seen_digests
from edgeflex.errors import BundleError, InputError
from edgeflex.progress import Silent
from edgeflex.runtimes import open_session
from edgeflex.runtimes.bench import disk_checks
from edgeflex.runtimes.loop import exits_for
from edgeflex.runtimes.quality import exit_qualities, oracle_exits, paired_drop_bounds, proportion_bounds
from edgeflex.runtimes.segments import all_exits
from edgeflex.schema import Check, CurvePoint, Example, VerifyResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeflex.bundle import Bundle
    from edgeflex.images import ImageFolder
    from edgeflex.progress import Progress
    from edgeflex.runtimes import Session
    from edgeflex.schema import BundleManifest, ModelGraph, Plan

    Float32 = NDArray[np.float32]
    Reference = Callable[[Float32], NDArray[np.floating]]

LEVEL = 0.95
_BATCH = 128
_EXAMPLES_PER_KIND = 4
_EXAMPLE_PIXELS = 96


@dataclass(frozen=True)
class _Answers:
    """What all exits said about all images that were looked at.

    Attributes:
        indices: ``[n]``, into the image folder.
        labels: ``[n]``, classes of the network.
        probabilities: ``[n, exits, classes]``.
        exits: ``[n]``, where each leaves by the plan's thresholds.
        reference: ``[n]``, whether the reference network was right; None where it was not given.
    """

    indices: NDArray[np.intp]
    labels: NDArray[np.intp]
    probabilities: Float32
    exits: NDArray[np.intp]
    reference: NDArray[np.bool_] | None

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``[n, exits]``: whether each exit is right."""
        return np.asarray(self.probabilities.argmax(axis=2) == self.labels[:, None])

    @property
    def confidence(self) -> NDArray[np.float64]:
        """``[n, exits]``: the largest probability."""
        return self.probabilities.max(axis=2).astype(np.float64)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """``[n]``: whether the exit where an image left is right."""
        return np.asarray(self.correct[np.arange(len(self.exits)), self.exits])


def verify(
    bundle: Bundle,
    images: ImageFolder,
    *,
    indices: Sequence[int] | None = None,
    max_images: int | None = None,
    runtime: str | None = None,
    threads: int = 1,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Run every segment on every image that chose nothing, and hold the manifest's promises against it.

    Args:
        bundle: A checked bundle.
        images: Labelled images; those named in the bundle's list of seen images are skipped.
        indices: The images to look at; all by default.
        max_images: At most so many, evenly spread over those left.
        runtime: What runs the bundle; that of its backend by default.
        threads: Threads of the pool.
        reference: The full-depth fp32 network, ``[n, C, H, W]`` to probabilities or logits ``[n, classes]``.
            Without it, the accuracy that the plan recorded stands in, and a note says so.
        progress: Told about images.

    Raises:
        InputError: No unseen image is left, a class is unknown, or no reference accuracy is known.
        BundleError: The manifest lacks the preprocessing or contradicts itself.
        DeviceError: The backend failed.
    """
    manifest = bundle.manifest
    _check_manifest(manifest)
    unseen = unseen_indices(bundle, images, among=indices)
    skipped = (len(images.items) if indices is None else len(indices)) - len(unseen)
    chosen = unseen_indices(bundle, images, max_images, among=unseen.tolist())
    with open_session(bundle, runtime, threads) as session:
        parity = _parity_check(bundle, session)
        answers = _answer(session, manifest, images, chosen, reference=reference, progress=progress or Silent())
    accuracy = float(answers.answered.mean())
    reference_accuracy = _reference_accuracy(manifest.plan, answers)
    cumulative_s = np.cumsum(manifest.plan.predicted.block_latency_s)
    oracle = oracle_exits(answers.correct)
    names = [point.name for point in manifest.graph.exits]
    return VerifyResult(
        manifest_digest=manifest.digest(),
        images=len(chosen),
        skipped_seen=skipped,
        checks=(
            *_drop_checks(manifest.plan, answers, reference_accuracy),
            parity,
            _precision_check(manifest),
            *disk_checks(bundle),
        ),
        accuracy=accuracy,
        reference_accuracy=reference_accuracy,
        drop=reference_accuracy - accuracy,
        exits=exit_qualities(names, answers.confidence, answers.correct, answers.exits),
        oracle_accuracy=float(answers.correct.any(axis=1).mean()),
        oracle_latency_s=float(cumulative_s[oracle].mean()),
        static_points=_static_points(manifest, answers, reference_accuracy, cumulative_s.tolist()),
        examples=_examples(images, manifest, answers),
    )


def _check_manifest(manifest: BundleManifest) -> None:
    counts = {
        "segments": len(manifest.segments),
        "exits": len(manifest.graph.exits),
        "thresholds": len(manifest.plan.thresholds),
        "blocks with a latency": len(manifest.plan.predicted.block_latency_s),
    }
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise BundleError(f"the manifest contradicts itself: {listed}. Export the bundle again.")
    if manifest.graph.preprocessing is None:
        raise BundleError("the manifest does not say how images are prepared. Export the bundle again.")


def unseen_indices(
    bundle: Bundle, images: ImageFolder, limit: int | None = None, *, among: Sequence[int] | None = None
) -> NDArray[np.intp]:
    """Return the indices of images that neither fitted, chose nor certified anything in ``bundle``.

    Args:
        bundle: A checked bundle.
        images: The images.
        limit: At most so many, evenly spread over those left.
        among: The indices to choose from; all by default.

    Raises:
        InputError: None is left, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"at most {limit} images: at least 1 is needed.")
    seen = seen_digests(bundle)
    asked = range(len(images.items)) if among is None else among
    fresh = np.array([index for index in asked if images.items[index].digest not in seen], dtype=np.intp)
    if len(fresh) == 0:
        raise InputError(
            f"{images.source}: all {len(asked)} images were used to fit, choose or certify this bundle; "
            "figures on them would prove nothing. Give images that it has not seen."
        )
    if limit is None or limit >= len(fresh):
        return fresh
    spread = np.linspace(0, len(fresh) - 1, limit).round().astype(np.intp)
    return np.asarray(fresh[spread], dtype=np.intp)


def _answer(
    session: Session,
    manifest: BundleManifest,
    images: ImageFolder,
    chosen: NDArray[np.intp],
    *,
    reference: Reference | None,
    progress: Progress,
) -> _Answers:
    preprocessing = manifest.graph.preprocessing
    if preprocessing is None:
        raise BundleError("the manifest does not say how images are prepared. Export the bundle again.")
    classes = _class_numbers(images, manifest.graph)
    labels = np.array([classes[images.items[index].label] for index in chosen], dtype=np.intp)
    parts: list[Float32] = []
    right: list[NDArray[np.bool_]] = []
    with progress.task("verify", len(chosen)) as advance:
        for start in range(0, len(chosen), _BATCH):
            batch = chosen[start : start + _BATCH]
            x = images.load(batch.tolist(), preprocessing)
            parts.append(all_exits(session, [x]))
            if reference is not None:
                right.append(reference(x).argmax(axis=1) == labels[start : start + _BATCH])
            advance(len(batch))
    probabilities = np.concatenate(parts)
    exits = exits_for(probabilities, manifest.plan.thresholds)
    return _Answers(chosen, labels, probabilities, exits, np.concatenate(right) if right else None)


def _class_numbers(images: ImageFolder, graph: ModelGraph) -> list[int]:
    """Return the network's class for each class of the folder, matched by name where the network has names."""
    if not graph.classes:
        return list(range(len(images.classes)))
    numbers = {name: number for number, name in enumerate(graph.classes)}
    unknown = [name for name in images.classes if name not in numbers]
    if unknown:
        raise InputError(
            f"{images.source}: the network knows no class {', '.join(map(repr, unknown[:10]))}; it knows "
            f"{', '.join(graph.classes[:10])}{', …' if len(graph.classes) > 10 else ''}. Rename the folders."
        )
    return [numbers[name] for name in images.classes]


def _reference_accuracy(plan: Plan, answers: _Answers) -> float:
    if answers.reference is not None:
        return float(answers.reference.mean())
    if plan.reference_accuracy is None:
        raise InputError(
            "the plan recorded no reference accuracy, so no drop can be told. "
            "Pass the full-depth network with --model and --weights."
        )
    return plan.reference_accuracy


def _drop_checks(plan: Plan, answers: _Answers, reference_accuracy: float) -> list[Check]:
    """A drop counts as broken only if it is beyond the limit by more than the sample can err."""
    certificate = plan.certificate
    limit = certificate.drop_limit if certificate else plan.budget.max_drop
    if limit is None:
        return []
    # as in plan and report; what the certificate's images showed stands in where the plan foretold none
    promised = plan.predicted_drop if plan.predicted_drop is not None else certificate.drop if certificate else 0.0
    drop = reference_accuracy - float(answers.answered.mean())
    samples = len(answers.answered)
    if answers.reference is not None:
        low, high = paired_drop_bounds(answers.reference, answers.answered, LEVEL)
        how = "both networks ran on the same images"
    else:
        accuracy = proportion_bounds(int(answers.answered.sum()), samples, LEVEL)
        low, high = reference_accuracy - accuracy[1], reference_accuracy - accuracy[0]
        how = "the reference accuracy is the plan's, from other images"
    note = f"{LEVEL * 100:.0f} % interval over {samples:,} images (Clopper–Pearson); {how}"
    return [
        Check(
            name="accuracy drop",
            unit="share",
            limit=limit,
            promised=promised,
            measured=drop,
            low=low,
            high=high,
            ok=low <= limit,
            note=note,
        )
    ]


def _parity_check(bundle: Bundle, session: Session) -> Check:
    """Compare the program's answers with the reference's, which the exporter kept for two inputs."""
    inputs, expected = _expected(bundle)
    measured = all_exits(session, [inputs])
    if measured.shape != expected.shape:
        raise BundleError(
            f"{bundle.file(EXPECTED)}: expected outputs are {list(expected.shape)}, the program gives "
            f"{list(measured.shape)}. Export the bundle again."
        )
    difference = float(np.abs(measured - expected).max())
    tolerance = bundle.manifest.tolerance
    return Check(
        name="parity with the reference",
        unit="share",
        limit=tolerance,
        promised=0.0,
        measured=difference,
        low=0.0,
        high=tolerance,
        ok=difference <= tolerance,
        note=f"largest difference of a probability over {len(inputs)} inputs and all exits",
    )


def _expected(bundle: Bundle) -> tuple[Float32, Float32]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = bundle.file(EXPECTED)
    try:
        tensors = load_file(path)
        return tensors["inputs"].astype(np.float32), tensors["probabilities"].astype(np.float32)
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{path}: expected outputs cannot be read: {error}. Export the bundle again.") from None


def _precision_check(manifest: BundleManifest) -> Check:
    planned = {choice.subject: choice.option for choice in manifest.plan.choices}
    held = {name: precision.value for name, precision in manifest.layer_precisions.items()}
    other = sorted(name for name, option in planned.items() if held.get(name) != option)
    told = ", ".join(f"{name}: planned {planned[name]}, holds {held.get(name, 'nothing')}" for name in other[:5])
    return Check(
        name="layers in their planned precision",
        unit="count",
        limit=None,
        promised=len(planned),
        measured=len(planned) - len(other),
        ok=not other,
        note=told,
    )


def _static_points(
    manifest: BundleManifest, answers: _Answers, reference_accuracy: float, cumulative_s: Sequence[float]
) -> tuple[CurvePoint, ...]:
    """Each exit alone, as a network that always leaves there; memory is the whole bundle's."""
    accuracies = answers.correct.mean(axis=0)
    return tuple(
        CurvePoint(
            label=f"always leave at {point.name}",
            latency_s=cumulative_s[k],
            memory_bytes=manifest.plan.memory.model_bytes,
            drop=reference_accuracy - float(accuracies[k]),
        )
        for k, point in enumerate(manifest.graph.exits)
    )


def _examples(images: ImageFolder, manifest: BundleManifest, answers: _Answers) -> tuple[Example, ...]:
    """Return up to four images each that left early and sure, that went to the end, and that were wrong."""
    rows = np.arange(len(answers.exits))
    confidence = answers.confidence[rows, answers.exits]
    right = answers.answered
    last = answers.probabilities.shape[1] - 1
    surest_first = np.argsort(-confidence, kind="stable")
    kinds = (
        right & (answers.exits == 0) & (last > 0),
        right & (answers.exits == last),
        ~right,
    )
    chosen = [row for kind in kinds for row in surest_first[kind[surest_first]][:_EXAMPLES_PER_KIND].tolist()]
    names = manifest.graph.classes or images.classes
    return tuple(_example(images, names, answers, row, float(confidence[row])) for row in chosen)


def _example(images: ImageFolder, names: Sequence[str], answers: _Answers, row: int, confidence: float) -> Example:
    item = images.items[int(answers.indices[row])]
    prediction = int(answers.probabilities[row, answers.exits[row]].argmax())
    return Example(
        input=item.path,
        image=images.png_data_uri(int(answers.indices[row]), _EXAMPLE_PIXELS),
        label=images.classes[item.label],
        prediction=names[prediction] if prediction < len(names) else str(prediction),
        exit=int(answers.exits[row]),
        confidence=confidence,
    )
