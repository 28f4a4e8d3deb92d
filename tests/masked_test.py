"""Masked statistics against numpy.ma."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import masked

AXES = [None, 0, 1, -1]


def data(seed: int, shape=(7, 9)):
    """Random values, a random mask whose row 2 and column 4 hold nothing, and NaN behind the mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, shape).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[2], mask[:, 4] = False, False
    hidden = np.where(mask, x, rng.choice([np.nan, np.inf, -np.inf, 1e30], shape)).astype(np.float32)
    return x, mask, hidden


def expect(actual, wanted):
    """Equal to numpy.ma's answer, 0 where that is masked."""
    wanted = np.ma.filled(np.ma.asarray(wanted, np.float64), 0.0)
    np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=1e-6)
    assert np.asarray(actual).dtype == np.float32


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("seed", range(3))
def test_total_and_mean(axis, seed):
    x, mask, hidden = data(seed)
    wanted = np.ma.array(x.astype(np.float64), mask=~mask)
    expect(masked.total(jnp.asarray(hidden), jnp.asarray(mask), axis), wanted.sum(axis))
    expect(masked.mean(jnp.asarray(hidden), jnp.asarray(mask), axis), wanted.mean(axis))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("seed", range(3))
def test_std(axis, ddof, seed):
    x, mask, hidden = data(seed)
    wanted = np.ma.array(x.astype(np.float64), mask=~mask).std(axis, ddof=ddof)
    expect(masked.std(jnp.asarray(hidden), jnp.asarray(mask), axis, ddof=ddof), wanted)


@pytest.mark.parametrize("ddof", [0, 1])
def test_weights_are_counts(ddof):
    """A value of weight w is w copies of it; weight 0 is as good as masked."""
    rng = np.random.default_rng(5)
    for seed in range(20):
        x, mask, hidden = (a[0] for a in data(seed))
        count = rng.integers(0, 4, x.shape)
        copies = np.repeat(x[mask], count[mask]).astype(np.float64)
        if copies.size < 2:
            continue
        weight = jnp.asarray(count, jnp.float32)
        expect(masked.mean(jnp.asarray(hidden), jnp.asarray(mask), weight=weight), copies.mean())
        expect(masked.std(jnp.asarray(hidden), jnp.asarray(mask), weight=weight, ddof=ddof), copies.std(ddof=ddof))


@pytest.mark.parametrize("axis", AXES)
def test_weights_along_an_axis(axis):
    """Fractional weights, each row's and column's own, against numpy.ma.average."""
    x, mask, hidden = data(11)
    weight = np.random.default_rng(12).uniform(0.1, 2.0, x.shape)
    values = np.ma.array(x.astype(np.float64), mask=~mask)
    mean, norm = np.ma.average(values, axis, np.ma.array(weight, mask=~mask), returned=True)
    centre = mean if axis is None else np.ma.expand_dims(mean, axis)
    wanted = np.ma.sqrt((np.ma.array(weight, mask=~mask) * (values - centre) ** 2).sum(axis) / norm)
    arguments = jnp.asarray(hidden), jnp.asarray(mask), axis
    expect(masked.mean(*arguments, weight=jnp.float32(weight)), mean)
    expect(masked.std(*arguments, weight=jnp.float32(weight)), wanted)


def test_one_weight_a_row_broadcasts():
    x, mask, hidden = data(21)
    weight = jnp.float32(np.random.default_rng(22).uniform(0.5, 2.0, (x.shape[0], 1)))
    arguments = jnp.asarray(hidden), jnp.asarray(mask), 1
    plain = np.asarray(masked.mean(*arguments))
    np.testing.assert_allclose(masked.mean(*arguments, weight=weight), plain, rtol=2e-6)


def test_nothing_is_zero_everywhere():
    x = jnp.full((3, 4), jnp.nan)
    mask = jnp.zeros((3, 4), bool)
    for axis in AXES:
        for value in (masked.total(x, mask, axis), masked.mean(x, mask, axis), masked.std(x, mask, axis, ddof=1)):
            assert not np.any(value)


def test_std_without_freedom_is_zero():
    """One value and ddof 1: numpy.ma masks that too."""
    x, mask = jnp.float32([[5.0, 9.0, 2.0]]), jnp.array([[False, True, False]])
    assert masked.std(x, mask, ddof=1) == 0
    assert masked.std(x, mask, axis=1, ddof=1)[0] == 0
    assert masked.std(x, mask, axis=1, ddof=0)[0] == 0
    weight = jnp.float32(0.5)  # half a copy each: 1.0 in all
    assert masked.std(x, jnp.array([[True, True, False]]), weight=weight, ddof=1) == 0
    assert masked.std(x, jnp.array([[True, True, False]]), weight=weight) == 2


def test_std_of_large_values_keeps_its_digits():
    """Two passes: the difference of squares would be lost in float32."""
    x = jnp.float32([10000.0, 10001.0, 10002.0, 77.0])
    mask = jnp.array([True, True, True, False])
    np.testing.assert_allclose(masked.std(x, mask, ddof=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("function", [masked.total, masked.mean])
def test_gradients_behind_the_mask_are_zero(function):
    x, mask, hidden = data(3)
    grad = np.asarray(jax.grad(lambda x: function(x, jnp.asarray(mask)))(jnp.asarray(hidden)))
    np.testing.assert_array_equal(grad[~mask], 0)
    np.testing.assert_allclose(grad[mask], 1 if function is masked.total else 1 / mask.sum(), rtol=1e-6)


def test_unbatched_equals_vmapped():
    _, mask, hidden = data(4)
    arguments = jnp.asarray(hidden), jnp.asarray(mask)
    for function in (masked.total, masked.mean, masked.std):
        np.testing.assert_allclose(jax.vmap(function)(*arguments), function(*arguments, axis=1), rtol=1e-6)
