"""The host loop: training, evaluation, checkpoints, files, and the report at the end."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from treerl import events, metrics, processes, profiling, prompts as P, report, tree as T, warm_start
from treerl.checkpoint import Checkpoints
from treerl.config import fields
from treerl.errors import UserError, writing
from treerl.experiment import Experiment
from treerl.models import weights
from treerl.progress import bar, words
from treerl.supervision import Interrupted, Signals, Stopped, Watchdog, stop_if_diverged
from treerl.workdir import claim, has_config, write_config

REFUSED = "make room or allow it, and the same command goes on from the last checkpoint."


def check_start(experiment: Experiment) -> None:
    """Raises UserError where what a new run will read cannot work: published weights, and every prompt up to its end."""
    if experiment.folder:
        weights.check(experiment.folder, experiment.fns.model.plain)
    config = experiment.config
    P.check(experiment.task, experiment.stream(), config.steps * config.sampler.prompts, config.sampler)


def compile_step(experiment: Experiment, tell: bool) -> None:
    """Compiles the training step and tells the memory it takes. Raises UserError where that is not there."""
    plan = experiment.compile_step()
    if tell:
        tqdm.write(f"memory of a step: {plan}", file=sys.stderr)  # not into a bar
    profiling.check_memory(plan)


def train(
    config: ConfigDict, workdir: str, progress: bool = True, profile: tuple[int, int] | None = None,
    watch: Callable[[dict], None] = lambda line: None,
) -> dict:  # fmt: skip
    """Runs an experiment to its end, from its last checkpoint if there is one.

    Writes config.json, metrics.jsonl, samples.jsonl, tensorboard/, wandb/ where asked for, checkpoints/ and report.html into workdir, and
    what the report is made of besides: warm_start.jsonl, trees.jsonl, and a line of starts.jsonl for every process that began or went on.
    Line 0 of metrics.jsonl are the scores before. Lines after the restored checkpoint are dropped and written again, with the
    same numbers apart from times (seconds, tokens_per_second) and games_KIND: how often games on this host failed since the line before, a failure that
    came again counted once. With `profile`, (first, last), traces those steps into profile/.
    Called again after its end, it writes the report again. Of several processes each calls this, with a workdir that
    all of them see; the first writes.

    After each step the process that writes the files calls `watch` with the step's line of metrics.jsonl: to draw curves in
    a notebook, or to log elsewhere.

    The first SIGINT or SIGTERM, in whichever process, lets the update under way end and saves a checkpoint: an evaluation
    is cut short and done again, and so is a step whose answers are still being graded on the host.

    Returns:
      The summary: steps, wall_seconds (of all processes of the run, each from its start to its last checkpoint), and pass@1 and the
      largest pass@k before and after.

    Raises:
      Interrupted: by a signal, after saving. Diverged: too many updates in a row were skipped.
    """
    with Signals() as signals, profiling.out_of_memory(), contextlib.ExitStack() as stack:
        return _train(config, workdir, progress and processes.is_first(), profile, watch, signals, stack)


def _train(config: ConfigDict, workdir: str, progress: bool, profile, watch, signals: Signals, stack) -> dict:
    begin = time.monotonic()
    processes.check_same(dict(fields(json.loads(config.to_json_best_effort())), workdir=str(workdir)))
    with signals.nothing_to_lose("stopped before the first step; the same command starts again."):
        claim(workdir, config)
        experiment = Experiment(config)
        stack.callback(experiment.close)
        warm_start.check(experiment)
        if processes.is_first():
            events.check_wandb(config.wandb)
        if new := processes.first_decides(not has_config(workdir)):
            check_start(experiment)
            compile_step(experiment, progress)  # what does not fit is said before anything is written
        if processes.is_first():
            with writing(f"workdir={workdir}", REFUSED):
                write_config(workdir, config)
        check_shared(workdir)
    keep = dict(keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every)
    with writing(f"workdir={workdir}", REFUSED), Checkpoints(workdir, **keep) as checkpoints:
        restored = checkpoints.restore_latest(experiment.state_shape())
        if restored:
            _, state, extra = restored
            begin -= extra["seconds"]  # of earlier processes of this run
        else:
            state, extra = begin_run(experiment, workdir, progress, signals)
            extra["seconds"] = time.monotonic() - begin
            checkpoints.save(0, state, extra=extra, metric=extra["before"]["pass@1"])
            checkpoints.wait()
        warm_start.forget(workdir)
        run = Run(experiment, workdir, checkpoints, signals, state, extra, begin, progress, watch)
        del state, restored  # donated to the next step
        with run.files(), profiling.Trace(os.path.join(workdir, "profile"), profile if processes.is_first() else None, run.done) as trace:
            run.resume()
            if run.done < config.steps:
                run.stop_if_asked()
                run.show_trees(first=True)
                text = f"stopped before step {run.done + 1} of {config.steps}, nothing is lost; the same command goes on from there."
                with signals.nothing_to_lose(text):
                    if not new:
                        compile_step(experiment, progress)
                    run.start_clock()
                    values = run.step(trace)
                run.finish(values)
            while run.done < config.steps:
                run.stop_if_asked()
                run.finish(run.step(trace))
            run.show_trees()
        after = run.extra.get("after", run.extra["before"])
        top = f"pass@{config.evaluation.samples}"
        summary = dict(steps=config.steps, wall_seconds=round(run.extra["seconds"], 1))
        for name in ("pass@1", top):
            summary |= {f"{name}_before": run.extra["before"][name], f"{name}_after": after[name]}
        if processes.is_first():
            report.write_report(os.path.join(workdir, "report.html"), [report.read_run(workdir)])
    return summary


def check_shared(workdir: str) -> None:
    """Raises UserError in every process if one of them does not see what the first has written."""
    processes.wait_for_all("config.json")
    blind = [i for i, sees in enumerate(processes.gather(has_config(workdir))) if not sees]
    if blind:
        raise UserError(
            f"workdir={workdir} is not the same folder everywhere: process {blind[0]} finds no config.json of process 0 "
            "there; give a --workdir on a file system that all hosts share, or a gs:// path."
        )


def begin_run(experiment: Experiment, workdir: str, progress: bool, signals: Signals):
    """The warm start: (state, what a checkpoint keeps beside it). Interrupted and Diverged as in `train`."""
    state, curve = warm_start.warm_start(experiment, workdir, progress, signals)
    if processes.is_first():
        with (
            events.EventFile(os.path.join(workdir, "tensorboard", "warm_start"), -1) as event_file,
            metrics.LinesFile(os.path.join(workdir, "warm_start.jsonl"), -1) as lines,
        ):
            for line in curve:
                lines.append(line)
                event_file.write(line["step"], {f"warm_start/{k}": v for k, v in line.items() if k != "step"})
    best = metrics.best(curve)
    scores = experiment.evaluate(state) if best is None else {k: v for k, v in best.items() if k not in ("step", "loss")}
    return state, dict(before=scores)


class Run:
    """A run between two steps: its state, how many steps are done, and where its numbers go."""

    def __init__(
        self, experiment: Experiment, workdir: str, checkpoints, signals: Signals, state, extra: dict, begin: float, progress: bool, watch
    ):
        self.experiment, self.workdir, self.checkpoints, self.signals = experiment, workdir, checkpoints, signals
        self.state, self.extra, self.begin = state, extra, begin
        self.done, self.position = int(state.step), int(state.position)
        self._stream, self._prompts, self._watchdog, self._faults = experiment.stream(), None, Watchdog(), {}
        self._wandb, self._show, self._watch = None, progress, watch

    @contextlib.contextmanager
    def files(self):
        """Opens the files that the first process writes, and closes them."""
        with contextlib.ExitStack() as stack:
            config = self.experiment.config
            if processes.is_first():
                where = functools.partial(os.path.join, self.workdir)
                told = self.done - ("unfinished" in self.extra)  # that step's line may be there, without its scores
                self._metrics = stack.enter_context(metrics.MetricsFile(where("metrics.jsonl"), told))
                self._samples = stack.enter_context(metrics.LinesFile(where("samples.jsonl"), self.done))
                shown = -1 if self.done == 0 else min(self.done, config.steps - 1)  # trees of this moment are grown again
                self._trees = stack.enter_context(metrics.LinesFile(where("trees.jsonl"), shown))
                self._events = stack.enter_context(events.EventFile(where("tensorboard"), told))
                with metrics.LinesFile(where("starts.jsonl"), self.done) as starts:
                    starts.append(dict(step=self.done, **versions()))
                if self.done == 0 and self._metrics.empty:
                    self._metrics.write(0, self.extra["before"])
                    self._events.write(0, events.grouped(self.extra["before"]))
                if config.wandb:
                    told = [line for line in metrics.read(where("metrics.jsonl")) if line["step"] <= told]
                    written = json.loads(config.to_json_best_effort())
                    self._wandb = stack.enter_context(events.WandbRun(config.wandb, self.workdir, written, told))
            self._bar = stack.enter_context(bar("train", config.steps, initial=self.done, show=self._show))
            yield

    def save(self, metric: float | None = None, **more) -> None:
        """Saves the state between two steps; `more` is kept beside it this once."""
        self.extra["seconds"] = time.monotonic() - self.begin
        for file in filter(None, (self._metrics, self._samples, self._trees, self._events, self._wandb)) if processes.is_first() else ():
            file.upload()
        self.checkpoints.save(self.done, self.state, extra=self.extra | more, metric=metric)

    def stop_if_asked(self, **unfinished) -> None:
        """Saves and raises Interrupted once a signal came."""
        name, config = self.signals.asked(), self.experiment.config
        if not name:
            return
        if not int(self.state.skipped):  # the last good one stays while updates are skipped
            self.save(**unfinished)
        raise Interrupted(
            f"{name}: stopped after step {self.done} of {config.steps}; {self.workdir}/checkpoints holds "
            f"step {self.checkpoints.latest_step}, and the same command goes on from there."
        )

    def _read(self, position: int):
        """The prompts of a step, on the mesh, from a position of the stream on."""
        return self.experiment.prompts(*self._stream.examples(position, self.experiment.config.sampler.prompts))

    def step(self, trace: profiling.Trace) -> dict:
        """The next update; its metrics, on the host."""
        config, number, tick = self.experiment.config, self.done + 1, time.monotonic()
        with self._watchdog.step(number), trace.step(number):
            prompts = self._prompts or self._read(self.position)
            try:
                self.state, values = self.experiment.train_step(self.state, prompts, self.experiment.knobs, self.signals.check)
            except Stopped:
                self.stop_if_asked()
            self._prompts = None
            if number < config.steps:  # while the device works
                with contextlib.suppress(Exception):  # the step that needs them reads again, and says why it cannot
                    self._prompts = self._read(self.position + config.sampler.prompts)
            shown = values.pop("samples", None)
            values = jax.device_get(values)
        self.done, self.position = number, self.position + config.sampler.prompts
        last = number == config.steps
        if shown is not None and processes.is_first() and (number % config.samples_every == 0 or number == 1 or last):
            for sample in self.experiment.samples(shown):
                self._samples.append(dict(step=number, **sample))
        values, seconds = metrics.plain(values), time.monotonic() - tick
        return dict(values, tokens_per_second=values["sampled_tokens"] / seconds, seconds=seconds)

    def finish(self, values: dict) -> None:
        """What follows an update: evaluation, files, checkpoint."""
        config, number, tick, scores = self.experiment.config, self.done, time.monotonic(), None
        last = number == config.steps
        if number % config.evaluation.every == 0 or last:
            try:
                scores = self.experiment.evaluate(self.state, check=self.signals.check)
            except Stopped:
                self.stop_if_asked(unfinished=values)
            self.extra["after"] = scores
        before, self._faults = self._faults, self.experiment.faults()
        failed = {f"games_{kind}": count - before.get(kind, 0) for kind, count in self._faults.items()}
        values = dict(values, **(scores or {}), **failed, seconds=values["seconds"] + time.monotonic() - tick)
        if processes.is_first():
            self._metrics.write(number, values)
            self._events.write(number, events.grouped(values))
            self._watch(dict(step=number, **values))
            if self._wandb:
                self._wandb.write(number, values)
        accuracy = self.extra.get("after", self.extra["before"])["pass@1"]
        self._bar.set_postfix_str(words(values["reward"], accuracy, values["tokens_per_second"]), refresh=False)
        self._bar.update()
        if self._show and 0 < values["skipped"] == int(self.state.skipped):  # the first in a row
            tqdm.write(f"step {number}: loss or gradient is not finite, the update is skipped.", file=sys.stderr)
        stop_if_diverged(
            self.state, config.learner.max_skipped, f"step {number}",
            f"look at loss and grad_norm in {self.workdir}/metrics.jsonl (null: not finite), then lower "
            "optimizer.learning_rate in another --workdir, or raise learner.max_skipped to go on from step "
            f"{self.checkpoints.latest_step}, saved before them in checkpoints; an estimator of your own may give a nan.",
            config.steps * config.learner.epochs,
        )  # fmt: skip
        due = number % config.checkpoint_every == 0 or scores  # what was measured can be the best
        if due and (last or not int(self.state.skipped)):  # the last good one stays while updates are skipped
            self.save(scores and scores["pass@1"])

    def show_trees(self, first: bool = False) -> None:
        """Trees of the same held-out examples before the first step and after the last, for the report; all processes grow them."""
        if first and self.done:
            return
        trees = example_trees(self.experiment, self.state)
        for line in trees if processes.is_first() else ():
            self._trees.append(dict(step=self.done, **line))

    def start_clock(self) -> None:
        """The bar's time and rate count from now on."""
        self._bar.unpause()

    def resume(self) -> None:
        """Does what a signal had left undone of the last step."""
        if values := self.extra.pop("unfinished", None):
            self.finish(values)


