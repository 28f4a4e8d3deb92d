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

The limit of memory bandwidth is the time to read once a step all weights and every distinct key
and value that some line attends to (a shared prompt once, a shared cell once), at the bandwidth
that reading a large array reaches in the same run.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from treerl import branching, pruning
from treerl import sampler as S
from treerl.bench import measure, synthetic
from treerl.models.policy import make_policy
from treerl.models.transformer import Model


def defaults() -> dict:
    """Sizes for this machine."""
    if measure.on_accelerator():
        return dict(
            preset="qwen2.5-1.5b", dtype="bfloat16", prompts=16, slots=8, prompt=256, rows=512, segment=32,
            lengths=(), windows=(20, 30, 50), repeats=5, read_bytes=4 * 2**30,
        )  # fmt: skip
    return dict(
        preset="tiny", dtype="float32", prompts=32, slots=8, prompt=20, rows=64, segment=4,
        lengths=(), windows=(4, 6), repeats=15, read_bytes=2**28,
    )  # fmt: skip


def open_rule(slots: int) -> dict:
    """Traced numbers that fill every slot at once and prune none."""
    f32 = jnp.float32
    return dict(
        temperature=f32(1), top_p=f32(1), eos=jnp.array([-1], jnp.int32), tau_abs=f32(0), tau_rel=f32(2),
        share=f32(1), fill_after=jnp.int32(slots), greedy=jnp.bool_(False), tau_ed=f32(0),
    )  # fmt: skip


RULES = {
    "stochastic": lambda knobs, windows: (branching.stochastic(), pruning.none()),
    "lookahead": lambda knobs, windows: (
        _lookahead(knobs), pruning.similarity(windows=windows, tau_ed=knobs["tau_ed"])
    ),
    "lookahead_without_pruning": lambda knobs, windows: (_lookahead(knobs), pruning.none()),
}  # fmt: skip


def _lookahead(knobs):
    return branching.lookahead(**{k: knobs[k] for k in ("tau_abs", "tau_rel", "share", "fill_after", "greedy")})


def grow(rule, model, sizes, params, prompts, knobs):
    """Prefill and the whole loop: (Tree, Stats)."""
    branch, prune = RULES[rule](knobs, sizes["windows"])
    rows, slots = sizes["rows"], sizes["slots"]
    return S.sample(
        make_policy(model, params, slots=slots, rows=rows), branch, prune, prompts, jax.random.key(1),
        slots=slots, rows=rows, budget=rows, segment=sizes["segment"], lengths=(*sizes["lengths"], rows),
        temperature=knobs["temperature"], top_p=knobs["top_p"], eos=knobs["eos"],
    )[:2]  # fmt: skip


def prefill(model, sizes, params, prompts):
    """Prefill alone, an empty pool included."""
    return make_policy(model, params, slots=sizes["slots"], rows=sizes["rows"]).prefill(prompts.token, prompts.length)


def bytes_per_step(config, params, used, prompt: int) -> float:
    """Weights, and keys and values of prompts and of all cells above the head, mean over steps.

    used: [B, S, K] bool, the cells of trees whose cursors are all equal.
    """
    batch, rows, _ = used.shape
    above = np.cumsum(used.sum((0, 2)))  # cells of rows 0 .. s of all trees
    head = np.maximum(np.arange(rows) - 1, 0)  # row of the head at each step, its own cell included
    cells = np.where(np.arange(rows) > 0, above[head], 0)
    item = jnp.dtype(config.dtype).itemsize
    each = 2 * config.layers * config.kv_heads * config.head_dim * item
    return measure.bytes_of(params) + each * (batch * prompt + cells.mean())


def rows(*, rules=("stochastic", "lookahead"), **sizes):
    """Yields rows of the suite.

    Args:
      rules: of RULES; the first is what the others are compared with.
      **sizes: replace `defaults()`.
    """
    sizes = {**defaults(), **sizes}
    config = measure.model_config(sizes["preset"], dtype=sizes["dtype"], param_dtype=sizes["dtype"])
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = synthetic.prompts(config.vocab, sizes["prompts"], sizes["prompt"])
    knobs, batch = open_rule(sizes["slots"]), sizes["prompts"]
    row = functools.partial(measure.row, "sampler", shapes=sizes)

    programs = {}
    for rule in rules:
        programs[rule] = measure.compiled(functools.partial(grow, rule, model, sizes), params, prompts, knobs)
        yield row(f"{rule}.compile", programs[rule].compile_seconds, "s")
        yield row(f"{rule}.peak_memory", programs[rule].peak_bytes, "bytes")
    first = measure.compiled(functools.partial(prefill, model, sizes), params, prompts)
    runs = {rule: functools.partial(programs[rule].run, params, prompts, knobs) for rule in rules}
    results = {rule: jax.device_get(run()) for rule, run in runs.items()}
    for rule, (_, stats) in results.items():
        if np.any(stats.iterations != sizes["rows"]) or np.any(stats.pruned):
            raise ValueError(f"sampler suite: {rule} took {stats.iterations} steps and pruned {stats.pruned} lines.")

    reading, read = measure.bandwidth_programs(sizes["read_bytes"])
    bandwidth = read / min(min(t.seconds) for t in measure.alternate(reading, 3).values())
    yield row("read_bandwidth", bandwidth / 1e9, "GB/s")
    del reading
    turns = {**runs, "prefill": functools.partial(first.run, params, prompts)}
    times = measure.alternate(turns, sizes["repeats"])
    yield row("prefill", 1e3 * times["prefill"].median, "ms")
    start, base, live = times["prefill"].median, rules[0], {}
    for rule, (tree, stats) in results.items():
        live[rule] = stats.sampled.sum() / (batch * sizes["rows"])
        step = (times[rule].median - start) / sizes["rows"]
        limit = bytes_per_step(config, params, tree.used, sizes["prompt"]) / bandwidth
        against = lambda ratio: dict(versus=base, ratio=float(ratio)) if rule != base else {}
        yield row(f"{rule}.step", 1e3 * step, "ms", **against(times[rule].over(times[base], less=start)))
        yield row(f"{rule}.live_slots", live[rule], "slots a step and tree", **against(live[rule] / live[base]))
        yield row(f"{rule}.tokens", stats.sampled.sum() / times[rule].median, "tokens/s")
        yield row(f"{rule}.bandwidth_share", limit / step, "of the limit")
