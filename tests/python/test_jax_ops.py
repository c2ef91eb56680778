"""ssmcore.jax: the operators inside jit, grad and vmap, against those outside and the reference."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
from backends import require_cuda
from cases import BLOCK_CASES, CONV_CASES, NARROW, BlockCase, ConvCase, ScanCase, rows
from gradients import random_like
from helpers import TOLERANCE_OF_ROUNDED, assert_close, assert_same_bits, refuses, relative_error

from ssmcore import _core, ops

jax = pytest.importorskip("jax", reason="JAX is optional: pip install 'jax[cpu]'")
if not _core.XLA_TARGETS:
    pytest.skip("ssmcore was built without jaxlib", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import ssmcore.jax as sj  # noqa: E402

Arrays = dict[str, Any]
CU_SEQLENS = np.array([0, 30, 30, 66, 67], np.int32)

SCANS = rows(
    ScanCase(),
    batch=(1,),
    dim=(1, 129),
    seqlen=(1, 2, 300),
    dstate=(3, 64),
    dtype=NARROW,
    A=("complex",),
    B=("constant", "1 group", "3 groups"),
    C=("constant", "3 groups"),
    D=(False,),
    z=(False,),
    delta_bias=(False,),
    delta_softplus=(False,),
    initial_state=(False,),
)
CONVOLUTIONS = [case for case in CONV_CASES if case.values[0].layout == "contiguous"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> Any:
    """Puts NumPy arrays, in dicts and lists too, on a device of JAX."""
    if request.param == "cuda":
        require_cuda()
    try:
        device = jax.devices({"cpu": "cpu", "cuda": "gpu"}[request.param])[0]
    except RuntimeError:
        pytest.skip("JAX has no GPU here")
    return functools.partial(jax.tree.map, lambda array: jax.device_put(array, device))


def split(inputs: Arrays) -> tuple[Arrays, Arrays]:
    """The arrays among keyword arguments, and the options."""
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in inputs.items() if name not in arrays}


def values_and_gradients(
    function: Callable[..., Any], arrays: Any, output_gradients: Any
) -> tuple[Any, Any]:
    """The results of a function of `arrays`, and the gradients for those of its results."""

    def run(arrays: Any, output_gradients: Any) -> tuple[Any, Any]:
        results, backward = jax.vjp(function, arrays)
        return results, backward(output_gradients)[0]

    return jax.tree.map(np.asarray, jax.jit(run)(arrays, output_gradients))


def tolerance(array: np.ndarray) -> str:
    return "float32" if array.dtype == np.complex64 else str(array.dtype)


def assert_agrees(actual: np.ndarray, expected: np.ndarray, through: str = "float32") -> None:
    """Results of the same computation, done in another way or on another device, perhaps through
    values of a narrower dtype than their own."""
    if np.any(expected):
        widest = max(through, tolerance(expected), key=TOLERANCE_OF_ROUNDED.__getitem__)
        assert_close(actual, expected, widest, rounded=True)
    else:
        assert_same_bits(np.abs(actual), np.abs(expected))


# --- Against the operators outside ----------------------------------------------------------------


@pytest.mark.parametrize("case", SCANS)
def test_scan(case: ScanCase, place: Any) -> None:
    inputs = case.inputs()
    arrays, options = split(inputs)
    expected = ops.selective_scan(**inputs, chunk_size=64)
    douts = [random_like(array, seed=seed) for seed, array in enumerate(expected[:2])]
    gradients = ops.selective_scan_bwd(
        douts[0], **inputs, dlast_state=douts[1], chunk_states=expected[2], chunk_size=64
    )._asdict()

    def scan(arrays: Arrays) -> Any:
        return sj.selective_scan(**arrays, **options, return_last_state=True)

    results, ours = values_and_gradients(scan, place(arrays), place((douts[0], np.conj(douts[1]))))
    for actual, theirs in zip(results, reference.selective_scan(**inputs), strict=True):
        assert_close(actual, theirs, tolerance(actual))
    for name, array in arrays.items():
        # JAX's gradients of complex numbers are the conjugates.
        assert ours[name].dtype == array.dtype
        # A GPU keeps the states of bfloat16 activations as float16.
        through = "bfloat16" if case.dtype == "bfloat16" else "float32"
        assert_agrees(ours[name], np.conj(gradients[f"d{name}"]), through)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: ConvCase, place: Any) -> None:
    inputs = case.inputs()
    arrays, options = split(inputs)
    expected = ops.causal_conv1d(**inputs, return_final_state=True)
    douts = tuple(random_like(array, seed=seed) for seed, array in enumerate(expected))
    gradients = ops.causal_conv1d_bwd(douts[0], **inputs, dfinal_state=douts[1])._asdict()

    def convolution(arrays: Arrays) -> Any:
        return sj.causal_conv1d(**arrays, **options, return_final_state=True)

    results, ours = values_and_gradients(convolution, place(arrays), place(douts))
    for actual, theirs in zip(results, expected, strict=True):
        assert_agrees(actual, theirs)
    for name in arrays:
        assert_agrees(ours[name], gradients[f"d{name}"])


@pytest.mark.parametrize("case", BLOCK_CASES)
@pytest.mark.parametrize("states", [False, True])
def test_block(case: BlockCase, states: bool, place: Any) -> None:
    inputs, given = case.inputs(), {}
    if states:
        given = {f"initial_{name}": state for name, state in case.states().items()}
    expected = ops.mamba_block_train_fwd(**inputs, **given, return_states=True, keep=("u", "delta"))
    out, saved, *last = expected
    douts = tuple(random_like(array, seed=seed) for seed, array in enumerate((out, *last)))
    gradients = ops.mamba_block_bwd(
        douts[0],
        **inputs,
        **given,
        saved=saved,
        dfinal_conv_state=douts[1],
        dlast_ssm_state=douts[2],
    )

    def block(arrays: Arrays) -> Any:
        return sj.mamba_block(**arrays, return_states=True)

    results, ours = values_and_gradients(block, place({**inputs, **given}), place(douts))
    for actual, theirs in zip(results, (out, *last), strict=True):
        assert_agrees(actual, theirs, case.dtype)
    assert_agrees(ours["x"], gradients.dx, case.dtype)
    for name, gradient in gradients.dweights.items():
        assert_agrees(ours["weights"][name], gradient, case.dtype)
    for name in given:
        assert_agrees(ours[name], getattr(gradients, f"d{name}"), case.dtype)


# --- Gradients, by themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["complex", "constant", "varying"])
def test_gradients_are_those_that_jax_derives(form: str) -> None:
    """Of the scan written in JAX, in its own conventions."""
    case = ScanCase(seqlen=9, dstate=3, A="complex" if form == "complex" else "real")
    case = replace(case, B="constant", C="constant") if form == "constant" else case
    arrays, options = split(case.inputs())

    def loss(scan: Callable[..., Any], arrays: Arrays) -> Any:
        out, last_state = scan(**arrays, **options, return_last_state=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.real(last_state) + 2))

    gradients = [
        jax.grad(functools.partial(loss, scan))(arrays) for scan in (sj.selective_scan, in_jax)
    ]
    for name in arrays:
        assert relative_error(*(np.asarray(each[name]) for each in gradients)) < 1e-4


def in_jax(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    return_last_state: bool,
) -> Any:
    """The selective scan as JAX would run it; B and C constant or without groups."""
    delta = jax.nn.softplus(delta + delta_bias[:, None])

    def per_step(x: Any) -> Any:
        if x.ndim == 2:
            return jnp.broadcast_to(x, (u.shape[2], 1, *x.shape))
        if jnp.iscomplexobj(A):
            x = x[..., 0::2] + 1j * x[..., 1::2]
        return jnp.moveaxis(x, -1, 0)[:, :, None]

    def step(h: Any, now: Any) -> Any:
        u, delta, B, C = now
        h = jnp.exp(delta[..., None] * A) * h + delta[..., None] * B * u[..., None]
        y = jnp.sum(C * h, axis=-1)
        return h, 2 * jnp.real(y) if jnp.iscomplexobj(A) else y

    steps = (jnp.moveaxis(u, -1, 0), jnp.moveaxis(delta, -1, 0), per_step(B), per_step(C))
    last_state, y = jax.lax.scan(step, initial_state, steps)
    return (jnp.moveaxis(y, 0, -1) + D[:, None] * u) * jax.nn.silu(z), last_state


def test_gradients_by_finite_differences() -> None:
    """In float64."""
    with jax.enable_x64(True):
        scan, scan_options = split(ScanCase(seqlen=70, dim=3, dstate=2, dtype="float64").inputs())
        check = functools.partial(check_grads, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
        check(lambda arrays: sj.selective_scan(**arrays, **scan_options), (scan,))
        conv, conv_options = split(ConvCase(dim=3, dtype="float64").inputs())
        check(lambda arrays: sj.causal_conv1d(**arrays, **conv_options), (conv,))
        block = BlockCase(d_model=3, dim=4, dstate=2, dtype="float64", weight_dtype="float64")
        inputs = jax.tree.map(lambda array: array.astype(np.float64), block.inputs())
        check(lambda arrays: sj.mamba_block(**arrays, dt_B_C_norm_eps=1e-5), (inputs,))


def test_second_derivatives_are_refused() -> None:
    arrays, options = split(ConvCase().inputs())

    def loss(x: Any) -> Any:
        return sj.causal_conv1d(**{**arrays, "x": x}, **options).sum()

    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(arrays["x"])


# --- Sequences in pieces, and several in one ------------------------------------------------------


def test_a_scan_in_two_halves_has_the_gradients_of_the_whole(place: Any) -> None:
    arrays, options = split(ScanCase(seqlen=130).inputs())
    varying = ("u", "delta", "B", "C", "z")

    def halves(arrays: Arrays) -> Any:
        state, outs = arrays["initial_state"], []
        for half in (slice(0, 65), slice(65, 130)):
            piece = {name: arrays[name][..., half] for name in varying}
            given = {**arrays, **piece, "initial_state": state}
            out, state = sj.selective_scan(**given, **options, return_last_state=True)
            outs.append(out)
        return jnp.concatenate(outs, axis=-1), state

    def whole(arrays: Arrays) -> Any:
        return sj.selective_scan(**arrays, **options, return_last_state=True)

    douts = tuple(random_like(arrays[name]) for name in ("u", "initial_state"))
    both = [values_and_gradients(f, place(arrays), place(douts)) for f in (halves, whole)]
    jax.tree.map(assert_agrees, *both)


def check_packed(function: Callable[..., Any], arrays: Arrays, along: list[str], axis: int) -> None:
    """Packed sequences have the results and gradients of each by itself; `along` are split."""

    def packed(arrays: Arrays) -> Any:
        return function(**arrays, cu_seqlens=CU_SEQLENS)

    def separately(arrays: Arrays) -> Any:
        outs, states = [], []
        for row, (begin, end) in enumerate(pairwise(CU_SEQLENS.tolist())):
            own = {name: arrays[name][row : row + 1] for name in arrays if "initial" in name}
            last = list(own.values())
            if begin < end:
                own |= {n: jax.lax.slice_in_dim(arrays[n], begin, end, axis=axis) for n in along}
                out, *last = function(**{**arrays, **own})
                outs.append(out)
            states.append(last)
        last_states = [jnp.concatenate(each) for each in zip(*states, strict=True)]
        return (jnp.concatenate(outs, axis=axis), *last_states)

    shapes = jax.eval_shape(packed, arrays)
    douts = tuple(random_like(np.zeros(each.shape, each.dtype)) for each in shapes)
    both = [values_and_gradients(f, arrays, douts) for f in (packed, separately)]
    jax.tree.map(assert_agrees, *both)


def test_packed_scan(place: Any) -> None:
    arrays, options = split(ScanCase(batch=1).inputs())
    arrays["initial_state"] = np.repeat(arrays["initial_state"], 4, axis=0)
    scan = functools.partial(sj.selective_scan, **options, return_last_state=True)
    check_packed(scan, place(arrays), ["u", "delta", "B", "C", "z"], axis=-1)


def test_packed_convolution(place: Any) -> None:
    arrays, options = split(ConvCase(batch=1).inputs())
    arrays["initial_state"] = np.repeat(arrays["initial_state"], 4, axis=0)
    convolution = functools.partial(sj.causal_conv1d, **options, return_final_state=True)
    check_packed(convolution, place(arrays), ["x"], axis=-1)


def test_packed_block(place: Any) -> None:
    states = {f"initial_{n}": s for n, s in BlockCase(batch=4).states().items()}
    arrays = {**BlockCase(batch=1, seqlen=67).inputs(), **states}
    block = functools.partial(sj.mamba_block, return_states=True)
    check_packed(block, place(arrays), ["x"], axis=1)


# --- vmap -----------------------------------------------------------------------------------------


def check_vmap(function: Callable[[Arrays], Any], arrays: Arrays, mapped: Collection[str]) -> None:
    """Mapping over some arrays is a loop over them, in results and each one's gradients."""
    given = {n: np.stack([a, random_like(a), a]) if n in mapped else a for n, a in arrays.items()}
    axes = ({name: 0 if name in mapped else None for name in arrays},)
    if "A" in mapped:
        given["A"] = -np.abs(given["A"])
    shape = jax.eval_shape(function, arrays)
    dout = random_like(np.zeros(shape.shape, shape.dtype))

    def one(arrays: Arrays) -> Any:
        out, backward = jax.vjp(function, arrays)
        return out, backward(dout)[0]

    results = jax.jit(jax.vmap(one, in_axes=axes))(given)
    rows = [{n: a[row] if n in mapped else a for n, a in given.items()} for row in range(3)]
    each = [jax.jit(one)(arrays) for arrays in rows]
    expected = jax.tree.map(lambda *own: np.stack(own), *each)
    for actual, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        if actual.dtype != jax.dtypes.float0:  # that of integers
            assert_agrees(np.asarray(actual), theirs)


