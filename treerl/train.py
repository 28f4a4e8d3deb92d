"""The host loop: signals, warm start, training, checkpoints, and the report at the end."""
import contextlib
import functools
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from treerl import draw, events, masked, metrics, profiling, report, sharding
from treerl import prompts as P
from treerl import step as S
from treerl.checkpoint import Checkpoints
from treerl.errors import UserError, writing
from treerl.experiment import Experiment
from treerl.models import weights
from treerl.optimizer import make_optimizer
from treerl.workdir import claim, write_config

REFUSED = "make room or allow it, and the same command goes on from the last checkpoint."


class Interrupted(KeyboardInterrupt):
    """A signal ended a run between two steps; the text says what was saved and how to go on."""


class Diverged(UserError):
    """Too many updates in a row were skipped; the text says which field and what to look at."""


@contextlib.contextmanager
def first_signal():
    """Turns the first SIGINT or SIGTERM into an entry of the list it yields; a second one acts as it did before.

    Outside the main thread, which alone may set handlers, the list stays empty.
    """
    caught, before = [], {}

    def restore():
        while before:
            signal.signal(*before.popitem())

    def note(number, _):
        restore()
        caught.append(signal.Signals(number).name)
        os.write(2, f"\n{caught[0]}: finishing what is under way; a second one ends at once.\n".encode())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as nohup and the like wish
                before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def first_examples(experiment: Experiment) -> list[dict]:
    """The training examples that the warm start may see."""
    train = experiment.task.train
    return [train[i] for i in range(min(experiment.config.warm_start.examples, len(train)))]


def check_warm_start(experiment: Experiment) -> None:
    """Raises UserError where a batch does not divide, or a prompt or answer is too long."""
    config, shards = experiment.config, sharding.tree_shards(experiment.mesh)
    if not config.warm_start.steps:
        return
    if config.warm_start.batch % shards:
        raise UserError(
            f"warm_start.batch={config.warm_start.batch} does not divide over mesh.data x mesh.fsdp = {shards} shards; "
            "make it a multiple."
        )
    examples = first_examples(experiment)
    P.encode(experiment.task, examples, np.arange(len(examples)), config.sampler.prompt_length)
    P.encode_answers(experiment.task, examples, config.sampler.answer_length)


def check_start(experiment: Experiment) -> None:
    """Raises UserError where what a new run will read cannot work: published weights, and every prompt up to its end.

    A prompt that is too long would end the run when its turn comes, and its workdir keeps sampler.prompt_length.
    """
    if experiment.folder:
        weights.check(experiment.folder, experiment.fns.model.plain)
    config, stream = experiment.config, experiment.stream()
    count, batch = min(config.steps * config.sampler.prompts, len(experiment.task.train)), config.sampler.prompts
    if config.task.name == "reasoning_gym":  # questions are made when they are asked for, some in 50 ms
        count = min(count, 256)
    for start in range(0, count, batch):
        examples, index = stream.examples(start, min(batch, count - start))
        P.encode(experiment.task, examples, index, config.sampler.prompt_length)


def compile_step(experiment: Experiment) -> None:
    """Compiles the training step and prints the memory it takes. Raises UserError where that is not there."""
    examples, index = experiment.stream().examples(0, experiment.config.sampler.prompts)
    plan = experiment.compile_step(experiment.state_shape(), experiment.prompts(examples, index))
    tqdm.write(f"memory of a step: {plan}", file=sys.stderr)  # not into a bar
    profiling.check_memory(plan)


def stop_if_diverged(config: ConfigDict, state, moment: str, advice: str) -> None:
    """Raises Diverged if more updates were skipped in a row than learner.max_skipped."""
    skipped, limit = int(state.skipped), config.learner.max_skipped
    if skipped > limit:
        raise Diverged(
            f"{moment}: loss or gradient was not finite in {skipped} updates in a row, more than "
            f"learner.max_skipped={limit}; {advice}"
        )


