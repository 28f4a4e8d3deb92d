"""A decoder-only transformer of the Qwen, Llama and Gemma families in Flax NNX.

One forward serves prefill, decoding and the packed learner: what differs is the `attend`
function that each passes in (`treerl.attention`). The blocks are stacked along a leading layer
axis. Where the backward pass stores little of a layer they are scanned, and compile time does not
grow with depth; elsewhere they run one by one, see `Transformer.__call__`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from treerl import sharding
from treerl.errors import UserError
from treerl.kernels import products


class Llama3Scaling(NamedTuple):
    """How Llama 3.1 and later slow long rotary wavelengths down, see `frequencies`."""

    factor: float  # wavelengths far above `original` grow by it
    low: float  # wavelengths above original / low grow by the whole factor ...
    high: float  # ... and below original / high not at all
    original: int  # tokens of the context before the extension


LORA = "_lora"  # ends the names of adapters
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and switches of a model; the sizes of known models are in `presets`, `families` reads a config.json."""

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
    rope_scaling: Llama3Scaling | None = None  # Llama 3.1 and later
    activation: str = "silu"  # of the MLP's gate, see ACTIVATIONS; gelu_tanh: Gemma
    embed_scale: bool = False  # embeddings times sqrt(width) (Gemma)
    norm_plus_one: bool = False  # norms multiply by 1 + their weights (Gemma)
    post_norms: bool = False  # norms after attention and MLP too (Gemma)
    query_scalar: float | None = None  # scores are divided by its root; None: head_dim (Gemma)
    local: tuple[bool, ...] = ()  # which layers see only the last `window` positions (Gemma); (): none
    window: int = 0  # positions that a local layer sees, the query's own included
    local_rope_theta: float = 10_000.0  # rope_theta of local layers; never scaled
    dtype: str = "float32"  # of activations, and of weights as they are used
    param_dtype: str = "float32"  # of weights as they are stored and updated
    lora_rank: int = 0  # train a change of this rank of every product in the blocks, and nothing else; 0: all weights
    lora_alpha: float = 32.0  # the change is lora_alpha / lora_rank times the product of its factors

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; make it one.")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary positions need it even.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.activation={self.activation!r} is unknown; known are {', '.join(ACTIVATIONS)}.")
        if self.local and len(self.local) != self.layers:
            raise UserError(
                f"model.local says which of {len(self.local)} layers are local, model.layers={self.layers}; give one entry a layer."
            )
        if any(self.local) and self.window < 1:
            raise UserError(f"model.window={self.window} cannot work with local layers; set it to 1 or more.")

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
        start = jnp.zeros if config.norm_plus_one else jnp.ones
        self.scale = nnx.Param(start((size,), config.param_dtype), axes=axes)
        self.eps, self.offset = config.norm_eps, config.norm_plus_one

    def numbers(self):
        """(scale, eps, offset) as `products.add_norm` wants them."""
        return self.scale[...], self.eps, self.offset

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (y * (1 + scale if self.offset else scale)).astype(x.dtype)


