"""The Mamba block in training: its forward pass, and its gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
from cases import BLOCK_CASES, BlockCase, rows
from finite_differences import numerical_gradient
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    fp64,
    refuses,
    relative_error,
)
from sequences import boundaries
from test_golden_ops import block_inputs, load

from ssmcore import ops

FALCON = {"dt_B_C_norm_eps": 1e-2}  # large enough to matter

STATES = ("conv_state", "ssm_state")

# Largest error of a gradient. What one operator hands to the next is rounded, forward and backward.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def initial(states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"initial_{name}": state for name, state in states.items()}


def output_gradients(case: BlockCase) -> dict[str, np.ndarray]:
    """Random gradients by what the block returns, as `mamba_block_bwd` takes them."""
    generator = np.random.default_rng(1)
    states = case.states()
    shapes = {
        "dout": (case.batch, case.seqlen, case.d_model),
        "dfinal_conv_state": states["conv_state"].shape,
        "dlast_ssm_state": states["ssm_state"].shape,
    }
    dtypes = {"dlast_ssm_state": np.dtype(np.float32)}
    return {
        name: generator.standard_normal(shape).astype(dtypes.get(name, DTYPES[case.dtype]))
        for name, shape in shapes.items()
    }


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: in_double(value)
        if isinstance(value, dict)
        else fp64(value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in arguments.items()
    }


def forward_and_backward(
    inputs: dict[str, Any],
    douts: dict[str, np.ndarray],
    *,
    keep: tuple[str, ...] = (),
    **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(out, every gradient by the name of its input); states may be among `inputs`."""
    out, saved = ops.mamba_block_train_fwd(**inputs, keep=keep)
    return out, by_name(ops.mamba_block_bwd(saved=saved, **inputs, **douts, **options))


def by_name(gradients: ops.MambaBlockGradients) -> dict[str, np.ndarray]:
    every = {
        "x": gradients.dx,
        **gradients.dweights,
        "initial_conv_state": gradients.dinitial_conv_state,
        "initial_ssm_state": gradients.dinitial_ssm_state,
    }
    return {name: gradient for name, gradient in every.items() if gradient is not None}


def differences(
    inputs: dict[str, Any], douts: dict[str, np.ndarray], sample: int | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each input the flat indices of elements, and the reference's gradients by them.

    `sample`: of how many elements of each input, chosen at random; None: of all.
    """
    exact = in_double(inputs)
    weights = exact.pop("weights")
    options = {name.removeprefix("initial_"): value for name, value in exact.items()}

    names = ("dout", "dfinal_conv_state", "dlast_ssm_state")
    given = [fp64(douts[name]) if name in douts else None for name in names]

    def loss() -> float:
        results = reference.mamba_block(**options, weights=weights)
        pairs = zip(given, results, strict=True)
        return sum(float((dout * result).sum()) for dout, result in pairs if dout is not None)

    generator = np.random.default_rng(2)
    results = {}
    for name, array in {**exact, **weights}.items():
        if name == "dt_B_C_norm_eps":
            continue
        at = np.arange(array.size)
        if sample is not None and array.size > sample:
            at = np.sort(generator.choice(at, sample, replace=False))
        results[name] = at, numerical_gradient(loss, array, at)
    return results


def assert_agree(
    gradients: dict[str, np.ndarray],
    expected: dict[str, tuple[np.ndarray, np.ndarray]],
    tolerance: float,
) -> None:
    assert set(gradients) == set(expected)
    for name, (at, values) in expected.items():
        assert np.any(values), name
        # Of a sample's elements the largest may be small: errors are relative to the whole.
        largest = max(np.abs(fp64(gradients[name])).max(), np.abs(values).max())
        error = np.abs(fp64(gradients[name]).reshape(-1)[at] - values).max() / largest
        assert error <= tolerance, f"{name}: error {error:.3g}"


# Small enough for every element of every input to be moved.
TINY = BlockCase(batch=2, seqlen=5, d_model=3, dim=4, dstate=2, dt_rank=2, width=3, proj_bias=True)

TINY_CASES = rows(
    TINY,
    batch=(1, 3),
    seqlen=(1, 2, 9),
    d_model=(1, 5),
    dim=(1, 7),
    dstate=(1, 5),
    dt_rank=(1, 3),
    width=(2, 4, 8),
    proj_bias=(False,),
    conv_bias=(False,),
)


@pytest.mark.parametrize("norms", [{}, FALCON], ids=["mamba", "falcon"])
@pytest.mark.parametrize("case", TINY_CASES)
def test_agrees_with_differences(case: BlockCase, norms: dict[str, float]) -> None:
    inputs = in_double({**case.inputs(), **initial(case.states()), **norms})
    douts = in_double(output_gradients(case))
    _, gradients = forward_and_backward(inputs, douts)
    assert_agree(gradients, differences(inputs, douts), 1e-7)


@pytest.mark.parametrize("norms", [{}, FALCON], ids=["mamba", "falcon"])
def test_from_the_start(norms: dict[str, float]) -> None:
    """Without states, and over several of the chunks whose states are kept."""
    case = replace(TINY, batch=1, seqlen=150, dim=17)
    inputs = in_double({**case.inputs(), **norms})
    douts = in_double({"dout": output_gradients(case)["dout"]})
    _, gradients = forward_and_backward(inputs, douts)
    assert_agree(gradients, differences(inputs, douts, sample=8), 1e-7)


@pytest.mark.parametrize("norms", [{}, FALCON], ids=["mamba", "falcon"])
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_agrees_with_double(case: BlockCase, norms: dict[str, float]) -> None:
    """In single precision, at sizes and in types of every kind."""
    inputs = {**case.inputs(), **initial(case.states()), **norms}
    douts = output_gradients(case)
    out, gradients = forward_and_backward(inputs, douts)
    expected_out, expected = forward_and_backward(in_double(inputs), in_double(douts))
    assert_close(out, expected_out, case.dtype, rounded=True)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        array = inputs[name] if name in inputs else inputs["weights"][name]
        assert gradient.dtype == array.dtype and gradient.shape == array.shape
        error = relative_error(gradient, expected[name])
        assert error <= max(TOLERANCE[case.dtype], TOLERANCE[gradient.dtype.name]), (
            f"{name}: error {error:.3g}"
        )


def test_double_agrees_with_reference() -> None:
    case = BlockCase()
    inputs, states = in_double(case.inputs()), in_double(case.states())
    expected_out, *expected = reference.mamba_block(**inputs, **states)
    out, _, *after = ops.mamba_block_train_fwd(**inputs, **initial(states), return_states=True)
    assert_close(out, expected_out, "float64")
    for state, expected_state in zip(after, expected, strict=True):
        assert_close(state, expected_state, "float64")
    assert_same_bits(out, ops.mamba_block(**inputs, **states))
    for name, state in zip(STATES, after, strict=True):
        assert_same_bits(states[name], state)


def test_golden() -> None:
    """The published block's gradients."""
    tensors = load("mamba_block")
    out, gradients = forward_and_backward(block_inputs(tensors), {"dout": tensors["dout"]})
    assert_close(out, tensors["out"], "float32", rounded=True)
    expected = {
        "x": tensors["dx"],
        **{k.removeprefix("dp."): v for k, v in tensors.items() if k.startswith("dp.")},
    }
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, "float32", rounded=True)


