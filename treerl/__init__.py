"""treerl: reinforcement learning of language models with tree rollouts, in JAX."""
