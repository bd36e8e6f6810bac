"""Faults in the core: the maps, the grid, steps, both passes, gradients, pinning."""

from _fault import Fault

CORE = ("test_steps", "test_maps", "test_guard", "test_adjoints", "test_parts_core")
ALL = (*CORE, "test_grid", "test_side_bits", "test_pinning", "test_reversible")

_IN_THE_CORE = [
    # The maps and the grid.
    Fault("side bits of +n", "maps", "(-n_prev).astype(jnp.uint32)", "n_prev.astype(jnp.uint32)"),
    Fault(
        "step without side", "maps", "sign * ((n_prev + s) >> m) + q", "sign * (n_prev >> m) + q"
    ),
    Fault("inverse adds s", "maps", "(n_next - q)) << m) - s", "(n_next - q)) << m) + s"),
    Fault("tie of the error", "maps", "(remainder < 0), half, e)", "(remainder > 0), half, e)"),
    Fault("error off by one", "maps", "(a_known - a) + half)", "(a_known - a) + half + 1)"),
    Fault("unfair signs", "maps", "bernoulli(key, 0.5,", "bernoulli(key, 0.6,"),
    Fault("signs all alike", "maps", "bernoulli(key, 0.5, (batch,))", "bernoulli(key, 0.5, (1,))"),
    Fault("no alternation", "maps", "dtype=jnp.int32) % 2))", "dtype=jnp.int32) % 1))"),
    Fault("γ in the sum", "maps", "(x - gamma * x) + (h", "(x + gamma * x) + (h"),
    Fault("no γ on h", "maps", "(h + gamma * h)", "(h + 0 * gamma * h)"),
    Fault(
        "integers round away from zero",
        "grid",
        "    y = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)\n",
        "    y = lax.round(y, lax.RoundingMethod.AWAY_FROM_ZERO)\n",
    ),
    Fault(
        "quantize rounds away from zero",
        "grid",
        "q = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)",
        "q = lax.round(y, lax.RoundingMethod.AWAY_FROM_ZERO)",
    ),
    Fault("NaN becomes the limit", "grid", "jnp.isnan(y), 0, jnp", "jnp.isnan(y), LIMIT, jnp"),
    Fault("no range", "grid", "return jnp.abs(y) < LIMIT", "return jnp.abs(y) < 2.0 * LIMIT"),
    Fault(
        "first order only",
        "grid",
        "lax.stop_gradient(value) + (carrier - lax.stop_gradient(carrier))",
        "lax.stop_gradient(value + 0 * carrier) + lax.stop_gradient(carrier) * 0",
    ),
    Fault("float64 in float32", "grid", '"float64" if jnp', '"float32" if jnp'),
    # The steps.
    Fault("sign per sample drawn per block", "steps", "scan_key if self", "block_key if self"),
    Fault("minus is plus", "steps", '{"minus": -1}', '{"minus": 1}'),
    Fault("pull without γ", "steps", "pulled = a_next - gamma * a_next", "pulled = a_next"),
    Fault("pull with a sign", "steps", "pulled, gamma * a_next", "pulled, -gamma * a_next"),
    Fault("pull of h", "steps", "return a_next + gamma * a_next", "return a_next - gamma * a_next"),
    Fault("pull forgets a", "steps", "pulled if a is None else a + pulled", "pulled"),
    Fault("pull of Euler forgets a", "steps", "(a_next, a + a_next,", "(a_next, a_next,"),
    Fault(
        "q is not corrected", "steps", "            q -= error\n", "            q -= 0 * error\n"
    ),
    Fault(
        "q is corrected twice", "steps", "            q -= error\n", "            q -= 2 * error\n"
    ),
    Fault(
        "no tolerance bits kept",
        "steps",
        "(n_prev, self.m, self.tolerance_bits)",
        "(n_prev, self.m)",
    ),
    Fault(
        "real without γ",
        "steps",
        "return (gamma * x_prev + maps",
        "return (0 * gamma * x_prev + maps",
    ),
    Fault("network off the grid", "steps", "return Euler(self.frac_bits)", "return Euler(None)"),
    # Keys, parts, the first block.
    Fault("first block has a sign", "arguments", "sign = jnp.where(k == 0, 0, sign)", "pass"),
    Fault(
        "every part of block 0 has none",
        "arguments",
        "self.start == 0 and p == 0",
        "self.start == 0",
    ),
    Fault("σ = 0 in every piece", "arguments", "self.start == 0 and p == 0", "p == 0"),
    Fault(
        "parts share a key", "arguments", "jax.random.split(keys[p])", "jax.random.split(keys[0])"
    ),
    Fault("pieces share keys", "arguments", "+ start * len(functions)", "+ 0 * start"),
    Fault(
        "key of the signs for the part",
        "arguments",
        "return sign, part_key",
        "return sign, sign_key",
    ),
    Fault(
        "all is said to be read",
        "arguments",
        "[id(v) in read for v in",
        "[id(v) in read or True for v in",
    ),
    # Up and down.
    Fault(
        "guard always content",
        "online",
        "checksum(n) + alive == kept[p].checksum",
        "True",
    ),
    Fault(
        "guard of Euler always content",
        "online",
        "jnp.where(sign == 0, fits,",
        "jnp.where(sign == 0, True,",
    ),
    Fault(
        "differences of the wrong state",
        "online",
        "            n = n - d\n",
        "            n = n + d\n",
    ),
    Fault(
        "narrow all the same",
        "online",
        "scan.dtype if scan.narrow_cotangents else a.dtype",
        "scan.dtype",
    ),
    Fault(
        "last states unguarded", "online", "nan_unless(checksum(n) == expected, a_next)", "a_next"
    ),
    Fault(
        "guard poisons nothing",
        "online",
        "step.pull(nan_unless(intact, c.a_next), c.a",
        "step.pull(c.a_next, c.a",
    ),
    Fault(
        "states not exchanged",
        "online",
        "zip((saved.n_prev, saved.n), cotangents)",
        "zip((saved.n, saved.n_prev), cotangents[::-1])",
    ),
    Fault(
        "parts downwards in order",
        "online",
        "for p in reversed(range(len(scan.parts))):",
        "for p in range(len(scan.parts)):",
    ),
    # Only a GPU's compiler (jax[cuda]) tells; a CPU's takes one part after the other by itself.
    Fault(
        "parts unfenced",
        "online",
        "            if p:\n",
        "            if False:\n",
        ("test_planning",),
    ),
    Fault("range unchecked", "online", "finite & in_range(y, n_next)", "finite"),
    Fault(
        "mismatches of a part are lost",
        "online",
        "mismatched.sum(), corrected.sum()",
        "mismatched.max(), corrected.sum()",
    ),
    Fault(
        "deviation is a sum",
        "online",
        "corrected.sum(), deviation.max())",
        "corrected.sum(), deviation.sum())",
    ),
    Fault(
        # A CPU's compiler makes the same kernels without: only those of a GPU (jax[cuda]) tell.
        "residuals untouched",
        "online",
        "jnp.where(sign > 1, alive, jnp.uint32(0))",
        "jnp.zeros_like(sign, jnp.uint32)",
        ("test_same_kernels", "test_exactness"),
    ),
    Fault("checksum without position", "states", "word += position *", "word += 0 * position *"),
    # Direct and checkpoints.
    Fault(
        "direct reads x_{-1}",
        "direct",
        "inputs.x_prev if scan.start else jnp.zeros_like(inputs.x)",
        "inputs.x_prev",
    ),
    Fault("checkpoint scale", "checkpoint", "axis=-1) / highest)", "axis=-1) / (highest + 1))"),
    Fault("checkpoint rounds down", "checkpoint", "jnp.round(steps)", "jnp.floor(steps)"),
    Fault(
        "checkpoint of the first part",
        "checkpoint",
        "x = fetch(kept[p], scan.keep_in)",
        "x = fetch(kept[0], scan.keep_in)",
    ),
    Fault(
        "checkpoint signs",
        "checkpoint",
        "scan.draw(saved.key, key, k, p)",
        "scan.draw(saved.key, key, k + 1, p)",
    ),
    Fault(
        "checkpoint forgets a",
        "checkpoint",
        "if step.gamma == 0 and is_zero(cotangents[0]):",
        "if step.gamma == 0:",
    ),
    # What becomes of gradients.
    Fault(
        "update at the wrong block",
        "gradients",
        "jnp.minimum(k + 1, self.blocks - 1)",
        "jnp.minimum(k, self.blocks - 1)",
    ),
    Fault(
        "first update lost",
        "gradients",
        "return d_others, *write(stacked, pending, 0)",
        "return d_others, *stacked",
    ),
    Fault(
        "no gradient beside an update",
        "gradients",
        "return stacked, new, self.others.write(others, k, d_others)",
        "return stacked, new, others",
        ("test_adjoints::test_an_update_is_the_ordinary_gradient_and_then_the_function",),
    ),
    Fault(
        "finite gradients of samples that are NaN",
        "online",
        "a_next = nan_unless(saved.finite | left_out, a_next)",
        "a_next = nan_unless(saved.finite | True, a_next)",
        ("test_reversible::test_where_the_output_is_nan_so_is_the_gradient",),
    ),
    Fault(
        "samples that are left out spoil the others",
        "online",
        "a_next = nan_unless(saved.finite | left_out, a_next)",
        "a_next = nan_unless(saved.finite, a_next)",
        ("test_reversible::test_a_sample_that_the_loss_leaves_out_spoils_nothing",),
    ),
    Fault(
        "gradients at the wrong block",
        "gradients",
        "return write(stacked, d_params, k)",
        "return write(stacked, d_params, 0)",
    ),
    Fault(
        "parts' gradients replace",
        "gradients",
        "a[i] + d.astype(a[i].dtype) if i in a else d",
        "d",
    ),
    Fault(
        "twice in silence",
        "gradients",
        "return up(scan, once(inputs), wanted)",
        "return up(scan, inputs, wanted)",
    ),
    Fault(
        "x and x_prev exchanged",
        "gradients",
        "jnp.zeros_like(c.a_next) if c.a is None else c.a,\n        c.a_next,",
        "c.a_next,\n        jnp.zeros_like(c.a_next) if c.a is None else c.a,",
    ),
    Fault(
        "a partitioner meets a layout",
        "pinning",
        "_parts_laid_out if count > 1 else _laid_out",
        "_laid_out",
        ("test_pinning",),
    ),
    Fault(
        "no layouts on several devices",
        "pinning",
        "if count > 1 and not (known and on_several):",
        "if count > 1:",
        ("test_pinning",),
    ),
    Fault(
        "layouts on a CPU",
        "pinning",
        'lambda context, array: [array], platform="cpu"',
        '_lower_by_rows, platform="cpu"',
    ),
    Fault(
        "None among the parameters is counted",
        "arguments",
        "enumerate(new for new, old in pairs if old is not None)",
        "enumerate(new for new, old in pairs)",
        ("test_adjoints::test_an_update_of_parameters_among_which_is_none",),
    ),
    Fault(
        "fractional bits stay unsigned",
        "steps",
        'object.__setattr__(self, "frac_bits", grid.check_frac_bits(self.frac_bits))',
        "grid.check_frac_bits(self.frac_bits)",
        ("test_steps::test_integers_of_other_types_are_those_of_python",),
    ),
]
FAULTS = [fault._replace(tests=fault.tests or ALL) for fault in _IN_THE_CORE]
