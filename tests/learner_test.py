"""From trees to gradients: packed equals flattened, and what must be zero is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import Mesh

from experiments.countdown import get_config
from treerl import attention, learner, losses, packing, step, tasks, tree as T
from treerl.models.policy import make_policy, packed_hidden, token_logps
from treerl.models.transformer import Model, TransformerConfig
from treerl.optimizer import make_optimizer
from treerl.sharding import AXES
from treerl.types import Cells, Prompts, TrainState

ROWS, SLOTS, WIDTH, VOCAB, TREES = 7, 5, 4, 9, 6
MODEL = Model(TransformerConfig(vocab=VOCAB, layers=2, width=16, heads=4, kv_heads=2, head_dim=4, hidden=24, qk_norm=True, qkv_bias=True))


@pytest.fixture
def optimised():
    """As users run it: conftest switches most of XLA's optimisations off for speed."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def fns(bin_tokens=ROWS + WIDTH, bins_per_step=2, **changes):
    sizes = step.Sizes(
        slots=SLOTS, rows=ROWS, budget=ROWS, segment=2, lengths=(ROWS,),
        bin_tokens=bin_tokens, bins_per_step=bins_per_step, epochs=1, vocab_chunk=7, remat="none",
    )._replace(**changes)  # fmt: skip
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    return step.Fns(
        sizes=sizes, model=MODEL, optimizer=None, mesh=mesh, branching=None, pruning=None, quality=None, grader=None, advantage=None,
        objective=lambda knobs: lambda logp, bins: losses.ppo(
            logp, bins, clip_low=knobs["clip_low"], clip_high=knobs["clip_high"]
        ),
        kl=None, thinning=None, trims=False, reference=False, overlong=0, proximal="sampler", forced="policy", importance="none",
        aggregation="token",
    )  # fmt: skip


def batch(seed, **options):
    """Random trees, their prompts, and credit of every kind, with old log-probs off the policy's."""
    rng = np.random.default_rng(seed)
    trees = [oracles.random_tree(rng, ROWS, SLOTS, vocab=VOCAB, **options) for _ in range(TREES)]
    tree = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    tree = tree.replace(logp_policy=jnp.asarray(-2 * rng.random((TREES, ROWS, SLOTS)) - 1, jnp.float32))
    length = rng.integers(1, WIDTH + 1, TREES)
    token = np.where(np.arange(WIDTH) < length[:, None], rng.integers(2, VOCAB, (TREES, WIDTH)), 0)
    prompts = Prompts(token=jnp.asarray(token), length=jnp.asarray(length), index=jnp.arange(TREES), data={})
    leaf_credit = jnp.asarray(rng.normal(size=(TREES, SLOTS)), jnp.float32)
    leaf_weight = jnp.asarray(rng.random((TREES, SLOTS)) + 0.5, jnp.float32)
    return tree, prompts, leaf_credit, leaf_weight


def rollout_rows(tree, prompts):
    """Every rollout as a row: (tokens, old log-probs, behaviour log-probs, forced, answer, each [R, P + S]; length, tree, leaf, each [R])."""
    rows = []
    for b in range(TREES):
        one = jax.tree.map(lambda x: np.asarray(x[b]), tree)
        for leaf, cells in oracles.leaf_cells(one).items():
            prompt = np.asarray(prompts.token[b])[: int(prompts.length[b])]
            pad = ROWS + WIDTH - len(prompt) - len(cells)
            line = lambda x, start: np.pad(np.concatenate([start, [x[c] for c in cells]]), (0, pad))
            none = np.zeros(len(prompt))
            columns = [line(one.token, prompt)] + [
                line(x, none) for x in (one.logp_policy, one.logp_behavior, one.source == T.FORCED, one.used)
            ]
            rows.append(columns + [len(prompt) + len(cells), b, leaf])
    return [jnp.asarray(np.stack(x)) for x in zip(*rows)]


def row_logps(params, tokens, length):
    """Log-probs [R, P + S - 1] of all tokens but the first, by a plain causal forward pass."""
    module = MODEL.merge(params)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = module(tokens.astype(jnp.int32), position, attention.causal(length))
    logp = jax.nn.log_softmax(module.logits(hidden[:, :-1]))
    return jnp.take_along_axis(logp, tokens[:, 1:, None].astype(jnp.int32), axis=-1)[..., 0]


