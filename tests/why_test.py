"""What pictures say of rules, against what the rules themselves saw and decided while the tree grew."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import sampler_test

from treerl import branching, pruning, sampler, tree as T
from treerl.draw import why
from treerl.types import ACTIVE, FREE

B, K, S, EOS = 16, 7, 14, (1, 3)
WINDOWS, TAU_ED, MOST = (2, 3, 4), 0.7, 2
SEEN = {"forks": [], "stops": []}  # of each iteration, see `grow`


@functools.partial(jax.jit, static_argnames=("fill_after", "windows"))
def grow(logits, key, tau_abs, tau_rel, share, greedy, *, fill_after=99, windows=WINDOWS):
    """Trees by lookahead and similarity; what both rules saw, and decided, is appended to SEEN."""
    forks = branching.lookahead(tau_abs=tau_abs, tau_rel=tau_rel, share=share, fill_after=fill_after, greedy=greedy, max_children=MOST)
    stops = pruning.similarity(windows=windows, tau_ed=TAU_ED)
    note = lambda name: lambda **found: SEEN[name].append(jax.tree.map(np.asarray, found))

    def fork(frontier):
        token, births = forks.step(frontier)
        jax.debug.callback(note("forks"), seen=frontier._replace(logits=(), iteration=()), births=births, number=frontier.iteration)
        return token, births

    def stop(memory, lines, cells):
        memory, number = memory
        reason, memory = stops.step(memory, lines, cells)
        jax.debug.callback(note("stops"), lines=lines, token=cells["token"], reason=reason, number=number)
        return reason, (memory, number + 1)

    return sampler.sample(
        sampler_test.markov(logits), forks._replace(step=fork), stops._replace(start=lambda *a: (stops.start(*a), jnp.int32(0)), step=stop),
        sampler_test.prompts(range(B)), key, slots=K, rows=S, budget=S + 5, segment=4, lengths=(S,), temperature=jnp.float32(1),
        top_p=jnp.float32(1), eos=jnp.array(EOS),
    )[:2]  # fmt: skip


def trees(seeds, **settings):
    """(tree, restarts, index in the batch, settings, logits), each with SEEN of its batch, in order."""
    for seed in seeds:
        numbers = dict(tau_abs=0.05, tau_rel=0.9, share=1.0, greedy=False) | settings
        logits = sampler_test.table(seed, peak=2.0)
        SEEN["forks"].clear(), SEEN["stops"].clear()
        tree, stats = grow(logits, jax.random.key(seed), **numbers)
        jax.effects_barrier()
        for seen in SEEN.values():
            seen.sort(key=lambda x: x["number"])
        for b in range(B):
            yield jax.tree.map(lambda x: np.asarray(x)[b], tree), int(stats.restarts[b]), b, numbers, logits


def stopped(b) -> dict:
    """(row, slot) of the end of each line that the rule stopped, the last one there: (iteration, slots it stood on, what is said of its own)."""
    found = {}
    for seen in SEEN["stops"]:
        lines = jax.tree.map(lambda x: x[b], seen["lines"])
        for k in np.flatnonzero(seen["reason"][b]):
            parent, end, birth = lines.parent[k], lines.cursor[k], lines.birth[k]
            said = lambda line: tuple(seen["token"][b][row, lines.path[line, row]] for row in range(birth, end))
            own, n = "", end - birth
            if lines.status[k] == ACTIVE and n in WINDOWS and not (lines.status[parent] != ACTIVE and lines.cursor[parent] <= end):
                distance = oracles.levenshtein(said(k), said(parent))
                if distance < TAU_ED * n:
                    own = f"similar to the line in slot {parent}: {distance} edit{'s' * (distance > 1)} in the {n} tokens since the fork, "
                    own += f"below tau_ed x {n} = {TAU_ED * n:g}"
            found[end - 1, k] = int(seen["number"]), lines.path[k, :end].tolist(), own
    return found


@pytest.mark.parametrize("settings", [{}, dict(fill_after=3), dict(share=0.6, fill_after=2), dict(greedy=True, fill_after=4)], ids=str)
def test_a_pruned_line_says_which_line_it_repeats_and_how_closely(settings):
    own = others = silent = 0
    for one, *_, b, _, _ in trees(range(4), **settings):
        truth, told = stopped(b), why.similar(one, windows=WINDOWS, tau_ed=TAU_ED, eos=np.array(EOS))
        ends = {tuple(cell) for cell in np.argwhere(one.used & (one.end == T.SIMILAR)).tolist()}
        assert set(told) <= ends <= set(truth)
        for end in ends:
            iteration, path, reason = truth[end]
            if end not in told:
                silent += 1
            elif reason:
                own += 1
                assert told[end] == reason
            else:  # it went with a line that it stood on
                others += 1
                slot, reason = re.fullmatch(r"stood on the line in slot (\d+), which was (.*)", told[end]).groups()
                assert (iteration, reason) in [(n, x) for (_, k), (n, _, x) in truth.items() if k == int(slot)]
                assert int(slot) in path[:-1]
    assert own > 20 and others > 0 and silent < 0.3 * (own + others)


def tree_of(*texts):
    """A slot for each text: "x." is x, drawn; "x2" x, forked from slot 2; "x!" x, where its line was stopped; "x " what is not used."""
    cells = {(row, k): text[2 * row : 2 * row + 2] for k, text in enumerate(texts) for row in range(len(text) // 2)}
    at = lambda of: np.array([[of(*cells.get((row, k), "  "), k) for k in range(len(texts))] for row in range(len(texts[0]) // 2)])
    parent = at(lambda x, mark, k: -1 if mark == " " else int(mark) if mark.isdigit() else k)
    parent[0] = -1
    return SimpleNamespace(
        token=at(lambda x, mark, k: ord(x)), parent=parent, used=at(lambda x, mark, k: mark != " "),
        source=at(lambda x, mark, k: T.SAMPLED if mark in ".!" else T.FORCED), end=at(lambda x, mark, k: T.SIMILAR if mark == "!" else T.RUNNING),
    )  # fmt: skip


NEAR = "similar to the line in slot {}: 1 edit in the {} tokens since the fork, below tau_ed x {} = {}"
FIRST = NEAR.format(0, 5, 5, 3.5)
WITH = "stood on the line in slot 1, which was " + FIRST


@pytest.mark.parametrize("lines, told", [
    # slot 1 repeats slot 0; slot 2 is as near to slot 1, but had ended ($) when slot 1 was stopped
    (["a.x.y.z.u.v.", "b0x.y.z.u!", "    c1z.$!"], [FIRST, WITH]),
    # slot 3 is as near to slot 2, which had ended in the window's last row, or before
    (["a.x.y.z.u.v.", "b0x.y.z.u!", "  p1q.r.$!", "    s2r.u!"], [FIRST, WITH, WITH]),
    (["a.x.y.z.u.v.", "b0x.y.z.u!", "  p1q.$!u ", "    s2t.u!"], [FIRST, WITH, WITH]),
    # a sample fills the slot that slot 2 had forked from
    (["a.x.y.z.u.v.", "h.x.y.z.u.w.", "    c1z.u!"], []),
    # slot 1, which slot 2 repeats, differs too much from slot 0 for its length
    (["a.x.y.z.u.v.", "b0k.l.m.u!", "    c1m.u!"], [NEAR.format(1, 3, 3, 2.1)]),
])  # fmt: skip
def test_what_is_not_certain_of_a_pruned_line_is_not_said(lines, told):
    found = why.similar(tree_of(*lines), windows=(3, 4, 5), tau_ed=TAU_ED, eos=np.array([ord("$")]))
    assert [words for (_, slot), words in sorted(found.items(), key=lambda x: x[0][1])] == told


def candidates(one, logits) -> dict:
    """Place -> five likeliest next tokens of each token that has a leaf below, and of the prompt."""
    kept = {None} | {cell for cells in oracles.leaf_cells(one).values() for cell in cells[:-1]}
    chances = lambda last: np.asarray(jax.nn.softmax(logits[last]))
    likely = lambda p: [(int(t), float(p[t])) for t in np.argsort(-p, kind="stable")[:5]]
    return {cell: likely(chances(2 if cell is None else one.token[cell])) for cell in kept}


FEW, FULL, NONE = "a fork needs two tokens likely enough", "no free slot", "lines here do not fork"
SETTINGS = [
    ({}, ["below tau_abs", "max_children likelier ones", FULL]), (dict(tau_abs=0.2), ["below tau_abs", FEW]),
    (dict(tau_rel=0.3), ["tau_rel or more below the likeliest", FEW]), (dict(greedy=True, tau_abs=0.1), ["below tau_abs", FULL]),
    (dict(fill_after=3), [NONE, f"{FULL}, or its line was pruned and overwritten"]), (dict(share=0.6), [NONE, FULL]), (dict(share=0.0), [NONE]),
]  # fmt: skip


@pytest.mark.parametrize("settings, often", SETTINGS, ids=str)
def test_a_token_that_was_not_taken_says_why(settings, often):
    counts = {}
    for one, restarts, b, numbers, logits in trees(range(4), **settings):
        likeliest, forks = candidates(one, logits), round(numbers["share"] * K) > 0
        bars = {name: numbers[name] for name in ("tau_abs", "tau_rel")}
        told = why.not_taken(one, likeliest, **bars, max_children=MOST, forks=forks, whole=not restarts)
        for above, pairs in likeliest.items():
            row, slot = (0, 0) if above is None else (above[0] + 1, above[1])
            taken = {int(one.token[row, k]) for k in range(K) if one.used[row, k] and (above is None or one.parent[row, k] == slot)}
            at = lambda x: x["seen"].lines.status[b, slot] == ACTIVE and x["seen"].lines.cursor[b, slot] == row
            step = [x for x in SEEN["forks"] if at(x)][-1]
            seen = jax.tree.map(lambda x: x[b], step["seen"])
            score = dict(zip(seen.best[slot].tolist(), np.exp(seen.score[slot]).tolist()))
            own = int(one.token[row, slot])
            bar = max(numbers["tau_abs"], pairs[0][1] - numbers["tau_rel"])
            passing = [t for t, p in score.items() if p > bar]
            children = [t for t in passing if t != own][:MOST] if len(passing) > 1 else []
            births = step["births"]
            born = {int(t) for t, line in zip(births.token[b], births.line[b]) if line == slot and t >= 0}
            full = np.sum((seen.lines.status == FREE) & (seen.free == 0)) <= np.sum(births.token[b] >= 0)
            for token, p in pairs:
                words = told.get(above, {}).get(token, "")
                kind = re.sub(r"=\S+", "", words)
                counts[kind] = counts.get(kind, 0) + (token not in taken)
                assert not words or token not in taken
                assert {
                    "": lambda: True,
                    "lines here do not fork": lambda: not seen.lines.may_fork[slot],
                    "below tau_abs": lambda: p <= numbers["tau_abs"],
                    "tau_rel or more below the likeliest": lambda: pairs[0][1] - p >= numbers["tau_rel"],
                    "a fork needs two tokens likely enough": lambda: passing == [token],
                    "max_children likelier ones": lambda: p > bar and token not in children,
                    "no free slot": lambda: token in children and token not in born and full,
                    "no free slot, or its line was pruned and overwritten": lambda: token in children and (full or token in born),
                }[kind](), (words, above, token)
                assert seen.lines.may_fork[slot] or token in taken or kind == "lines here do not fork"
    said = sum(counts.values()) - counts.get("", 0)
    assert said > 100 and counts.get("", 0) < 0.1 * said and set(often) <= {kind for kind, count in counts.items() if count > 5}, counts
