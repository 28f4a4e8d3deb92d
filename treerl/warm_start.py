"""Supervised learning on reference answers before reinforcement learning, until held-out pass@1 stops rising."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from treerl import processes, prompts as P, sharding, step as S
from treerl.checkpoint import Checkpoints, abstract
from treerl.errors import UserError
from treerl.experiment import Experiment
from treerl.optimizer import make_optimizer
from treerl.progress import bar
from treerl.supervision import Interrupted, Signals, stop_if_diverged


def first_examples(experiment: Experiment) -> list[dict]:
    """The training examples that the warm start may see."""
    train = experiment.task.train
    return [train[i] for i in range(min(experiment.config.warm_start.examples, len(train)))]


def check(experiment: Experiment) -> None:
    """Raises UserError where a batch does not divide, or a prompt or answer is too long."""
    config, shards = experiment.config, sharding.tree_shards(experiment.mesh)
    if not config.warm_start.steps:
        return
    if config.warm_start.batch % shards:
        raise UserError(
            f"warm_start.batch={config.warm_start.batch} does not divide over mesh.data x mesh.fsdp = {shards} shards; make it a multiple."
        )
    examples, task = first_examples(experiment)[: experiment.task.few], experiment.task
    P.encode(task, examples, np.arange(len(examples)), config.sampler.prompt_length)
    if task.environment is None:  # episodes are cut
        P.encode_answers(task, examples, config.sampler.answer_length)


def folder_of(workdir: str) -> str:
    """Where a warm start under way is saved."""
    return f"{workdir}/warm_start"


def forget(workdir: str) -> None:
    """Removes what is saved of a warm start that is over."""
    folder = epath.Path(folder_of(workdir))
    if processes.is_first() and folder.exists():
        folder.rmtree()


def functions(experiment: Experiment) -> S.Fns:
    """The run's functions with the warm start's optimizer: its own learning rate, constant after optimizer.warmup_steps."""
    whole, config = experiment.config, experiment.config.warm_start
    optimizer = ConfigDict(dict(whole.optimizer, learning_rate=config.learning_rate, schedule="constant"))
    return experiment.fns._replace(optimizer=make_optimizer(optimizer, config.steps))


def warm_start(experiment: Experiment, workdir: str, progress: bool, signals: Signals):
    """Trains on a small fixed set of reference answers; saved with every evaluation, and continued from there.

    Returns:
      (state with the best parameters seen and a fresh optimizer, list of dicts of step, loss and pass@k).

    Raises:
      Interrupted: by a signal, after saving. Diverged: too many updates in a row were skipped.
    """
    whole, config = experiment.config, experiment.config.warm_start
    if not config.steps:
        return experiment.init(whole.seed), []
    fns, model = functions(experiment), experiment.fns.model
    shardings, trained = S.state_shardings(fns), lambda state: model.split(state.params)[0]
    update = jax.jit(
        functools.partial(S.supervised_step, fns),
        in_shardings=(shardings, *[experiment.trees] * 4),
        out_shardings=(shardings, sharding.replicated(experiment.mesh)),
        donate_argnums=0,
    )
    restart = lambda fns, where: jax.jit(functools.partial(S.restart, fns), out_shardings=where, donate_argnums=0)
    stream = P.Stream(first_examples(experiment), whole.seed)
    with Checkpoints(folder_of(workdir)) as checkpoints:
        shape = abstract(jax.eval_shape(lambda: S.init_state(fns, 0)), shardings)
        if found := checkpoints.restore_latest(dict(state=shape, best=trained(shape))):
            start, (state, best), extra = found[0], (found[1]["state"], found[1]["best"]), found[2]
        else:
            state = restart(fns, shardings)(experiment.init(whole.seed))
            best, extra = jax.tree.map(jnp.copy, trained(state)), dict(curve=[], losses=[], top=-1.0, since=0)
            start = 0
        curve, losses, top, since = (extra[name] for name in ("curve", "losses", "top", "since"))

        def save(number):
            known = [None if x is None or not np.isfinite(x) else float(x) for x in jax.device_get(losses)]
            extra = dict(curve=curve, losses=known, top=top, since=since)
            checkpoints.save(number, dict(state=state, best=best), extra=extra)

        updates = bar("warm start", config.steps, initial=start, show=progress)
        for number in updates:
            if since >= config.patience:
                break
            if signals.asked():
                updates.close()
                save(number - 1)
                raise Interrupted(
                    f"{signals.asked()}: stopped in the warm start after update {number - 1}, which is saved; the same "
                    "command goes on from there."
                )
            examples, index = stream.examples((number - 1) * config.batch, config.batch)
            state, values = update(state, *experiment.lessons(examples, index))
            losses.append(values["loss"])
            if number % config.eval_every == 0 or number == config.steps:
                stop_if_diverged(
                    state, whole.learner.max_skipped, f"warm start, update {number}",
                    "lower warm_start.learning_rate, or look for weights or examples that make a nan.",
                )  # fmt: skip
                scores = experiment.evaluate(state)
                loss = float(np.mean([np.nan if x is None else float(x) for x in jax.device_get(losses)]))
                curve.append(dict(step=number, loss=loss if np.isfinite(loss) else None, **scores))
                losses, since = [], since + 1
                if scores["pass@1"] > top:
                    top, since, best = scores["pass@1"], 0, jax.tree.map(jnp.copy, trained(state))
                save(number)
    state = state.replace(params=model.join(best, model.split(state.params)[1]))
    return restart(experiment.fns, experiment.shardings)(state), curve
