"""What all tests share: which of them run, and how JAX compiles.

Tests marked `slow` run with `--all` alone: they train, start processes or compile much, and what they guard is also seen, less
closely, by a test that is not. Tests compile hundreds of small programs that each run once, so none of them is stored.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

# In this process alone: programs that tests start keep their cache. Storing one of these programs once ended in a
# segmentation fault of the CPU's serialiser (jax 0.10).
jax.config.update("jax_enable_compilation_cache", False)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --all alone")


def pytest_collection_modifyitems(config, items):
    slow = {item for item in items if item.get_closest_marker("slow")}
    if slow and not config.getoption("--all") and len(items) > 1:  # one that is named by itself runs
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 means float32 on accelerators as well, whose products XLA rounds otherwise."""
    with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a file compiled: thousands of programs in one process exceed the memory maps that Linux allows it."""
    yield
    jax.clear_caches()