def frequencies(size: int, theta: float, scaling: Llama3Scaling | None = None) -> jax.Array:
    """Radians a position by which each pair of a head's dimensions turns: float32 [size / 2].

    With `scaling`, wavelengths above original / low are `factor` times longer and those between there and
    original / high partly, linear in original / wavelength (`_compute_llama3_parameters` of transformers).
    """
    half = size // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    turns = scaling.original * frequency / (2 * jnp.pi)  # within the original context
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotary(position: jax.Array, frequency: jax.Array, reach: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles: position [B, T], frequency [d / 2] -> two of float32 [B, T, 1, d / 2].

    Read from a table of all positions below `reach` (static), behind a barrier: fused into every use, cosines cost more
    than the layers, and on a CPU XLA takes barriers away.
    """
    angle = jnp.arange(reach)[:, None] * frequency
    table = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return jax.lax.optimization_barrier(tuple(table[:, position, None]))


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, halves convention: x [B, T, H, d], angles of `rotary`."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


PRODUCT = "product"  # checkpoint name of the outputs of matrix products and of attention


def _products(primitive, *args, **params) -> bool:
    """Whether an output is stored under remat=products; backward passes of fused attention need more than its output."""
    named = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return primitive.name in ("dot_product_attention_fwd_wrapper", "pallas_call") or named(primitive, *args, **params)


# Name -> policy: compute nothing again; all but products and attention; all but the layers' inputs.
REMAT = {"none": None, "products": _products, "layers": jax.checkpoint_policies.nothing_saveable}
ALPHABET = 64  # tokens below which a vocabulary is whole on every device


class Placed(nnx.Module):
    """A module that knows its mesh: parameters are gathered over fsdp where they are used, products lie as the rules say."""

    mesh: Mesh | None = None

    def weight(self, name: str) -> jax.Array:
        """A parameter, whole but for its part along tensor."""
        parameter = getattr(self, name)
        return sharding.constrain(parameter[...], self.mesh, *parameter.get_metadata("axes"), gathered=True)

    def place(self, x, *names) -> jax.Array:
        """An activation whose first axis are trees, or bins; `names` of the others."""
        return sharding.constrain(x, self.mesh, "trees", *names)


class Adapter(Placed):
    """A change of low rank of one product, zero at the start: LoRA, arXiv 2106.09685, section 4.1.

    Products that are one here have one adapter: queries, keys and values share their first factor, as do gate and
    up. Stored in float32 whatever param_dtype is.
    """

    def __init__(self, rngs, config, shape, axes, inputs: int, mesh: Mesh | None):
        self.mesh = mesh
        c = dataclasses.replace(config, param_dtype="float32")
        fan_in, rank = math.prod(shape[:inputs]), c.lora_rank
        self.first = _weight(rngs, c, (*shape[:inputs], rank), (*axes[:inputs], "rank"), fan_in)
        self.second = nnx.Param(jnp.zeros((rank, *shape[inputs:])), axes=("rank", *axes[inputs:]))
        self.inputs, self.scale = inputs, c.lora_alpha / rank

    def __call__(self, x):
        """x [..., *inputs] -> [..., *outputs]."""
        return jnp.tensordot(jnp.tensordot(x, self.weight("first"), self.inputs), self.weight("second"), 1) * self.scale


def change(adapter: dict, config: TransformerConfig) -> jax.Array:
    """What an adapter's parameters, stacked over layers, add to the stacked weights: float32."""
    with jax.default_matmul_precision("highest"):
        one = lambda first, second: jnp.tensordot(first, second, 1)
        return jax.vmap(one)(adapter["first"], adapter["second"]) * (config.lora_alpha / config.lora_rank)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project(config: TransformerConfig, form: str, x: jax.Array, table: jax.Array) -> jax.Array:
    """An einsum of activations and weights whose result is float32 and whose gradient is rounded to their dtype.

    Left to itself the backward pass multiplies float32 gradients: of a vocabulary, at a fraction of the speed.
    """
    with config.products():
        return jnp.einsum(form, x, table, preferred_element_type=jnp.float32)


def _project_forward(config, form, x, table):
    return project(config, form, x, table), (x, table)


def _project_backward(config, form, inputs, gradient):
    with config.products():
        _, pull = jax.vjp(functools.partial(jnp.einsum, form), *inputs)
    return pull(gradient.astype(inputs[0].dtype))


project.defvjp(_project_forward, _project_backward)


INPUTS = {"qkv": 1, "out": 2, "gate_up": 1, "down": 1}  # axes that the products of a block sum over


def in_turn(function, carry, inputs):
    """What `jax.lax.scan` computes, without a loop; gradients of inputs are joined, not summed slice by slice."""
    leaves, structure = jax.tree.flatten(inputs)
    cut = [[jnp.squeeze(x, 0) for x in jax.lax.split(leaf, (1,) * leaf.shape[0])] for leaf in leaves]
    found = []
    for each in zip(*cut):
        carry, out = function(carry, jax.tree.unflatten(structure, each))
        found.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *found)


