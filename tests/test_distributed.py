"""Two processes that train together, data-parallel, over the loopback interface.

``python test_distributed.py NUMBER PORT`` is one of them.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import BLOCKS, gradients, loss_of, make_mesh, problem, transformer

import bdia_jax

STEPS = 3
NO_COLLECTIVES = 77
"""Exit status of a process on a platform without collectives between processes."""


def train() -> dict:
    """A few steps of gradient descent, data-parallel on all devices of all processes."""
    params, x, target, key = problem()
    mesh = make_mesh(False, data=len(jax.devices()))

    def place(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    x, target = place(x, P("data")), place(target, P("data"))
    params = {name: place(p, P()) for name, p in params.items()}
    seed = np.asarray(jax.random.key_data(key))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def step(params, x, target, i):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), i)
        probe = bdia_jax.BackwardReport.zeros(BLOCKS)
        loss = gradients(loss_of(transformer()))
        value, (d_params, _, report) = loss(params, x, probe, target, key)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, d_params)
        return params, value, jnp.sum(report.mismatched)

    losses, mismatched = [], 0.0
    for i in range(STEPS):
        params, loss, wrong = step(params, x, target, np.int32(i))
        losses.append(float(loss))
        mismatched += float(wrong)
    return {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "losses": losses,
        "mismatched": mismatched,
        "norms": {name: float(np.linalg.norm(p)) for name, p in jax.device_get(params).items()},
    }


def main(number: int, port: int) -> int:
    """One of two processes; prints what :func:`train` gives, as JSON."""
    try:
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
        jax.devices()
    except (RuntimeError, ValueError, AttributeError) as error:
        if "gloo" not in str(error).lower():
            raise
        print(error, file=sys.stderr)
        return NO_COLLECTIVES
    print(json.dumps(train()), flush=True)
    return 0


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_as_one(record_property):
    """Two processes of four devices each: the losses and parameters of one process of eight."""
    port = free_port()
    command = [sys.executable, str(pathlib.Path(__file__).resolve())]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [*command, str(number), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    reference = train()
    try:
        ended = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(status == NO_COLLECTIVES for *_, status in ended):
        pytest.skip(f"no collectives between processes on this platform: {ended[0][1][-300:]}")
    assert all(status == 0 for *_, status in ended), [errors[-3000:] for _, errors, _ in ended]

    first, second = (json.loads(output.splitlines()[-1]) for output, *_ in ended)
    for name, found in first.items():
        record_property(name, str(found))
    assert first == second
    assert (first["processes"], first["devices"], reference["devices"]) == (2, 8, 8)
    assert first["mismatched"] == reference["mismatched"] == 0
    assert first["losses"][-1] < first["losses"][0]
    np.testing.assert_allclose(first["losses"], reference["losses"], rtol=1e-4)
    for name, norm in reference["norms"].items():
        np.testing.assert_allclose(first["norms"][name], norm, rtol=1e-4, err_msg=name)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
