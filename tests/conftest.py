"""Settings shared by all tests: virtual devices, and property tests that can be repeated."""

import hypothesis
import jax

# Eight virtual devices, for the tests of sharded arrays; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "bdia_jax", deadline=None, derandomize=True, max_examples=50, print_blob=True
)
hypothesis.settings.load_profile("bdia_jax")
