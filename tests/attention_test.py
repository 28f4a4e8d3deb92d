"""Attention over the pool, against a walk along every path, and within bins, against every query by itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import attention
from treerl.kernels import bins
from treerl.models.policy import packed_hidden
from treerl.models.transformer import Model, TransformerConfig

B, G, K, R, D, P, S = 3, 2, 5, 3, 16, 21, 40


def inputs(seed, *, used=S, dtype=jnp.float32, slots=K, group=R, heads=G, prompt=P, size=D, own=0):
    """Random (q, k, v), cache, prompt lengths, paths, rows of heads and who writes; rows from `used` on hold nothing.

    A line that writes has its head in its own column; other heads lie anywhere, some where another line writes. Lines stay
    in their own columns from row `own` on, if it is not 0.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    cursor = rng.integers(0, used + 1, (B, slots))
    cursor[0, 0], cursor[1, 1] = 0, used  # one line at its prompt, one as long as it can be
    path = np.where(np.arange(S) < cursor[..., None], rng.integers(0, slots, (B, slots, S)), -1)
    if own:
        path = np.where((path >= 0) & (np.arange(S) >= own), np.arange(slots)[:, None], path)
    write = (cursor > 0) & (rng.random((B, slots)) < 0.7)
    tree, line = np.nonzero(write)
    path[tree, line, cursor[tree, line] - 1] = line
    tree, line = np.nonzero(write & (np.roll(cursor, 1, axis=1) == cursor))  # below a head that is being written
    path[tree, line, cursor[tree, line] - 1] = (line - 1) % slots
    write[tree, line] = False
    cache = normal(B, heads, prompt, size), normal(B, heads, prompt, size), *(normal(B, heads, slots, S, size) for _ in "kv")
    qkv = normal(B, slots, heads * group, size), normal(B, slots, heads, size), normal(B, slots, heads, size)
    length = jnp.asarray([prompt, prompt // 3, 1])
    return qkv, cache, (length, jnp.asarray(path, jnp.int32), jnp.asarray(cursor - 1, jnp.int32), jnp.asarray(write))


def walk(qkv, cache, tree, window=None):
    """Softmax over the last `window` tokens of the prompt and the path, one query at a time, in float64: (out, cache)."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    prompt_k, prompt_v, pool_k, pool_v = (np.array(x, np.float64) for x in cache)
    length, path, row, write = map(np.asarray, tree)
    for b, j in zip(*np.nonzero(write)):
        pool_k[b, :, j, row[b, j]], pool_v[b, :, j, row[b, j]] = k[b, j], v[b, j]
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, j, h in np.ndindex(q.shape[:-1]):
        g, rows = h // group, [s for s in range(S) if path[b, j, s] >= 0]
        line = lambda prompt, pool: list(prompt[b, g, : length[b]]) + [pool[b, g, path[b, j, s], s] for s in rows]
        on = lambda prompt, pool: np.array(line(prompt, pool)[-window if window else 0 :])
        score = on(prompt_k, pool_k) @ q[b, j, h] / q.shape[-1] ** 0.5
        weight = np.exp(score - score.max())
        out[b, j, h] = weight / weight.sum() @ on(prompt_v, pool_v)
    return out, (prompt_k, prompt_v, pool_k, pool_v)


def attend(form, qkv, cache, tree, rows=S, window=None):
    """(out, cache) of a form of attention over the pool."""
    return jax.jit(lambda qkv, cache, tree: form(*tree, rows)(*qkv, cache, window))(qkv, cache, tree)


def assert_walks(got, qkv, cache, tree, window=None, atol=2e-6):
    out, cache = walk(qkv, cache, tree, window)
    np.testing.assert_allclose(np.asarray(got[0], np.float64), out, atol=atol)
    for ours, wanted in zip(got[1], cache):
        np.testing.assert_array_equal(np.asarray(ours, np.float64), wanted)


KERNELS = {
    "dense": attention.dense,
    "fused": attention.fused,
    "fused, columns and prompts in pieces": functools.partial(attention.fused, block=16, span=16, prompt_span=16),
    "fused, two lines a tile": functools.partial(attention.fused, tile=6, span=48),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("used", [S, 17])
def test_kernels_equal_a_walk_along_the_path(name, used):
    given = inputs(used, used=used)
    assert_walks(attend(KERNELS[name], *given, used), *given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(own=1),
        dict(own=20, slots=8),
        dict(slots=35, group=2),
        dict(group=1, heads=3),
        dict(slots=12, group=8, prompt=150),
        dict(size=32, heads=1),
    ],
    ids=str,
)
def test_the_kernel_takes_all_head_layouts_and_more_lines_than_bits(sizes):
    given = inputs(7, **sizes)
    assert_walks(attend(attention.fused, *given), *given)


@pytest.mark.parametrize("window", [1, 6, 25, P + S])
def test_a_window_leaves_the_last_positions(window):
    given = inputs(3)
    assert_walks(attend(attention.dense, *given, window=jnp.int32(window)), *given, window=window)


@pytest.mark.parametrize("window", [1, 3, 40])
def test_windows_hide_alike_in_rows_and_in_bins(window):
    """A chain alone in a bin is a row; what lies beyond the window gets exactly no gradient."""
    rng = np.random.default_rng(window)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, n, D)), jnp.float32) for n in (4, 2, 2))
    index = jnp.arange(40)[None]
    row, bin_ = attention.causal(jnp.array([40])), attention.packed(jnp.full((1, 40), 40), index, block=16)
    np.testing.assert_allclose(row(q, k, v, None, window)[0], bin_(q, k, v, None, window)[0], atol=2e-6)
    for attend in (row, bin_):
        reads = jax.jacobian(lambda v: jnp.sum(attend(q, k, v, None, jnp.int32(window))[0], (0, 2, 3)))(v)
        reads = np.any(np.asarray(reads) != 0, axis=(1, 3, 4))  # [query, key]
        behind = np.arange(40)[:, None] - np.arange(40)
        np.testing.assert_array_equal(reads, (behind >= 0) & (behind < window))


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_what_no_line_stands_on_is_not_read(name):
    qkv, cache, tree = inputs(0)
    length, path, *_ = map(np.asarray, tree)
    stands = (path[:, :, None] == np.arange(K)[:, None]).any(1)  # [B, K, S]
    poison = lambda pool: jnp.where(stands[:, None, ..., None], pool, 1e4)
    past = (np.arange(P) >= length[:, None])[:, None, :, None]
    other = *(jnp.where(past, 1e4, x) for x in cache[:2]), *map(poison, cache[2:])
    run = lambda cache: attend(KERNELS[name], qkv, cache, tree)[0]
    np.testing.assert_array_equal(run(cache), run(other))


def test_bfloat16_kernel_is_as_close_as_bfloat16_allows():
    given = inputs(1, dtype=jnp.bfloat16)
    got = attend(attention.fused, *given)
    assert got[0].dtype == jnp.bfloat16
    assert_walks(got, *given, atol=0.03)


def test_the_kernel_sees_a_head_as_it_is_stored():
    qkv, cache, tree = inputs(1)
    half = (*(x.astype(jnp.bfloat16) for x in cache),)
    dense, fused = (attend(form, qkv, half, tree) for form in (attention.dense, attention.fused))
    np.testing.assert_allclose(fused[0], dense[0], atol=2e-2)
    jax.tree.map(np.testing.assert_array_equal, fused[1], dense[1])


def test_the_kernel_is_chosen_on_gpus_alone(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert attention.kernel(64) is attention.dense
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.kernel(64) is attention.fused and not caplog.records
    with caplog.at_level("INFO"):
        assert attention.kernel(24) is attention.dense and attention.kernel(8) is attention.dense
    assert "head_dim=24" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_exact_and_others_are_left_alone(dtype):
    model = Model(TransformerConfig(vocab=8, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, hidden=8, dtype=dtype))

    def logits(params):
        module = model.merge(params)
        token = jnp.zeros((1, 4), jnp.int32)
        return module.logits(module(token, token, attention.causal(jnp.array([4])))[0]).sum()

    with jax.default_matmul_precision(None):
        text = str(jax.make_jaxpr(jax.grad(logits))(model.init(jax.random.key(0))))
    exact = text.count("HIGHEST")
    assert exact == 2 * text.count("dot_general[") > 0 if dtype == "float32" else exact == 0


# --- within bins -------------------------------------------------------------------------------------


def forest(seed, size, used):
    """Random trees one after another in `used` places of a bin, the rest padding: (stop, position) [size]."""
    rng, above, parents = np.random.default_rng(seed), [], []
    for _ in range(used):
        if rng.random() < 0.12:
            del above[rng.integers(0, len(above) + 1) :]  # all of them: a new tree
        parents.append(above[-1] if above else -1)
        above.append(len(parents) - 1)
    stop, position = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for i in reversed(range(used)):
        stop[i] = max(stop[i], i + 1)
        if parents[i] >= 0:
            stop[parents[i]] = max(stop[parents[i]], stop[i])
    for i in range(used):
        position[i] = position[parents[i]] + 1 if parents[i] >= 0 else 0
    return stop, position


def in_bins(seed, *, size=96, heads=4, kv_heads=2, head_dim=16, dtype=jnp.float32):
    """(q, k, v, slopes of the result), (stop, position) of three bins: full, with padding, and of padding alone."""
    rng = np.random.default_rng(seed)
    stop, position = (jnp.asarray(np.stack(x)) for x in zip(*(forest(seed + i, size, used) for i, used in enumerate((size, size - 27, 0)))))
    arrays = (jnp.asarray(rng.normal(size=(3, size, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads, heads))
    return tuple(arrays), (stop, position)


def each_query(q, k, v, stop, position, window):
    """One softmax a query, in float32 at least, over the keys in whose subtrees it lies."""
    index = jnp.arange(q.shape[1])
    seen = (index <= index[:, None]) & (index[:, None] < stop[:, None]) | jnp.eye(index.size, dtype=bool)
    if window is not None:
        seen &= position[..., None] - position[:, None] < window
    k, v = (jnp.repeat(x.astype(jnp.float32), q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = jnp.einsum("nqhd,nkhd->nhqk", q.astype(jnp.float32), k, precision="highest") / q.shape[-1] ** 0.5
    weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf), axis=-1)
    return jnp.einsum("nhqk,nkhd->nqhd", weight, v, precision="highest").astype(q.dtype)


def with_gradients(form, q, k, v, slope):
    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(form, q, k, v)
        return out, *pull(slope)

    return run(q, k, v)


def assert_near(got, wanted, tolerance):
    """Norms of differences over norms."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("how", ["xla", "kernel"])
@pytest.mark.parametrize("window", [None, 2, 7])
@pytest.mark.parametrize("sizes", [dict(), dict(heads=3, kv_heads=3), dict(heads=6, kv_heads=1, head_dim=32, size=64)], ids=str)
def test_bins_equal_each_query_by_itself(how, window, sizes):
    (q, k, v, slope), (stop, position) = in_bins(1, **sizes)
    window = None if window is None else jnp.int32(window)
    form = lambda q, k, v: attention.packed(stop, position, block=16, how=how)(q, k, v, None, window)[0]
    wanted = with_gradients(lambda q, k, v: each_query(q, k, v, stop, position, window), q, k, v, slope)
    assert_near(with_gradients(form, q, k, v, slope), wanted, 1e-5)


@pytest.mark.parametrize("queries, keys", [(16, 32), (32, 16), (64, 16)])
def test_blocks_of_queries_and_keys_may_differ(queries, keys):
    (q, k, v, slope), (stop, position) = in_bins(2)
    form = functools.partial(bins.bin_attention, stop=stop, queries=queries, keys=keys)
    wanted = with_gradients(lambda q, k, v: each_query(q, k, v, stop, position, None), q, k, v, slope)
    assert_near(with_gradients(form, q, k, v, slope), wanted, 1e-5)


def test_bins_in_bfloat16():
    (q, k, v, slope), (stop, position) = in_bins(3, dtype=jnp.bfloat16)
    form = functools.partial(bins.bin_attention, stop=stop)
    wanted = with_gradients(lambda q, k, v: each_query(q, k, v, stop, position, None), q, k, v, slope)
    assert_near(with_gradients(form, q, k, v, slope), wanted, 1e-2)


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_that_nobody_sees_are_skipped(window):
    """All others are read; with a window perhaps some more, since a block of siblings has no order."""
    for seed in range(5):
        _, (stop, position) = in_bins(seed)
        index = np.arange(stop.shape[1])
        seen = (index <= index[:, None]) & (index[:, None] < np.asarray(stop)[:, None]) | np.eye(index.size, dtype=bool)
        if window:
            seen &= (np.asarray(position)[..., None] - np.asarray(position)[:, None]) < window
        wanted = seen.reshape(3, 6, 16, 3, 32).any((2, 4))
        got = np.asarray(bins.live(stop, position, window, 16, 32))
        assert not (wanted & ~got).any() and got.mean() < 0.62
        assert window or (wanted == got).all()


def test_what_a_query_does_not_see_is_not_read():
    """Not even multiplied by zero: a sibling's numbers that are not finite stay its own."""
    (q, k, v, _), _ = in_bins(4)
    stop = jnp.asarray(np.r_[96, [32] * 31, [64] * 32, [96] * 32].astype(np.int32))[None].repeat(3, 0)  # a root and three chains
    form = functools.partial(bins.bin_attention, stop=stop, queries=32, keys=32)
    out, other = form(q, k, v), form(q, k.at[:, 32:64].set(jnp.nan), v.at[:, 32:64].set(jnp.nan))
    np.testing.assert_array_equal(out[:, 64:], other[:, 64:])
    np.testing.assert_array_equal(out[:, :32], other[:, :32])
    assert np.isnan(other[:, 32:64]).all()


@pytest.mark.parametrize("remat, times", [("none", 1), ("products", 1), ("layers", 2)])
def test_the_backward_pass_runs_the_kernel_again_only_if_nothing_is_stored(monkeypatch, remat, times):
    monkeypatch.setattr(attention, "packed", functools.partial(attention.packed, how="kernel"))
    model = Model(TransformerConfig(vocab=8, layers=1, width=32, heads=2, kv_heads=1, head_dim=16, hidden=8))
    token = jnp.zeros((1, 16), jnp.int32)

    def loss(params):
        module, hidden = packed_hidden(model, params, token, token, token + 16, remat=remat)
        return jnp.sum(module.logits(hidden))

    text = str(jax.make_jaxpr(jax.grad(loss))(model.init(jax.random.key(0))))
    assert len(re.findall(r"name=bin_attention\b", text)) == times
    assert text.count("name=bin_attention_queries") == text.count("name=bin_attention_keys") == 1


@pytest.mark.parametrize("window", [None, 5])
def test_rows_of_prompts_go_through_the_kernel_too(window):
    (q, k, v, slope), _ = in_bins(5)
    length = jnp.array([96, 41, 1])
    form = lambda how: lambda q, k, v: attention.causal(length, how=how)(q, k, v, None, window)[0]
    real = (jnp.arange(96) < length[:, None])[..., None, None]
    rows, kernel = (with_gradients(form(how), q, k, v, slope * real) for how in ("xla", "kernel"))
    assert_near([kernel[0] * real, *kernel[1:]], [rows[0] * real, *rows[1:]], 1e-5)


@pytest.mark.parametrize(
    "within", [lambda size: attention.packed(jnp.full((1, size), size)), lambda size: attention.causal(jnp.array([size]))]
)
def test_how_bins_are_attended_is_chosen(monkeypatch, within):
    """Half precision of sizes that fit on a GPU by the kernel; the rest by XLA."""
    used = []
    monkeypatch.setattr(attention, "bin_attention", lambda q, *_: used.append("kernel") or q)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: used.append("xla") or q)

    def chosen(platform, dtype, size, head_dim):
        used.clear()
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        x = jnp.zeros((1, size, 1, head_dim), dtype)
        within(size)(x, x, x, None)
        return set(used)

    for size, head_dim in [(128, 64), (96, 16), (48, 256)]:
        assert chosen("gpu", jnp.bfloat16, size, head_dim) == chosen("gpu", jnp.float16, size, head_dim) == {"kernel"}
        assert chosen("gpu", jnp.float32, size, head_dim) == chosen("cpu", jnp.bfloat16, size, head_dim) == {"xla"}
    for size, head_dim in [(100, 64), (128, 80), (128, 8)]:
        assert chosen("gpu", jnp.bfloat16, size, head_dim) == {"xla"}
