"""Kernels of compiled programs, compared; and programs for GPUs that are not there."""

import dataclasses
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

from measure import same_kernels

from bdia_jax.planning import targets

pytestmark = pytest.mark.optimized

TEXT = """HloModule jit_f

%square (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %m = f32[4,8]{1,0} multiply(%p, %p)
}

%square.1 (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %m.1 = f32[4,8]{LAYOUT} multiply(%q, %q)
}

%product (a: f32[4,8], b: f32[8,4]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  ROOT %d = f32[4,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%product.1 (a.1: f32[4,8], b.1: f32[8,4]) -> f32[4,4] {
  %a.1 = f32[4,8]{LAYOUT} parameter(0)
  %b.1 = f32[8,4]{1,0} parameter(1)
  ROOT %d.1 = f32[4,4]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%round (r: f32[4,8]) -> f32[4,8] {
  %r = f32[4,8]{1,0} parameter(0)
  ROOT %n = f32[4,8]{1,0} round-nearest-even(%r)
}

%up (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%square, metadata={op_name="UP/jvp()/mul"}
  %z = f32[4,4]{1,0} fusion(%y, %w), kind=kCustom, calls=%product, metadata={op_name="UP/jvp()/d"}
  %o = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%round, metadata={op_name="UP/round"}
}

%down (x.1: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %y.1 = f32[4,8]{LAYOUT} fusion(%x.1), kind=kLoop, calls=%square.1, metadata={op_name="DOWN/m"}
  %z.1 = f32[4,4]{1,0} fusion(%y.1, %v), kind=kCustom, calls=%product.1, metadata={op_name="DOWN/d"}
}

ENTRY %main (e: f32[4,8]) -> f32[4,8] {
  %e = f32[4,8]{1,0} parameter(0)
  %l = f32[4,8]{1,0} while(%e), condition=%c, body=%up, metadata={op_name="jit(f)/jvp()/while"}
  ROOT %k = f32[4,8]{1,0} while(%l), condition=%c, body=%down
}
"""


def program(layout):
    text = TEXT.replace("LAYOUT", layout)
    text = text.replace("UP/", "jit(f)/jvp()/while/body/closed_call/")
    return text.replace("DOWN/", "jit(f)/transpose(jvp())/while/body/closed_call/")


def test_kernels_are_compared_by_what_they_do():
    # What is outside the block does not count.
    found = same_kernels.compare(program("1,0"))
    assert found == {"kernels": 2, "same": 2, "other": 0, "others": []}
    # Where a result lies otherwise, so does the argument of the product that reads it.
    found = same_kernels.compare(program("0,1"))
    assert found["other"] == 2
    assert "z: f32[4,4]{1,0} jit(f)/jvp()/while/body/closed_call/jvp()/d" in found["others"]


def test_a_program_in_which_nothing_is_found_is_an_error():
    with pytest.raises(ValueError, match="no loops"):
        same_kernels.compare("ENTRY %main (e: f32[4]) -> f32[4] {\n}")
    with pytest.raises(ValueError, match="the block was not found"):
        same_kernels.compare(program("1,0").replace("jvp()/mul", "mul").replace("jvp()/d", "d"))


def test_constants_are_a_part_of_what_a_kernel_does():
    text = (
        program("1,0")
        .replace("multiply(%p, %p)", "multiply(%p, %two)")
        .replace("multiply(%q, %q)", "multiply(%q, %three)")
    )
    for name, value in (("p", "two"), ("q", "three")):
        parameter = f"  %{name} = f32[4,8]{{1,0}} parameter(0)\n"
        text = text.replace(parameter, f"{parameter}  %{value} = f32[] constant({value})\n")
    assert same_kernels.compare(text)["other"] == 1


@pytest.mark.parametrize("name", ["h100", "h100:8"])
def test_a_gpus_compiler_makes_the_same_kernels_in_both_passes(name):
    pytest.importorskip("jax_cuda13_plugin", reason="to compile for a GPU needs jax[cuda]")
    devices = targets.devices(name)
    config = dataclasses.replace(
        same_kernels.MODELS["gpt2"], dtype="bfloat16", dropout=0.1, depth=3, attention="chunked"
    )
    found = same_kernels.compare(same_kernels.compiled_text(config, devices))
    assert found["kernels"] > 20
    assert found["other"] == 0, found["others"]
    # That the comparison would show it:
    bare = same_kernels.compare(same_kernels.compiled_text(config, devices, lambda tree: tree))
    assert bare["other"] > 0
