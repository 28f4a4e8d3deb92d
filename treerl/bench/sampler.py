"""Time per decode step: lookahead against independent samples, at equal live slots.

What a fair comparison needs, and how it is had here:
  - the same number of decode steps: no end-of-sequence id, so every line runs to the last row;
  - the same number of live slots at every step: with tau_abs = 0 and tau_rel > 1 every token is
    a candidate, so one line with two children a fork fills 8 slots in its first two steps, all
    cursors being equal from then on. The missing tokens (5 of 8 x rows) are reported as live
    slots a step, for both rules;
  - the rule at work at every step: the fork test over the vocabulary, the search for children,
    the order of admission and the edit distance are computed whether or not a slot is free. With
    tau_ed = 0 every comparison is made and none prunes;
  - no luck of the clock: both programs, and prefill alone, run in turns in one process, and the
    time of a step is (median of the whole - median of prefill) / steps. The ratio is the median
    over turns of the ratio within a turn.
A full batch of slots is where lookahead costs most: what it saves (decoding one line instead of
K before it forks, freeing slots by pruning) is the learner's and the refill's gain, not counted.

`pruned` draws independent samples until each has `detection` tokens, scores them all once by a quality head and
stops half of each tree; the others go on in a pool of half as many slots (`survival.balance`, `treerl.compaction`).

The limit of a step is the larger of two times, each of its mean over the steps: to read all weights and every
distinct key and value that some line attends to (a shared prompt once, a shared cell once), at the bandwidth that
reading a large array reaches in the same run; and to compute 2 operations a line and parameter of the matrix
products, and the scores and sums of attention, at the speed of a large matrix product in the same run.

`stochastic_int8` reads its largest weights in 8 bits, where the kernels for it are; its limit is still that of all bits.

Peers (see `bench.peers`) have no time without prefill that could be taken apart fairly, so `call` rows compare whole
calls, prefill included on both sides, in ms per new token of a line.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from treerl import branching, pruning, sampler as S, survival, tree as T
from treerl.bench import measure, peers, shapes, synthetic
from treerl.models.policy import make_policy, packed_hidden, token_logps
from treerl.models.quality import QualityHead
from treerl.models.transformer import Model


def defaults(shape: str | None = None) -> dict:
    """Sizes of a shape (see `shapes`); without one, A on an accelerator and a small one on a CPU."""
    if shape is not None or measure.on_accelerator():
        return shapes.sizes(shape or "A", segment=32, lengths=(), windows=(20, 30, 50), detection=128, repeats=5, read_bytes=4 * 2**30)
    return dict(
        preset="tiny", dtype="float32", prompts=32, slots=8, prompt=20, rows=64, segment=4,
        lengths=(), windows=(4, 6), detection=16, repeats=15, read_bytes=2**28,
    )  # fmt: skip


def open_rule(slots: int) -> dict:
    """Traced numbers that fill every slot at once and prune none."""
    f32 = jnp.float32
    return dict(
        temperature=f32(1), top_p=f32(1), eos=jnp.array([-1], jnp.int32), tau_abs=f32(0), tau_rel=f32(2),
        share=f32(1), fill_after=jnp.int32(slots), greedy=jnp.bool_(False), tau_ed=f32(0),
    )  # fmt: skip


class Chosen(NamedTuple):
    """How a rule grows trees."""

    branching: object
    pruning: object
    arguments: dict = {}  # more of `sampler.sample`
    policy: dict = {}  # more of `make_policy`


def _lookahead(knobs):
    return branching.lookahead(**{k: knobs[k] for k in ("tau_abs", "tau_rel", "share", "fill_after", "greedy")})


def _similar(knobs, sizes, width):
    return Chosen(_lookahead(knobs), pruning.similarity(windows=sizes["windows"], tau_ed=knobs["tau_ed"]))


def survivors(slots: int) -> int:
    """Lines of a tree that `pruned` lets go on."""
    return max(1, slots // 2)


def head(width: int) -> QualityHead:
    """What `pruned` scores lines with."""
    return QualityHead(width, 64)


def _pruned(knobs, sizes, width):
    def judge(hidden):
        score = head(width).score(knobs["head"], hidden)
        return score, survival.posterior(knobs["table"], score)

    columns = survivors(sizes["slots"])
    choose = functools.partial(survival.balance, kappa=columns / sizes["slots"], rho=0.5, least=1)
    rule = pruning.survival(judge, choose, detection=sizes["detection"], columns=columns, rho=0.5, warm=jnp.bool_(False))
    return Chosen(branching.stochastic(), rule, dict(review_at=sizes["detection"], columns=columns))


RULES = {
    "stochastic": lambda *_: Chosen(branching.stochastic(), pruning.none()),
    "stochastic_int8": lambda *_: Chosen(branching.stochastic(), pruning.none(), policy=dict(weight_dtype="int8")),
    "lookahead": _similar,
    "pruned": _pruned,
    "lookahead_without_pruning": lambda knobs, *_: Chosen(_lookahead(knobs), pruning.none()),
}


def grow(rule, model, sizes, params, prompts, knobs):
    """Prefill and the whole loop: (Tree, Stats)."""
    chosen = RULES[rule](knobs, sizes, model.config.width)
    rows, slots = sizes["rows"], sizes["slots"]
    return S.sample(
        make_policy(model, params, slots=slots, rows=rows, **chosen.policy), chosen.branching, chosen.pruning, prompts, jax.random.key(1),
        slots=slots, rows=rows, budget=rows, segment=sizes["segment"], lengths=(*sizes["lengths"], rows),
        temperature=knobs["temperature"], top_p=knobs["top_p"], eos=knobs["eos"], **chosen.arguments,
    )[:2]  # fmt: skip


def prefill(model, sizes, params, prompts):
    """Prefill alone, an empty pool included."""
    return make_policy(model, params, slots=sizes["slots"], rows=sizes["rows"]).prefill(prompts.token, prompts.length)


def logp_difference(model, params, prompts, tree: T.Tree, most: int = 4) -> float:
    """Mean absolute difference, in nats, of the sampler's log-probs from those of a forward pass over whole rows.

    Of the first `most` trees of independent samples that run to the last row.
    """
    batch, (width, slots) = min(most, tree.token.shape[0]), (prompts.token.shape[1], tree.token.shape[2])
    answer = jnp.swapaxes(tree.token[:batch], 1, 2)
    token = jnp.concatenate([jnp.repeat(prompts.token[:batch, None], slots, axis=1), answer], axis=-1).reshape(batch * slots, -1)

    def score(params):
        position = jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape)
        module, hidden = packed_hidden(model, params, token, position, jnp.full_like(token, token.shape[1]), remat="layers")
        hidden = hidden[:, width - 1 : -1].reshape(-1, hidden.shape[-1])
        return token_logps(module, hidden, token[:, width:].reshape(-1), jnp.float32(1), chunk=1024)

    wanted = jax.jit(score)(params).reshape(answer.shape)
    return float(jnp.mean(jnp.abs(wanted - jnp.swapaxes(tree.logp_policy[:batch], 1, 2))))


class Work(NamedTuple):
    """What a decode step cannot do without, mean over the steps."""

    bytes: float  # weights, and keys and values that some line attends to
    flops: float  # of the products of all lines, and of their attention

    def limit(self, bandwidth: float, peak: float) -> tuple[float, str]:
        """(seconds, what sets them) at bytes a second and operations a second."""
        return max((self.bytes / bandwidth, "bytes"), (self.flops / peak, "arithmetic"))


def work_per_step(config, params, tree: T.Tree, prompt: int) -> Work:
    """The work of a step that grew these trees, whose running lines all had the same cursor.

    Args:
      tree: NumPy, [B, S, K]. prompt: tokens of each, all of them seen by every line.
    """
    used, parent = np.asarray(tree.used), np.asarray(tree.parent)
    batch, rows, slots = used.shape
    row, trees = np.arange(rows)[:, None], np.arange(batch)[:, None]
    last = np.where(used, row, 0)  # the last row below each cell: until it is written, the cell is read once a step
    for s in range(rows - 1, 0, -1):
        np.maximum.at(last[:, s - 1], (trees, np.maximum(parent[:, s], 0)), np.where(used[:, s], last[:, s], 0))
    cells = np.sum(np.where(used, last - row, 0)) / rows
    lines, keys = used.sum() / rows, np.sum(used * (prompt + row)) / rows
    item = jnp.dtype(config.dtype).itemsize
    each = 2 * config.layers * config.kv_heads * config.head_dim * item
    weights = measure.bytes_of(params) - (0 if config.tied else params["embedding"].nbytes)  # of which few rows are read
    scores = 4 * config.layers * config.heads * config.head_dim  # a query times a key, and a weight times a value
    return Work(weights + each * (batch * prompt + cells), 2 * measure.product_parameters(config) * lines + scores * keys)


def check_ran(rule: str, stats, sizes: dict) -> None:
    """Raises ValueError where a rule stopped early or pruned other lines than it is meant to."""
    dropped = sizes["slots"] - survivors(sizes["slots"]) if rule == "pruned" else 0
    if np.any(stats.iterations != sizes["rows"]) or np.any(stats.pruned != dropped):
        raise ValueError(f"sampler suite: {rule} took {stats.iterations} steps and pruned {stats.pruned} lines.")


def make_knobs(config, slots: int) -> dict:
    """Traced numbers of every rule."""
    return open_rule(slots) | dict(head=head(config.width).init(jax.random.key(2)), table=survival.start_calibration())


def rows(*, rules=None, shape=None, beside=False, outside=None, **sizes):
    """Yields rows of the suite.

    Args:
      rules: of RULES; the first is what the others are compared with. None: all that differ here.
      shape: see `defaults`. beside: run peers in turns with these programs. outside: what `peers.outside` found.
      **sizes: replace `defaults()`.
    """
    sizes = {**defaults(shape), **sizes}
    rules = rules or ("stochastic", "lookahead", "pruned", *["stochastic_int8"] * measure.on_accelerator())
    config = measure.model_config(sizes["preset"], dtype=sizes["dtype"], param_dtype=sizes["dtype"])
    model, batch, base = Model(config), sizes["prompts"], rules[0]
    prompts = synthetic.prompts(config.vocab, batch, sizes["prompt"])
    row = functools.partial(measure.row, "sampler", shapes=sizes)
    # first: what it needs at once is most of a device's memory, and that it is not enough is no accident
    peer = peers.tunix(config, np.asarray(prompts.token), slots=sizes["slots"], rows=sizes["rows"]) if beside else None
    params = jax.jit(model.init)(jax.random.key(0))
    knobs = make_knobs(config, sizes["slots"])

    programs = {}
    for rule in rules:
        programs[rule] = measure.compiled(functools.partial(grow, rule, model, sizes), params, prompts, knobs)
        yield row(f"{rule}.compile", programs[rule].compile_seconds, "s")
        yield row(f"{rule}.peak_memory", programs[rule].peak_bytes, "bytes")
    first = measure.compiled(functools.partial(prefill, model, sizes), params, prompts)
    runs = {rule: functools.partial(programs[rule].run, params, prompts, knobs) for rule in rules}
    results = {rule: jax.device_get(run()) for rule, run in runs.items()}
    for rule, (_, stats) in results.items():
        check_ran(rule, stats, sizes)

    reading, read = measure.bandwidth_programs(sizes["read_bytes"])
    bandwidth = read / min(min(t.seconds) for t in measure.alternate(reading, 3).values())
    yield row("read_bandwidth", bandwidth / 1e9, "GB/s")
    del reading
    peak = measure.matrix_peak(sizes["dtype"])
    yield row("matrix_peak", peak / 1e12, "TFLOP/s")
    turns = {**runs, "prefill": functools.partial(first.run, params, prompts)}
    own = base  # the program that the peer is compared with
    if peer is not None:
        turns["tunix"] = peer.call
        if peer.prompt < sizes["prompt"]:  # it holds no more: its own comparison, at the prompts that it holds
            own, cut = (
                f"{base}_prompt_{peer.prompt}",
                prompts.replace(token=prompts.token[:, : peer.prompt], length=jnp.full((batch,), peer.prompt)),
            )
            short = measure.compiled(functools.partial(grow, base, model, sizes), params, cut, knobs)
            turns[own] = functools.partial(short.run, params, cut, knobs)
    times = measure.alternate(turns, sizes["repeats"])
    yield row("prefill", 1e3 * times["prefill"].median, "ms")
    start, live = times["prefill"].median, {}
    for rule, (tree, stats) in results.items():
        live[rule] = stats.sampled.sum() / (batch * sizes["rows"])
        step = (times[rule].median - start) / sizes["rows"]
        limit, what = work_per_step(config, params, tree, sizes["prompt"]).limit(bandwidth, peak)
        against = lambda ratio: dict(versus=base, ratio=float(ratio)) if rule != base else {}
        yield row(f"{rule}.step", 1e3 * step, "ms", **against(times[rule].over(times[base], less=start)))
        yield row(f"{rule}.live_slots", live[rule], "slots a step and tree", **against(live[rule] / live[base]))
        yield row(f"{rule}.tokens", stats.sampled.sum() / times[rule].median, "tokens/s")
        yield row(f"{rule}.limit", 1e3 * limit, f"ms, of {what}")
        yield row(f"{rule}.limit_share", limit / step, "of the limit")
        if rule.startswith("stochastic"):
            apart = logp_difference(model, params, prompts, jax.tree.map(jnp.asarray, tree))
            yield row(f"{rule}.logp_difference", apart, "nats, mean, from a forward pass")
    yield from peer_rows(row, sizes, times, base, own, peer, peers.matching(outside, sizes))


def peer_rows(row, sizes: dict, times: dict, base: str, own: str, peer, outside: dict):
    """Yields whole calls, prefill included: of `base`, and of what others offer beside it.

    Args:
      own: the program that `peer`, timed in the same turns as "tunix", is compared with. outside: see `peers.matching`.
    """
    new, lines = sizes["rows"], sizes["prompts"] * sizes["slots"]
    call = lambda name, time, **against: row(
        f"{name}.call", 1e3 * time.median / new, "ms a new token of a line, prefill included", **against
    )
    yield call(base, times[base])
    if own != base:
        yield call(own, times[own])
    found = {name: (other, other.times, base, other.times.median / times[base].median) for name, other in outside.items()}
    if peer is not None:
        found["tunix"] = (peer, times["tunix"], own, times["tunix"].over(times[own]))
    for name, (other, time, versus, ratio) in found.items():
        yield row(f"{name}.first_call", other.first_seconds, "s, compilation included")
        if other.peak_bytes:
            yield row(f"{name}.peak_memory", other.peak_bytes, "bytes")
        yield call(name, time, versus=f"{versus}.call", ratio=ratio)
        yield row(f"{name}.tokens", lines * new / time.median, "tokens/s")