def warm_start(experiment: Experiment, state, progress, caught=()):
    """Supervised learning on a small fixed set of solutions, until held-out pass@1 stops rising.

    Returns (state with the best parameters seen and a fresh optimizer, list of dicts of
    step, loss and pass@k). Raises Interrupted once `caught` names a signal, and Diverged.
    """
    config = experiment.config.warm_start
    if not config.steps:
        return state, []
    optimizer = ConfigDict(dict(experiment.config.optimizer, learning_rate=config.learning_rate, schedule="constant"))
    fns, model = experiment.fns._replace(optimizer=make_optimizer(optimizer, config.steps)), experiment.fns.model
    shardings = S.state_shardings(fns)
    update = jax.jit(
        functools.partial(S.supervised_step, fns),
        in_shardings=(shardings, *[experiment.trees] * 3),
        out_shardings=(shardings, sharding.replicated(experiment.mesh)),
        donate_argnums=0,
    )
    state = jax.jit(functools.partial(S.restart, fns), out_shardings=shardings, donate_argnums=0)(state)
    stream = P.Stream(first_examples(experiment), experiment.config.seed)
    curve, best, best_params, since, losses = [], -1.0, None, 0, []
    bar = tqdm(range(1, config.steps + 1), desc="warm start", disable=not progress)
    for number in bar:
        if caught:
            bar.close()
            raise Interrupted(
                f"{caught[0]}: stopped in the warm start, of which nothing is saved; "
                "the same command starts it again, with the same numbers."
            )
        examples, index = stream.examples((number - 1) * config.batch, config.batch)
        answer = P.encode_answers(experiment.task, examples, experiment.config.sampler.answer_length)
        state, values = update(state, experiment.prompts(examples, index), *P.to_device(answer, experiment.trees))
        losses.append(values["loss"])
        if number % config.eval_every == 0 or number == config.steps:
            stop_if_diverged(
                experiment.config, state, f"warm start, update {number}",
                "lower warm_start.learning_rate, or look for weights or examples that make a nan.",
            )  # fmt: skip
            scores = experiment.evaluate(state)
            loss = float(np.mean(jax.device_get(losses)))
            curve.append(dict(step=number, loss=loss if np.isfinite(loss) else None, **scores))
            losses, since = [], since + 1
            if scores["pass@1"] > best:
                best, since = scores["pass@1"], 0
                best_params = jax.tree.map(jnp.copy, model.split(state.params)[0])
            if since >= config.patience:
                break
    state = state.replace(params=model.join(best_params, model.split(state.params)[1]))
    finish = jax.jit(functools.partial(S.restart, experiment.fns), out_shardings=experiment.shardings, donate_argnums=0)
    return finish(state), curve


def train(config: ConfigDict, workdir: str, progress: bool = True, profile: tuple[int, int] | None = None) -> dict:
    """Runs an experiment to its end, from its last checkpoint if there is one.

    Writes config.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/ and report.html into workdir.
    Lines of metrics.jsonl after the restored checkpoint are dropped and written again, with the
    same numbers apart from times. With `profile`, (first, last), traces those steps into profile/.
    Called again after its end, it writes the report again.

    The first SIGINT or SIGTERM lets the step under way end (with its evaluation) and saves a
    checkpoint; the warm start saves nothing, the last step and the report are finished.

    Returns:
      The summary: steps, train_seconds, and pass@1 and the largest pass@k before and after.

    Raises:
      Interrupted: by a signal, after saving. Diverged: too many updates in a row were skipped.
    """
    with first_signal() as caught, profiling.out_of_memory():
        return _train(config, workdir, progress, profile, caught)


