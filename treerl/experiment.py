"""An experiment built from its config: what growing trees and evaluating need, training aside."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from treerl import draw, learner, masked, profiling, prompts as P, rewards, sharding, step as S, tasks, tree as T
from treerl.checkpoint import Checkpoints, abstract
from treerl.config import check
from treerl.draw import why
from treerl.errors import UserError
from treerl.evaluate import majority_vote, pass_at_k, weighted_vote
from treerl.graders import FAULTS
from treerl.models import sources, weights
from treerl.tokenizers import TextTokenizer
from treerl.workdir import read_config


class Grown(NamedTuple):
    """Trees grown and graded, on the host."""

    tree: T.Tree  # B in front
    reward: np.ndarray  # [B, L] float32
    advantage: np.ndarray  # [B, S, K] float32; of leaf credit, the mean over the leaves below a cell
    forks: np.ndarray  # [B] int32
    restarts: np.ndarray  # [B] int32, lines that began at the prompt because a slot was free
    pruned: np.ndarray  # [B] int32
    prompt: np.ndarray  # [B, P] int32, as the policy read it: in an environment, with the first observation
    length: np.ndarray  # [B] int32, of the prompt
    candidates: tuple | None = None  # what was likeliest in each cell, see `learner.cell_candidates`
    chance: np.ndarray | None = None  # [B, K] float32, of a right answer, by which a review of `pruning.survival` chose lines
    knobs: dict | None = None  # the numbers they were grown by, and `share` at their step


class Experiment:
    """A config built: its task, its functions compiled for the mesh, its held-out examples.

    Args:
      devices: None is all there are. Nothing is put on them before it is needed, so they may be described ones.
    """

    def __init__(self, config: ConfigDict, devices=None):
        check(config)
        self.config = config
        self.mesh = sharding.make_mesh(**config.mesh, devices=devices)
        data_dir = os.path.expanduser(config.data_dir)
        source = config.model.source
        models = os.path.join(data_dir, "models")
        self.folder = sources.resolve(os.path.expanduser(source), models) if source else None  # of a published model
        tokenizer = TextTokenizer(self.folder) if self.folder else None
        self.task = tasks.make(config.task, data_dir, config.text, tokenizer, config.environment)
        self.fns = S.make_fns(config, self.task, self.mesh, folder=self.folder)
        trees, whole = sharding.trees(self.mesh), sharding.replicated(self.mesh)
        self.trees = trees
        self.shardings = shardings = S.state_shardings(self.fns)
        if config.text.right and (self.fns.host is None or config.text.right not in self.fns.host.names):
            raise UserError(f"text.right={config.text.right!r} is none of text.graders; name one of them, or set it to ''.")
        self._split = self.fns.host is not None and config.text.grading == "split"

        def program(function, takes, gives, **options):
            return jax.jit(functools.partial(function, self.fns, **options), in_shardings=takes, out_shardings=gives)

        self._whole_step, self._sample_half, self._learn_half = (
            jax.jit(
                functools.partial(function, self.fns),
                in_shardings=takes,
                out_shardings=gives,
                donate_argnums=donated,
                keep_unused=True,  # what a half does not read, such as moments, takes memory all the same
            )
            for function, takes, gives, donated in (
                (S.train_step, (shardings, trees, whole), (shardings, whole), 0),
                (S.sample_half, (shardings, trees, whole), trees, ()),
                (S.learn_half, (shardings, trees, trees, whole), (shardings, whole), 0),
            )
        )
        self._answers = jax.jit(rewards.answers, out_shardings=trees)
        self._grade = program(S.grade, (trees, trees), trees)
        self._evaluate = program(
            S.evaluate_sample, (shardings.params, shardings.quality, trees, whole, whole), trees,
            samples=config.evaluation.samples,
        )  # fmt: skip
        self._gather = jax.jit(lambda x: x, out_shardings=whole)  # every process has all
        self._grow = program(grow, (shardings, trees, whole, whole, whole), trees)
        self._credit = program(credit, (shardings, trees, trees, whole), trees)
        self._candidates = program(candidates, (shardings, trees, whole), trees)
        self.splits = {"": self.task.heldout} | ({} if self.task.novel is None else {"novel/": self.task.novel})
        self._starts, shards = {}, sharding.tree_shards(self.mesh)
        for name, examples in self.splits.items():
            count = min(config.evaluation.examples, len(examples))
            batch = min(config.evaluation.batch, count)
            if batch % shards or count % batch:
                raise UserError(
                    f"evaluation.batch={batch} must divide over {shards} shards and into the {count} {name.rstrip('/') or 'held-out'} "
                    "examples used; change evaluation.batch or evaluation.examples."
                )
            self._starts[name] = range(0, count, batch)
        self.programs = []  # those of a training step that `compile_step` compiled

    @functools.cached_property
    def knobs(self) -> dict:
        """The config's numbers, on the mesh."""
        return sharding.place(S.make_knobs(self.config, self.task), sharding.replicated(self.mesh))

    @functools.cached_property
    def batches(self) -> dict[str, list]:
        """The held-out prompts of `evaluate` in batches, on the mesh, by what is put in front of their scores' names."""
        batch = lambda examples, part: self.prompts([examples[i] for i in part], np.asarray(part))
        return {
            name: [batch(self.splits[name], range(start, start + starts.step)) for start in starts] for name, starts in self._starts.items()
        }

    def prompts(self, examples, index):
        """Examples as prompts on the mesh; each process reads and encodes those of its own devices."""
        rows = sharding.own_rows(self.trees, len(index))
        own = P.encode(self.task, [examples[i] for i in rows.tolist()], index[rows], self.config.sampler.prompt_length)
        return sharding.place(own, self.trees, rows, len(index))

    def lessons(self, examples, index):
        """What `step.supervised_step` takes for examples, on the mesh, see `prompts.encode_lessons`."""
        rows = sharding.own_rows(self.trees, len(index))
        own = P.encode_lessons(self.task, [examples[i] for i in rows.tolist()], index[rows], self.config.sampler, self.fns.window)
        return sharding.place(own, self.trees, rows, len(index))

    def prompts_shape(self):
        """The prompts of a step as ShapeDtypeStructs with shardings."""
        one = P.encode(self.task, [self.task.train[0]], np.arange(1), self.config.sampler.prompt_length)
        one = jax.tree.map(lambda x: np.repeat(x, self.config.sampler.prompts, axis=0), one)
        return sharding.shapes(one, self.trees)

    def faults(self) -> dict[str, int]:
        """How many episodes ended so far because a game on this process's host failed, by kind; {} of JAX."""
        return {} if self.fns.environment is None else self.fns.environment.faults()

    def close(self) -> None:
        """Ends the processes of an environment on the host; what plays in it later starts others."""
        if self.fns.environment is not None:
            self.fns.environment.close()

    def stream(self) -> P.Stream:
        """The training examples of this seed."""
        return P.Stream(self.task.train, self.config.seed)

    def init(self, seed: int):
        """The state at the start, with the published model's parameters if there is one."""
        if self.folder is None:
            start = jax.jit(functools.partial(S.init_state, self.fns), static_argnums=0, out_shardings=self.shardings)
            return start(seed)
        loaded = weights.load(self.folder, self.fns.model.plain, self.mesh)
        start = functools.partial(S.init_state, self.fns, seed)
        return jax.jit(start, out_shardings=self.shardings, donate_argnums=0)(loaded)

    def state_shape(self):
        """The state as ShapeDtypeStructs with shardings, to restore into."""
        return abstract(jax.eval_shape(lambda: S.init_state(self.fns, 0)), self.shardings)

    def grade(self, tree: T.Tree, prompts) -> rewards.Graded:
        """Rewards of trees: on the device, or on this host, see `text.grading`."""
        if self._split:
            return rewards.between(self.fns.host, *self._answers(tree), prompts.data)
        return self._grade(tree, prompts)

    def train_step(self, state, prompts, knobs, check=lambda: None):
        """`step.train_step`, as one program, or as two with the host's graders between them; the state is donated.

        Args:
          check: called before and after the host grades; what it raises leaves the state as it was.
        """
        if not self._split:
            return self._whole_step(state, prompts, knobs)
        sampled = self._sample_half(state, prompts, knobs)
        check()
        graded = self.grade(sampled.tree, prompts)
        check()
        return self._learn_half(state, sampled, graded, knobs)

    def compile_step(self) -> profiling.Memory:
        """Compiles the training step, so that calls run what was compiled; the memory it takes."""
        state, prompts = self.state_shape(), self.prompts_shape()
        knobs = sharding.shapes(S.make_knobs(self.config, self.task), sharding.replicated(self.mesh))
        with profiling.out_of_memory():
            if not self._split:
                self._whole_step = self._whole_step.lower(state, prompts, knobs).compile()
                self.programs = [self._whole_step]
            else:
                sampled = jax.eval_shape(self._sample_half, state, prompts, knobs)
                graded = rewards.shapes(*sampled.tree.leaf.shape[:2], len(self.fns.host.names))
                self._sample_half = self._sample_half.lower(state, prompts, knobs).compile()
                self._learn_half = self._learn_half.lower(state, sampled, graded, knobs).compile()
                self.programs = [self._sample_half, self._learn_half]
        return profiling.memory(*self.programs)

    def samples(self, shown: dict) -> list[dict]:
        """The `samples` of a step's metrics as text: for each tree its prompt, and answers with what they are worth."""
        decode, shown = self.task.tokenizer.decode, jax.device_get(shown)
        names = self.fns.host.names if self.fns.host is not None else ()

        number = lambda x: float(x) if np.isfinite(x) else None  # as in metrics.jsonl

        def answer(b, i):
            line = dict(text=decode(shown["answer"][b, i, : shown["length"][b, i]]), reward=number(shown["reward"][b, i]))
            scores = {name: number(x) for name, x in zip(names, shown["parts"][b, i])}
            fault = FAULTS[shown["fault"][b, i]]
            return line | (dict(scores=scores) if scores else {}) | (dict(fault=fault) if fault else {})

        return [
            dict(
                prompt=self.task.tokenizer.decode_prompt(prompt[:length]),
                answers=[answer(b, i) for i in range(shown["length"].shape[1]) if shown["length"][b, i]],
            )
            for b, (prompt, length) in enumerate(zip(shown["prompt"], shown["prompt_length"]))
        ]

    @profiling.out_of_memory("lower evaluation.batch or evaluation.samples, or set sampler.pool_dtype=bfloat16.")
    def evaluate(self, state, seed: int = 0, check=lambda: None) -> dict:
        """Scores on held-out examples, from n samples of each.

        Args:
          check: called between batches; what it raises ends the evaluation.

        Returns:
          pass@k, unbiased, for k = 1, 2, 4, ... up to n; majority@n, the share of examples whose most frequent answer
          is right; with a quality head weighted@n, where samples vote by the rank of their scores; with graders on the
          host heldout/reward and heldout/NAME, their mean scores. An answer is right where the score of the grader
          text.right, else the reward, is above 0.5; an episode where its reward is the highest there is, 1. In an environment
          also heldout/reward, no majority, and all of the split of another distribution, as novel/NAME.
        """
        found = {}
        for split, batches in self.batches.items():
            found |= named(split, self._scores(batches, state, seed, check))
        return found

    def _scores(self, batches: list, state, seed: int, check) -> dict:
        """See `evaluate`."""
        key = jax.random.key(seed)

        def scores_of(batch, tree, known):
            graded = self.grade(tree, batch)
            return self._gather(dict(known, reward=graded.reward, answer=graded.key, parts=graded.parts))

        gathered, waiting = [], None
        for batch in batches:  # the host grades one while the device samples the next
            check()
            sampled = batch, *self._evaluate(state.params, state.quality, batch, key, self.knobs)
            gathered += [scores_of(*waiting)] if waiting else []
            waiting = sampled
        gathered.append(scores_of(*waiting))
        return self.summarise({name: np.concatenate([x[name] for x in jax.device_get(gathered)]) for name in gathered[0]})

    def summarise(self, found: dict) -> dict:
        """Scores, as of `evaluate`, of numpy arrays [N, n] of samples: valid, reward, answer, parts and perhaps score."""
        n, acts = found["reward"].shape[1], self.fns.environment is not None
        score, names = found["reward"], self.fns.host.names if self.fns.host is not None else ()
        if self.config.text.right and names:
            score = found["parts"][..., names.index(self.config.text.right)]
        right = score > self.task.right
        powers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
        scores = {f"pass@{k}": pass_at_k(right.sum(axis=1), n, k) for k in powers}
        elected = lambda winner: float(np.mean((winner >= 0) & right[np.arange(len(right)), winner]))
        if not acts:
            scores[f"majority@{n}"] = elected(majority_vote(found["answer"], found["valid"]))
        if names or acts:
            scores["heldout/reward"] = float(masked.mean(found["reward"], found["valid"]))
            scores |= {f"heldout/{x}": float(masked.mean(found["parts"][..., i], found["valid"])) for i, x in enumerate(names)}
        if "score" in found:
            scores[f"weighted@{n}"] = elected(weighted_vote(found["answer"], found["score"], found["valid"]))
        return scores

    def grow(self, state, examples: list[dict], *, step: int, seed: int = 0, knobs: dict | None = None, candidates: bool = False) -> Grown:
        """Grows and grades a tree for each example by the run's own rules, as they are at `step`.

        An example's place in the list is part of its random key; the number of devices is not.

        Args:
          knobs: numbers in place of the config's, by the names in `self.knobs`: {"tau_abs": 0.01}. Nothing is compiled for them.
          candidates: also ask the policy what else it might have drawn; not of agents that read a fresh prompt every turn.
        """
        if unknown := set(knobs or ()) - set(self.knobs):
            raise UserError(f"knobs has no {min(unknown)!r}; known are {', '.join(self.knobs)}.")
        given = {name: np.asarray(x, self.knobs[name].dtype) for name, x in (knobs or {}).items()}
        numbers = self.knobs | sharding.place(given, sharding.replicated(self.mesh))
        shards = sharding.tree_shards(self.mesh)
        index = np.arange(-(-len(examples) // shards) * shards)  # repeats fill the last shard
        prompts = self.prompts([examples[i % len(examples)] for i in index], index)
        sampled = self._grow(state, prompts, jax.random.key(seed), jnp.int32(step), numbers)
        graded = self.grade(sampled.tree, prompts)
        found = self._credit(state, sampled, graded, numbers)
        stats, read = sampled.stats, sampled.prompts
        more = self._candidates(state, sampled, numbers) if candidates and sampled.contexts is None else None
        chance = sampled.seen.record.posterior if self.fns.quality is not None else None
        every = self._gather(
            Grown(sampled.tree, graded.reward, found, stats.forks, stats.restarts, stats.pruned, read.token, read.length, more, chance)
        )
        every, used = jax.device_get((every, numbers))
        used["share"] = used["share"][np.sum(used["share_from"] <= step) - 1]
        return jax.tree.map(lambda x: x[: len(examples)], every)._replace(knobs=used)

    def export(self, state, folder: str, *, dtype: str | None = None) -> None:
        """Writes the policy as a model in Hugging Face's format, adapters merged; see `weights.save`."""
        model = self.fns.model
        params = jax.jit(model.fold)(state.params) if model.config.lora_rank else state.params
        weights.save(folder, params, model.plain, self.folder, dtype=dtype)

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
            raise UserError(f"--prompt={text!r} has {length} tokens and this run reads at most {limit}; give a shorter --prompt.")
        return example

    def read_text(self, grown: Grown, i: int) -> str:
        """What the model read before tree i."""
        return self.task.tokenizer.decode_prompt(grown.prompt[i, : grown.length[i]])

    def tree_text(self, grown: Grown, i: int) -> str:
        """Tree i as text: its forks and its leaves."""
        tree, decode, view = self._view(grown, i)
        return draw.format_tree(tree, decode, **view) + "\n\n" + draw.format_leaves(tree, decode, **view)

    def tree_page(self, grown: Grown, i: int, **more) -> draw.Page:
        """Tree i as a page to walk about in; `more` is what else `draw.explore_tree` takes."""
        tree, decode, view = self._view(grown, i)
        possible = {}  # after a token, or the prompt
        if grown.candidates is not None:
            tokens, chances = (x[i] for x in grown.candidates)
            for s, k in zip(*np.nonzero(chances[..., 0] > 0)):
                above = None if s == 0 else (int(s) - 1, int(tree.parent[s, k]))
                possible[above] = list(zip(tokens[s, k].tolist(), chances[s, k].tolist()))
        known = dict(stops=self._stops(tree, grown, i, decode), refusals=self._refusals(tree, grown, i, possible))
        return draw.explore_tree(tree, decode, prompt=self.read_text(grown, i), candidates=possible, **view, **known | more)

    def _stops(self, tree: T.Tree, grown: Grown, i: int, read) -> dict:
        """Why lines of tree i were pruned, where that is known: (row, column) -> words."""
        b, p, given = self.config.branching, self.config.pruning, grown.knobs
        if grown.chance is not None:
            ends = zip(*np.nonzero(tree.used & (tree.end == T.DROPPED)))
            return {(int(s), int(k)): f"dropped at detection, chance of a right answer {grown.chance[i, k]:.2f}" for s, k in ends}
        if (b.rule, p.rule) != ("lookahead", "similarity") or self.fns.environment is not None:
            return {}
        return why.similar(tree, windows=tuple(p.windows), tau_ed=float(given["tau_ed"]), eos=given["eos"], read=read)

    def _refusals(self, tree: T.Tree, grown: Grown, i: int, possible: dict) -> dict:
        """Why likely tokens of tree i were not taken, where that is known: as `why.not_taken`."""
        b, given = self.config.branching, grown.knobs
        turns = self.fns.environment is not None and b.at == "turn"
        known = b.rule == "lookahead" and self.config.pruning.rule in ("none", "similarity") and not turns
        if not known or given["temperature"] != 1:
            return {}
        return why.not_taken(
            tree, possible, tau_abs=float(given["tau_abs"]), tau_rel=float(given["tau_rel"]), max_children=b.max_children,
            forks=round(float(given["share"] * np.float32(tree.token.shape[1]))) > 0, whole=not grown.restarts[i],
        )  # fmt: skip

    def _view(self, grown: Grown, i: int):
        """What pictures of tree i take: it, how to read tokens, and keyword arguments."""
        view = dict(reward=grown.reward[i], advantage=grown.advantage[i], right=self.task.right)
        return jax.tree.map(lambda x: x[i], grown.tree), self.task.tokenizer.decode, view


def named(split: str, scores: dict) -> dict:
    """Scores with the split in front of their names: pass@1, novel/pass@1; heldout/reward, novel/reward."""
    return {split + (key.removeprefix("heldout/") if split else key): value for key, value in scores.items()}


def grow(fns: S.Fns, state, prompts, key, step, knobs) -> S.Sampled:
    """Grows the trees of a batch of prompts; traceable."""
    return S.rollout(fns, state.params, prompts, key, step, knobs, quality=state.quality)


def credit(fns: S.Fns, state, sampled: S.Sampled, graded: rewards.Graded, knobs):
    """Credit of the cells of graded trees, [B, S, K]; traceable."""
    tree, _, seen, prompts, contexts = sampled
    shaped = S.shape_reward(fns, tree, graded.reward)
    found, *_ = S.estimate(
        fns, state, tree, prompts, shaped, knobs, graded=graded.reward, chance=S.survival_chance(fns, seen), contexts=contexts
    )
    if found.ndim == 3:
        return found
    return jax.vmap(lambda t, x: T.up(t, x) / jnp.maximum(T.leaf_count(t), 1))(tree, found)


def candidates(fns: S.Fns, state, sampled: S.Sampled, knobs):
    """Likeliest tokens of every kept cell and their probabilities, [B, S, K, 5]; traceable."""
    count = min(5, fns.model.config.vocab)
    return learner.cell_candidates(fns, state.params, sampled.tree, sampled.prompts, knobs["temperature"], count=count)


def load(workdir: epath.PathLike, *, best: bool = False) -> tuple[Experiment, object, int]:
    """Rebuilds the experiment of a workdir on this machine's devices and restores its latest (or best) checkpoint.

    On a number of devices that the run's own mesh does not fit, the mesh is data=-1, fsdp=1, tensor=1.

    Returns:
      (experiment, state, step).
    """
    config = ConfigDict(read_config(workdir))
    try:
        sharding.make_mesh(**config.mesh)
    except UserError:
        config.mesh = dict(data=-1, fsdp=1, tensor=1)
    experiment = Experiment(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    restore = checkpoints.restore_best if best else checkpoints.restore_latest
    restored = restore(experiment.state_shape())
    if restored is None:
        raise UserError(f"workdir={workdir} has no checkpoint yet; wait for the first or train longer.")
    step, state, _ = restored
    return experiment, state, step
