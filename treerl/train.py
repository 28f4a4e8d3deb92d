"""The host loop: warm start, training, evaluation, checkpoints, and the report at the end."""
import contextlib
import functools
import json
import os
import signal
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from treerl import prompts as P
from treerl import draw, events, metrics, profiling, report, sharding, tasks
from treerl import step as S
from treerl import tree as T
from treerl.checkpoint import Checkpoints, abstract
from treerl.config import check, fields
from treerl.errors import UserError, writing
from treerl.evaluate import pass_at_k
from treerl.optimizer import make_optimizer

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


class Grown(NamedTuple):
    """Trees grown and graded, on the host."""

    tree: T.Tree  # B in front
    reward: np.ndarray  # [B, L] float32
    advantage: np.ndarray  # [B, S, K] float32; of leaf credit, the mean over the leaves below a cell
    forks: np.ndarray  # [B] int32
    pruned: np.ndarray  # [B] int32


class Experiment:
    """A config built: its task, its functions compiled for the mesh, its held-out examples."""

    def __init__(self, config: ConfigDict):
        check(config)
        self.config = config
        self.mesh = sharding.make_mesh(**config.mesh)
        self.task = tasks.make(config.task, os.path.expanduser(config.data_dir))
        self.fns = S.make_fns(config, self.task, self.mesh)
        self.knobs = jax.device_put(S.make_knobs(config, self.task), sharding.replicated(self.mesh))
        trees, whole = sharding.trees(self.mesh), sharding.replicated(self.mesh)
        self.trees = trees
        self.shardings = S.state_shardings(self.fns)
        self.init = jax.jit(functools.partial(S.init_state, self.fns), static_argnums=0, out_shardings=self.shardings)
        self.train_step = jax.jit(
            functools.partial(S.train_step, self.fns),
            in_shardings=(self.shardings, trees, whole),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self._evaluate = jax.jit(
            functools.partial(S.evaluate_step, self.fns, samples=config.evaluation.samples),
            in_shardings=(self.shardings.params, trees, whole, whole),
            out_shardings=whole,
        )
        self._grow = jax.jit(functools.partial(grow, self.fns))
        count = min(config.evaluation.examples, len(self.task.heldout))
        batch = min(config.evaluation.batch, count)
        shards = sharding.tree_shards(self.mesh)
        if batch % shards or count % batch:
            raise UserError(
                f"evaluation.batch={batch} must divide over {shards} shards and into the {count} held-out "
                "examples used; change evaluation.batch or evaluation.examples."
            )
        self._heldout = [
            self.prompts([self.task.heldout[i] for i in range(start, start + batch)], np.arange(start, start + batch))
            for start in range(0, count, batch)
        ]

    def prompts(self, examples, index):
        """Examples as prompts on the mesh."""
        return P.to_device(P.encode(self.task, examples, index, self.config.sampler.prompt_length), self.trees)

    def stream(self) -> P.Stream:
        """The training examples of this seed."""
        return P.Stream(self.task.train, self.config.seed)

    def state_shape(self):
        """The state as ShapeDtypeStructs with shardings, to restore into."""
        return abstract(jax.eval_shape(lambda: S.init_state(self.fns, 0)), self.shardings)

    def evaluate(self, params, seed: int = 0) -> dict:
        """Unbiased pass@k on held-out examples for k = 1, 2, 4, ... up to the samples drawn."""
        key, n = jax.random.key(seed), self.config.evaluation.samples
        graded = [self._evaluate(params, batch, key, self.knobs) for batch in self._heldout]
        correct = np.concatenate([np.sum(np.asarray(r) > 0.5, axis=1) for r in graded])
        powers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
        return {f"pass@{k}": pass_at_k(correct, n, k) for k in powers}

    def grow(self, state, examples: list[dict], *, step: int, seed: int = 0) -> Grown:
        """Grows and grades a tree for each example by the run's own rules, as they are at `step`.

        An example's place in the list is part of its random key; the number of devices is not.
        """
        shards = sharding.tree_shards(self.mesh)
        index = np.arange(-(-len(examples) // shards) * shards)  # repeats fill the last shard
        prompts = self.prompts([examples[i % len(examples)] for i in index], index)
        grown = jax.device_get(self._grow(state, prompts, jax.random.key(seed), jnp.int32(step), self.knobs))
        return jax.tree.map(lambda x: x[: len(examples)], grown)

    def prompt_text(self, example: dict) -> str:
        """What the model reads."""
        return self.task.tokenizer.decode(self.task.encode(example).prompt)

    def parse(self, text: str) -> dict:
        """The example of a prompt that a user wrote.

        Raises:
          UserError: it is no prompt of the run's task, or is too long for its sampler.
        """
        if self.task.parse is None:
            raise UserError(f"task {self.config.task.name!r} takes no --prompt; use a run of another task.")
        example = self.task.parse(text)
        length, limit = len(self.task.encode(example).prompt), self.config.sampler.prompt_length
        if length > limit:
            raise UserError(
                f"--prompt={text!r} has {length} tokens and this run reads at most {limit}; give a shorter --prompt."
            )
        return example

    def tree_text(self, grown: Grown, i: int) -> str:
        """Tree i as text: its forks and its leaves."""
        view = dict(reward=grown.reward[i], advantage=grown.advantage[i])
        tree, decode = jax.tree.map(lambda x: x[i], grown.tree), self.task.tokenizer.decode
        return draw.format_tree(tree, decode, **view) + "\n\n" + draw.format_leaves(tree, decode, **view)


def grow(fns: S.Fns, state, prompts, key, step, knobs) -> Grown:
    """Grows, grades and estimates the trees of a batch of prompts; traceable."""
    tree, stats = S.rollout(fns, state.params, prompts, key, step, knobs)
    reward, shaped = S.grade(fns, tree, prompts)
    credit, *_ = S.estimate(fns, state, tree, prompts, shaped, knobs)
    if credit.ndim == 2:
        credit = jax.vmap(lambda t, x: T.up(t, x) / jnp.maximum(T.leaf_count(t), 1))(tree, credit)
    return Grown(tree, reward, credit, stats.forks, stats.pruned)


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
    fns = experiment.fns._replace(optimizer=make_optimizer(optimizer, config.steps))
    shardings = S.state_shardings(fns)
    update = jax.jit(
        functools.partial(S.supervised_step, fns),
        in_shardings=(shardings, *[experiment.trees] * 3),
        out_shardings=(shardings, sharding.replicated(experiment.mesh)),
        donate_argnums=0,
    )
    state = jax.jit(functools.partial(S.restart, fns), out_shardings=shardings)(state)
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
            scores = experiment.evaluate(state.params)
            loss = float(np.mean(jax.device_get(losses)))
            curve.append(dict(step=number, loss=loss if np.isfinite(loss) else None, **scores))
            losses, since = [], since + 1
            if scores["pass@1"] > best:
                best, since = scores["pass@1"], 0
                best_params = jax.tree.map(jnp.copy, state.params)
            if since >= config.patience:
                break
    state = state.replace(params=best_params)
    finish = jax.jit(functools.partial(S.restart, experiment.fns), out_shardings=experiment.shardings)
    return finish(state), curve


def train(config: ConfigDict, workdir: str, progress: bool = True, profile: tuple[int, int] | None = None) -> dict:
    """Runs an experiment to its end, from its last checkpoint if there is one.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ and report.html into workdir.
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
    with first_signal() as caught:
        return _train(config, workdir, progress, profile, caught)


def _train(config: ConfigDict, workdir: str, progress: bool, profile, caught: list) -> dict:
    begin = time.monotonic()
    claim(workdir, config)
    experiment = Experiment(config)
    check_warm_start(experiment)
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
            before = curve_best(curve) or experiment.evaluate(state.params)
            extra = dict(warm_start=curve, before=before, seconds=time.monotonic() - begin)
            checkpoints.save(0, state, extra=extra, metric=before["pass@1"])

        def save(number, metric=None):
            extra["seconds"] = time.monotonic() - begin
            checkpoints.save(number, state, extra=extra, metric=metric)

        start = int(state.step)
        with (
            metrics.MetricsFile(os.path.join(workdir, "metrics.jsonl"), start) as metrics_file,
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
                with trace.step(number):
                    state, values = experiment.train_step(state, experiment.prompts(examples, index), experiment.knobs)
                    values = jax.device_get(values)
                position += config.sampler.prompts
                last, scores = number == config.steps, None
                if number % config.evaluation.every == 0 or last:
                    extra["after"] = scores = experiment.evaluate(state.params)
                    values = dict(values, **scores)
                    bar.set_postfix({"reward": f"{values['reward']:.3f}", "pass@1": f"{scores['pass@1']:.3f}"})
                values = dict(values, seconds=time.monotonic() - tick)
                metrics_file.write(number, values)
                event_file.write(number, events.grouped(values))
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


def claim(workdir: str, config: ConfigDict) -> None:
    """Checks that a workdir is new, or has a config.json with the same fields; writes nothing.

    Devices, folders of data and learner.max_skipped may differ, and so may `steps` without a
    schedule over them.

    Raises:
      UserError: the workdir belongs to another experiment; names the first field that differs.
    """
    if not os.path.exists(os.path.join(workdir, "config.json")):
        return
    old, new = dict(fields(read_config(workdir))), dict(fields(json.loads(config.to_json_best_effort())))
    free = ("mesh.", "data_dir", "learner.max_skipped")
    free += ("steps",) if config.optimizer.schedule == "constant" else ()
    for name in sorted(old | new):
        if not name.startswith(free) and old.get(name) != new.get(name):
            raise UserError(
                f"workdir={workdir} belongs to a run with {name}={old.get(name)!r}, not {new.get(name)!r}; "
                "give another --workdir, or the same config."
            )


def read_config(workdir: str) -> dict:
    """The config.json of a workdir."""
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(
            f"workdir={workdir} has no config.json; give the workdir of a run made by launch.train."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; give another --workdir, or put the run's own config there.") from error


def write_config(workdir: str, config: ConfigDict) -> None:
    """Writes config.json into a workdir, made if missing; all of it or nothing."""
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(config.to_json_best_effort(indent=2))
    os.replace(path + ".tmp", path)


def curve_best(curve: list[dict]) -> dict | None:
    """The scores of the best evaluation of a warm start, first of equals; None without any."""
    if not curve:
        return None
    best = max(curve, key=lambda line: line["pass@1"])
    return {name: value for name, value in best.items() if name.startswith("pass@")}


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
    mean = np.sum(grown.reward, axis=1) / np.maximum(np.sum(valid, axis=1), 1)  # a missing leaf has reward 0
    contrast = np.sum(valid * (grown.reward - mean[:, None]) ** 2, axis=1)
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


def load(workdir: str, *, best: bool = False) -> tuple[Experiment, object, int]:
    """Rebuilds the experiment of a workdir and restores its latest (or best) checkpoint.

    Returns:
      (experiment, state, step).
    """
    experiment = Experiment(ConfigDict(read_config(workdir)))
    checkpoints = Checkpoints(workdir, read_only=True)
    restore = checkpoints.restore_best if best else checkpoints.restore_latest
    restored = restore(experiment.state_shape())
    if restored is None:
        raise UserError(f"workdir={workdir} has no checkpoint yet; wait for the first or train longer.")
    step, state, _ = restored
    return experiment, state, step