@pytest.mark.parametrize(
    "mapped", ["u", "u delta B C z initial_state", "A", "D", "B", "u delta A B C D z delta_bias"]
)
@pytest.mark.parametrize("form", ["shared", "3 groups", "constant"])
def test_vmap_of_a_scan(mapped: str, form: str, place: Any) -> None:
    arrays, options = split(ScanCase(seqlen=20, B=form, C="3 groups").inputs())
    check_vmap(lambda a: sj.selective_scan(**a, **options), place(arrays), mapped.split())


@pytest.mark.parametrize("mapped", ["x", "weight", "x weight bias initial_state", "seq_idx"])
def test_vmap_of_a_convolution(mapped: str, place: Any) -> None:
    arrays, options = split(ConvCase(state_len=None if mapped == "seq_idx" else 3).inputs())
    if mapped == "seq_idx":
        arrays["seq_idx"] = np.cumsum(np.arange(67) % 9 == 0, dtype=np.int32)[None].repeat(2, 0)

    def convolution(arrays: Arrays) -> Any:
        return sj.causal_conv1d(**arrays, **options)

    check_vmap(convolution, place(arrays), mapped.split())


@pytest.mark.parametrize("mapped", ["x", "x initial_conv_state initial_ssm_state", "A_log", "x D"])
def test_vmap_of_a_block(mapped: str, place: Any) -> None:
    case = BlockCase()
    states = {f"initial_{name}": state for name, state in case.states().items()}

    def block(arrays: Arrays) -> Any:
        weights = {name: arrays[name] for name in case.weights()}
        return sj.mamba_block(arrays["x"], weights, **{name: arrays[name] for name in states})

    arrays = {"x": case.inputs()["x"], **case.weights(), **states}
    check_vmap(block, place(arrays), mapped.split())


