"""Settings shared by all tests: compiled programs, virtual devices, checked types, fixed seeds."""

import functools
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
from jax._src import compiler  # noqa: E402

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


# ---------------------------------------------------------------------------------------------
# How programs are compiled: quickly, unless a test is marked ``optimized`` or ``buffers``
# ---------------------------------------------------------------------------------------------

LESS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""Options of XLA: with these and the above, small programs take a quarter of the time."""
FLAGS = os.environ.get("XLA_FLAGS", "")
quick_options = False


def with_quick_options(options_of):
    """What JAX makes options for the compiler by, with :data:`QUICK` where these are set.

    JAX takes such options for one program at a time, or for a whole process, but not for a test.
    """

    @functools.wraps(options_of)
    def options(*args, **kwargs):
        found = options_of(*args, **kwargs)
        if quick_options:
            found.env_option_overrides = [*found.env_option_overrides, *QUICK.items()]
        return found

    return options


try:
    jax.jit(lambda x: x).lower(0).compile(compiler_options=QUICK)
    compiler.get_compile_options = with_quick_options(compiler.get_compile_options)
except (AttributeError, RuntimeError):
    # Another release of JAX: the tests then take longer.
    QUICK = {}


def compile_as(mark: str | None):
    """In this process, and in those that it starts from now on: as a mark says, or quickly."""
    global quick_options
    quick_options = mark is None
    # Buffers are assigned before machine code is made, which takes most of the time.
    jax.config.update(LESS.lower(), mark != "optimized")
    os.environ[LESS] = str(int(mark != "optimized"))
    quick = " ".join(f"--{name}={value}".lower() for name, value in QUICK.items())
    os.environ["XLA_FLAGS"] = f"{FLAGS} {quick}".strip() if quick_options else FLAGS


compile_as(None)


@pytest.fixture(autouse=True)
def compiled(request):
    """As the test is marked."""
    marks = [m for m in ("optimized", "buffers") if request.node.get_closest_marker(m) is not None]
    if not marks:
        yield
        return
    compile_as(marks[0])
    yield
    compile_as(None)


def pytest_unconfigure():
    if made_here:
        shutil.rmtree(os.environ[SHARED], ignore_errors=True)