def flattened(params, tree, prompts, leaf_credit, leaf_weight):
    """The clipped loss of every rollout as a row of its own: sum over leaves and tokens / weight."""
    tokens, old, _, _, real, length, which, leaf = rollout_rows(tree, prompts)
    credit, weight = leaf_credit[which, leaf], leaf_weight[which, leaf]

    def loss(params):
        logp = row_logps(params, tokens, length)
        a, w = credit[:, None], weight[:, None] * real[:, 1:]
        ratio = jnp.exp(logp - old[:, 1:])
        gain = jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
        return -jnp.sum(w * gain) / jnp.sum(w)

    return jax.value_and_grad(loss)(params)


def packed(params, tree, prompts, credit, include=None, **sizes):
    """The same through packing and the step's microbatches."""
    f = fns(**sizes)
    include = jnp.ones(TREES, bool) if include is None else include

    @jax.jit
    def run(params, tree, prompts, credit):
        bins = learner.pack(f, tree, prompts, credit, include)
        knobs = dict(temperature=jnp.float32(1), clip_low=0.2, clip_high=0.2)
        grads, (loss, _, _) = learner.gradient(f, learner.policy_objective(f, knobs), params, bins, jnp.sum(credit[2]))
        return loss, grads, bins

    return run(params, tree, prompts, credit)


@jax.jit
def spread(tree, leaf_credit, leaf_weight):
    return jax.vmap(lambda t, c, w: T.spread(t, leaf_credit=c, leaf_weight=w))(tree, leaf_credit, leaf_weight)


def lay_out(tree, prompts, credit, **sizes):
    """The bins of one shard, compiled as a whole."""
    f = fns(**sizes)
    return jax.jit(lambda *args: learner.pack(f, *args, jnp.ones(TREES, bool)))(tree, prompts, credit)


