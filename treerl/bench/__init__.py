"""Benchmarks: one file a suite, each a generator of rows (see `measure.row`)."""
from treerl.bench import devices, learner, sampler, step

SUITES = {"sampler": sampler.rows, "learner": learner.rows, "step": step.rows, "devices": devices.rows}
