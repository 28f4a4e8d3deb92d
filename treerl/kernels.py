"""Pallas kernels for GPUs (Triton); elsewhere than on a GPU they are interpreted, for tests.

Each has a form in XLA that means the same: `attention.dense`, and `transformer.Block` without kernels.
"""
import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_LOWEST = -1e30  # finite: the difference of two of them is 0, not nan
_ROWS = (16, 32, 64, 128)  # that the kernels of products take


def _call(program, name: str, warps: int, stages: int = 1, **spec):
    """A Pallas call for Triton."""
    options = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(program, name=name, compiler_params=options, interpret=jax.default_backend() != "gpu", **spec)


def _barrier():
    """Stores of a program before it are seen by its loads after it; the interpreter goes line by line anyway."""
    if jax.default_backend() == "gpu":
        triton.debug_barrier()


def _whole(*shape):
    """All of an array in every program."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., K] as int8 [..., K] times a float32 scale [...], of each row its largest absolute entry / 127."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-20) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def add_norm(x: jax.Array, parts: jax.Array, scale: jax.Array, eps: float, offset: bool, *, narrow: bool = False):
    """x + sum(parts), and its root-mean-square norm times `scale`, or 1 + `scale` with an offset.

    Rounded where `transformer.RMSNorm` after a sum rounds.

    Args:
      x: [..., D]. parts: [n, ..., D], n summands in float32 or one in any dtype. scale: [D].

    Returns:
      (sum, norm), both [..., D] in x's dtype; with `narrow` the norm quantized, see `quantize`.
    """
    shape, (size,), count = x.shape, scale.shape, parts.shape[0]
    width = pl.next_power_of_2(size)

    def program(x_ref, parts_ref, scale_ref, sum_ref, out_ref, step_ref=None):
        row, at = pl.program_id(0), jnp.arange(width)
        real = at < size
        load = lambda ref, *place: triton.load(ref.at[*place, at], mask=real, other=0.0).astype(jnp.float32)
        h = sum((load(parts_ref, i, row) for i in range(1, count)), load(parts_ref, 0, row))
        total = (load(x_ref, row) + h.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
        y, factor = total.astype(jnp.float32), load(scale_ref)
        y = y * jax.lax.rsqrt(jnp.sum(y * y) / size + eps) * (1 + factor if offset else factor)
        y = y.astype(x.dtype)
        if narrow:
            y = y.astype(jnp.float32)
            step_ref[row] = step = jnp.maximum(jnp.max(jnp.abs(y)), 1e-20) / 127
            y = y / step
            y = jnp.where(y < 0, y - 0.5, y + 0.5).astype(jnp.int32).astype(jnp.int8)  # to the nearest
        triton.store(sum_ref.at[row, at], total, mask=real)
        triton.store(out_ref.at[row, at], y, mask=real)

    x, parts = x.reshape(-1, size), parts.reshape(count, -1, size)
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, jnp.int8 if narrow else x.dtype)]
    outs += [jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)] * narrow
    total, *norm = _call(
        program, "add_norm", 8, grid=x.shape[:1], in_specs=[_whole(*x.shape), _whole(*parts.shape), _whole(size)],
        out_specs=[_whole(*y.shape) for y in outs], out_shape=outs,
    )(x, parts, scale)  # fmt: skip
    return total.reshape(shape), tuple(norm) if narrow else norm[0].reshape(shape)


def roomy() -> bool:
    """Whether the GPU's processors have room for the tiles of products, 147 kB of shared memory: A100, H100, B200 and their like."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if capability not in ("8.0", "9.0", "10.0", "10.3"):
        lacks = "A GPU of compute capability %s lacks room for the kernels of products: the sampler's are XLA's."
        logging.log_first_n(logging.INFO, lacks, 1, capability)
        return False
    return True


def fits(x: jax.Array, outer: int) -> bool:
    """Whether `gated` takes x [M, K] and w [K, 2, outer]."""
    rows, inner = x.shape
    return x.dtype.itemsize == 2 and rows in _ROWS and inner % 32 == 0 and outer % 128 == 0 and roomy()


