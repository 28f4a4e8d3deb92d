"""Benchmarks: one file a suite, each a generator of rows (see `measure.row`)."""
from treerl.bench import checkpoint, devices, environments, estimators, learner, meshes, pruning, sampler, scaling, step

SUITES = {s.__name__.rpartition(".")[2]: s.rows for s in (sampler, learner, step, estimators, pruning, devices, scaling, checkpoint, meshes, environments)}