def versions() -> dict:
    """What this process runs on."""
    found = {"python": platform.python_version()}
    for name in ("treerl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a folder that is not installed
            found[name] = importlib.metadata.version(name)
    kind = jax.devices()[0].device_kind
    return found | dict(devices=f"{jax.device_count()} x {kind}", processes=jax.process_count())


def example_trees(experiment: Experiment, state, count: int = 4) -> list[dict]:
    """Trees of the first held-out examples: dicts of index, caption, page and text."""
    heldout = experiment.task.heldout
    grown = experiment.grow(state, [heldout[i] for i in range(min(count, len(heldout)))], step=int(state.step), candidates=True)
    valid, trees = grown.tree.leaf[..., 0] >= 0, []
    right = np.sum(valid & (grown.reward > experiment.task.right), axis=1)
    for i in range(len(valid)):
        gone = grown.pruned[i] - np.sum(grown.tree.used[i] & (grown.tree.end[i] >= T.PRUNED))  # new lines stand in their place
        caption = f"{right[i]} of {valid[i].sum()} leaves right; forks: {grown.forks[i]}; fresh starts: {grown.restarts[i]}; pruned: {grown.pruned[i]}"
        caption += f", {gone} of them overwritten by lines that came later." if gone > 0 else "."
        text = experiment.read_text(grown, i) + "\n" + experiment.tree_text(grown, i)
        trees.append(dict(index=i, caption=caption, page=str(experiment.tree_page(grown, i)), text=text))
    return trees
