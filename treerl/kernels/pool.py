"""Attention of the sampler, over a prompt and a pool of cells."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from treerl.kernels import LOWEST, barrier, call, exactly


def lines_standing(path: jax.Array) -> jax.Array:
    """Which lines stand on each cell, as bits: path [B, K, S] -> int32 [B, K, ceil(K / 32), S].

    Bit i of word w at (column, row) belongs to line 32 w + i.
    """
    slots = path.shape[1]
    stands = path[:, :, None] == jnp.arange(slots)[:, None]  # [B, line, column, S]
    words = [stands[:, at : at + 32] for at in range(0, slots, 32)]
    bits = lambda word: jnp.left_shift(1, jnp.arange(word.shape[1], dtype=jnp.int32))[:, None, None]
    return jnp.stack([jnp.sum(jnp.where(word, bits(word), 0), axis=1, dtype=jnp.int32) for word in words], axis=2)


def pool_attention(
    qkv, cache, prompt_length, path, target, *,
    tile: int = 64, span: int = 512, prompt_span: int | None = None, block: int = 32, warps: int = 4, stages: int = 3,
):  # fmt: skip
    """Attention of each slot's head over its prompt and its ancestors, which also writes the head's keys and values.

    Columns of the pool and the prompt are cut into pieces. A program for every (tree, key head, piece, tile of lines)
    scores the queries of its lines on the rows of its piece between the first and the last that any of them stands on,
    with few queries if few lines do; where none does it ends at once. No scores reach memory. The pieces' partial
    softmaxes are merged by log-sum-exp in a second kernel, which reads of each line those pieces that it stands on.

    Args:
      qkv: [B, K, G, R + 2, d] of each slot and key head: the R queries that share it, its keys, its values; d a power of
        two, at least 16.
      cache: (prompt k, prompt v [B, G, P, d], pool k, pool v [B, G, K, S, d]).
      prompt_length: [B]. path: [B, K, S], column of each ancestor, the head included, -1 elsewhere.
      target: [B, K], the row at which a slot's head is written, S for none.
      tile: queries of a program, at most, if a line has no more. span, prompt_span: rows of a piece of a column and of
        the prompt, None for a quarter of it. block: rows scored at a time.

    Returns:
      (out [B, K, G, R, d] of qkv's dtype, cache).
    """
    prompt_k, prompt_v, pool_k, pool_v = cache
    batch, slots, heads, members, size = qkv.shape
    group, depth, width = members - 2, path.shape[2], prompt_k.shape[2]
    tiles = -(-slots // max(1, tile // group))
    lines = -(-slots // tiles)  # of a tile
    queries = lines * group
    tile, narrow = max(16, pl.next_power_of_2(queries)), 16
    few = narrow // group  # lines of a narrow tile
    cuts = -(-depth // span)  # of a column
    prompt_span = prompt_span or max(128, pl.next_power_of_2(width) // 4)
    shared = -(-width // prompt_span)  # pieces of the prompt, the first
    pieces = shared + slots * cuts
    exact = exactly(qkv.dtype)

    marks = lines_standing(path)
    words = marks.shape[2]
    stands = jnp.pad(path, ((0, 0), (0, tiles * lines - slots), (0, cuts * span - depth)), constant_values=-1)
    stands = stands.reshape(batch, tiles, lines, 1, cuts, span) == jnp.arange(slots)[:, None, None]
    line = jnp.arange(tiles * lines).reshape(tiles, lines, 1, 1)
    found = jnp.any(stands, axis=-1)  # [B, tile, line, column, cut]
    lowest, highest = jnp.min(jnp.where(found, line, slots), axis=2), jnp.max(jnp.where(found, line, -1), axis=2)
    stands = jnp.moveaxis(jnp.any(stands, axis=2), 1, 3)  # [B, column, cut, tile, span]
    row = jnp.arange(cuts * span).reshape(cuts, 1, span)
    first = jnp.min(jnp.where(stands, row, depth), axis=-1)
    last = jnp.max(jnp.where(stands, row + 1, 0), axis=-1)
    lowest, highest = (jnp.moveaxis(x, 1, 3) for x in (lowest, highest))  # [B, column, cut, tile]
    bounds = jnp.stack([first, last, lowest, highest - lowest + 1], axis=-1).reshape(batch, slots * cuts, tiles, 4)
    start = jnp.arange(shared) * prompt_span
    end = jnp.minimum(prompt_length[:, None], start + prompt_span)
    on_prompt = jnp.stack([jnp.broadcast_to(start, end.shape), end, 0 * end, 0 * end + slots], axis=-1)[:, :, None]
    bounds = jnp.concatenate([jnp.broadcast_to(on_prompt, (batch, shared, tiles, 4)), bounds], axis=1).astype(jnp.int32)

    def program(qkv_ref, pk_ref, pv_ref, k_in, v_in, target_ref, marks_ref, bounds_ref, out_ref, top_ref, norm_ref, k_ref, v_ref):
        piece, part = pl.program_id(2), pl.program_id(3)
        first, last, lowest, count = (bounds_ref[piece, part, i] for i in range(4))
        dim = jnp.arange(size)

        def places(tile, start, lines):
            """Line and member of each query of a tile, and which are real."""
            query = jnp.arange(tile)
            line = start + query // group
            return line, query % group, (query < lines * group) & (line < slots)

        def nothing(but=None):
            """Says that lines of the tile saw nothing of the piece; `but`: whether a line did."""
            line, member, real = places(tile, part * lines, lines)
            real = real if but is None else real & ~but(line)
            triton.store(top_ref.at[line, member], jnp.full((tile,), LOWEST), mask=real)
            triton.store(norm_ref.at[line, member], jnp.zeros((tile,), jnp.float32), mask=real)

        def score(place, k_ref, v_ref, front, see):
            """Stores sums of values weighted by exp(score - top), the largest score, and the weights' sum."""
            line, member, real = place
            tile = line.shape[0]
            q = triton.load(qkv_ref.at[line[:, None], member[:, None], dim[None]], mask=real[:, None], other=0.0)

            def add(i, carry):
                out, top, norm = carry
                at = i * block + jnp.arange(block)
                inside = (at >= first) & (at < last)
                load = lambda ref: triton.load(ref.at[*front, at[:, None], dim[None]], mask=inside[:, None], other=0.0).astype(q.dtype)
                seen = see(line, at, inside) & real[:, None]
                score = triton.dot(q, load(k_ref), trans_b=True, **exact) * size**-0.5
                score = jnp.where(seen, score, LOWEST)
                new = jnp.maximum(top, jnp.max(score, axis=1))
                weight = jnp.where(seen, jnp.exp(score - new[:, None]), 0.0)
                fade = jnp.exp(top - new)
                out = out * fade[:, None] + triton.dot(weight.astype(q.dtype), load(v_ref), **exact)
                return out, new, norm * fade + jnp.sum(weight, axis=1)

            carry = jnp.zeros((tile, size), jnp.float32), jnp.full((tile,), LOWEST), jnp.zeros((tile,), jnp.float32)
            out, top, norm = jax.lax.fori_loop(first // block, (last + block - 1) // block, add, carry)
            some = real & (norm > 0)  # what a line saw nothing of is not stored, and not read by the merge
            out = (out / jnp.where(norm > 0, norm, 1.0)[:, None]).astype(out_ref.dtype)
            triton.store(out_ref.at[line[:, None], member[:, None], dim[None]], out, mask=some[:, None])
            triton.store(top_ref.at[line, member], top, mask=real)
            triton.store(norm_ref.at[line, member], norm, mask=real)

        def of_prompt():
            score(places(tile, part * lines, lines), pk_ref, pv_ref, (), lambda line, at, inside: inside[None])

        def of_pool():
            column = (piece - shared) // cuts
            # every program that may read a new row writes it first, all of them the same
            written = target_ref[column]
            new = jnp.broadcast_to((written >= first) & (written < last), (size,))
            for ref, member in ((k_ref, group), (v_ref, group + 1)):
                triton.store(ref.at[column, jnp.minimum(written, depth - 1), dim], qkv_ref[column, member, :].astype(ref.dtype), mask=new)
            barrier()

            def see(line, at, inside):
                seen = None
                for word in range(words):
                    bits = triton.load(marks_ref.at[column, word, at], mask=inside, other=0)
                    bits = jax.lax.shift_right_logical(bits[None], (line % 32)[:, None]) & 1
                    seen = bits if seen is None else jnp.where((line // 32 == word)[:, None], bits, seen)
                return seen > 0

            def of_few():
                nothing(lambda line: (line >= lowest) & (line < lowest + few))
                score(places(narrow, lowest, few), k_ref, v_ref, (column,), see)

            def of_all():
                score(places(tile, part * lines, lines), k_ref, v_ref, (column,), see)

            if tile == narrow or not few:
                of_all()
            else:
                jax.lax.cond(count <= few, of_few, of_all)

        def work():
            jax.lax.cond(piece < shared, of_prompt, of_pool)

        jax.lax.cond(first < last, work, nothing)

    zeros = lambda count: (0,) * count
    head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, g, j, t: (b, g) + zeros(len(shape)))
    tree = lambda *shape: pl.BlockSpec((None, *shape), lambda b, g, j, t: (b,) + zeros(len(shape)))
    parts = lambda *shape: pl.BlockSpec((None, None, slots, None, *shape), lambda b, g, j, t: (b, j, 0, g) + zeros(len(shape)))
    part = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, pieces, slots, heads, group, *shape), dtype)
    out, top, norm, pool_k, pool_v = call(
        program, "pool_attention", warps, stages,
        grid=(batch, heads, pieces, tiles),
        in_specs=[
            pl.BlockSpec((None, slots, None, members, size), lambda b, g, j, t: (b, 0, g, 0, 0)),
            head(width, size), head(width, size), head(slots, depth, size), head(slots, depth, size),
            tree(slots), tree(slots, words, depth), tree(pieces, tiles, 4),
        ],
        out_specs=[parts(group, size), parts(group), parts(group), head(slots, depth, size), head(slots, depth, size)],
        out_shape=[
            part(qkv.dtype, size), part(jnp.float32), part(jnp.float32),
            jax.ShapeDtypeStruct(pool_k.shape, pool_k.dtype), jax.ShapeDtypeStruct(pool_v.shape, pool_v.dtype),
        ],
        input_output_aliases={3: 3, 4: 4},
    )(qkv, prompt_k, prompt_v, pool_k, pool_v, target, marks, bounds)  # fmt: skip
    return _merge(out, top, norm), (prompt_k, prompt_v, pool_k, pool_v)


def _merge(out, top, norm, *, chunk: int = 16):
    """Softmaxes over pieces [B, pieces, K, G, R (, d)] joined by their largest score and their sum: [B, K, G, R, d]."""
    batch, pieces, *shape, size = out.shape
    count, width = shape[0] * shape[1] * shape[2], pl.next_power_of_2(pieces)

    def program(part_ref, top_ref, norm_ref, out_ref):
        dim, piece = jnp.arange(size), jnp.arange(width)
        # a piece that has nothing has the lowest
        highest = jnp.max(triton.load(top_ref.at[piece], mask=piece < pieces, other=LOWEST))

        def add(i, carry):
            at = i * chunk + jnp.arange(chunk)
            load = lambda ref, other: triton.load(ref.at[at], mask=at < pieces, other=other)
            top, norm = load(top_ref, LOWEST), load(norm_ref, 0.0)
            part = triton.load(part_ref.at[at[:, None], dim[None]], mask=(top > LOWEST)[:, None], other=0.0)
            weight = norm * jnp.exp(top - highest)
            return carry[0] + jnp.sum(part.astype(jnp.float32) * weight[:, None], axis=0), carry[1] + jnp.sum(weight)

        total, whole = jax.lax.fori_loop(0, -(-pieces // chunk), add, (jnp.zeros((size,), jnp.float32), jnp.float32(0)))
        triton.store(out_ref.at[dim], (total / whole).astype(out_ref.dtype))

    of_query = lambda *more: pl.BlockSpec((None, pieces, None, *more), lambda b, q: (b, 0, q) + (0,) * len(more))
    merged = call(
        program, "merge", 1, grid=(batch, count), in_specs=[of_query(size), of_query(), of_query()],
        out_specs=pl.BlockSpec((None, None, size), lambda b, q: (b, q, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, count, size), out.dtype),
    )(out.reshape(batch, pieces, count, size), top.reshape(batch, pieces, count), norm.reshape(batch, pieces, count))  # fmt: skip
    return merged.reshape(batch, *shape, size)
