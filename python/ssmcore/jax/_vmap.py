"""How the operators are mapped over an axis."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._calls import Array, Arrays


def foldable(
    function: Callable[[Arrays], Arrays], axis_of: Callable[[str, int], int | None]
) -> Callable[[Arrays], Arrays]:
    """`function` such that `vmap` calls it once, with the mapped axis folded into one of its own.

    Args:
        function: from arrays by name to arrays by name.
        axis_of: from the name and the number of axes of an argument or result to the axis of it
            that the mapped one joins, all of which have sizes in proportion; None where there is
            none. If such an argument is mapped over, `function` is called in a loop.
    """
    mapped: Callable[[Arrays], Arrays] = jax.custom_batching.custom_vmap(function)

    def rule(size: int, are_mapped: list[Arrays], arrays: Arrays) -> tuple[Arrays, Arrays]:
        (is_mapped,) = are_mapped
        given = {name: array for name, array in arrays.items() if array is not None}
        axes = {name: axis_of(name, given[name].ndim - is_mapped[name]) for name in given}
        if any(is_mapped[name] and axes[name] is None for name in given):
            each = {name: array for name, array in given.items() if is_mapped[name]}
            results = jax.lax.map(lambda one: mapped({**given, **one}), each)
        else:
            folded = {
                name: array if axis is None else _fold(array, axis, size, is_mapped[name])
                for (name, array), axis in zip(given.items(), axes.values(), strict=True)
            }
            results = {
                name: _unfold(result, axis_of(name, result.ndim), size)
                for name, result in mapped(folded).items()
            }
        return results, dict.fromkeys(results, True)

    mapped.def_vmap(rule)  # type: ignore[attr-defined]
    return mapped


def _fold(array: Array, axis: int, size: int, is_mapped: bool) -> Array:
    """The first axis, repeated where there is none, and `axis` of what follows as one."""
    if not is_mapped:
        array = jnp.broadcast_to(array, (size, *array.shape))
    array = jnp.moveaxis(array, 0, axis)
    shape = array.shape
    return array.reshape(*shape[:axis], size * shape[axis + 1], *shape[axis + 2 :])


def _unfold(array: Array, axis: int | None, size: int) -> Array:
    assert axis is not None
    shape = array.shape
    array = array.reshape(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :])
    return jnp.moveaxis(array, axis, 0)