def assert_close(got, want, rtol=1e-5):
    """Relative to the largest entry of each array; a loss, whose terms of about 1 nearly cancel, to at least 0.02."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        floor = 1e-3 if np.ndim(b) else 0.02
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(floor, float(np.max(np.abs(b)))))


DEEP = {"fork": 0.9, "end": 0.02, "prune": 0.02, "roots": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, bin_tokens, bins_per_step",
    [({}, ROWS + WIDTH, 1), ({}, 64, 2), ({"fork": 0.0}, 24, 2), (DEEP, ROWS + WIDTH, 3)],
    ids=["mixed, split", "mixed", "flat", "deep, split"],
)
def test_packed_loss_and_gradient_equal_flattened_ones(optimised, params, options, bin_tokens, bins_per_step):
    tree, prompts, credit, weight = batch(bin_tokens, **options)
    want = flattened(params, tree, prompts, credit, weight)
    loss, grads, bins = packed(params, tree, prompts, spread(tree, credit, weight), bin_tokens=bin_tokens, bins_per_step=bins_per_step)
    assert_close((loss, grads), want)
    assert_close(jnp.sum(bins.weight), jnp.sum(spread(tree, credit, weight)[2]))
    if options == {"fork": 0.0}:
        assert not np.any(jax.jit(jax.vmap(lambda t: T.forks(t)[1]))(tree))
    if options == DEEP:
        written = int(jnp.sum(bins.stop > 0))
        unique = int(jnp.sum(jax.vmap(T.kept)(tree))) + int(jnp.sum(prompts.length))
        assert written > unique, "no tree was split over bins, so repeated context was not exercised"


@pytest.mark.slow
def test_the_number_of_bins_and_microbatches_leaves_the_gradient_unchanged(params):
    tree, prompts, credit, weight = batch(3)
    credit = spread(tree, credit, weight)
    _, want, first = packed(params, tree, prompts, credit)
    counts = {int(first.count[0])}
    for size, micro in ((16, 4), (200, 2)):
        _, got, bins = packed(params, tree, prompts, credit, bin_tokens=size, bins_per_step=micro)
        assert_close(got, want)
        counts.add(int(bins.count[0]))
    assert len(counts) >= 3


def test_bins_hold_each_cell_once_and_only_ancestors_are_seen():
    """Every packed token's visible set, read off [tin, stop), is its prompt and its path."""
    for seed, size in ((0, ROWS + WIDTH), (1, 20), (2, 90)):
        tree, prompts, _, _ = batch(seed)
        codes = jnp.arange(ROWS * SLOTS).reshape(ROWS, SLOTS) + 1000 * (1 + jnp.arange(TREES))[:, None, None]
        kept = jax.vmap(T.kept)(tree)
        marks = tree.replace(token=codes, logp_policy=kept.astype(jnp.float32))
        plain = prompts.replace(token=-1 - jnp.arange(TREES)[:, None] * 10 - jnp.arange(WIDTH))
        one = (kept.astype(jnp.float32),) * 3
        coded = lay_out(marks, plain, one, bin_tokens=size)
        token, stop, parent, owned = (np.asarray(x)[0] for x in (coded.token, coded.stop, coded.parent, coded.weight))
        position = np.asarray(coded.position)[0]
        seen = sorted(token[owned > 0].tolist())
        assert seen == sorted(np.asarray(codes)[np.asarray(kept)].tolist())
        paths = {}
        for b in range(TREES):
            numpy_tree = jax.tree.map(lambda x: np.asarray(x[b]), tree)
            prompt = [-1 - 10 * b - p for p in range(int(prompts.length[b]))]
            for p in range(len(prompt)):
                paths[prompt[p]] = prompt[: p + 1]
            for cells in oracles.leaf_cells(numpy_tree).values():
                path = [int(codes[b][c]) for c in cells]
                for i, code in enumerate(path):
                    paths[code] = prompt + path[: i + 1]
        for n in range(int(coded.count[0])):
            for q in np.flatnonzero(stop[n]):
                visible = [int(token[n, k]) for k in range(q + 1) if q < stop[n, k]]
                assert visible == paths[int(token[n, q])]
                assert position[n, q] == len(visible) - 1
                if len(visible) > 1:
                    assert token[n, parent[n, q]] == visible[-2]


def test_non_ancestors_have_exactly_zero_gradient(optimised, params):
    tree, prompts, credit, weight = batch(5)
    bins = lay_out(tree, prompts, spread(tree, credit, weight), bin_tokens=64)
    token, position, stop = (x[0][:1] for x in (bins.token, bins.position, bins.stop))
    module = MODEL.merge(params)

    def hidden(x):
        angles = module.angles(position, 64)
        attend = attention.packed(stop, block=16)
        block_of, layers = module.layers()
        for weights in layers:
            x, _ = block_of(weights)(x, angles, attend, None)
        return x

    jacobian = jax.jit(jax.jacobian(lambda x: jnp.sum(hidden(x), -1)[0]))(module.embed(token))[:, 0]  # [C, C, D]
    depends = np.any(np.asarray(jacobian) != 0, axis=-1)
    index = np.arange(stop.shape[1])
    allowed = (index[None] <= index[:, None]) & (index[:, None] < np.asarray(stop[0])[None])
    real = np.asarray(stop[0]) > 0
    np.testing.assert_array_equal(depends[real], allowed[real])


def test_end_of_sequence_receives_gradient(params):
    tree, prompts, _, _ = batch(7)
    end = np.asarray(tree.end == T.FINISHED) & np.asarray(jax.vmap(T.kept)(tree))
    assert end.sum() > 5 and np.all(np.asarray(tree.token)[end] == 1)
    weight = jnp.asarray(end, jnp.float32)  # credit for the end tokens alone
    _, grads, bins = packed(params, tree, prompts, (weight, 0 * weight, weight))
    assert float(jnp.sum(bins.weight)) == end.sum()
    assert float(jnp.max(jnp.abs(grads["embedding"][1]))) > 1e-4


