"""ResNet-56 on CIFAR-10 JPEGs through the whole corridor, against its own static programs.

    python benchmarks/resnet56_tune.py --out resnet56-jpeg.safetensors          (once)
    python benchmarks/resnet56_exits.py --weights resnet56-jpeg.safetensors --work /tmp/resnet56

Images: heads are fitted on the 20,000 training images; of the 5,000 dev images 30 % choose, 30 % certify and
40 % judge. Programs: the planned bundle, the fp32 network and the static int8 network each as one ExecuTorch
program without exits. All timed in one process, one thread, one image at a time, in runs of 25 images in the
order A B C C B A (runs, since a program that follows another finds its weights out of the cache, which no
deployment of one program does); medians per image over the passes, then means over images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from edgeflex import flow
from edgeflex.bundle import open_bundle, seen_digests
from edgeflex.costs.policies import exit_outputs
from edgeflex.exporters.executorch import lower
from edgeflex.images import open_images
from edgeflex.models import assemble, load_module, open_model
from edgeflex.models.dynamic import DynamicModel, state_of
from edgeflex.profiles import load
from edgeflex.runtimes.executorch import ExecutorchSession
from edgeflex.runtimes.quality import oracle_exits
from edgeflex.runtimes.segments import all_exits
from edgeflex.schema import Budget, Precision
from edgeflex.transforms import prepare, record_ranges
from tests.builders import needed_data

STAGES = "layer2.2,layer2.8,layer3.2"
RUN = 25
SHARES = {"choose": 0.3, "certify": 0.3, "test": 0.4}


class Bars:
    """Progress on a line of its own."""

    def task(self, title: str, total: int):
        from contextlib import contextmanager

        @contextmanager
        def shown():
            start = time.time()
            yield lambda _count: None
            print(f"  {title}: {total} in {time.time() - start:.0f} s", flush=True)

        return shown()

    def note(self, text: str) -> None:
        print(f"  {text}")


def whole(model: DynamicModel) -> DynamicModel:
    """Return the same network without early exits, its weights and its fitted last layer."""
    plain = assemble(
        load_module(model.recipe.source, classes=len(model.recipe.classes)),
        model.recipe.model_copy(update={"stages": (), "temperatures": ()}),
    )
    state = state_of(model.segments)
    for segment in plain.segments:
        segment.load_state_dict({name: state[name] for name in segment.state_dict()})
    return plain


def static_program(model: DynamicModel, images: np.ndarray, precision: Precision) -> tuple[bytes, DynamicModel]:
    """Return the network as one program in one precision."""
    plain = whole(model)
    ranges = record_ranges(plain, [torch.from_numpy(images)])
    prepared = prepare(plain, {layer.name: precision for layer in plain.graph.layers}, ranges)
    return lower({"forward": (prepared.segments[0], torch.zeros(1, *plain.graph.input_shape))}), plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--head", default="grid")
    parser.add_argument("--stages", default=STAGES)
    parser.add_argument("--max-drop", type=float, nargs="+", default=[0.02, 0.025, 0.03], help="promises to plan for")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--only-report", action="store_true", help="time and judge the bundles that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, progress = arguments.work, Bars()
    if arguments.only_report:
        reports(arguments, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    train, dev = needed_data("cifar10-jpeg", "train.zip"), needed_data("cifar10-jpeg", "dev.zip")
    if not (work / "device.json").exists():
        flow.profile(work / "device.json", quick=True, progress=progress)
    if not (work / "model").exists():
        flow.fit_exits(
            "zoo:resnet56", train, work / "model", weights=arguments.weights,
            stage_names=tuple(arguments.stages.split(",")),
            head=arguments.head, epochs=30, flip=True, progress=progress,
        )  # fmt: skip
    flow.calibrate(
        work / "model", dev, work / "calibration", device=load(str(work / "device.json")),
        shares=SHARES, mixes=6, progress=progress,
    )  # fmt: skip
    for drop in arguments.max_drop:
        budget = Budget(max_drop=drop, confidence=arguments.confidence, minimize="latency")
        planned = flow.plan(work / "calibration", budget)
        folder = work / f"bundle-{drop:g}"
        flow.export(planned, work / "model", work / "calibration", folder, overwrite=True, progress=progress)
    reports(arguments, work)


def reports(arguments: argparse.Namespace, work: Path) -> None:
    """Judge every promise; the unseen images choose none of them."""
    lines = []
    for drop in arguments.max_drop:
        print(f"\npromised: at most {drop:.1%}")
        lines.append((drop, *report(arguments, work, work / f"bundle-{drop:g}")))
    print("\npromised  drop seen   bundle / fp32   bundle / static int8")
    for drop, seen, fp32, int8 in lines:
        print(f"{drop:>8.1%}  {seen * 100:>+6.2f} pt   {fp32:>13.3f}   {int8:>20.3f}")


def report(arguments: argparse.Namespace, work: Path, folder: Path) -> tuple[float, float, float]:
    """Print the figures of one bundle; return its drop and its times over those of fp32 and static int8."""
    model, bundle = open_model(work / "model"), open_bundle(folder)
    planned = bundle.manifest.plan
    images = open_images(needed_data("cifar10-jpeg", "dev.zip"))
    seen = seen_digests(bundle)
    unseen = np.array([i for i, item in enumerate(images.items) if item.digest not in seen])
    pixels = images.load(unseen, model.graph.preprocessing)
    labels = images.labels[unseen]
    choose = np.load(work / "calibration" / "choose.npy")
    sample = images.load(choose[:256], model.graph.preprocessing)
    fp32, _ = static_program(model, sample, Precision.FP32)
    int8, _plain = static_program(model, sample, Precision.INT8_STATIC)
    with ExecutorchSession(bundle.file("program"), bundle.manifest.segments) as session:
        probabilities = all_exits(session, [pixels])
    outputs = exit_outputs(probabilities, labels)
    reference = np.concatenate(
        [
            model.exit_logits(torch.from_numpy(pixels[i : i + 250]))[-1].argmax(1).numpy()
            for i in range(0, len(pixels), 250)
        ]
    )
    times, exits, int8_right = timed(arguments, bundle, fp32, int8, pixels, labels)
    taken = np.array(exits)
    answers = probabilities.argmax(-1)
    thresholds = planned.thresholds
    from edgeflex.runtimes.loop import exits_for

    where = exits_for(probabilities, thresholds)
    right = answers[np.arange(len(where)), where] == labels
    base = float((reference == labels).mean())
    ladder = np.cumsum(planned.predicted.block_latency_s)
    oracle_accuracy = float(outputs.correct.any(axis=1).mean())
    oracle_s = float(ladder[oracle_exits(outputs.correct)].mean())
    rows = [
        ("test images (never used for choosing)", f"{len(labels)}"),
        ("fp32 full depth accuracy", f"{base:.4f}"),
        ("static int8 full depth accuracy", f"{int8_right:.4f}"),
        ("planned accuracy", f"{right.mean():.4f}"),
        ("drop", f"{(base - right.mean()) * 100:+.2f} points"),
        ("certified", f"<= {planned.certificate.drop_limit:.2%} at {planned.certificate.confidence:.0%}"),
        ("fp32 program, mean", f"{times[1].mean() * 1e6:.1f} us"),
        ("static int8 program, mean", f"{times[2].mean() * 1e6:.1f} us"),
        (
            "planned bundle, mean",
            f"{times[0].mean() * 1e6:.1f} us  (promised {planned.predicted.latency_s['mean'] * 1e6:.1f})",
        ),
        ("bundle / fp32", f"{times[0].mean() / times[1].mean():.3f}"),
        ("bundle / static int8", f"{times[0].mean() / times[2].mean():.3f}"),
        ("exit shares", " ".join(f"{(taken == k).mean():.2f}" for k in range(len(thresholds)))),
        ("accuracy of each exit alone", " ".join(f"{one:.3f}" for one in outputs.correct.mean(0))),
        ("time to each exit, promised us", " ".join(f"{one * 1e6:.0f}" for one in ladder)),
        ("oracle: first right exit, else the last", f"{oracle_accuracy:.4f} at {oracle_s * 1e6:.1f} us"),
        ("proof", f"{planned.proof.status}, gap {planned.proof.gap:.2%}"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    mean_s = [one.mean() for one in times]
    return base - float(right.mean()), mean_s[0] / mean_s[1], mean_s[0] / mean_s[2]


def timed(arguments, bundle, fp32: bytes, int8: bytes, pixels: np.ndarray, labels: np.ndarray):
    """Return per-image median seconds of bundle, fp32 and int8, the exits taken, and int8's accuracy."""
    from executorch.extension.pybindings import portable_lib

    programs = [portable_lib._load_program_from_buffer(one) for one in (fp32, int8)]
    calls = [one.load_method("forward").call for one in programs]
    right = sum(
        int(calls[1]((torch.from_numpy(x[None]),), False)[0].argmax()) == y
        for x, y in zip(pixels, labels, strict=False)
    )
    chosen = np.random.default_rng(0).permutation(len(pixels))[: arguments.images]
    samples = np.zeros((3, arguments.passes, len(chosen)))
    exits = []
    with ExecutorchSession(bundle.file("program"), bundle.manifest.segments) as session:
        thresholds = bundle.manifest.plan.thresholds
        runs = [
            lambda x: session.infer(x, thresholds),
            lambda x: calls[0]((torch.from_numpy(x),), False),
            lambda x: calls[1]((torch.from_numpy(x),), False),
        ]
        runs_of_images = [range(start, min(start + RUN, len(chosen))) for start in range(0, len(chosen), RUN)]
        for number in range(arguments.passes + 1):
            for turn, places in enumerate(runs_of_images):
                for which in (0, 1, 2) if (number + turn) % 2 == 0 else (2, 1, 0):
                    for place in places:
                        x = np.ascontiguousarray(pixels[chosen[place]][None])
                        start = time.perf_counter()
                        out = runs[which](x)
                        if number:
                            samples[which, number - 1, place] = time.perf_counter() - start
                        elif which == 0:
                            exits.append(out.exit)
    return np.median(samples, axis=1), exits, right / len(labels)


if __name__ == "__main__":
    main()
