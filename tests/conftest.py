"""What every test stands on: one thread, no network, caches of its own, lanes in order, a clean repository."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports a numeric library: they read these once.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
for _name in ("COLUMNS", "FORCE_COLOR"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path(__file__).resolve().parents[1]
_LANES = ("unit", "architecture", "contracts", "backends", "gpu", "e2e")
# What tools keep beside the sources on purpose; .gitignore names them too.
_TOOLS = {".git", ".hypothesis", ".import_linter_cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv"}
_CACHE = "EDGEFLEX_TEST_CACHE"

settings.register_profile("edgeflex", deadline=None, print_blob=True)
settings.load_profile("edgeflex")


def pytest_configure(config: pytest.Config) -> None:
    """Give caches a folder of their own, shared by all workers of one run."""
    if _CACHE not in os.environ:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="edgeflex-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True))
    cache = os.environ[_CACHE]
    os.environ["XDG_CACHE_HOME"] = cache
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache, "inductor"))
    os.environ["MPLCONFIGDIR"] = str(Path(cache, "matplotlib"))


def _lane(item: pytest.Item) -> int:
    parts = item.path.relative_to(_ROOT).parts if item.path.is_relative_to(_ROOT) else ()
    return next((index for index, lane in enumerate(_LANES) if lane in parts[1:2]), len(_LANES))


def _has_cuda() -> bool:
    from edgeflex.runtimes.cuda_driver import driver_problem

    return driver_problem() is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick lanes first, and skip what needs a CUDA device where there is none."""
    items.sort(key=_lane)
    for_gpu = [item for item in items if "needs_gpu" in item.keywords]
    if for_gpu and not _has_cuda():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _listing() -> set[str]:
    return {path.name for path in _ROOT.iterdir()} - _TOOLS


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the bundles that tests of decoder engines share; one that is to be damaged is copied first."""
    from tests.engine_samples import Bundles

    return Bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread, so that sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _clean_repository() -> Iterator[None]:
    """Fail the session if tests leave something in the root of the repository."""
    before = _listing()
    yield
    strays = sorted(_listing() - before)
    if strays:
        pytest.fail(f"tests left files in the repository: {', '.join(strays)}; write below tmp_path instead")