def test_trees_left_out_and_their_place_do_not_matter(params):
    tree, prompts, credit, weight = batch(8)
    some = jnp.array([True, False, True, True, False, True])
    masked = jnp.where(some[:, None], credit, 0)
    _, want, _ = packed(params, tree, prompts, spread(tree, masked, weight))
    _, got, _ = packed(params, tree, prompts, spread(tree, masked, weight), include=some)
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["chaos", "lookahead"])
def test_cached_decoding_equals_the_full_forward(params, rule):
    """After arbitrary forks, prunes and rebirths, the sampler's log-probs are the learner's."""
    import sampler_test

    from treerl import branching, pruning, sampler

    rows, slots = 10, 5
    prompts = batch(0)[1]

    @jax.jit
    def grow(params, key):
        chaos = sampler_test.chaos(key)
        rules = dict(
            chaos=(chaos, sampler_test.chaos_prune(key)),
            lookahead=(
                branching.lookahead(tau_abs=0.05, tau_rel=0.6, share=0.8, fill_after=4, greedy=False),
                pruning.similarity(windows=(2, 4), tau_ed=0.7),
            ),
        )
        return sampler.sample(
            make_policy(MODEL, params, slots=slots, rows=rows), *rules[rule], prompts, key, slots=slots, rows=rows,
            budget=3 * rows, segment=2, lengths=(4, rows), temperature=jnp.float32(0.9), top_p=jnp.float32(1),
            eos=jnp.array([1]),
        )[:2]  # fmt: skip

    compared = restarts = 0
    for seed in range(3):
        tree, stats = grow(params, jax.random.key(seed))
        restarts += int(jnp.sum(stats.restarts))
        for b in range(TREES):
            T.check(jax.tree.map(lambda x: x[b], tree))
        ones = jnp.ones(tree.token.shape)
        bins = lay_out(tree, prompts, (ones, ones, ones), bin_tokens=rows + WIDTH, rows=rows)
        flat = jax.tree.map(lambda x: x[0], {k: v for k, v in bins.items() if k != "count"})
        module, hidden = packed_hidden(MODEL, params, flat["token"], flat["position"], flat["stop"])
        hidden = jnp.take_along_axis(hidden, flat["parent"][..., None], axis=1).reshape(-1, hidden.shape[-1])
        logp = token_logps(module, hidden, flat["token"].reshape(-1), jnp.float32(0.9), chunk=64)
        owned = np.asarray(flat["weight"]).reshape(-1) > 0
        np.testing.assert_allclose(np.asarray(logp)[owned], np.asarray(flat["logp"]).reshape(-1)[owned], atol=2e-5)
        compared += owned.sum()
    assert compared > 300 and (rule == "lookahead" or restarts > 10)


def test_chunked_log_probs_equal_whole_ones(params):
    module = MODEL.merge(params)
    hidden = jax.random.normal(jax.random.key(0), (23, 16))
    target = jnp.arange(23) % VOCAB
    whole = jax.nn.log_softmax(module.logits(hidden) / 0.7)
    for chunk in (5, 23, 100):
        logp = token_logps(module, hidden, target, 0.7, chunk=chunk)
        np.testing.assert_allclose(logp, whole[jnp.arange(23), target], atol=1e-5)


def test_windows_longer_than_the_answer_are_refused():
    config = get_config()
    config.pruning.windows = (20, 30)
    with pytest.raises(ValueError, match=r"pruning.windows=\(20, 30\) must be lengths up to sampler.answer_length=16"):
        step.make_fns(config, bare_task(), fns().mesh)


def test_a_bin_that_cannot_hold_a_path_is_refused():
    with pytest.raises(ValueError, match=r"learner.bin_tokens=10 is less than sampler.prompt_length \+ sampler.answer_length = 11"):
        packing.bin_bound(TREES, SLOTS, ROWS + WIDTH, 10)


