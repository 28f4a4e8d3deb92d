"""The sampler driven by a table of known probabilities: no model, every number recomputable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from treerl import branching, nucleus, pruning, sampler, tree as T
from treerl.types import ACTIVE, FREE, Births, Branching, Policy, Prompts, Pruning, empty_lines

VOCAB, EOS = 6, 1
B, K, S = 6, 5, 12


def table(seed, peak=1.0):
    """Logits of the next token given the last: [V, V]."""
    return np.asarray(peak * np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)), np.float32)


def markov(logits):
    """A policy whose next token depends on the last one alone."""
    logits = jnp.asarray(logits)

    def prefill(token, length):
        return jnp.take_along_axis(token, length[:, None] - 1, axis=1)

    def decode(last, token, row, path, write, rows):
        return logits[jnp.where(row < 0, last, token)], last

    return Policy(prefill=prefill, decode=decode)


def prompts(index=range(B)):
    index = jnp.asarray(list(index))
    return Prompts(token=jnp.full((len(index), 3), 2), length=jnp.full(len(index), 2), index=index, data={})


@functools.partial(jax.jit, static_argnames=("rule", "prune", "windows", "segment", "lengths", "budget", "slots"))
def grow(logits, key, index, *, rule, prune="none", windows=(3,), segment=4, lengths=(S,), budget=S + 6, slots=K,
         tau_abs=0.1, tau_rel=0.4, share=1.0, fill_after=4, greedy=False, tau_ed=0.5, temperature=1.0, top_p=1.0,
         eos=(EOS,)):  # fmt: skip
    rules = {
        "stochastic": branching.stochastic,
        "lookahead": lambda: branching.lookahead(tau_abs=tau_abs, tau_rel=tau_rel, share=share, fill_after=fill_after, greedy=greedy),
        "chaos": lambda: chaos(key),
    }
    prunes = {"none": pruning.none, "similarity": lambda: pruning.similarity(windows=windows, tau_ed=tau_ed)}
    prunes["chaos"] = lambda: chaos_prune(key)
    pad = Prompts(token=jnp.full((index.shape[0], 3), 2), length=jnp.full(index.shape[0], 2), index=index, data={})
    return sampler.sample(
        markov(logits), rules[rule](), prunes[prune](), pad, key, slots=slots, rows=S, budget=budget,
        segment=segment, lengths=lengths, temperature=jnp.float32(temperature), top_p=jnp.float32(top_p),
        eos=jnp.atleast_1d(jnp.asarray(eos)),
    )[:2]  # fmt: skip


def chaos(key) -> Branching:
    """Forks, restarts at older cells and refills at random, to exercise what no rule does yet."""

    def start(batch, slots):
        first = jnp.broadcast_to(jnp.arange(slots) < 2, (batch, slots))
        return first, first

    def step(frontier):
        lines = frontier.lines
        keys = jax.random.split(jax.random.fold_in(key, frontier.iteration), 4)
        shape = lines.status.shape
        line = jax.random.randint(keys[0], shape, 0, shape[1])
        take = lambda x: jnp.take_along_axis(x, line, axis=1)
        active, cursor = take(lines.status) == ACTIVE, take(lines.cursor)
        kind = jax.random.randint(keys[1], shape, 0, 3)  # 0 nothing, 1 fork now, 2 rebirth further up
        older = jnp.floor(jax.random.uniform(keys[2], shape) * (cursor + 1)).astype(jnp.int32) - 1
        row = jnp.where(kind == 1, cursor - 1, jnp.minimum(older, cursor - 1))
        token = jnp.where(kind == 1, jax.random.randint(keys[3], shape, 2, VOCAB), -1)
        ok = (lines.status == FREE) & active & (kind > 0) & (frontier.free <= row + 1)
        none = jnp.full(shape, -1)
        births = Births(line=jnp.where(ok, line, -1), row=row, token=token, may_fork=ok)
        return none, births

    return Branching(start=start, step=step)


def chaos_prune(key):
    """Stops lines at random, descendants or not."""

    def step(memory, lines, cells):
        hit = jax.random.bernoulli(jax.random.fold_in(key, memory), 0.08, lines.status.shape)
        return jnp.where(hit & (lines.status == ACTIVE), T.SIMILAR, 0).astype(jnp.int8), memory + 1

    return Pruning(start=lambda batch, slots: jnp.int32(100), step=step)


def scripted(births, stops):
    """Rules that follow a script: slots 0 and 1 start, the rest is told.

    births: [N, 5] int, (iteration, slot, line, row, token). stops: [N, 2] int, (iteration, slot).
    """

    def start(batch, slots):
        first = jnp.broadcast_to(jnp.arange(slots) < 2, (batch, slots))
        return first, first

    def step(frontier):
        none = jnp.full_like(frontier.drawn, -1)
        line = row = token = none
        for at, slot, *what in births:
            here = (frontier.iteration == at) & (jnp.arange(none.shape[1]) == slot)
            line, row, token = (jnp.where(here, new, old) for new, old in zip(what, (line, row, token)))
        return none, Births(line=line, row=row, token=token, may_fork=line >= 0)

    def stop(iteration, lines, cells):
        reason = jnp.zeros(lines.status.shape, jnp.int8)
        for at, slot in stops:
            reason = jnp.where((iteration == at) & (jnp.arange(reason.shape[1]) == slot), T.PRUNED, reason)
        return reason.astype(jnp.int8), iteration + 1

    return Branching(start=start, step=step), Pruning(start=lambda batch, slots: jnp.int32(0), step=stop)


@functools.partial(jax.jit, static_argnames=("segment", "lengths", "budget"))
def act(logits, births, index, stops=((-1, 0),), eos=-1, segment=1, lengths=(S,), budget=2 * S):
    """Grows trees by a script, with logits that are nan where an ancestor is beyond the rows in use."""
    plain = markov(logits)

    def decode(last, token, row, path, write, rows):
        logits, last = plain.decode(last, token, row, path, write, rows)
        seen = jnp.sum(path[..., :rows] >= 0, -1) == row + 1
        return jnp.where(seen[..., None], logits, jnp.nan), last

    return sampler.sample(
        Policy(prefill=plain.prefill, decode=decode), *scripted(births, stops), prompts(index), jax.random.key(3),
        slots=4, rows=S, budget=budget, segment=segment, lengths=lengths, temperature=jnp.float32(1),
        top_p=jnp.float32(1), eos=jnp.atleast_1d(eos),
    )[:2]  # fmt: skip


def each(tree):
    return [jax.tree.map(lambda x: np.asarray(x)[b], tree) for b in range(tree.token.shape[0])]


@pytest.mark.parametrize(
    "options",
    [
        dict(rule="stochastic"),
        dict(rule="lookahead"),
        dict(rule="lookahead", prune="similarity"),
        dict(rule="lookahead", prune="similarity", share=0.6, greedy=True),
        dict(rule="chaos", prune="chaos"),
    ],
    ids=str,
)
def test_every_tree_passes_the_check_and_its_logps_are_those_of_the_table(options):
    ended = set()
    for seed in range(4):
        logits = table(seed)
        tree, stats = grow(logits, jax.random.key(seed), jnp.arange(B), temperature=0.7, **options)
        logp = np.asarray(jax.nn.log_softmax(logits / 0.7))
        for one in each(tree):
            T.check(one)
            for cells in oracles.leaf_cells(one).values():
                last = 2
                for cell in cells:
                    assert one.logp_policy[cell] == pytest.approx(logp[last, one.token[cell]], abs=1e-5)
                    p = np.exp(logp[last])
                    assert one.entropy[cell] == pytest.approx(-np.sum(p * logp[last]), abs=1e-4)
                    if one.source[cell] == T.SAMPLED:
                        assert one.logp_behavior[cell] == pytest.approx(one.logp_policy[cell], abs=1e-5)
                    last = one.token[cell]
                    assert (last == EOS) == (one.end[cell] == T.FINISHED)
            ended |= set(one.end[one.used].tolist())
        assert np.all(stats.sampled >= np.asarray(tree.used).sum((1, 2)))
    assert {T.RUNNING, T.FINISHED, T.TRUNCATED} <= ended
    if options.get("prune") in ("similarity", "chaos"):
        assert T.SIMILAR in ended


def test_chaos_reuses_columns_and_restarts_at_older_cells():
    """The random rule really exercises what the check above covers."""
    restarts = reused = 0
    for seed in range(6):
        tree, stats = grow(table(seed), jax.random.key(seed), jnp.arange(B), rule="chaos", prune="chaos", budget=3 * S)
        restarts += int(stats.restarts.sum())
        for one in each(tree):
            T.check(one)
            reused += int(np.any(one.used[1:] & ~one.used[:-1] & (one.parent[1:] >= 0)))
    assert restarts > 10 and reused > 5


def recomputed_forks(tree, logits, tau_abs, tau_rel):
    """Share of forced tokens, and whether each satisfies both thresholds from scratch."""
    p = np.asarray(jax.nn.softmax(logits))
    count = 0
    for one in each(tree):
        for row, column in np.argwhere(one.used & (one.source == T.FORCED)):
            above = one.parent[row, column]
            last = one.token[row - 1, above] if row else 2
            mine = p[last, one.token[row, column]]
            assert mine > tau_abs - 1e-5 and p[last].max() - mine < tau_rel + 1e-5
            candidates = (p[last] > tau_abs - 1e-5) & (p[last].max() - p[last] < tau_rel + 1e-5)
            assert candidates.sum() >= 2
            others = one.used[row] & (one.parent[row] == above) & (np.arange(len(one.used[row])) != column)
            assert one.token[row, column] not in one.token[row][others], "a fork repeats a sibling's token"
            count += 1
    return count


def test_every_forked_token_satisfies_both_thresholds_recomputed_from_scratch():
    count = 0
    for seed in range(6):
        for tau_abs, tau_rel in ((0.1, 0.4), (0.2, 0.1), (0.25, 0.15)):
            tree, stats = grow(
                table(seed), jax.random.key(seed), jnp.arange(B), rule="lookahead", tau_abs=tau_abs, tau_rel=tau_rel,
                temperature=0.5,
            )  # fmt: skip
            forced = recomputed_forks(tree, table(seed), tau_abs, tau_rel)
            assert forced == int(stats.forks.sum())  # nothing was pruned, so every fork is still there
            count += forced
    assert count > 50


def test_forks_are_admitted_by_descending_probability_and_capped():
    logits = np.full((VOCAB, VOCAB), -9.0, np.float32)
    logits[:, 2:] = np.log([0.4, 0.28, 0.2, 0.12])
    tree, _ = grow(logits, jax.random.key(0), jnp.arange(B), rule="lookahead", tau_abs=0.1, tau_rel=0.9, slots=4)
    for one in each(tree):
        drawn, children = one.token[0, 0], one.token[0, 1:3]
        np.testing.assert_array_equal(children, [t for t in (2, 3, 4, 5) if t != drawn][:2])  # max_children 2
        # one slot is left: of all lines' candidates at the next row the likeliest gets it
        lines = one.token[1, :3]
        assert one.token[1, 3] == (2 if np.any(lines != 2) else 3)


@pytest.mark.parametrize("change", [dict(tau_abs=1.0), dict(tau_rel=0.0), dict(share=0.0)])
def test_lookahead_that_never_forks_is_plain_sampling_token_for_token(change):
    logits = table(0)
    plain, _ = grow(logits, jax.random.key(3), jnp.arange(B), rule="stochastic")
    same, stats = grow(logits, jax.random.key(3), jnp.arange(B), rule="lookahead", prune="similarity", **change)
    assert not np.any(stats.forks)
    for field in ("token", "parent", "used", "source", "logp_policy", "logp_behavior", "leaf"):
        np.testing.assert_array_equal(plain[field], same[field], err_msg=field)


def test_greedy_line_takes_the_argmax_and_is_forced():
    logits = table(5)
    tree, _ = grow(logits, jax.random.key(0), jnp.arange(B), rule="lookahead", greedy=True, tau_abs=1.0, fill_after=99)
    for one in each(tree):
        last = 2
        for row in range(one.leaf[0, 0] + 1):
            assert one.token[row, 0] == np.argmax(logits[last]) and one.source[row, 0] == T.FORCED
            assert one.logp_behavior[row, 0] == 0 and one.logp_policy[row, 0] < 0
            last = one.token[row, 0]


@pytest.mark.slow
def test_trees_do_not_depend_on_their_place_or_neighbours():
    whole, _ = grow(table(1), jax.random.key(7), jnp.array([4, 9, 2, 7, 1, 3]), rule="lookahead", prune="similarity")
    part, _ = grow(table(1), jax.random.key(7), jnp.array([7, 4]), rule="lookahead", prune="similarity")
    for here, there in ((0, 3), (1, 0)):
        for field in ("token", "parent", "leaf", "logp_policy"):
            np.testing.assert_array_equal(part[field][here], whole[field][there])


@pytest.mark.slow
def test_the_same_prompt_twice_gives_different_trees():
    tree, _ = grow(table(1), jax.random.key(7), jnp.array([0, 1]), rule="lookahead")
    assert np.any(tree.token[0] != tree.token[1])
    plain, _ = grow(table(1), jax.random.key(7), jnp.array([0, 1]), rule="stochastic")
    assert len({tuple(np.asarray(plain.token[0, :, k])) for k in range(K)}) > 1, "slots repeat each other"


@pytest.mark.slow
@pytest.mark.parametrize("lengths, segment", [((S,), 3), ((4, 8, S), 4), ((6, S), 2)])
def test_segments_and_row_bounds_change_nothing(lengths, segment):
    want, _ = grow(table(2), jax.random.key(0), jnp.arange(B), rule="lookahead", budget=2 * S)
    got, _ = grow(table(2), jax.random.key(0), jnp.arange(B), rule="lookahead", lengths=lengths, segment=segment, budget=2 * S)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_lengths_must_end_with_the_rows():
    with pytest.raises(ValueError, match=r"sampler.lengths=\(4,\) must ascend and end with the rows, 12"):
        grow(table(2), jax.random.key(0), jnp.arange(B), rule="stochastic", lengths=(4,))


def test_a_line_that_outlasts_the_budget_is_cut_and_no_leaf():
    tree, _ = grow(table(0), jax.random.key(0), jnp.arange(B), rule="stochastic", budget=8, eos=(-1,))
    assert np.all(tree.leaf == -1) and np.all(np.asarray(tree.end)[:, 7] == T.CUT)


@pytest.mark.slow
def test_empty_slots_are_filled_from_the_prompt_after_fill_after_iterations():
    """Fills start at that iteration, do not fork, and an exact budget lets them reach the last row."""
    uniform = np.zeros((VOCAB, VOCAB), np.float32)  # every token is a candidate wherever forking is allowed
    for late in (1, 4):
        no_forks, stats = grow(
            uniform, jax.random.key(0), jnp.arange(B), rule="lookahead", tau_abs=1.0, eos=(-1,), fill_after=late,
            budget=S + late + 1, segment=1,
        )  # fmt: skip
        assert np.all(no_forks.leaf[..., 0] == S - 1) and np.all(stats.restarts == K - 1)
        assert np.all(stats.iterations == S + late + 1)
        short, _ = grow(
            uniform, jax.random.key(0), jnp.arange(B), rule="lookahead", tau_abs=1.0, eos=(-1,), fill_after=late,
            budget=S + late, segment=1,
        )  # fmt: skip
        assert np.all(short.leaf[:, 1:, 0] == -1) and np.all(short.leaf[:, 0, 0] == S - 1)
    # with share 0.4 two slots grow a tree: one fork fills them, and the plain lines never fork
    mixed, stats = grow(uniform, jax.random.key(0), jnp.arange(B), rule="lookahead", share=0.4, tau_abs=0.0, tau_rel=2.0, eos=(-1,))
    assert np.all(stats.forks == 1) and np.all(np.asarray(mixed.parent)[:, 0] == -1)
    # after the prompt comes 3 and after 3 anything: the main line forks twice at row 1, the two slots
    # left are filled, and what pruned children free later goes to forks of other lines than the fills
    logits = uniform.copy()
    logits[:, 2], logits[2, 3] = -50.0, 50.0
    logits[4, [0, 1, 5]] = -50.0  # likelier candidates after 4, so that a fill would be admitted first
    tree, stats = grow(
        logits, jax.random.key(0), jnp.arange(B), rule="lookahead", prune="similarity", tau_abs=0.01, tau_rel=0.9,
        tau_ed=9.0, windows=(3,), eos=(-1,), fill_after=1, budget=2 * S,
    )  # fmt: skip
    reused = 0
    for one in each(tree):
        fills = [k for k in range(1, K) if one.used[0, k]]
        assert len(fills) >= 2 and not np.any(one.source[:, fills] == T.FORCED)
        forced = one.used & (one.source == T.FORCED)
        assert not np.any(np.isin(one.parent[forced], fills))
        reused += np.sum(forced[3:])
    assert reused > 0 and np.all(stats.restarts >= 2)


@pytest.mark.slow
def test_a_line_reborn_from_a_finished_one_sees_all_its_ancestors():
    """Nothing runs when slot 2 is born at row 8 of a line that is DONE: the rows of its path count, not of runners."""
    births = jnp.array([[S, 2, 0, 8, -1]])
    want, _ = act(table(0), births, (0, 1))
    got, _ = act(table(0), births, (0, 1), segment=4, lengths=(4, 8, S))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for one in each(got):
        T.check(one)
        assert one.leaf[2].tolist() == [S - 1, 2] and one.parent[9, 2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("line", [0, 2], ids=["of another column", "of its own column"])
@pytest.mark.parametrize("pruned", [False, True], ids=["cut", "pruned"])
def test_a_newborn_that_has_drawn_nothing_marks_no_cell(line, pruned):
    """Slot 2 forks from slot 1, which is pruned and reborn at row 3, where slot 2 stands on its column."""
    births = jnp.array([[4, 2, 1, 3, 2], [6, 1, line, 3, -1]])
    stops = jnp.array([[5, 1], [6, 1]])[: 1 + pruned]
    # the loop goes on to the end of the others, unless the budget cuts the newborn at once
    cut, stats = act(table(0), births, (0,), stops=stops, budget=2 * S if pruned else 7)
    (one,) = each(cut)
    assert stats.restarts[0] == 1 and stats.pruned[0] == 1 + pruned and one.token[4, 2] == 2
    assert one.end[3, 1] == T.RUNNING
    T.check(one)


@pytest.mark.slow
@pytest.mark.parametrize("segment", [1, 4])
def test_a_rule_on_a_timer_does_nothing_to_a_tree_that_is_over(segment):
    """A tree is stepped while others run; what the rules do to it then it would not have got alone."""
    births, stops = jnp.array([[6, 2, 2, -1, -1], [6, 3, 0, 0, -1]]), jnp.array([[7, 0]])
    logits = np.zeros((VOCAB, VOCAB))
    logits[:, EOS] = 1.0
    whole, stats = act(logits, births, tuple(range(8)), stops=stops, eos=EOS, segment=segment)
    alone = [act(logits, births, (i,), stops=stops, eos=EOS, segment=segment) for i in range(8)]
    born = 0
    for i, (tree, own) in enumerate(alone):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[i]), tree, whole)
        assert (own.restarts[0], own.pruned[0]) == (stats.restarts[i], stats.pruned[i])
        born += int(own.restarts[0] > 0)
    assert 0 < born < 8


@pytest.mark.parametrize(
    "birth, accepted",
    [
        ((2, 2, 1, 1, 3), True),  # a forced token at the head
        ((2, 2, 1, 0, 3), False),  # at another cell: its log-prob would be the head's
        ((2, 2, 1, -1, 3), False),
        ((2, 2, 1, 0, -1), True),  # there the newborn decodes and draws
        ((2, 2, 1, 2, -1), False),  # below the head is nothing to stand on
        ((2, 2, 2, -1, -1), True),  # the prompt is nobody's, the line means nothing
        ((2, 2, 3, 0, -1), False),  # a FREE line has no cells
        ((2, 2, 3, -1, 3), False),  # and no logits
        ((5, 2, 0, 4, -1), False),  # below the end of a finished line nothing goes on
        ((5, 2, 0, 4, 3), False),
        ((5, 2, 0, 3, -1), True),
    ],
    ids=str,
)
def test_only_births_that_mean_something_are_accepted(birth, accepted):
    """Every line says 3, 4, 5, 0, end; a birth is asked for at iteration 2 or 5."""
    chain = np.full((VOCAB, VOCAB), -30.0, np.float32)
    chain[[2, 3, 4, 5, 0], [3, 4, 5, 0, EOS]] = 9.0
    tree, _ = act(chain, jnp.array([birth]), (0,), eos=EOS)
    (one,) = each(tree)
    T.check(one)
    assert np.any(one.used[:, 2]) == accepted
    if accepted and birth[-1] >= 0:
        assert one.logp_policy[2, 2] == pytest.approx(-39.0, abs=1e-3)


def test_samples_follow_the_table():
    logits = table(3)
    tree, _ = grow(logits, jax.random.key(0), jnp.arange(400), rule="stochastic", eos=(-1,))
    pairs = np.zeros((VOCAB, VOCAB))
    token = np.asarray(tree.token)
    np.add.at(pairs, (token[:, :-1].ravel(), token[:, 1:].ravel()), 1)
    expected = np.asarray(jax.nn.softmax(logits)) * pairs.sum(1, keepdims=True)
    chi2 = np.sum((pairs - expected) ** 2 / expected)
    assert chi2 < 60  # 30 degrees of freedom: p < 1e-3 above


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_nucleus_keeps_the_smallest_set_of_that_mass(top_p):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(2 * rng.normal(size=(50, 40)), jnp.float32)
    got = np.asarray(logits >= nucleus.nucleus(logits, jnp.float32(0.8), jnp.float32(top_p)))
    p = np.asarray(jax.nn.softmax(logits / 0.8))
    for mine, full in zip(got, p):
        order = np.argsort(-full)
        keep = order[: np.searchsorted(np.cumsum(full[order]), top_p) + 1]
        np.testing.assert_array_equal(mine, np.isin(np.arange(40), keep))


@pytest.mark.slow
def test_behaviour_logp_is_of_the_truncated_distribution():
    tree, _ = grow(table(0), jax.random.key(0), jnp.arange(B), rule="stochastic", top_p=0.6, temperature=0.8)
    for one in each(tree):
        for cells in oracles.leaf_cells(one).values():
            for cell in cells:
                last = 2 if cell[0] == 0 else one.token[cell[0] - 1, one.parent[cell]]
                logits = jnp.asarray(table(0)[last])
                lowest = nucleus.nucleus(logits, jnp.float32(0.8), jnp.float32(0.6))
                kept = np.where(logits >= lowest, np.exp(logits / 0.8), 0)
                want = kept[one.token[cell]] / kept.sum()
                assert np.exp(one.logp_behavior[cell]) == pytest.approx(want, abs=1e-4) and want > 0
    assert np.any(tree.logp_behavior > tree.logp_policy + 1e-3)


def test_draw_inverts_the_sum_and_never_picks_weight_zero():
    rng = np.random.default_rng(0)
    weight = rng.random((200, 37)).astype(np.float32) * (rng.random((200, 37)) < 0.3)
    weight[:, 5] += 1e-3
    uniform = np.concatenate([rng.random(190), np.zeros(5), np.full(5, 1 - 2**-24)]).astype(np.float32)
    drawn = nucleus.draw(jnp.log(weight), jnp.float32(1), jnp.float32(1), jnp.asarray(uniform))
    got = np.asarray(drawn.token)
    total = np.cumsum(weight.astype(np.float64), axis=1)
    want = (total <= (uniform * total[:, -1])[:, None]).sum(1)
    assert np.all(weight[np.arange(200), got] > 0)
    assert np.mean(got == want) > 0.97  # the rest differ by rounding at a boundary


@pytest.mark.slow
def test_empty_lines_hold_nothing():
    lines = empty_lines(2, 3, 4)
    assert np.all(lines.status == FREE) and np.all(lines.path == -1) and np.all(lines.parent == -1)
    assert lines.path.shape == (2, 3, 4) and lines.key.shape == (2, 3, 2) and not np.any(lines.may_fork)
    np.testing.assert_array_equal(sampler._free_from(lines), np.zeros((2, 3)))
