"""The page for apps of one's own: its Python, run as it stands, answers as the bundle does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeflex.images import open_images
from edgeflex.runtimes.executorch import ExecutorchSession
from tests.toy_bundle import toy_graph, toy_plan, write_images, write_toy_bundle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "app.md"


def page_names() -> dict[str, Any]:
    """Run the page's code in the current folder; return its names."""
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert "edgeflex" not in "".join(code)
    names: dict[str, Any] = {}
    exec("".join(code), names)
    return names


def test_the_code_of_the_page_prepares_and_answers_as_a_session_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), per_class=8)
    Image.open("images/red/0.png").resize((41, 29)).save("images/red/large.png")
    preprocessing = toy_graph().preprocessing
    assert preprocessing is not None
    images = open_images(Path("images"))
    inputs = [images.load(np.array([index]), preprocessing) for index in range(len(images.items))]
    # first, since a session may give the process another thread pool, and loaded methods keep the address of theirs
    with ExecutorchSession.from_bundle(write_toy_bundle(Path("bundle"))) as session:
        sure = [session.infer(x, (0.0, None, None)).confidence for x in inputs]
        thresholds = (float(np.median(sure)), 0.7, None)
        found = [session.infer(x, thresholds) for x in inputs]
    write_toy_bundle(Path("bundle"), plan=toy_plan(thresholds=thresholds))
    names = page_names()
    for x, item, outcome in zip(inputs, images.items, found, strict=True):
        prepared = names["prepare"](f"images/{item.path}")
        np.testing.assert_allclose(prepared.numpy(), x, atol=1e-6)
        best, confidence, leaving = names["answer"](prepared)
        assert (best, leaving) == (int(outcome.probabilities.argmax()), outcome.exit)
        assert confidence == pytest.approx(outcome.confidence, abs=1e-5)
    assert len({one.exit for one in found}) > 1, "where all leave at one exit, nothing is shown about the loop"
