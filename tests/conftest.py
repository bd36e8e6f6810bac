"""Settings shared by all tests: compiled programs, virtual devices, checked types, fixed seeds."""

import os
import shutil
import tempfile

# Tests, their workers and the processes that they start compile many a program twice.
SHARED = "JAX_COMPILATION_CACHE_DIR"
if made_here := SHARED not in os.environ:
    os.environ[SHARED] = tempfile.mkdtemp(prefix="bdia_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Annotated arrays are checked wherever a test calls the library.
jaxtyping.install_import_hook("bdia_jax", "_shapes.checked")

# Eight virtual devices, for the tests of sharded arrays; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "bdia_jax", deadline=None, derandomize=True, max_examples=50, print_blob=True
)
hypothesis.settings.load_profile("bdia_jax")


# These give NumPy's arrays, symbolic words, or wrong arguments throughout.
UNCHECKED = ("test_bad_input", "test_grid", "test_maps", "test_proofs")


def pytest_runtest_setup(item):
    """A test that gives what no annotation allows is in such a file, or marked ``unchecked``."""
    marked = item.get_closest_marker("unchecked") is not None
    jaxtyping.config.update("jaxtyping_disable", marked or item.module.__name__ in UNCHECKED)


@pytest.fixture
def quick_compiles(monkeypatch):
    """For tests of something else than arithmetic: LLVM does not optimize, here and in children."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_unconfigure():
    if made_here:
        shutil.rmtree(os.environ[SHARED], ignore_errors=True)
