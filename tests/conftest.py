"""What every test shares: reproducible numbers, and skipping what needs a device that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.nets", "tests.pixels", "tests.monitor.training")

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="renew the pictures in tests/grids/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def process_as_it_was() -> Iterator[None]:
    """Hold that a test leaves the stance of the compiler and the mode of gradients as they were."""
    from torch._dynamo import eval_frame

    before = eval_frame._stance, torch.is_grad_enabled()
    yield
    assert (eval_frame._stance, torch.is_grad_enabled()) == before
