"""What all tests share: options, markers that skip, one thread, the folder of recordings."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# A first example compiles or loads something, which no deadline foresees.
hypothesis.settings.register_profile("cachegraph", deadline=None)
hypothesis.settings.load_profile("cachegraph")

SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden texts; review the diff"
    )
    parser.addoption("--pictures", metavar="FOLDER", help="where tests leave screenshots")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    # Tiny tensors gain nothing from a second thread; two workers share a small machine.
    torch.set_num_threads(1)
    # Traces make millions of short-lived objects; the usual threshold of 700 makes of their
    # collection a tenth of the suite.
    gc.set_threshold(2_000, 20, 100)
    # One thread needs no pool of processes that compile, and what g++ would optimise longest is
    # the frame of a compiled graph, which computes nothing.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")


def _missing(*modules: str) -> str:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _reason_to_skip(marker: str, config: pytest.Config) -> str:
    """Says why tests with this marker cannot run here, or nothing if they can."""
    match marker:
        case "gpu":
            return "" if torch.cuda.is_available() else "no CUDA device"
        case "onnx":
            return _missing("onnx", "onnxscript", "onnxruntime")
        case "tensorrt":
            return _missing("tensorrt")
        case "slow":
            return "" if config.getoption("--slow") else "slow: runs with --slow"
    return ""


# Files of which one takes longer than many others together: two workers that begin with these
# end at about the same time.
LONGEST = (
    "test_recordings",
    "test_method_recordings",
    "test_random_tokens",
    "test_random_plans",
    "test_big_model",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        for marker in list(item.iter_markers()):
            if reason := _reason_to_skip(marker.name, config):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_collected_again() -> None:
    """What a worker holds for good, torch and traced models, is not walked in every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def equal_models_are_traced_once() -> Iterator[None]:
    """Commands are run on the same few models a hundred times."""
    from tests.traces import traced_once

    with traced_once():
        yield


@pytest.fixture(scope="module", autouse=True)
def shared_models_stay_as_they_are() -> Iterator[None]:
    """What tests of all files share is changed by none; the file that did so is told here."""
    from tests.models import changed_models

    yield
    assert not changed_models()


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite golden texts instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository that holds the recordings of published implementations."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name} beside the repository: its recordings are not here")
    return SHARED


@pytest.fixture(scope="session")
def toca_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a DiT of one block under ToCa, compiled for onnxruntime."""
    from tests.models import TOCA, compile_traced, shared_dit

    target = tmp_path_factory.mktemp("onnx") / "toca.cgraph"
    compile_traced(*shared_dit(depth=1), TOCA, backend="onnx", out=target)
    return target
