"""Steps that went wrong, and the errors that say why and what to do."""

from __future__ import annotations

import math

import numpy as np
from flax import nnx

from bdia_jax import BackwardReport, Online
from bdia_jax.nn.coupled import CoupledStack
from bdia_jax.train.step import StepReport


class InexactInverseError(RuntimeError):
    """The backward pass did not reconstruct the states of the forward pass to the last bit."""


class NonFiniteError(RuntimeError):
    """The loss, the gradient, or an evaluation was not finite."""


def raise_if_wrong(step: int, report: StepReport) -> None:
    """Judges a step by its report, which is on the host."""
    for stack, backward in report.backward.items():
        if backward.mismatched.any():
            raise InexactInverseError(_inexact(step, stack, backward))
    loss = float(report.sums.means()["loss"])
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"step {step}: the loss is {loss}, and the step was not taken. Either it diverged "
            "(lower the learning rate, clip the gradient), or a state left the range of the grid, "
            "±2**(30 - frac_bits) (lower frac_bits)"
        )
    if not math.isfinite(report.grad_norm):
        raise NonFiniteError(
            f"step {step}: the gradient is not finite, the loss is ({loss:.4g}); the step was not "
            "taken. All states were reconstructed exactly: the derivative of a block overflows "
            "(lower the learning rate, or compute in bfloat16 or float32), or a sample of weight 0 "
            "left the range of the grid, ±2**(30 - frac_bits) (lower frac_bits)"
        )


def raise_if_not_finite(step: int, metrics: dict[str, float], names: set[str]) -> None:
    """Judges an evaluation by some of its metrics."""
    for name in sorted(names & metrics.keys()):
        if not math.isfinite(metrics[name]):
            when = "although the steps of training were finite" if step else "before any training"
            raise NonFiniteError(
                f"step {step}: {name} is {metrics[name]} in evaluation, {when}. A state left "
                "the range of the grid, ±2**(30 - frac_bits) (lower frac_bits), or the network "
                "diverges (lower the learning rate)"
            )


def reversibility(model: nnx.Module, report: StepReport) -> str:
    """A line about how exactly a step was taken back."""
    coupled = [m for _, m in nnx.iter_modules(model) if isinstance(m, CoupledStack)]
    if any(stack.adjoint == Online() for stack in coupled):
        return (
            "blocks of two streams, which are taken back in floats, not exactly: "
            "CoupledStack.reconstruction_errors says by how much they are off"
        )
    reports = report.backward.values()
    states = sum(backward.mismatched.size for backward in reports)
    if not states:
        return "no reversible blocks"
    mismatched = sum(backward.mismatched.sum() for backward in reports)
    corrected = sum(backward.corrected.sum() for backward in reports)
    return (
        f"reversible blocks: {states}; in the first step {mismatched:.0f} states mismatched, "
        f"{corrected:.0f} roundings corrected"
    )


def _inexact(step: int, stack: str, backward: BackwardReport) -> str:
    wrong = np.flatnonzero(backward.mismatched)
    return (
        f"step {step}: in the backward pass through {stack.removesuffix('.probe')}, the step of "
        f"block {wrong[-1]} was not undone to the last bit for "
        f"{int(backward.mismatched[wrong[-1]])} samples (mismatches in {len(wrong)} of "
        f"{backward.mismatched.size} blocks: an error is passed down). The gradients are NaN, and "
        "the step was not taken. The block was computed differently the second time: set "
        "tolerance_bits=1 (or more; bdia_jax.check_reversible on your block says how many), or "
        'make the hardware deterministic (XLA_FLAGS="--xla_gpu_deterministic_ops=true")'
    )
