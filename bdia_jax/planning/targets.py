"""Devices to compile for, which need not be there: TPUs, and NVIDIA's GPUs.

What a compiler says of a program's memory it can say without the device. A TPU's compiler comes
with ``libtpu``, a GPU's with JAX's CUDA packages; both are installed on any Linux machine.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Gpu(NamedTuple):
    """What a GPU's compiler asks of a GPU: NVIDIA's data sheets."""

    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    multiprocessors: int
    threads: int
    """Per multiprocessor."""
    fpus: int
    """Per multiprocessor."""
    shared_kib: int
    """Shared memory per multiprocessor, in KiB; a block of threads may use all but one of them."""
    l2_mib: int
    """Second-level cache, in MiB."""
    memory_gib: int
    """In GiB."""
    bandwidth: float
    """Of the memory, in bytes per second."""
    clock: float
    """In GHz."""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 2048, 128, 228, 50, 80, 3.35e12, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 2048, 128, 228, 50, 131, 4.8e12, 1.98),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 64, 164, 40, 80, 2.04e12, 1.41),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 2048, 64, 164, 40, 40, 1.56e12, 1.41),
    "a10g": Gpu("NVIDIA A10G", (8, 6), 80, 1536, 128, 100, 6, 24, 6.0e11, 1.71),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 1536, 128, 100, 96, 48, 8.64e11, 2.52),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 1536, 128, 100, 48, 24, 3.0e11, 2.04),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 1536, 128, 100, 72, 24, 1.01e12, 2.52),
    "rtx-3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 1536, 128, 100, 6, 24, 9.36e11, 1.70),
}
"""By the name that is asked for."""


DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""Of NVIDIA's, one of which is there where a GPU is (the second on WSL)."""


def devices(name: str) -> Sequence[jax.Device]:
    """Devices to compile for, which need not be there; nothing can be run on them.

    Args:
      name: a GPU of :data:`GPUS`, maybe with how many of them (``"h100"``, ``"h100:8"``); or kind
        and arrangement of TPUs (``"v5e:2x2"``, ``"v5p:2x2x1"``).

    Raises:
      ImportError: without the compiler.
      ValueError: for what no compiler knows.
    """
    kind, _, count = name.strip().lower().partition(":")
    if kind not in GPUS:
        if not re.match(r"tpu|v\d", kind):
            close = difflib.get_close_matches(kind, GPUS, n=3, cutoff=0.4)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise ValueError(
                f'a device must be one of the GPUs {", ".join(GPUS)}, or a TPU such as "v5e:2x2"; '
                f"got {name!r}{hint}"
            )
        return _tpus(name)
    if count and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"the number of GPUs must be an int >= 1, as in {kind}:8; got {name!r}")
    return _gpus(GPUS[kind], int(count or 1))


def is_gpu(name: str | None) -> bool:
    """Whether :func:`devices` would give GPUs."""
    return name is not None and name.strip().lower().partition(":")[0] in GPUS


def _gpus(gpu: Gpu, count: int) -> Sequence[jax.Device]:
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise ImportError(
            "to compile for a GPU needs JAX's CUDA packages (and no GPU): "
            'pip install "bdia_jax[cuda]" (from a clone: pip install -e ".[cuda]")'
        )
    # A description in XLA's own terms (GpuTargetConfigProto), as text.
    major, minor = gpu.capability
    description = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024  threads_per_warp: 32
        shared_memory_per_block: {48 * 2**10}
        shared_memory_per_core: {gpu.shared_kib * 2**10}
        shared_memory_per_block_optin: {(gpu.shared_kib - 1) * 2**10}
        threads_per_core_limit: {gpu.threads}
        core_count: {gpu.multiprocessors}  fpus_per_core: {gpu.fpus}
        registers_per_core_limit: {2**16}  registers_per_block_limit: {2**16}
        block_dim_limit_x: {2**31 - 1}  block_dim_limit_y: {2**16 - 1}
        block_dim_limit_z: {2**16 - 1}
        thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
        memory_bandwidth: {int(gpu.bandwidth)}  l2_cache_size: {gpu.l2_mib * 2**20}
        clock_rate_ghz: {gpu.clock}  device_memory_size: {gpu.memory_gib * 2**30}
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        device_vendor: "NVIDIA Corporation"  name: "{gpu.name}"
        driver_version: "13.0.0"  runtime_version: "13.0.0"
        compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{gpu.name}"
    """
    if not any(map(os.path.exists, DRIVERS)) and not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        # Where there is no driver, JAX leaves its CUDA packages aside, unless no GPU is asked for.
        jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(
            gpu.name, "cuda", target_config=description, topology=f"1x1x{count}"
        ).devices
    except NotImplementedError as error:
        raise ImportError(
            "JAX had looked for a GPU before, and left its CUDA packages aside when it found none: "
            "set JAX_PLATFORMS=cpu in the environment, or ask for these devices first"
        ) from error


def _tpus(name: str) -> Sequence[jax.Device]:
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{name!r} is none of the GPUs {', '.join(GPUS)}; and to compile for a TPU needs "
            "libtpu: pip install libtpu"
        ) from error
    # Nothing is run: a TPU that another process holds is in nobody's way.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is none of the GPUs {', '.join(GPUS)}, and libtpu knows no such TPU, as it "
            f'does "v5e:2x2" or "v5p:2x2x1": {first}'
        ) from error
