"""Tests of the CUDA path on stand-in libraries: only where `make cuda-dry` has preloaded them."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and "FAKECUDA" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="no stand-in CUDA libraries: make cuda-dry"))
