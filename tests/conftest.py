"""Set before JAX starts: tests compile hundreds of small programs that each run once, so none of them is stored."""
import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

# In this process alone: programs that tests start keep their cache. Storing one of these programs once ended in a
# segmentation fault of the CPU's serialiser (jax 0.10).
jax.config.update("jax_enable_compilation_cache", False)


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