def test_vmap_over_packed_boundaries() -> None:
    arrays, options = split(ScanCase(batch=1, initial_state=False).inputs())
    boundaries = np.stack([CU_SEQLENS, [0, 1, 2, 3, 67]]).astype(np.int32)

    def scan(cu_seqlens: Any) -> Any:
        return sj.selective_scan(**arrays, **options, cu_seqlens=cu_seqlens)

    assert_same_bits(
        np.asarray(jax.vmap(scan)(boundaries)), np.stack([scan(each) for each in boundaries])
    )


def test_vmap_of_vmap_and_the_gradient_of_vmap() -> None:
    arrays, options = split(ScanCase(seqlen=12).inputs())
    u = np.stack([[arrays["u"], -arrays["u"]], [2 * arrays["u"], 3 * arrays["u"]]])
    others = {name: array for name, array in arrays.items() if name not in ("u", "A")}

    def scan(u: Any, A: Any) -> Any:
        return sj.selective_scan(u=u, A=A, **others, **options)

    def twice(A: Any) -> Any:
        return jax.vmap(jax.vmap(scan, in_axes=(0, None)), in_axes=(0, None))(u, A)

    def loop(A: Any) -> Any:
        return jnp.stack([jnp.stack([scan(each, A) for each in row]) for row in u])

    both = [values_and_gradients(f, arrays["A"], random_like(u)) for f in (twice, loop)]
    jax.tree.map(assert_agrees, *both)


