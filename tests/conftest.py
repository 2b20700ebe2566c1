"""What every test shares: reproducible numbers, and skipping what needs a device that is not there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.nets", "tests.pixels", "tests.monitor.training")

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="renew the pictures in tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
