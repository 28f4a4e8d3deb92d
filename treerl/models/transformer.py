"""A decoder-only transformer of the Qwen / Llama family in Flax NNX.

One forward serves prefill, decoding and the packed learner: what differs is the `attend`
function that each passes in (`treerl.attention`). The blocks are stacked along a leading layer
axis and scanned, so compile time does not grow with depth.
"""
import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from treerl.errors import UserError


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and switches of a model; the sizes of known models are in `presets`."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width of the gated MLP
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False  # Qwen3
    qkv_bias: bool = False  # Qwen2
    tied: bool = True  # output projection is the embedding
    dtype: str = "float32"  # of activations, and of weights as they are used
    param_dtype: str = "float32"  # of weights as they are stored and updated

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; "
                "make it one."
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary positions need it even.")

    def products(self):
        """A context for matrix products: float32 means float32, not TF32 or passes of bfloat16."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else None)


def _weight(rngs, config, shape, axes, fan_in):
    """A parameter, normal with standard deviation fan_in^-1/2, with its logical axes."""
    value = jax.random.normal(rngs.params(), shape, config.param_dtype) * fan_in**-0.5
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, size, config, axes=("norm",)):
        self.scale = nnx.Param(jnp.ones((size,), config.param_dtype), axes=axes)
        self.eps = config.norm_eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rotary(position: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles: position [B, T] -> two of float32 [B, T, 1, size / 2].

    Computed once a forward, behind a barrier: fused into every use they cost more than the layers.
    """
    half = size // 2
    angle = position[..., None, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, halves convention: x [B, T, H, d], angles of `rotary`."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, d = config, config.width
        self.config = config
        self.attention_norm, self.mlp_norm = RMSNorm(d, c), RMSNorm(d, c)
        # of each key/value head: the queries that share it, its keys, its values; one product
        group, names = c.heads // c.kv_heads + 2, ("kv_heads", "group", "head_dim")
        self.qkv = _weight(rngs, c, (d, c.kv_heads, group, c.head_dim), ("embed", *names), d)
        out_in = c.heads * c.head_dim
        self.out = _weight(rngs, c, (c.heads, c.head_dim, d), ("heads", "head_dim", "embed"), out_in)
        self.gate_up = _weight(rngs, c, (d, 2, c.hidden), ("embed", "gate_up", "mlp"), d)
        self.down = _weight(rngs, c, (c.hidden, d), ("mlp", "embed"), c.hidden)
        if c.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((c.kv_heads, group, c.head_dim), c.param_dtype), axes=names)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c), RMSNorm(c.head_dim, c)

    def __call__(self, x, angles, attend, cache):
        """x [B, T, D], angles of `rotary` -> (x, cache) of this layer."""
        with self.config.products():
            return self._forward(x, angles, attend, cache)

    def _forward(self, x, angles, attend, cache):
        c, h = self.config, self.attention_norm(x)
        qkv = jnp.einsum("btd,dgrh->btgrh", h, self.qkv[...])
        if c.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        q, k, v = rearrange(qkv[..., :-2, :], "b t g r h -> b t (g r) h"), qkv[..., -2, :], qkv[..., -1, :]
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        attended, cache = attend(q, k, v, cache)
        x = x + jnp.einsum("bthk,hkd->btd", attended, self.out[...])
        h = self.mlp_norm(x)
        h = jnp.einsum("btd,dch->btch", h, self.gate_up[...])
        return x + (jax.nn.silu(h[..., 0, :]) * h[..., 1, :]) @ self.down[...], cache


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm and output projection."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        shape, axes = (config.vocab, config.width), ("vocab", "embed")
        self.embedding = _weight(rngs, config, shape, axes, config.width)
        if not config.tied:
            self.unembedding = _weight(rngs, config, shape, axes, config.width)
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda r: Block(config, r)))
        self.blocks = stack(rngs)
        self.final_norm = RMSNorm(config.width, config)

    def embed(self, token):
        """token [B, T] -> [B, T, D]."""
        return self.embedding[...][token].astype(self.config.dtype)

    def angles(self, position):
        """Rotary angles of positions [B, T], for the blocks."""
        return rotary(position, self.config.head_dim, self.config.rope_theta)

    def __call__(self, token, position, attend, caches=None, *, remat=False):
        """Runs all layers by a scan.

        Args:
          token, position: [B, T] int32. attend: see `treerl.attention`.
          caches: pytree with a leading layer axis, or None.
          remat: recompute each layer in the backward pass instead of storing it.

        Returns:
          (hidden [B, T, D], normalised and ready for `logits`; caches with a layer axis).
        """
        definition, weights = nnx.split(self.blocks)
        angles = self.angles(position)

        def layer(x, inputs):
            weights, cache = inputs
            return nnx.merge(definition, weights)(x, angles, attend, cache)

        layer = jax.checkpoint(layer) if remat else layer
        x, caches = jax.lax.scan(layer, self.embed(token), (weights, caches))
        return self.final_norm(x), caches

    def layers(self):
        """The blocks one by one, for a loop that must not slice stacked weights every step.

        Returns:
          (apply(weights, x, angles, attend, cache) -> (x, cache), list of the layers' weights).
        """
        definition, weights = nnx.split(self.blocks)
        apply = lambda weights, *args: nnx.merge(definition, weights)(*args)
        return apply, [jax.tree.map(lambda w: w[i], weights) for i in range(self.config.layers)]

    def logits(self, hidden):
        """hidden [..., D] -> float32 [..., V]."""
        table = self.embedding if self.config.tied else self.unembedding
        with self.config.products():
            return jnp.einsum("...d,vd->...v", hidden, table[...], preferred_element_type=jnp.float32)


class Model:
    """The transformer split once: pure functions of a nested dict of parameters."""

    def __init__(self, config: TransformerConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
        self._definition, self._state = nnx.split(abstract)

    def init(self, key: jax.Array):
        """Draws parameters: nested dict of arrays of `param_dtype`."""
        return nnx.to_pure_dict(nnx.state(Transformer(self.config, nnx.Rngs(params=key))))

    def axes(self):
        """Logical axis names of every parameter, as a nested dict of tuples.

        Stacked blocks have one axis more, in front, than their names.
        """
        names = lambda p: p.get_metadata("axes")
        return nnx.to_pure_dict(jax.tree.map(names, self._state, is_leaf=lambda p: isinstance(p, nnx.Param)))

    def shapes(self):
        """The parameters as a nested dict of `jax.ShapeDtypeStruct`."""
        return nnx.to_pure_dict(self._state)

    def merge(self, params) -> Transformer:
        """The module over these parameters, cast to the dtype of the activations."""
        params = jax.tree.map(lambda p: p.astype(self.config.dtype), params)
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._definition, state)
