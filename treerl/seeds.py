"""Several seeds of an experiment in one program: what a small model leaves idle of a device, others use.

Each seed has parameters, order of examples, warm start and random draws of its own, as a run of `train` has; or all go on
from one warm start. Loops whose length depends on data run until the last seed is done.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from treerl import metrics, processes, prompts as P, report, step as S, warm_start
from treerl.checkpoint import Checkpoints, abstract
from treerl.errors import UserError, writing
from treerl.experiment import Experiment, named
from treerl.progress import bar
from treerl.supervision import Interrupted, Signals
from treerl.workdir import claim, has_config, write_config


class Seeds:
    """The programs of an experiment for N seeds; states have N in front of every array."""

    def __init__(self, config: ConfigDict, seeds: list[int], shared: bool = False):
        """With `shared`, the warm start is that of the first seed. Raises UserError where the experiment cannot run so."""
        self.seeds, self.shared, self.experiment = seeds, shared, Experiment(config)
        fns, task = self.experiment.fns, self.experiment.task
        if fns.host is not None or (fns.environment is not None and fns.environment.on_host):
            raise UserError("several seeds in one program cannot ask graders or games on the host; use launch.sweep.")
        if processes.several() or self.experiment.mesh.size > 1:
            raise UserError("several seeds in one program need one device; set CUDA_VISIBLE_DEVICES=0, or use launch.sweep.")
        if self.experiment.folder:
            raise UserError("several seeds in one program start from random weights; use launch.sweep, or set model.source=''.")
        self.knobs = self.experiment.knobs
        self._step = jax.jit(jax.vmap(functools.partial(S.train_step, fns), in_axes=(0, 0, None)), donate_argnums=0)

        def sample(params, quality, prompts, key, knobs):
            tree, known = S.evaluate_sample(fns, params, quality, prompts, key, knobs, samples=config.evaluation.samples)
            graded = S.grade(fns, tree, prompts)
            return dict(known, reward=graded.reward, answer=graded.key, parts=graded.parts)

        self._sample = jax.jit(jax.vmap(sample, in_axes=(0, 0, None, None, None)))
        self.streams = [P.Stream(task.train, seed) for seed in seeds]

    def start(self):
        """The states before anything is learnt."""
        return jax.jit(jax.vmap(functools.partial(S.init_state, self.experiment.fns)))(jnp.array(self.seeds))

    def _encode(self, encode, streams, position: int, count: int):
        """The next examples of each seed's stream, encoded: numpy [N, count, ...]."""
        drawn = [stream.examples(position, count) for stream in streams]
        return jax.tree.map(lambda *x: np.stack(x), *[encode(list(examples), index) for examples, index in drawn])

    def warm_start(self, states, progress: bool = False):
        """`warm_start.steps` supervised updates, all of them: patience is not for seeds that march together."""
        whole, config = self.experiment.config, self.experiment.config.warm_start
        if not config.steps:
            return states
        fns = warm_start.functions(self.experiment)
        restart = lambda fns: jax.jit(jax.vmap(functools.partial(S.restart, fns)), donate_argnums=0)
        update = jax.jit(jax.vmap(functools.partial(S.supervised_step, fns)), donate_argnums=0)
        examples = warm_start.first_examples(self.experiment)
        streams = [P.Stream(examples, seed) for seed in self.seeds[: 1 if self.shared else None]]
        count, key = len(self.seeds), jnp.copy(states.key)  # the states are donated
        lessons = lambda examples, index: P.encode_lessons(self.experiment.task, examples, index, whole.sampler, fns.window)
        states = restart(fns)(jax.tree.map(lambda x: x[: len(streams)], states))
        for number in bar("warm start", config.steps, show=progress):
            states, values = update(states, *self._encode(lessons, streams, (number - 1) * config.batch, config.batch))
        if not np.all(np.isfinite(values["loss"])):
            raise UserError("the warm start diverged; lower warm_start.learning_rate.")
        states = restart(self.experiment.fns)(states)
        return jax.tree.map(lambda x: jnp.repeat(x, count // len(streams), axis=0), states).replace(key=key)

    def step(self, states, number: int):
        """Update number `number`, from 1: (states, metrics [N])."""
        size, task = self.experiment.config.sampler, self.experiment.task
        encode = lambda examples, index: P.encode(task, examples, index, size.prompt_length)
        prompts = self._encode(encode, self.streams, (number - 1) * size.prompts, size.prompts)
        states, values = self._step(states, prompts, self.knobs)
        values.pop("samples", None)
        return states, jax.device_get(values)

    def evaluate(self, states) -> list[dict]:
        """The scores of each seed, see `Experiment.evaluate`."""
        scores = [{} for _ in self.seeds]
        for split, batches in self.experiment.batches.items():
            found = [jax.device_get(self._sample(states.params, states.quality, batch, jax.random.key(0), self.knobs)) for batch in batches]
            for i, own in enumerate(scores):
                own |= named(split, self.experiment.summarise({k: np.concatenate([x[k][i] for x in found]) for k in found[0]}))
        return scores


def train(config: ConfigDict, workdir: str, count: int, progress: bool = True, *, shared: bool = False) -> dict:
    """Trains seeds config.seed, config.seed + 1, ... side by side, from the last checkpoint if there is one.

    Writes workdir/seedN/metrics.jsonl, as `train.train` does and with a line of step 0 for the scores before, and
    checkpoints of all seeds together; no samples, no report. With `shared`, all seeds go on from the warm start of the
    first. However many updates of a seed are skipped, see its metric `skipped`, the others go on. The first SIGINT or
    SIGTERM lets the step under way end and saves; before the first step there is nothing to save.

    Returns:
      name -> (mean, half width of the 95% interval by Student's t) over the seeds, of the scores at the end.

    Raises:
      UserError: the workdir has other seeds, or the experiment cannot run so. Interrupted: by a signal, after saving.
    """
    if config.wandb:
        raise UserError("several seeds in one program write metrics.jsonl alone; set wandb='', or use launch.sweep.")
    if count < 1:
        raise UserError(f"--count={count} cannot work; set it to 1 or more seeds.")
    claim(workdir, config)
    there = len(list(epath.Path(workdir).glob("seed*/metrics.jsonl")))
    if there not in (0, count):
        raise UserError(f"workdir={workdir} has a run of {there} seeds; give --count={there}, or another --workdir.")
    run = Seeds(config, list(range(config.seed, config.seed + count)), shared)
    with Signals() as signals:
        return _train(config, workdir, run, progress, signals)


def _train(config: ConfigDict, workdir: str, run: Seeds, progress: bool, signals: Signals) -> dict:
    warm_start.check(run.experiment)
    for stream in () if has_config(workdir) else run.streams:
        P.check(run.experiment.task, stream, config.steps * config.sampler.prompts, config.sampler)
    keep = dict(keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every)
    refused = "make room or allow it, and the same command goes on."
    with writing(f"workdir={workdir}", refused), Checkpoints(workdir, **keep) as checkpoints:
        write_config(workdir, config)
        restored = checkpoints.restore_latest(abstract(jax.eval_shape(run.start)))
        done, states, extra = restored or (0, None, {})
        path = lambda seed: os.path.join(workdir, f"seed{seed}", "metrics.jsonl")
        files = [metrics.MetricsFile(path(seed), done if restored else -1) for seed in run.seeds]
        if states is None:
            with signals.nothing_to_lose("stopped before the first step; the same command starts again."):
                states = run.warm_start(run.start(), progress)
                scores = run.evaluate(states)
            for file, own in zip(files, scores):
                file.write(0, own)
            checkpoints.save(0, states, extra=dict(scores=scores))
        else:
            scores = extra["scores"]
        numbers = bar("train", config.steps, initial=done, show=progress)
        for number in numbers:
            states, values = run.step(states, number)
            measured = number % config.evaluation.every == 0 or number == config.steps
            scores = run.evaluate(states) if measured else scores
            for i, file in enumerate(files):
                file.write(number, {k: v[i] for k, v in values.items()} | (scores[i] if measured else {}))
            if measured:
                numbers.set_postfix({k: f"{np.mean([own[k] for own in scores]):.3f}" for k in scores[0] if k.endswith("pass@1")})
            asked = signals.asked()
            if asked or number % config.checkpoint_every == 0 or number == config.steps:
                checkpoints.save(number, states, extra=dict(scores=scores))
            if asked and number < config.steps:
                raise Interrupted(
                    f"{asked}: stopped after step {number} of {config.steps}; {workdir}/checkpoints holds it, and the same "
                    "command goes on from there."
                )
        for file in files:
            file.close()
    found = {k: report.interval(np.array([own[k] for own in scores])) for k in scores[0]}
    return {k: (float(mean), None if np.isnan(half) else float(half)) for k, (mean, half) in found.items()}
