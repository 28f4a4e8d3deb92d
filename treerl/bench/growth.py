"""How the time of a decode step grows: with the slots of a tree, with the same lines in all, and with the rows.

Independent samples that all run to the last row, as in `bench.sampler`, prefill taken off. K = 4 ... 64 slots share
the same number of lines among fewer and fewer prompts; S = 128 ... 4,096 rows are grown at one number of slots. Programs of
1,024 rows and more run once, without a turn before that does not count: compiled ahead, they have little to start.

The figure, from a file that `launch.bench --suite=growth --out=growth.jsonl` wrote:

    python -c "import json; from treerl.bench import growth; growth.draw('growth.svg', map(json.loads, open('growth.jsonl')))"
"""

import functools

import jax
import matplotlib
from matplotlib.figure import Figure

from treerl.bench import measure, sampler, synthetic
from treerl.models.transformer import Model
from treerl.report import SVG


def defaults() -> dict:
    """Sizes for this machine: `lines` over all prompts, `slots` and `rows` that are tried, and what the other has meanwhile."""
    if measure.on_accelerator():
        return dict(
            preset="qwen2.5-1.5b", dtype="bfloat16", lines=128, prompt=256, slots=(4, 8, 16, 32, 64), rows_then=512,
            rows=(128, 256, 512, 1024, 2048, 4096), slots_then=8, segment=32, repeats=2, read_bytes=4 * 2**30,
        )  # fmt: skip
    return dict(
        preset="tiny", dtype="float32", lines=64, prompt=20, slots=(4, 8, 16), rows_then=32, rows=(16, 32, 64, 128),
        slots_then=8, segment=4, repeats=3, read_bytes=2**28,
    )  # fmt: skip


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    config = measure.model_config(sizes["preset"], dtype=sizes["dtype"], param_dtype=sizes["dtype"])
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    row = functools.partial(measure.row, "growth", shapes=sizes)
    reading, read = measure.bandwidth_programs(sizes["read_bytes"])
    bandwidth = read / min(min(t.seconds) for t in measure.alternate(reading, 3).values())
    del reading
    peak = measure.matrix_peak(sizes["dtype"])
    yield row("read_bandwidth", bandwidth / 1e9, "GB/s")
    yield row("matrix_peak", peak / 1e12, "TFLOP/s")
    points = {f"slots_{k}": (k, sizes["rows_then"]) for k in sizes["slots"]}
    points |= {f"rows_{s}": (sizes["slots_then"], s) for s in sizes["rows"]}
    done = {}
    for name, (slots, length) in points.items():
        if (slots, length) not in done:
            done[slots, length] = measured(model, params, sizes, slots, length)
        program, seconds, work = done[slots, length]
        limit, what = work.limit(bandwidth, peak)
        yield row(f"{name}.compile", program.compile_seconds, "s")
        yield row(f"{name}.peak_memory", program.peak_bytes, "bytes")
        yield row(f"{name}.step", 1e3 * seconds, "ms")
        yield row(f"{name}.tokens", sizes["lines"] / seconds, "tokens/s, without prefill")
        yield row(f"{name}.limit", 1e3 * limit, f"ms, of {what}")
        yield row(f"{name}.limit_share", limit / seconds, "of the limit")


def measured(model: Model, params, sizes: dict, slots: int, length: int):
    """(program, seconds a step, `sampler.Work` of a step) of trees of `slots` x `length`."""
    batch = sizes["lines"] // slots
    own = dict(slots=slots, rows=length, segment=sizes["segment"], lengths=(), windows=(), prompts=batch)
    prompts = synthetic.prompts(model.config.vocab, batch, sizes["prompt"])
    knobs = sampler.open_rule(slots)
    grow = measure.compiled(functools.partial(sampler.grow, "stochastic", model, own), params, prompts, knobs)
    first = measure.compiled(functools.partial(sampler.prefill, model, own), params, prompts)
    kept = {}

    def run():
        kept["tree"], kept["stats"] = grow.run(params, prompts, knobs)
        return kept["tree"]

    short = length < 1024
    turns = dict(whole=run, prefill=lambda: first.run(params, prompts))
    times = measure.alternate(turns, sizes["repeats"] if short else 1, warmup=1 if short else 0)
    tree, stats = jax.device_get((kept["tree"], kept["stats"]))
    sampler.check_ran("stochastic", stats, own)
    seconds = (times["whole"].median - times["prefill"].median) / length
    return grow._replace(run=None), seconds, sampler.work_per_step(model.config, params, tree, sizes["prompt"])


def draw(path, rows) -> None:
    """Draws the suite's rows as an SVG: ms a step over slots and over rows, and the limit of each."""
    found = {row["name"]: row["value"] for row in rows}
    with matplotlib.rc_context(SVG):
        figure = Figure(figsize=(11, 4), layout="constrained")
        for place, axis in zip(figure.subplots(1, 2), ("slots", "rows")):
            x = sorted({int(name.split(".")[0].split("_")[1]) for name in found if name.startswith(f"{axis}_")})
            for what, label in dict(step="measured", limit="limit").items():
                place.plot(x, [found[f"{axis}_{n}.{what}"] for n in x], marker="o", label=label)
            place.set_ylim(bottom=0)
            place.set_xlabel(dict(slots="slots of a tree, K", rows="rows, S")[axis])
            place.set_ylabel("ms a step")
            place.grid(alpha=0.3)
            place.legend(fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None})
