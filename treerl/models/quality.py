"""A quality head: the chance, from a hidden state of the policy, that an answer will be right.

A small network beside the policy. It never changes it: hidden states come in without gradient.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from treerl import masked


class _Net(nnx.Module):
    def __init__(self, width: int, inner: int, rngs: nnx.Rngs):
        self.inner = nnx.Linear(width, inner, rngs=rngs)
        self.outer = nnx.Linear(inner, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        return self.outer(jax.nn.gelu(self.inner(x)))[..., 0]


class QualityHead:
    """Two layers over the normalised last hidden state (ARRoL, arXiv 2603.24840: a two-layer MLP); starts at score 0.

    Args:
      width: D of the policy. inner: units between the layers (the paper's number is not known).
    """

    def __init__(self, width: int, inner: int):
        self._sizes = width, inner
        self._definition, self._state = nnx.split(nnx.eval_shape(lambda: _Net(*self._sizes, nnx.Rngs(0))))

    def init(self, key: jax.Array):
        """Draws parameters: nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(_Net(*self._sizes, nnx.Rngs(params=key))))

    def score(self, params, hidden: jax.Array) -> jax.Array:
        """Logit of a right answer: hidden [..., D] -> float32 [...]; no gradient reaches hidden."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        with jax.default_matmul_precision("highest"):
            return nnx.merge(self._definition, state)(jax.lax.stop_gradient(hidden).astype(jnp.float32))

    def loss(self, params, hidden: jax.Array, right: jax.Array, counts: jax.Array) -> jax.Array:
        """Mean binary cross-entropy where it counts, 0 if nowhere: hidden [..., D], right and counts bool [...]."""
        score = self.score(params, jnp.where(counts[..., None], hidden, 0))
        return masked.mean(optax.sigmoid_binary_cross_entropy(score, right.astype(jnp.float32)), counts)
