"""Shared by all tests: fixed seeds, few threads, no network."""

from __future__ import annotations

import gc
import os
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("POT_BACKEND_DISABLE_JAX", "1")  # POT imports every framework that it finds

import pytest
import torch

gc.disable()  # while thousands of tests are collected, of which nothing is garbage


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        for mark in item.iter_markers("sampled"):
            # By a hash: a stride may fall in step with one of several crossed parameters.
            if test in seen and zlib.crc32(item.nodeid.encode()) % mark.args[0]:
                item.add_marker(pytest.mark.slow)
        if "gpu" not in item.keywords:
            seen.add(test)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # among the keywords are the names of folders too
            item.add_marker(skip)
