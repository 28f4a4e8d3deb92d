"""Logits of two rollouts of one tree in the three ways that treerl computes them.

tokens [2, T]: a prompt, then `shared` tokens that are the same in both, then each one's own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from treerl import attention
from treerl.models.policy import make_policy, packed_hidden


def forward(model, params, tokens, prompt, shared):
    """Logits [2, T, V] of the rollouts as rows of their own."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    module = model.merge(params)
    hidden, _ = module(jnp.asarray(tokens), position, attention.causal(jnp.full((2,), position.shape[1])))
    return module.logits(hidden)


def stepped(model, params, tokens, prompt, shared):
    """The same by prefill and steps through the pool, slot 1 born from slot 0 after the shared tokens.

    From the last token of the prompt on.
    """
    rows = tokens.shape[1] - prompt
    policy = make_policy(model, params, slots=2, rows=rows)
    padded = jnp.asarray(np.pad(tokens[:1, :prompt], ((0, 0), (0, 2))))  # right-padded
    column = np.array([[0] * rows, [0] * shared + [1] * (rows - shared)])

    def step(cache, row):
        token = jnp.asarray(tokens)[None, :, prompt + jnp.maximum(row, 0)]
        path = jnp.where(jnp.arange(rows) <= row, column, -1)[None].astype(jnp.int32)
        write = jnp.stack([row >= 0, row >= shared])[None]
        logits, cache = policy.decode(cache, token, jnp.full((1, 2), row), path, write, rows)
        return cache, logits[0]

    _, found = jax.lax.scan(step, policy.prefill(padded, jnp.array([prompt])), jnp.arange(-1, rows))
    return found.swapaxes(0, 1)


def packed(model, params, tokens, prompt, shared):
    """The same from one bin: prompt and shared tokens once, then slot 0's own, then slot 1's, then padding."""
    trunk = prompt + shared
    own = tokens.shape[1] - trunk
    token = np.concatenate([tokens[0], tokens[1, trunk:], [0, 0]])
    position = np.concatenate([np.arange(trunk + own), np.arange(trunk, trunk + own), [0, 0]])
    stop = np.concatenate([np.full(trunk, trunk + 2 * own), np.full(own, trunk + own), np.full(own, trunk + 2 * own), [0, 0]])
    module, hidden = packed_hidden(model, params, *(jnp.asarray(x, jnp.int32)[None] for x in (token, position, stop)))
    logits = module.logits(hidden)[0]
    return jnp.stack([logits[: trunk + own], jnp.concatenate([logits[:trunk], logits[trunk + own : -2]])])
