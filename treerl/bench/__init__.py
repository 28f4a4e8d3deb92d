"""Benchmarks: one file a suite, each a generator of rows (see `measure.row`)."""

import jax

from treerl.bench import checkpoint, devices, environments, estimators, growth, learner, meshes, peers, pruning, sampler, scaling, step
from treerl.bench.shapes import SHAPES

SUITES = {
    s.__name__.rpartition(".")[2]: s.rows
    for s in (sampler, learner, step, growth, estimators, pruning, devices, scaling, checkpoint, meshes, environments)
}
SHAPED = ("sampler", "learner", "step")  # suites that measure any of SHAPES


def run(suite: str, shapes: list[str] = (), *, beside: bool = False):
    """Yields the rows of a suite, of each shape or else of this machine's default sizes.

    Args:
      beside: measure peers, too (see `peers`), those of torch before anything of JAX.
    """
    if suite not in SHAPED:
        yield from SUITES[suite]()
        return
    shapes = shapes or [None]
    found = {shape: peers.outside(suite, shape) for shape in shapes} if beside and suite in peers.OUTSIDE else {}
    for shape in shapes:
        others = dict(beside=beside, outside=found.get(shape)) if suite in peers.OUTSIDE else {}
        yield from SUITES[suite](shape=shape, **others)
        jax.clear_caches()  # programs of the last shape, and what they hold