def test_bin_bound_is_never_exceeded():
    assign = jax.jit(packing._assign, static_argnames="size")
    rng = np.random.default_rng(0)
    for _ in range(200):
        length = np.sort(rng.integers(0, 9, (4, 3)), axis=1)[:, ::-1]
        shared = np.concatenate([np.zeros((4, 1), int), np.minimum(length[:, 1:], rng.integers(0, 8, (4, 2)))], axis=1)
        shared = np.minimum(shared, np.maximum(length - 1, 0))
        prompt = rng.integers(1, 5, 4)
        size = int(rng.integers(12, 30))
        start, whole, count = assign(jnp.asarray(length), jnp.asarray(shared), jnp.asarray(prompt), size=size)
        assert int(count) <= packing.bin_bound(4, 3, 12, size)
        total = np.where(np.asarray(whole), prompt[:, None] + length, length - shared)
        first, last = np.asarray(start), np.asarray(start) + np.maximum(total, 1) - 1
        assert np.all((first // size == last // size) | (length == 0)), "a leaf straddles two bins"


def fresh(params, optimizer, reference=None):
    return TrainState(
        params=params, opt_state=optimizer.init(params), reference=reference, step=jnp.int32(0),
        memory={}, quality=None, key=jnp.zeros(2, jnp.uint32), position=jnp.int32(0), skipped=jnp.int32(0),
    )  # fmt: skip


def learned(params, kl=0.0, reference=None, epochs=1, credit_scale=1.0):
    """(state, metrics) of `learn` with plain gradient descent on one batch."""
    tree, prompts, credit, weight = batch(9)
    f = fns(bin_tokens=24, epochs=epochs)._replace(
        optimizer=optax.with_extra_args_support(optax.sgd(0.5)), kl=losses.kl_k3 if reference is not None else None
    )
    state = fresh(params, f.optimizer, reference)
    knobs = dict(temperature=jnp.float32(1), clip_low=0.2, clip_high=0.2, kl=kl)

    @jax.jit
    def run(state, tree, prompts, cells):
        logp = None if reference is None else learner.cell_logps(f, state.reference, tree, prompts, jnp.float32(1))
        return step.learn(f, state, tree, prompts, cells, jnp.sum(cells.weight), knobs, reference=logp)

    return run(state, tree, prompts, Cells(*spread(tree, credit * credit_scale, weight)))


@pytest.mark.slow
def test_kl_to_a_reference_is_added_and_vanishes_at_the_policy_itself(params):
    other = jax.tree.map(lambda p: p + 0.05, params)
    plain, _ = learned(params)
    same, metrics = learned(params, kl=3.0, reference=params)
    assert_close(same.params, plain.params)
    assert abs(float(metrics["kl"])) < 1e-6
    pulled, metrics = learned(params, kl=3.0, reference=other)
    assert float(metrics["kl"]) > 1e-4
    moved = sum(float(jnp.sum(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (pulled.params, plain.params))))
    assert moved > 1e-3
    off, _ = learned(params, kl=0.0, reference=other)
    assert_close(off.params, plain.params)


@pytest.mark.slow
def test_two_epochs_are_two_updates_on_the_same_trees(params):
    once, first = learned(params)
    want, _ = learned(once.params)
    got, metrics = learned(params, epochs=2)
    assert_close(got.params, want.params)
    assert_close(metrics["logp_drift"], first["logp_drift"])  # of the first epoch


def assert_untouched(after, before, skipped):
    """All but the count is as it was, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, after.replace(skipped=before.skipped), before)
    assert int(after.skipped) == skipped


@pytest.mark.parametrize("loss, entry", [(np.nan, 0.5), (np.inf, 0.5), (1.0, np.nan), (1.0, -np.inf)])
def test_an_update_that_is_not_finite_changes_nothing(loss, entry):
    """One entry of one array of the gradient is enough; the next good update counts from 0 again."""
    f = fns()._replace(optimizer=optax.with_extra_args_support(make_optimizer(get_config().optimizer, 10)))
    update = jax.jit(lambda *args: step.update(f, *args), donate_argnums=0)
    good = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    bad = dict(good, b=good["b"].at[2].set(entry))
    state = jax.tree.map(jnp.copy, fresh(good, f.optimizer))  # nothing shares a buffer, so that it can be donated
    for _ in range(2):  # a learning rate and moments that are not 0
        state, metrics = update(state, good, jnp.float32(1))
    assert (int(metrics["skipped"]), int(state.skipped)) == (0, 0)
    before = jax.tree.map(np.array, state)
    for count in (1, 2):
        state, metrics = update(state, bad, jnp.float32(loss))
        assert_untouched(state, before, skipped=count)
        assert int(metrics["skipped"]) == 1
    state, metrics = update(state, good, jnp.float32(1))
    assert (int(metrics["skipped"]), int(state.skipped)) == (0, 0)
    assert not np.array_equal(state.params["a"], before.params["a"])


def test_nan_credit_reaches_neither_policy_nor_optimizer(params):
    state, metrics = learned(params, epochs=2, credit_scale=np.nan)
    assert_untouched(state, fresh(params, optax.sgd(0.5)), skipped=2)
    assert int(metrics["skipped"]) == 2 and not np.isfinite(metrics["loss"])


def test_a_supervised_update_that_is_not_finite_changes_nothing(params, monkeypatch):
    f = fns(bin_tokens=24)._replace(optimizer=optax.with_extra_args_support(optax.adam(0.1)))
    state = fresh(params, f.optimizer)
    answer = jnp.ones((TREES, ROWS), jnp.int32), jnp.full(TREES, 3), jnp.ones((TREES, ROWS), bool)
    likelihood = losses.likelihood
    broken = lambda logp, bins: likelihood(logp, bins)._replace(sum=likelihood(logp, bins).sum / 0 * 0)
    monkeypatch.setattr(losses, "likelihood", broken)
    after, metrics = jax.jit(lambda *args: step.supervised_step(f, *args))(state, batch(9)[1], *answer)
    assert_untouched(after, state, skipped=1)
    assert int(metrics["skipped"]) == 1 and np.isnan(metrics["loss"])


def test_unknown_names_are_refused():
    for section, field in (
        ("advantage", "name"),
        ("branching", "rule"),
        ("pruning", "rule"),
        ("learner", "aggregation"),
        ("learner", "objective"),
        ("learner", "kl_estimate"),
        ("learner", "proximal"),
        ("learner", "forced"),
        ("learner", "importance"),
    ):
        config = get_config()
        config[section][field] = "magic"
        with pytest.raises(ValueError, match=f"{section}.{field}='magic' is unknown; known are "):
            step.make_fns(config, bare_task(), fns().mesh)


def bare_task():
    return tasks.Task(tokenizer=tasks.CharTokenizer("ab"), train=[], heldout=[], encode=None, grade=None)


def test_what_has_no_credit_need_not_be_packed(params):
    """Trimmed trees are trees, hold every cell with credit, and give the same loss and gradient."""
    tree, prompts, credit, weight = batch(11, fork=0.7)
    positive, negative, whole = spread(tree, credit, weight)
    some = jax.random.bernoulli(jax.random.key(3), 0.25, whole.shape)
    cells = jnp.where(some, positive, 0), jnp.where(some, negative, 0), whole
    used = (cells[0] != 0) | (cells[1] != 0)
    trimmed = jax.jit(jax.vmap(packing.trim))(tree, used)
    for b in range(TREES):
        one = jax.tree.map(lambda x: np.array(x[b]), trimmed)
        one.end[tuple(one.leaf[one.leaf[:, 0] >= 0].T)] = T.FINISHED
        T.check(one)
    kept, before = (np.asarray(jax.vmap(T.kept)(t)) for t in (trimmed, tree))
    assert np.all(kept[np.asarray(used)]) and kept.sum() < 0.9 * before.sum()
    ends = np.asarray(trimmed.leaf)[np.asarray(trimmed.leaf)[..., 0] >= 0]
    assert len(ends) and all(np.asarray(used)[b][tuple(cell)] for b in range(TREES) for cell in np.asarray(trimmed.leaf[b]) if cell[0] >= 0)
    total = jnp.sum(whole)

    def run(tree):
        f = fns(bin_tokens=24)
        bins = learner.pack(f, tree, prompts, cells, jnp.any(used, axis=(1, 2)))
        knobs = dict(temperature=jnp.float32(1), clip_low=0.2, clip_high=0.2)
        grads, (loss, _, _) = learner.gradient(f, learner.policy_objective(f, knobs), params, bins, total)
        return loss, grads

    assert_close(jax.jit(run)(trimmed), jax.jit(run)(tree))
