"""Where each tensor of a Hugging Face file lies in our parameters.

Linear layers are stored there as [outputs, inputs], a tensor a layer; here the layers are stacked and queries,
keys and values are one array, as are gate and up.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from treerl.models.transformer import TransformerConfig


class Piece(NamedTuple):
    """A stored tensor as a part of a leaf (of one layer of a stacked leaf)."""

    name: str  # of the tensor; {} stands for the number of the layer
    order: tuple[tuple[int, ...], ...]  # for each stored axis the leaf's axes that it flattens
    axis: int = 0  # of the leaf, along which the tensor is a part
    start: int = 0
    stop: int | None = None  # None: to the end

    def sizes(self, leaf: tuple[int, ...]) -> list[int]:
        """Sizes of this part of a leaf, by the leaf's axes."""
        part = len(range(leaf[self.axis])[self.start : self.stop])
        return [part if i == self.axis else size for i, size in enumerate(leaf)]

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor for a leaf of this shape."""
        sizes = self.sizes(leaf)
        return tuple(math.prod(sizes[i] for i in group) for group in self.order)

    def take(self, leaf: np.ndarray) -> np.ndarray:
        """The stored tensor out of a whole leaf."""
        part = leaf[tuple(slice(self.start, self.stop) if i == self.axis else slice(None) for i in range(leaf.ndim))]
        flat = part.transpose([i for group in self.order for i in group])
        return np.ascontiguousarray(flat.reshape(self.shape(leaf.shape)))

    def read(self, stored, leaf: tuple[int, ...], index: tuple[range, ...]) -> tuple[tuple, np.ndarray] | None:
        """What this tensor has of the part `index` of a leaf; no more is read than whole runs of the first cut axis.

        Args:
          stored: sliced like an array, such as `safe_open(...).get_slice(name)`.
          leaf: shape of the whole leaf. index: a range for each of its axes.

        Returns:
          (where in the part, values there), or None where they do not meet.
        """
        first = lambda i: self.start if i == self.axis else 0
        sizes = self.sizes(leaf)
        meet = [range(max(r.start, first(i)), min(r.stop, first(i) + sizes[i])) for i, r in enumerate(index)]
        if not all(meet):
            return None
        cuts, runs, inner = [], list(sizes), [slice(None)] * len(leaf)
        for group in self.order:
            lead = next((i for i in group if sizes[i] > 1), group[0])
            step = math.prod(sizes[i] for i in group) // sizes[lead]
            cuts.append(slice((meet[lead].start - first(lead)) * step, (meet[lead].stop - first(lead)) * step))
            runs[lead] = len(meet[lead])
            for i in set(group) - {lead}:
                inner[i] = slice(meet[i].start - first(i), meet[i].stop - first(i))
        flat = [i for group in self.order for i in group]
        values = stored[tuple(cuts)].reshape([runs[i] for i in flat]).transpose(np.argsort(flat))
        return tuple(slice(m.start - r.start, m.stop - r.start) for m, r in zip(meet, index)), values[tuple(inner)]


def pieces(config: TransformerConfig) -> dict[tuple[str, ...], list[Piece]]:
    """The stored tensors of every leaf, by the leaf's path; leaves under `blocks` are stacked."""
    c, layer = config, "model.layers.{}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    shared = c.heads // c.kv_heads  # queries of a key head
    parts = ("q", 0, shared), ("k", shared, shared + 1), ("v", shared + 1, shared + 2)
    norm = lambda name: [Piece(f"{name}.weight", ((0,),))]
    table = lambda name: [Piece(f"{name}.weight", ((0,), (1,)))]
    before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    block = {
        ("attention_norm", "scale"): norm(layer + "input_layernorm"),
        ("mlp_norm", "scale"): norm(layer + before_mlp),
        ("qkv",): [Piece(f"{attention}{n}_proj.weight", ((1, 2, 3), (0,)), 2, a, b) for n, a, b in parts],
        ("out",): [Piece(f"{attention}o_proj.weight", ((2,), (0, 1)))],
        ("gate_up",): [Piece(f"{mlp}{n}_proj.weight", ((1, 2), (0,)), 1, i, i + 1) for i, n in enumerate(("gate", "up"))],
        ("down",): [Piece(f"{mlp}down_proj.weight", ((1,), (0,)))],
    }
    if c.qkv_bias:
        block[("qkv_bias",)] = [Piece(f"{attention}{n}_proj.bias", ((0, 1, 2),), 1, a, b) for n, a, b in parts]
    if c.qk_norm:
        block |= {(f"{x}_norm", "scale"): norm(f"{attention}{x}_norm") for x in "qk"}
    if c.post_norms:
        block[("attention_out_norm", "scale")] = norm(layer + "post_attention_layernorm")
        block[("mlp_out_norm", "scale")] = norm(layer + "post_feedforward_layernorm")
    found = {("embedding",): table("model.embed_tokens"), ("final_norm", "scale"): norm("model.norm")}
    if not c.tied:
        found[("unembedding",)] = table("lm_head")
    return found | {("blocks", *path): value for path, value in block.items()}


def tensors(config: TransformerConfig, shapes) -> Iterator[tuple]:
    """Every stored tensor: (name, path of its leaf, layer or None, piece, shape), a layer's together.

    Args:
      shapes: of the parameters, see `Model.shapes`.
    """
    found = pieces(config)
    rows = [(path, None) for path in found if path[0] != "blocks"]
    rows += [(path, i) for i in range(config.layers) for path in found if path[0] == "blocks"]
    for path, i in rows:
        leaf = at(shapes, path).shape[0 if i is None else 1 :]
        for piece in found[path]:
            yield piece.name.format(i), path, i, piece, piece.shape(leaf)


def at(params, path: tuple[str, ...]):
    """The leaf of a nested dict at a path."""
    for key in path:
        params = params[key]
    return params