def _train(config: ConfigDict, workdir: str, progress: bool, profile, caught: list) -> dict:
    begin = time.monotonic()
    claim(workdir, config)
    experiment = Experiment(config)
    check_warm_start(experiment)
    if new := not os.path.exists(os.path.join(workdir, "config.json")):
        check_start(experiment)
        compile_step(experiment)  # what does not fit is said before anything is written
    with writing(f"workdir={workdir}", REFUSED):
        write_config(workdir, config)
    stream = experiment.stream()
    with writing(f"workdir={workdir}", REFUSED), Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore_latest(experiment.state_shape())
        if restored:
            _, state, extra = restored
            begin -= extra["seconds"]  # of earlier processes of this run
        else:
            state, curve = warm_start(experiment, experiment.init(config.seed), progress, caught)
            with events.EventFile(os.path.join(workdir, "tensorboard", "warm_start"), -1) as event_file:
                for line in curve:
                    event_file.write(line["step"], {f"warm_start/{k}": v for k, v in line.items() if k != "step"})
            before = curve_best(curve) or experiment.evaluate(state)
            extra = dict(warm_start=curve, before=before, seconds=time.monotonic() - begin)
            checkpoints.save(0, state, extra=extra, metric=before["pass@1"])

        def save(number, metric=None):
            extra["seconds"] = time.monotonic() - begin
            checkpoints.save(number, state, extra=extra, metric=metric)

        start = int(state.step)
        with (
            metrics.MetricsFile(os.path.join(workdir, "metrics.jsonl"), start) as metrics_file,
            metrics.LinesFile(os.path.join(workdir, "samples.jsonl"), start) as samples_file,
            events.EventFile(os.path.join(workdir, "tensorboard"), start) as event_file,
            profiling.Trace(os.path.join(workdir, "profile"), profile, start) as trace,
            tqdm(total=config.steps, initial=start, desc="train", disable=not progress) as bar,
        ):
            position = int(state.position)
            for number in range(start + 1, config.steps + 1):
                if caught:
                    if not state.skipped:
                        save(number - 1)
                    raise Interrupted(
                        f"{caught[0]}: stopped after step {number - 1} of {config.steps}; {workdir}/checkpoints/latest "
                        f"holds step {checkpoints.latest_step}, and the same command goes on from there."
                    )
                tick = time.monotonic()
                examples, index = stream.examples(position, config.sampler.prompts)
                if number == start + 1 and not new:
                    compile_step(experiment)
                with trace.step(number):
                    state, values = experiment.train_step(state, experiment.prompts(examples, index), experiment.knobs)
                    shown = values.pop("samples", None)
                    values = jax.device_get(values)
                position += config.sampler.prompts
                last, scores = number == config.steps, None
                if number % config.evaluation.every == 0 or last:
                    extra["after"] = scores = experiment.evaluate(state)
                    values = dict(values, **scores)
                    bar.set_postfix({"reward": f"{values['reward']:.3f}", "pass@1": f"{scores['pass@1']:.3f}"})
                values = dict(values, seconds=time.monotonic() - tick)
                metrics_file.write(number, values)
                event_file.write(number, events.grouped(values))
                if shown is not None and (number % config.samples_every == 0 or number == 1 or last):
                    for sample in experiment.samples(shown):
                        samples_file.append(dict(step=number, **sample))
                bar.update()
                stop_if_diverged(
                    config, state, f"step {number}",
                    f"look at loss and grad_norm in {workdir}/metrics.jsonl (null: not finite), then lower "
                    "optimizer.learning_rate in another --workdir, or raise learner.max_skipped to go on from step "
                    f"{checkpoints.latest_step}, saved before them in checkpoints/latest.",
                )  # fmt: skip
                due = number % config.checkpoint_every == 0 or scores  # what was measured can be the best
                if due and (last or not state.skipped):  # the last good one stays while updates are skipped
                    save(number, scores and scores["pass@1"])
    after = extra.get("after", extra["before"])
    top = f"pass@{config.evaluation.samples}"
    summary = dict(steps=config.steps, train_seconds=round(extra["seconds"], 1))
    for name in ("pass@1", top):
        summary |= {f"{name}_before": extra["before"][name], f"{name}_after": after[name]}
    with writing(f"workdir={workdir}", REFUSED):
        write_report(experiment, state, workdir, extra["warm_start"], extra["before"], after)
    return summary


def curve_best(curve: list[dict]) -> dict | None:
    """The scores of the best evaluation of a warm start, first of equals; None without any."""
    if not curve:
        return None
    best = max(curve, key=lambda line: line["pass@1"])
    return {name: value for name, value in best.items() if "@" in name}


def write_report(experiment: Experiment, state, workdir: str, curve, before: dict, after: dict) -> None:
    """Writes report.html from metrics.jsonl and trees of the final policy."""
    report.write_report(
        os.path.join(workdir, "report.html"),
        title=os.path.basename(os.path.abspath(workdir)),
        config_text=experiment.config.to_json_best_effort(indent=2),
        history=metrics.read(os.path.join(workdir, "metrics.jsonl")),
        warmup=curve,
        before=before,
        after=after,
        trees=example_trees(experiment, state),
    )


def example_trees(experiment: Experiment, state, count: int = 16, shown: int = 4) -> list[tuple[str, str, str]]:
    """(caption, SVG, text) of some held-out trees: contrast, forks, pruned lines, no contrast."""
    heldout = experiment.task.heldout
    examples = [heldout[i] for i in range(min(count, len(heldout)))]
    grown = experiment.grow(state, examples, step=int(state.step))
    valid = grown.tree.leaf[..., 0] >= 0
    right = np.sum(valid & (grown.reward >= draw.CORRECT), axis=1)
    mean = masked.mean(grown.reward, valid, axis=1)
    contrast = masked.total((grown.reward - mean[:, None]) ** 2, valid, axis=1)
    busy = (grown.forks + grown.pruned) / (1 + np.max(grown.forks + grown.pruned))  # decides among equals
    picks = []
    earns = 1e6 * (contrast > 0)
    for score in (contrast, grown.forks + earns, grown.pruned + earns, -contrast)[:shown]:
        ranked = np.argsort(-(score + busy), kind="stable")
        picks += [i for i in ranked.tolist() if i not in picks][:1]
    result = []
    for i in picks:
        example = examples[i]
        tree, text = jax.tree.map(lambda x: x[i], grown.tree), experiment.prompt_text(example)
        svg = draw.draw_tree(
            tree, experiment.task.tokenizer.decode, reward=grown.reward[i], advantage=grown.advantage[i], title=text
        )
        caption = f"{right[i]} of {valid[i].sum()} leaves right; forks: {grown.forks[i]}; pruned: {grown.pruned[i]}."
        result.append((caption, svg, text + "\n" + experiment.tree_text(grown, i)))
    return result