def product_plan(x: jax.Array, outer: int) -> tuple[int, int] | None:
    """How `product` cuts x [M, K] @ w [K, outer]: (columns of a program, splits of the sum), None where it is left to XLA.

    As many splits as give a GPU one program each for most of its processors; more sums would have to be read again.
    """
    (rows, inner), width, depth = x.shape, 64, 64
    if x.dtype.itemsize != 2 or rows not in _ROWS or outer % width or not roomy():
        return None
    programs = {outer // width * splits: splits for splits in (1, 2, 3, 4, 5) if inner % (splits * depth) == 0}
    some = [count for count in programs if 64 <= count <= 132] or [count for count in programs if count > 132][:1]
    return (width, programs[max(some)]) if some else None


def product(x: jax.Array, w: jax.Array, plan: tuple[int, int]) -> jax.Array:
    """Parts of x [M, K] @ w [K, N]: float32 [splits, M, N], to be summed by whoever reads them."""
    (rows, inner), outer, (width, splits), depth = x.shape, w.shape[1], plan, 64
    each = inner // splits

    def program(x_ref, w_ref, out_ref):
        part = pl.program_id(1)
        row, column = jnp.arange(rows), pl.program_id(0) * width + jnp.arange(width)

        def add(i, total):
            at = part * each + i * depth + jnp.arange(depth)
            here = triton.load(x_ref.at[row[:, None], at[None]])
            return total + triton.dot(here, triton.load(w_ref.at[at[:, None], column[None]]))

        total = jax.lax.fori_loop(0, each // depth, add, jnp.zeros((rows, width), jnp.float32))
        triton.store(out_ref.at[part, row[:, None], column[None]], total)

    return _call(
        program, "product", 4, 6, grid=(outer // width, splits), in_specs=[_whole(*x.shape), _whole(*w.shape)],
        out_specs=_whole(splits, rows, outer), out_shape=jax.ShapeDtypeStruct((splits, rows, outer), jnp.float32),
    )(x, w)  # fmt: skip


def gated(x: jax.Array, w: jax.Array, activation) -> jax.Array:
    """activation(x @ gate) * (x @ up), both rounded to x's dtype before: x [M, K], w [K, 2, N] gate and up -> [M, N]."""
    (rows, inner), outer, width, depth = x.shape, w.shape[2], 128, 32

    def program(x_ref, w_ref, out_ref):
        row, column = jnp.arange(rows), pl.program_id(0) * width + jnp.arange(width)

        def add(i, totals):
            at = i * depth + jnp.arange(depth)
            here = triton.load(x_ref.at[row[:, None], at[None]])
            return tuple(t + triton.dot(here, triton.load(w_ref.at[at[:, None], j, column[None]])) for j, t in enumerate(totals))

        zero = jnp.zeros((rows, width), jnp.float32)
        gate, up = (t.astype(x.dtype).astype(jnp.float32) for t in jax.lax.fori_loop(0, inner // depth, add, (zero, zero)))
        out = activation(gate).astype(x.dtype).astype(jnp.float32) * up
        triton.store(out_ref.at[row[:, None], column[None]], out.astype(x.dtype))

    return _call(
        program, "gated", 8, 6, grid=(outer // width,), in_specs=[_whole(*x.shape), _whole(*w.shape)],
        out_specs=_whole(rows, outer), out_shape=jax.ShapeDtypeStruct((rows, outer), x.dtype),
    )(x, w)  # fmt: skip


def survey(logits, temperature, lowest, uniform, candidates: int, *, block: int = 2048):
    """One pass over logits for all that is read of them, see `nucleus.survey`, and a second kernel that joins its blocks.

    Args:
      logits: [N, V] float32. temperature: [] float32. lowest: [N] float32, logits below are not drawn. uniform: [N] in
        [0, 1). candidates: how many of the likeliest tokens to name (static).

    Returns:
      (token int32, logp, top, norm, entropy [N], best int32, score [N, candidates]).
    """
    count, size = logits.shape
    blocks = -(-size // block)
    width, low = pl.next_power_of_2(blocks), float("-inf")
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    chosen = lambda x, index, at: jnp.sum(jnp.where(at == index, x, jnp.zeros_like(x)))

    def look(logits_ref, temperature_ref, lowest_ref, top_ref, norm_ref, mass_ref, moment_ref, plain_ref):
        row, part = pl.program_id(0), pl.program_id(1)
        at = part * block + jnp.arange(block)
        x = triton.load(logits_ref.at[row, at], mask=at < size, other=low)
        top = jnp.maximum(jnp.max(x), _LOWEST)
        shift = (x - top) / temperature_ref[()]
        weight = jnp.exp(shift)
        top_ref[row, part], norm_ref[row, part] = top, jnp.sum(weight)
        mass_ref[row, part] = jnp.sum(jnp.where(x >= lowest_ref[row], weight, 0.0))
        moment_ref[row, part] = jnp.sum(jnp.where(weight > 0, weight * shift, 0.0))
        if candidates:
            plain_ref[row, part] = jnp.sum(jnp.exp(x - top))

    some = max(1, candidates)
    outs = [shape(count, blocks)] * 5
    found = _call(
        look, "survey", 4, grid=(count, blocks), in_specs=[_whole(count, size), _whole(), _whole(count)],
        out_specs=[_whole(*x.shape) for x in outs], out_shape=outs,
    )(logits, temperature, lowest)  # fmt: skip

    def invert(weight, at, target):
        """(first index at which the running sum exceeds the target, what is left of the target there)."""
        total = jnp.cumsum(weight)
        whole = jnp.max(total)
        target = jnp.clip(target, 0.0, whole * (1 - 2e-7))
        index = jnp.sum(jnp.where(total <= target, 1, 0))
        return index, target - (chosen(total, index, at) - chosen(weight, index, at))

    def join(logits_ref, temperature_ref, lowest_ref, uniform_ref, top_ref, norm_ref, mass_ref, moment_ref, plain_ref,
             token_ref, logp_ref, highest_ref, log_ref, entropy_ref, best_ref, score_ref):  # fmt: skip
        row, part = pl.program_id(0), jnp.arange(width)
        temperature = temperature_ref[()]
        load = lambda ref, other=0.0: triton.load(ref.at[row, part], mask=part < blocks, other=other)
        tops = load(top_ref, _LOWEST)
        top = jnp.max(tops)
        shift = (tops - top) / temperature
        scale = jnp.exp(shift)
        norms = load(norm_ref) * scale
        norm, mass = jnp.sum(norms), load(mass_ref) * scale
        mean = jnp.sum(load(moment_ref) * scale + jnp.where(norms > 0, norms * shift, 0.0)) / norm
        whole = jnp.sum(mass)
        outer, rest = invert(mass, part, uniform_ref[row] * whole)
        inside = jnp.arange(block)
        at = outer * block + inside
        x = triton.load(logits_ref.at[row, at], mask=at < size, other=low)
        shift = (x - top) / temperature
        kept = (at < size) & (x >= lowest_ref[row])
        inner, _ = invert(jnp.where(kept, jnp.exp(shift), 0.0), inside, rest)
        token_ref[row] = jnp.minimum(outer * block + inner, size - 1).astype(jnp.int32)
        logp_ref[row] = chosen(jnp.where(inside == inner, shift, 0.0), inner, inside) - jnp.log(whole)
        highest_ref[row], log_ref[row], entropy_ref[row] = top, jnp.log(norm), jnp.log(norm) - mean
        if candidates:
            plain = top + jnp.log(jnp.sum(load(plain_ref) * jnp.exp(tops - top)))
        taken = []
        for i in range(candidates):  # the best block again, without what was taken
            value = jnp.max(tops)
            outer = jnp.min(jnp.where(tops == value, part, blocks - 1))
            at = outer * block + inside
            x = triton.load(logits_ref.at[row, at], mask=at < size, other=low)
            for token in taken:
                x = jnp.where(at == token, low, x)
            best = jnp.min(jnp.where(x == value, at, size))
            taken.append(best)
            possible = value > _LOWEST
            best_ref[i, row], score_ref[i, row] = jnp.where(possible, best, 0), jnp.where(possible, value - plain, low)
            tops = jnp.where(part == outer, jnp.max(jnp.where(at == best, low, x)), tops)

    f32, i32 = shape(count), shape(count, dtype=jnp.int32)
    ends = [i32, f32, f32, f32, f32, shape(some, count, dtype=jnp.int32), shape(some, count)]
    *drawn, best, score = _call(
        join, "join", 4, grid=(count,),
        in_specs=[_whole(count, size), _whole(), _whole(count), _whole(count), *(_whole(*x.shape) for x in outs)],
        out_specs=[_whole(*x.shape) for x in ends], out_shape=ends,
    )(logits, temperature, lowest, uniform, *found)  # fmt: skip
    return *drawn, best[:candidates].T, score[:candidates].T


def narrow_fits(rows: int, inner: int, outer: int) -> bool:
    """Whether `narrow_product` takes [rows, inner] x [inner, outer]."""
    return rows in _ROWS and inner % 128 == 0 and outer % 64 == 0 and roomy()


def narrow_product(x, w, dtype, join=lambda y: y) -> jax.Array:
    """join(x @ w[0].T, ..., x @ w[n - 1].T) of int8 with scales: [M, N] of a dtype.

    Args:
      x: `quantize` of [M, K]. w: of [n, N, K]. join: of n arrays in float32, element by element.
    """
    (x, step), (w, steps) = x, w
    (rows, inner), (count, outer, _), width, depth = x.shape, w.shape, 64, 128

    def program(x_ref, step_ref, w_ref, steps_ref, out_ref):
        row, column = jnp.arange(rows), pl.program_id(0) * width + jnp.arange(width)

        def add(i, totals):
            at = i * depth + jnp.arange(depth)
            here = triton.load(x_ref.at[row[:, None], at[None]])
            return tuple(t + triton.dot(here, triton.load(w_ref.at[j, column[:, None], at[None]]), trans_b=True) for j, t in enumerate(totals))

        totals = jax.lax.fori_loop(0, inner // depth, add, (jnp.zeros((rows, width), jnp.int32),) * count)
        step = triton.load(step_ref.at[row])[:, None]
        wide = [t.astype(jnp.float32) * step * triton.load(steps_ref.at[j, column])[None] for j, t in enumerate(totals)]
        triton.store(out_ref.at[row[:, None], column[None]], join(*wide).astype(dtype))

    return _call(
        program, "narrow_product", 4, 3, grid=(outer // width,), in_specs=[_whole(*y.shape) for y in (x, step, w, steps)],
        out_specs=_whole(rows, outer), out_shape=jax.ShapeDtypeStruct((rows, outer), dtype),
    )(x, step, w, steps)  # fmt: skip


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
    exact = dict(precision=jax.lax.Precision.HIGHEST) if qkv.dtype == jnp.float32 else {}

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
            triton.store(top_ref.at[line, member], jnp.full((tile,), _LOWEST), mask=real)
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
                score = jnp.where(seen, score, _LOWEST)
                new = jnp.maximum(top, jnp.max(score, axis=1))
                weight = jnp.where(seen, jnp.exp(score - new[:, None]), 0.0)
                fade = jnp.exp(top - new)
                out = out * fade[:, None] + triton.dot(weight.astype(q.dtype), load(v_ref), **exact)
                return out, new, norm * fade + jnp.sum(weight, axis=1)

            carry = jnp.zeros((tile, size), jnp.float32), jnp.full((tile,), _LOWEST), jnp.zeros((tile,), jnp.float32)
            out, top, norm = jax.lax.fori_loop(first // block, (last + block - 1) // block, add, carry)
            some = real & (norm > 0)  # what a line saw nothing of is not stored, and not read by the merge
            out = (out / jnp.where(norm > 0, norm, 1.0)[:, None]).astype(out_ref.dtype)
            triton.store(out_ref.at[line[:, None], member[:, None], dim[None]], out, mask=some[:, None])
            triton.store(top_ref.at[line, member], top, mask=real)
            triton.store(norm_ref.at[line, member], norm, mask=real)

        def of_prompt():
            score(places(tile, part * lines, lines), pk_ref, pv_ref, (), lambda line, at, inside: inside[None])

        def of_pool():
            column, cut = (piece - shared) // cuts, (piece - shared) % cuts
            # every program that may read a new row writes it first, all of them the same
            written = target_ref[column]
            new = jnp.broadcast_to((written >= first) & (written < last), (size,))
            for ref, member in ((k_ref, group), (v_ref, group + 1)):
                triton.store(ref.at[column, jnp.minimum(written, depth - 1), dim], qkv_ref[column, member, :].astype(ref.dtype), mask=new)
            _barrier()

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
    out, top, norm, pool_k, pool_v = _call(
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
        highest = jnp.max(triton.load(top_ref.at[piece], mask=piece < pieces, other=_LOWEST))

        def add(i, carry):
            at = i * chunk + jnp.arange(chunk)
            load = lambda ref, other: triton.load(ref.at[at], mask=at < pieces, other=other)
            top, norm = load(top_ref, _LOWEST), load(norm_ref, 0.0)
            part = triton.load(part_ref.at[at[:, None], dim[None]], mask=(top > _LOWEST)[:, None], other=0.0)
            weight = norm * jnp.exp(top - highest)
            return carry[0] + jnp.sum(part.astype(jnp.float32) * weight[:, None], axis=0), carry[1] + jnp.sum(weight)

        total, whole = jax.lax.fori_loop(0, -(-pieces // chunk), add, (jnp.zeros((size,), jnp.float32), jnp.float32(0)))
        triton.store(out_ref.at[dim], (total / whole).astype(out_ref.dtype))

    of_query = lambda *more: pl.BlockSpec((None, pieces, None, *more), lambda b, q: (b, 0, q) + (0,) * len(more))
    merged = _call(
        program, "merge", 1, grid=(batch, count), in_specs=[of_query(size), of_query(), of_query()],
        out_specs=pl.BlockSpec((None, None, size), lambda b, q: (b, q, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, count, size), out.dtype),
    )(out.reshape(batch, pieces, count, size), top.reshape(batch, pieces, count), norm.reshape(batch, pieces, count))  # fmt: skip
    return merged.reshape(batch, *shape, size)