@pytest.mark.parametrize("keep", [(), ("u",), ("u", "delta")], ids=["least", "u", "all"])
@pytest.mark.parametrize("norms", [{}, FALCON], ids=["mamba", "falcon"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_that_of_inference(
    dtype: str, norms: dict[str, float], keep: tuple[str, ...]
) -> None:
    case = BlockCase(dtype=dtype, seqlen=150)
    inputs, states = {**case.inputs(), **norms}, case.states()
    before = {name: state.copy() for name, state in states.items()}
    out, _, *after = ops.mamba_block_train_fwd(
        **inputs, **initial(states), return_states=True, keep=keep
    )
    for name in STATES:
        assert_same_bits(states[name], before[name])
    assert_same_bits(out, ops.mamba_block(**inputs, **states))
    for name, state in zip(STATES, after, strict=True):
        assert_same_bits(state, states[name])


@pytest.mark.parametrize("norms", [{}, FALCON], ids=["mamba", "falcon"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_is_computed_again(dtype: str, norms: dict[str, float]) -> None:
    case = BlockCase(dtype=dtype, seqlen=100)
    inputs = {**case.inputs(), **initial(case.states()), **norms}
    douts = output_gradients(case)
    _, gradients = forward_and_backward(inputs, douts)
    _, kept = forward_and_backward(inputs, douts, keep=("u", "delta"))
    for name, gradient in gradients.items():
        assert_same_bits(kept[name], gradient)


def test_threads_do_not_change_a_bit(set_num_threads: Any) -> None:
    case = BlockCase(batch=3, seqlen=100, d_model=100, dim=201)
    inputs = {**case.inputs(), **initial(case.states())}
    douts = output_gradients(case)
    set_num_threads(1)
    _, gradients = forward_and_backward(inputs, douts)
    for threads in (2, 3):
        set_num_threads(threads)
        _, again = forward_and_backward(inputs, douts)
        for name, gradient in gradients.items():
            assert_same_bits(again[name], gradient)


def test_two_halves_are_the_whole() -> None:
    """The states' gradients of the second half go into the first."""
    case = BlockCase(seqlen=100)
    inputs, states, douts = case.inputs(), case.states(), output_gradients(case)
    _, whole = forward_and_backward({**inputs, **initial(states)}, douts)

    first = {**inputs, "x": inputs["x"][:, :37].copy(), **initial(states)}
    _, saved_first, *between = ops.mamba_block_train_fwd(**first, return_states=True)
    second = {
        **inputs,
        "x": inputs["x"][:, 37:].copy(),
        **initial(dict(zip(STATES, between, strict=True))),
    }
    _, saved_second = ops.mamba_block_train_fwd(**second)
    gradients_second = by_name(
        ops.mamba_block_bwd(
            saved=saved_second, **second, **{**douts, "dout": douts["dout"][:, 37:].copy()}
        )
    )
    gradients_first = by_name(
        ops.mamba_block_bwd(
            saved=saved_first,
            **first,
            dout=douts["dout"][:, :37].copy(),
            dfinal_conv_state=gradients_second["initial_conv_state"],
            dlast_ssm_state=gradients_second["initial_ssm_state"],
        )
    )
    dx = np.concatenate([gradients_first["x"], gradients_second["x"]], axis=1)
    assert_close(dx, whole["x"], "float32")
    for name in inputs["weights"]:
        assert_close(gradients_first[name] + gradients_second[name], whole[name], "float32")
    for name in initial(states):
        assert_close(gradients_first[name], whole[name], "float32")


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("norms", [{}, FALCON], ids=["mamba", "falcon"])
def test_packed_is_separate(norms: dict[str, float], with_states: bool) -> None:
    """Also where a sequence is empty, and where one is shorter than the convolution."""
    lengths = [70, 0, 2, 31]
    case = BlockCase(batch=1, seqlen=sum(lengths))
    states = replace(case, batch=len(lengths)).states()
    given = initial(states) if with_states else {}
    inputs = {**case.inputs(), **norms}
    dout = output_gradients(case)["dout"]
    dstates = {
        name: gradient
        for name, gradient in output_gradients(replace(case, batch=len(lengths))).items()
        if name != "dout" and with_states
    }
    cu_seqlens = boundaries(lengths)
    out, packed = forward_and_backward(
        {**inputs, **given, "cu_seqlens": cu_seqlens}, {"dout": dout, **dstates}
    )

    sums = {name: np.zeros_like(weight) for name, weight in inputs["weights"].items()}
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        row = {name: state[s : s + 1] for name, state in given.items()}
        drow = {name: gradient[s : s + 1] for name, gradient in dstates.items()}
        if begin == end:  # its last state is its initial state
            for name, gradient in zip(given, drow.values(), strict=True):
                assert_same_bits(packed[name][s : s + 1], gradient)
            continue
        alone = {**inputs, "x": inputs["x"][:, begin:end].copy(), **row}
        out_alone, gradients = forward_and_backward(
            alone, {"dout": dout[:, begin:end].copy(), **drow}
        )
        assert_close(out[:, begin:end], out_alone, "float32", rounded=True)
        assert_close(packed["x"][:, begin:end], gradients["x"], "float32")
        for name in given:
            assert_close(packed[name][s : s + 1], gradients[name], "float32")
        for name in sums:
            sums[name] += gradients[name]
    for name, total in sums.items():
        assert_close(packed[name], total, "float32")


def test_batch_in_parts_is_the_whole() -> None:
    case = BlockCase(batch=3, seqlen=40)
    inputs, dout = case.inputs(), output_gradients(case)["dout"]
    _, whole = forward_and_backward(inputs, {"dout": dout})
    parts = [
        forward_and_backward({**inputs, "x": inputs["x"][part].copy()}, {"dout": dout[part].copy()})
        for part in (slice(0, 1), slice(1, 3))
    ]
    dx = np.concatenate([gradients["x"] for _, gradients in parts])
    assert_close(dx, whole["x"], "float32")
    for name in inputs["weights"]:
        assert_close(sum(gradients[name] for _, gradients in parts), whole[name], "float32")


def test_only_what_is_needed() -> None:
    case = BlockCase(proj_bias=True)
    inputs = {**case.inputs(), **initial(case.states())}
    douts = output_gradients(case)
    _, every = forward_and_backward(inputs, douts)
    for name in every:
        _, alone = forward_and_backward(inputs, douts, needs=[name])
        assert set(alone) == {name}
        assert_same_bits(alone[name], every[name])
    assert forward_and_backward(inputs, douts, needs=[])[1] == {}


def test_inputs_stay() -> None:
    case = BlockCase()
    inputs = {**case.inputs(), **initial(case.states())}
    douts = output_gradients(case)
    arrays = {**inputs, **inputs["weights"], **douts}
    del arrays["weights"]
    before = {name: array.copy() for name, array in arrays.items()}
    forward_and_backward(inputs, douts)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])


def test_sequences_are_independent() -> None:
    """A NaN in a row's gradient stays in that row, but for the weights'."""
    case = BlockCase(batch=3)
    inputs = {**case.inputs(), **initial(case.states())}
    douts = output_gradients(case)
    _, clean = forward_and_backward(inputs, douts)
    douts["dout"][1, 20, 3] = np.nan
    _, gradients = forward_and_backward(inputs, douts)
    assert np.isnan(gradients["x"][1, :18]).all()
    assert_same_bits(gradients["x"][1, 21:], clean["x"][1, 21:])
    for name in ("x", *initial(case.states())):
        assert_same_bits(gradients[name][[0, 2]], clean[name][[0, 2]])
    assert np.isnan(gradients["in_proj.weight"]).all()


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    case = BlockCase()
    inputs, dout = case.inputs(), output_gradients(case)["dout"]
    _, expected = forward_and_backward(inputs, {"dout": dout})
    tensors = {
        "x": torch.from_numpy(inputs["x"]),
        "weights": {name: torch.from_numpy(weight) for name, weight in inputs["weights"].items()},
    }
    _, gradients = forward_and_backward(tensors, {"dout": torch.from_numpy(dout)})
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert isinstance(gradient, torch.Tensor)
        assert_close(gradient.numpy(), expected[name], "float32", rounded=True)


# --- Bad input ------------------------------------------------------------------------------------


def test_saved_is_used_once() -> None:
    case = BlockCase()
    inputs, dout = case.inputs(), output_gradients(case)["dout"]
    _, saved = ops.mamba_block_train_fwd(**inputs)
    with refuses("mamba_block_bwd", "dout"):  # which uses nothing up
        ops.mamba_block_bwd(dout.astype(np.float64), **inputs, saved=saved)
    ops.mamba_block_bwd(dout, **inputs, saved=saved)
    with refuses("mamba_block_bwd", "saved", "used"):
        ops.mamba_block_bwd(dout, **inputs, saved=saved)


@pytest.mark.parametrize("saved", [None, {}])
def test_saved_is_missing(saved: Any) -> None:
    case = BlockCase()
    with refuses("mamba_block_bwd", "saved"):
        ops.mamba_block_bwd(output_gradients(case)["dout"], **case.inputs(), saved=saved)


def test_keeps_nothing_else() -> None:
    with refuses("mamba_block_train_fwd", "keep has 'y'", "'u' and 'delta'"):
        ops.mamba_block_train_fwd(**BlockCase().inputs(), keep=["u", "y"])


@pytest.mark.parametrize("name", ["xz", "delta_B_C", "y", "chunk_states", "u", "delta"])
def test_saved_of_another_call(name: str) -> None:
    case = BlockCase()
    _, saved = ops.mamba_block_train_fwd(**case.inputs(), keep=("u", "delta"))
    setattr(saved, name, getattr(saved, name)[:1])
    with refuses("mamba_block_bwd", name):
        ops.mamba_block_bwd(output_gradients(case)["dout"], **case.inputs(), saved=saved)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("dout", zeros(2, 35, 31), ["31", "32"]),
        ("dout", zeros(2, 35, 32, dtype=np.float16), ["float16", "float32"]),
        ("dout", zeros(2, 32, 35).swapaxes(1, 2), ["contiguous"]),
        ("dfinal_conv_state", zeros(2, 64, 2), ["2", "3"]),
        ("dlast_ssm_state", zeros(3, 64, 16), ["3", "2"]),
        ("initial_conv_state", zeros(1, 64, 3), ["1", "2"]),
        ("initial_ssm_state", zeros(2, 64, 16, dtype=np.float16), ["float16", "float32"]),
        ("needs", ["x", "y"], ["y", "x"]),
        ("dt_B_C_norm_eps", 0.0, ["0.0"]),
    ],
)
def test_bad_argument(name: str, bad: Any, words: list[str]) -> None:
    case = BlockCase()
    inputs = {**case.inputs(), **initial(case.states())}
    _, saved = ops.mamba_block_train_fwd(**inputs)
    arguments = {**inputs, **output_gradients(case), name: bad}
    with refuses("mamba_block_bwd", name, *words):
        ops.mamba_block_bwd(saved=saved, **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", zeros(2, 32), []),
        ("initial_conv_state", zeros(2, 64, 2), ["2", "3"]),
        ("initial_ssm_state", zeros(3, 64, 16), ["3", "2"]),
        ("cu_seqlens", np.array([0, 35], np.int32), ["batch", "2"]),
    ],
)
def test_bad_argument_of_the_forward(name: str, bad: Any, words: list[str]) -> None:
    with refuses("mamba_block_train_fwd", name, *words):
        ops.mamba_block_train_fwd(**{**BlockCase().inputs(), name: bad})