# --- Training -------------------------------------------------------------------------------------


def test_training_steps_of_a_block_lower_the_loss(place: Any) -> None:
    inputs = BlockCase().inputs()
    x, weights = place((inputs["x"], inputs["weights"]))
    target = place(random_like(inputs["x"]))

    @jax.jit
    def step(weights: Arrays) -> tuple[Any, Arrays]:
        def loss(weights: Arrays) -> Any:
            return jnp.mean((sj.mamba_block(x, weights) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(weights)
        return value, jax.tree.map(lambda weight, slope: weight - 0.005 * slope, weights, gradients)

    losses = []
    for _ in range(20):
        loss, weights = step(weights)
        losses.append(float(loss))
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]


def test_programs_in_several_threads() -> None:
    arrays, options = split(ScanCase().inputs())
    expected = ops.selective_scan(**arrays, **options)[0]

    @jax.jit
    def scan(arrays: Arrays) -> Any:
        return sj.selective_scan(**arrays, **options)

    with ThreadPoolExecutor(4) as threads:
        for out in threads.map(lambda _: np.asarray(scan(arrays)), range(40)):
            assert_same_bits(out, expected)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "changes", "words"),
    [
        ("scan", {"B": np.ones((2, 5, 67), np.float32)}, ["selective_scan", "B", "dstate 5", "16"]),
        ("scan", {"u": np.ones((24, 67), np.float32)}, ["selective_scan", "u", "(24, 67)"]),
        ("scan", {"delta": np.ones((2, 24, 67), np.float16)}, ["delta", "float16", "float32"]),
        ("scan", {"z": [1.0]}, ["selective_scan", "z", "list", "array"]),
        ("scan", {"cu_seqlens": np.zeros(3, np.int32)}, ["cu_seqlens", "batch"]),
        ("convolution", {"weight": np.ones((24, 9), np.float32)}, ["causal_conv1d", "width", "9"]),
        ("convolution", {"activation": "relu"}, ["causal_conv1d", "activation", "relu"]),
        ("block", {"weights": {}}, ["mamba_block", "in_proj.weight"]),
        ("block", {"dt_B_C_norm_eps": -1.0}, ["mamba_block", "dt_B_C_norm_eps", "-1"]),
        ("block", {"x": np.ones((2, 35, 31), np.float32)}, ["in_proj", "d_model 32", "31"]),
    ],
)
def test_what_does_not_fit_is_refused_while_tracing(
    operator: str, changes: Arrays, words: list[str]
) -> None:
    function, case = {
        "scan": (sj.selective_scan, ScanCase()),
        "convolution": (sj.causal_conv1d, ConvCase()),
        "block": (sj.mamba_block, BlockCase()),
    }[operator]
    with refuses(*words):
        jax.eval_shape(lambda: function(**{**case.inputs(), **changes}))


def test_boundaries_are_refused_when_the_program_runs() -> None:
    arrays, options = split(ScanCase(batch=1, initial_state=False).inputs())
    scan = jax.jit(functools.partial(sj.selective_scan, **arrays, **options))
    with pytest.raises(jax.errors.JaxRuntimeError, match="selective_scan: cu_seqlens"):
        scan(cu_seqlens=np.array([0, 70, 67], np.int32)).block_until_ready()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("XLA_TARGETS = {}", "this ssmcore was built without jaxlib"),
        ("XLA_FFI_VERSION = (99, 1)", "version 99.1, and jaxlib"),
    ],
)
def test_a_build_for_no_jaxlib_or_a_newer_one_says_so(change: str, words: str) -> None:
    program = f"import ssmcore._core as core; core.{change}; import ssmcore.jax"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "ssmcore.errors.BackendError: ssmcore.jax" in result.stderr
    assert words in result.stderr