class Block(Placed):
    """Pre-norm attention and gated MLP, each followed by a norm of its own with `post_norms`."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        c, d = config, config.width
        self.config, self.mesh = config, mesh
        self.attention_norm, self.mlp_norm = RMSNorm(d, c), RMSNorm(d, c)
        # of each key/value head: the queries that share it, its keys, its values; one product
        group, names = c.heads // c.kv_heads + 2, ("kv_heads", "group", "head_dim")
        self.qkv = _weight(rngs, c, (d, c.kv_heads, group, c.head_dim), ("embed", *names), d)
        out_in = c.heads * c.head_dim
        self.out = _weight(rngs, c, (c.heads, c.head_dim, d), ("heads", "head_dim", "embed"), out_in)
        self.gate_up = _weight(rngs, c, (d, 2, c.hidden), ("embed", "gate_up", "mlp"), d)
        self.down = _weight(rngs, c, (c.hidden, d), ("mlp", "embed"), c.hidden)
        if c.lora_rank:
            for name, inputs in INPUTS.items():
                weight = getattr(self, name)
                adapter = Adapter(rngs, c, weight.shape, weight.get_metadata("axes"), inputs, mesh)
                setattr(self, name + LORA, adapter)
        if c.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((c.kv_heads, group, c.head_dim), c.param_dtype), axes=names)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c), RMSNorm(c.head_dim, c)
        if c.post_norms:
            self.attention_out_norm, self.mlp_out_norm = RMSNorm(d, c), RMSNorm(d, c)

    def __call__(self, x, angles, attend, cache, window=None):
        """x [B, T, D], angles of `rotary` -> (x, cache) of this layer; window: see `Transformer.views`."""
        with self.config.products():
            attended, cache = attend(*self.before(x, angles), cache, window)
            return self.after(x, checkpoint_name(attended, PRODUCT)), cache

    def before(self, x, angles):
        """What is attended: x [B, T, D] -> queries [B, T, H, d], keys and values [B, T, G, d]."""
        with self.config.products():
            return self._heads(self._product(self.attention_norm(x), "qkv"), angles)

    def after(self, x, attended):
        """x [B, T, D] after attention, [B, T, H, d], and the MLP."""
        with self.config.products():
            return self._after(x, attended)

    def decode(self, x, angles, attend, cache, gate_up=None):
        """The same in kernels for GPUs, for few tokens and without gradients or adapters.

        x is (x [B, T, D], parts [n, B, T, D]): a sum that is made with the norm after it; so is the result.
        gate_up: `products.quantize` of that product's weights as [2, hidden, D]; its input is quantized too then.
        """
        with self.config.products():
            return self._decode(*x, angles, attend, cache, gate_up)

    def _decode(self, x, parts, angles, attend, cache, gate_up):
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        x, h = products.add_norm(x, parts, *self.attention_norm.numbers())
        qkv = sum(self._parts(h, "qkv")).astype(x.dtype)
        q, k, v = self._heads(qkv.reshape(*x.shape[:2], *self.qkv.shape[1:]), angles)
        attended, cache = attend(q, k, v, cache)
        parts = self._parts(attended.reshape(*x.shape[:2], -1), "out")
        parts = self.attention_out_norm(sum(parts).astype(x.dtype))[None] if c.post_norms else parts
        x, h = products.add_norm(x, parts, *self.mlp_norm.numbers(), narrow=gate_up is not None)
        if gate_up is not None:
            h = products.narrow_product(h, gate_up, x.dtype, lambda gate, up: activation(gate) * up)
        elif products.fits(flat := h.reshape(-1, c.width), c.hidden):
            h = products.gated(flat, self.weight("gate_up"), activation)
        else:
            h = jnp.tensordot(flat, self.weight("gate_up"), 1)
            h = activation(h[:, 0]) * h[:, 1]
        parts = self._parts(h.reshape(*x.shape[:-1], -1), "down")
        return (x, self.mlp_out_norm(sum(parts).astype(x.dtype))[None] if c.post_norms else parts), cache

    def _parts(self, x, name):
        """Summands of a product: x [B, T, K] -> [n, B, T, N]."""
        flat, table = x.reshape(-1, x.shape[-1]), self.weight(name).reshape(x.shape[-1], -1)
        plan = products.product_plan(flat, table.shape[1])
        parts = jnp.dot(flat, table)[None] if plan is None else products.product(flat, table, plan)
        return parts.reshape(-1, *x.shape[:-1], table.shape[1])

    def _product(self, x, name):
        """One of the block's products, with its adapter if there is one."""
        y = checkpoint_name(jnp.tensordot(x, self.weight(name), INPUTS[name]), PRODUCT)
        return y + getattr(self, name + LORA)(x) if self.config.lora_rank else y

    def _after(self, x, attended):
        c = self.config
        h = self._product(self.place(attended, None, "heads", None), "out")
        x = x + (self.attention_out_norm(h) if c.post_norms else h)
        h = self.place(self._product(self.mlp_norm(x), "gate_up"), None, None, "mlp")
        gate, up = (jnp.squeeze(x, -2) for x in jax.lax.split(h, (1, 1), axis=h.ndim - 2))
        h = self._product(ACTIVATIONS[c.activation](gate) * up, "down")
        return self.place(x + (self.mlp_out_norm(h) if c.post_norms else h), None, None)

    def _heads(self, qkv, angles):
        """Queries, keys and values of their product [B, T, G, R + 2, d]: q [B, T, H, d], k, v [B, T, G, d]."""
        c = self.config
        if c.qkv_bias:
            qkv = qkv + self.weight("qkv_bias")
        qkv = self.place(qkv, None, "kv_heads", None, None)
        q, k, v = jax.lax.split(qkv, (c.heads // c.kv_heads, 1, 1), axis=3)  # whose gradient is one array, not a sum of three
        q, k, v = (rearrange(x, "b t g r h -> b t (g r) h") for x in (q, k, v))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        if c.query_scalar not in (None, c.head_dim):
            q = q * (c.head_dim / c.query_scalar) ** 0.5  # attention divides scores by the root of head_dim
        return q, k, v


class Transformer(Placed):
    """Embedding, stacked blocks, final norm and output projection."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.config, self.mesh = config, mesh
        self.vocab = "vocab" if config.vocab >= ALPHABET else "alphabet"
        shape, axes = (config.vocab, config.width), (self.vocab, "embed")
        self.embedding = _weight(rngs, config, shape, axes, config.width)
        if not config.tied:
            self.unembedding = _weight(rngs, config, shape, axes, config.width)
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda r: Block(config, r, mesh)))
        self.blocks = stack(rngs)
        self.final_norm = RMSNorm(config.width, config)

    def embed(self, token):
        """token [B, T] -> [B, T, D]."""
        x = self.place(self.weight("embedding")[token].astype(self.config.dtype), None, None)
        # the factor too is rounded to the dtype, as transformers does
        return x * jnp.asarray(self.config.width**0.5, x.dtype) if self.config.embed_scale else x

    def angles(self, position, reach: int):
        """Rotary angles of positions [B, T], all below `reach` (static), for the global layers."""
        c = self.config
        return rotary(position, frequencies(c.head_dim, c.rope_theta, c.rope_scaling), reach)

    def views(self, position, reach: int):
        """How global layers look at positions [B, T], and how local ones do, in a model that has them.

        Args:
          reach: positions from a token's first ancestor to itself, at most (static).

        Returns:
          [(angles, window)] of one or two; windows count the positions in sight, the query's own
          included, and are None where none is as short as to hide something within `reach`.
        """
        c, all_seen = self.config, (self.angles(position, reach), None)
        if not any(c.local):
            return [all_seen]
        local = rotary(position, frequencies(c.head_dim, c.local_rope_theta), reach)
        windows = (reach, c.window) if c.window < reach else (None, None)
        return list(zip((all_seen[0], local), windows))

    def __call__(self, token, position, attend, *, remat: str = "none"):
        """Runs all layers: by a scan where little is stored of each, else one by one, since a scan copies what it stores.

        Args:
          token, position: [B, T] int32. attend: see `treerl.attention`.
          remat: what the backward pass computes again instead of having stored it, see REMAT.

        Returns:
          (hidden [B, T, D], normalised and ready for `logits`; what `attend` returned beside, with a layer axis).
        """
        definition, weights = nnx.split(self.blocks)
        views = self.views(position, token.shape[1])
        view, local = views[0], None
        if len(views) > 1:
            views = jax.tree.map(lambda *x: jnp.stack(x), *views)
            local = jnp.asarray(self.config.local, jnp.int32)

        def layer(x, inputs):
            weights, local = inputs
            angles, window = view if local is None else jax.tree.map(lambda x: x[local], views)
            return nnx.merge(definition, weights)(x, angles, attend, None, window)

        if remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[remat])
        elif self.mesh is not None and self.mesh.shape["fsdp"] > 1:  # gathered weights are not kept for the backward pass
            layer = jax.checkpoint(layer, policy=lambda primitive, *_, **__: primitive.name != "sharding_constraint")
        x, inputs = self.embed(token), (weights, local)
        if remat == "layers":
            x, kept = jax.lax.scan(layer, x, inputs)
        else:
            x, kept = in_turn(jax.jit(layer), x, inputs)
        return self.final_norm(x), kept

    def layers(self):
        """The blocks one by one, for a loop that must not slice stacked weights every step.

        Returns:
          (block(weights) -> Block, list of the layers' weights).
        """
        definition, weights = nnx.split(self.blocks)
        return functools.partial(nnx.merge, definition), [jax.tree.map(lambda w: w[i], weights) for i in range(self.config.layers)]

    def table(self, *shards: int) -> jax.Array:
        """The output projection [V, D], or a copy for each of some shards: [shards, V, D].

        Copies cost no device more than one, and the gradients of each are summed before they meet those of the others.
        """
        table = self.weight("embedding" if self.config.tied else "unembedding")
        return self.place(jnp.broadcast_to(table, (*shards, *table.shape)), self.vocab, None) if shards else table

    def logits(self, hidden, table=None):
        """hidden [..., D] -> float32 [..., V]; of three axes the first are trees or, with their `table`, shards."""
        table = self.table() if table is None else table
        form = "...d,vd->...v" if table.ndim == 2 else "s...d,svd->s...v"
        logits = project(self.config, form, hidden, table)
        return self.place(logits, None, self.vocab) if logits.ndim == 3 else logits


class Model:
    """The transformer split once: pure functions of a nested dict of parameters.

    Args:
      mesh: where activations lie, trees over data and fsdp; None says nothing of it.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh | None = None):
        self.config, self.mesh = config, mesh
        abstract = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), mesh))
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

    @property
    def plain(self) -> "Model":
        """The model without adapters."""
        return Model(dataclasses.replace(self.config, lora_rank=0), self.mesh) if self.config.lora_rank else self

    @property
    def anywhere(self) -> "Model":
        """The model without a mesh, for arrays whose first axis are not trees."""
        return Model(self.config)

    def adapt(self, params, key: jax.Array):
        """Parameters of this model from those of the plain one: with adapters that change nothing yet."""
        if not self.config.lora_rank:
            return params
        return self.join(self.split(self.init(key))[0], params)

    def split(self, params):
        """(what is trained, what is not) of nested dicts like the parameters; with adapters, they alone are trained."""
        if not self.config.lora_rank:
            return params, {}
        flat = traverse_util.flatten_dict(params)
        trained = {path: x for path, x in flat.items() if any(name.endswith(LORA) for name in path)}
        frozen = {path: x for path, x in flat.items() if path not in trained}
        return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)

    def join(self, trained, frozen):
        """The whole that `split` divided."""
        if not frozen:
            return trained
        flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
        return traverse_util.unflatten_dict(flat)

    def fold(self, params):
        """Parameters of the plain model with the adapters' changes added to its weights, in their dtype."""
        if not self.config.lora_rank:
            return params
        trained, frozen = self.split(params)
        blocks, adapters = dict(frozen["blocks"]), trained["blocks"]
        for name in INPUTS:
            whole = blocks[name].astype(jnp.float32) + change(adapters[name + LORA], self.config)
            blocks[name] = whole.astype(blocks[name].dtype)
        return dict(frozen, blocks=blocks)

    def merge(self, params) -> Transformer:
        """The module over these parameters, cast to the dtype of the activations."""
        params = jax.tree.map(lambda p: p.astype(self.config.dtype), params)
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._definition, state)
