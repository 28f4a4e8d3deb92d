"""Countdown on a laptop: a small character model learns to reach a target with given numbers.

    bash launch/local.sh
"""
from treerl.config import default, parse_arg


def get_config(arg: str | None = None):
    """The default experiment; arg: `seed=N`."""
    given = parse_arg(arg, seed=0)
    config = default()
    config.seed = given["seed"]
    return config
