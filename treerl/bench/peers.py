"""What a user would take instead of treerl, at the same shapes, random weights: each only where its packages are there.

  - `google-tunix`: its Sampler over its own model of the shape, in this process, in turns with treerl's programs.
  - `transformers` generate on torch, with a static cache, which it compiles on a GPU.
  - a GRPO update as TRL does it, with `transformers` and SDPA, gradients only: no optimizer, as in the learner's suite.

The last two run in a child process, `python -m treerl.bench.peers SUITE [SHAPE]`, which `outside` starts before this
process's JAX takes the device's memory, and which has ended when treerl is timed: the same command on the same device, but
not in turns. There JAX runs on the CPU and makes nothing but the prompts.

All get the prompts that treerl gets, each repeated for its lines, fill them, never stop before the last token, and draw at
temperature 1 from the whole distribution. What is missing or fails, for example for want of memory, costs one line on
standard error and no row.
"""

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from treerl.bench import measure, synthetic

SECONDS = 420  # that a child process may take
ROWS = 8  # of a microbatch of the GRPO update
SAME = ("preset", "dtype", "prompts", "slots", "prompt", "rows")  # sizes that must be those of treerl's own programs


class Peer(NamedTuple):
    """Somebody else's program."""

    call: Callable | None  # () -> results, complete when it returns; None where it ran elsewhere
    first_seconds: float  # of its first call, compilation included
    prompt: int  # tokens of a prompt that it was given
    times: measure.Times | None = None  # of later calls, where it ran elsewhere
    peak_bytes: int = 0  # 0: not known


def left_out(name: str, error) -> None:
    """Says on standard error, in a line, that a peer is not measured, and why."""
    text = str(error).strip() or type(error).__name__
    print(f"bench: {name} is left out: {text.splitlines()[0][:300]}", file=sys.stderr, flush=True)


def is_out_of_memory(error: Exception) -> bool:
    return any(word in f"{type(error).__name__} {error}" for word in ("RESOURCE_EXHAUSTED", "OutOfMemory", "Out of memory"))


def family(config) -> str:
    """Which of the models that the peers have this shape is of: qwen2 or qwen3. Raises ValueError for another."""
    c = config
    others = c.rope_scaling, c.embed_scale, c.norm_plus_one, c.post_norms, any(c.local), c.query_scalar, c.activation != "silu"
    if any(others) or c.qk_norm == c.qkv_bias:
        raise ValueError("it has no model of this shape")
    return "qwen3" if c.qk_norm else "qwen2"


# --- google-tunix ----------------------------------------------------------------------------------


class _Words:
    """A tokenizer for tunix: a text is the number of a prompt. Its ids for ends and padding are no tokens."""

    def __init__(self, prompts: np.ndarray, vocab: int):
        self._prompts, self._vocab = prompts.tolist(), vocab

    def encode(self, text, **_):
        return self._prompts[int(text)]

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return 0  # none is added

    def eos_id(self):
        return self._vocab

    def pad_id(self):
        return self._vocab + 1


def tunix_call(config, prompts: np.ndarray, *, slots: int, rows: int) -> Callable:
    """A call of tunix's Sampler, [B, P] prompts with K lines each: () -> list of B * K arrays of S tokens."""
    kind = family(config)
    from flax import nnx
    from tunix.generate import sampler

    if kind == "qwen3":
        from tunix.models.qwen3.model import ModelConfig, Qwen3 as Module
    else:
        from tunix.models.qwen2.model import ModelConfig, Qwen2 as Module
    shape = ModelConfig(
        num_layers=config.layers, vocab_size=config.vocab, embed_dim=config.width, hidden_dim=config.hidden,
        num_heads=config.heads, head_dim=config.head_dim, num_kv_heads=config.kv_heads, rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps, use_tied_embedding=config.tied, dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
    )  # fmt: skip
    batch, width = prompts.shape
    room = sampler.CacheConfig(cache_size=width + rows, num_layers=config.layers, num_kv_heads=config.kv_heads, head_dim=config.head_dim)
    grow = sampler.Sampler(Module(shape, rngs=nnx.Rngs(0)), _Words(prompts, config.vocab), room)
    texts = [str(i) for i in range(batch) for _ in range(slots)]

    def call():
        tokens = grow(
            texts, max_generation_steps=rows, max_prompt_length=width, temperature=1.0, top_p=1.0, seed=1,
            eos_tokens=[config.vocab],
        ).tokens  # fmt: skip
        if [len(line) for line in tokens] != [rows] * len(texts):
            raise ValueError(f"it drew lines of {min(map(len, tokens))} to {max(map(len, tokens))} tokens, not of {rows}")
        return [np.asarray(line) for line in tokens]

    return call


def tunix(config, prompts: np.ndarray, *, slots: int, rows: int, least: int = 64) -> Peer | None:
    """tunix's Sampler after a first call, at the whole width of the prompts, a half, a quarter, ... until memory is enough."""
    width = prompts.shape[1]
    while True:
        try:
            call = tunix_call(config, prompts[:, :width], slots=slots, rows=rows)
            begin = time.perf_counter()
            call()
            return Peer(call, time.perf_counter() - begin, width)
        except Exception as error:
            again = is_out_of_memory(error) and width // 2 >= least
            left_out(f"tunix with prompts of {width} tokens" if is_out_of_memory(error) else "tunix", error)
        if not again:
            return None
        call = None
        gc.collect()
        width //= 2


# --- torch, in a child process ---------------------------------------------------------------------


def torch_model(config, *, seed: int = 0):
    """A causal language model of `transformers` of this shape, random weights of the dtype, on torch's GPU if it has one."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = transformers.Qwen3Config if family(config) == "qwen3" else transformers.Qwen2Config
    shape = make(
        vocab_size=config.vocab, hidden_size=config.width, intermediate_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied, max_position_embeddings=2**15,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta), bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype), attn_implementation="sdpa")


def _timed(call: Callable, repeats: int) -> dict:
    """What the parent is told of a torch program: seconds of its first call and of later ones, and peak bytes."""
    import torch

    def once():
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    first, later = once(), [once() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return dict(first_seconds=first, seconds=later, peak_bytes=peak)


def transformers_static(config, prompts: np.ndarray, sizes: dict, repeats: int = 2) -> dict:
    """`generate` with a static cache: see `_timed`."""
    import torch

    model = torch_model(config).eval()
    token = torch.tensor(np.repeat(prompts, sizes["slots"], axis=0), device=model.device, dtype=torch.long)
    length = token.shape[1] + sizes["rows"]

    def call():
        out = model.generate(
            token, attention_mask=torch.ones_like(token), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=sizes["rows"], max_new_tokens=sizes["rows"], cache_implementation="static", pad_token_id=0,
        )  # fmt: skip
        if tuple(out.shape) != (token.shape[0], length):
            raise ValueError(f"it made {tuple(out.shape)} tokens, not {(token.shape[0], length)}")

    return _timed(call, repeats)


def answer_logps(model, token, rows: int):
    """Log-probs [N, S] of the last S tokens of rows [N, P + S], as TRL computes them: a row of logits at a time."""
    import torch

    logits = model(input_ids=token, logits_to_keep=rows + 1, use_cache=False).logits[:, :-1]
    pick = lambda logits, token: torch.log_softmax(logits, -1).gather(-1, token[:, None])[:, 0]
    return torch.stack([pick(*row) for row in zip(logits, token[:, -rows:])])


def transformers_update(config, prompts: np.ndarray, sizes: dict, repeats: int = 2) -> dict:
    """Gradient of GRPO's clipped loss over all rollouts as rows, microbatches of `ROWS`: see `_timed`.

    As TRL's trainer: layers computed again in the backward pass, everything in the dtype. Rows are not padded, and so given
    without a mask. With `lora_rank`, adapters on every product (`peft`) are trained and nothing else.
    """
    import torch

    model = torch_model(config)
    if sizes.get("lora_rank"):
        import peft

        adapters = peft.LoraConfig(r=sizes["lora_rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    draw = torch.Generator().manual_seed(0)
    lines, rows = prompts.shape[0] * sizes["slots"], sizes["rows"]
    answer = torch.randint(config.vocab, (lines, rows), generator=draw)
    token = torch.cat([torch.tensor(np.repeat(prompts, sizes["slots"], axis=0), dtype=torch.long), answer], 1).to(model.device)
    old = torch.full((ROWS, rows), -float(np.log(config.vocab)), device=model.device)
    credit = torch.linspace(-1, 2, lines, device=model.device)

    def call():
        model.zero_grad(set_to_none=True)
        for begin in range(0, lines, ROWS):
            part = slice(begin, begin + ROWS)
            logp = answer_logps(model, token[part], rows)
            ratio, gain = torch.exp(logp - old[: len(logp)]), credit[part, None]
            loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).sum() / (lines * rows)
            loss.backward()
        if not all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None):
            raise ValueError("its gradient is not finite")

    return _timed(call, repeats)


OUTSIDE = dict(sampler=transformers_static, learner=transformers_update)


def child(suite: str, shape: str | None) -> dict:
    """What the child process measures: {program: `_timed`, "sizes": those it had}. Raises whatever goes wrong."""
    import torch

    from treerl.bench import learner, sampler

    shape = shape or ("A" if torch.cuda.is_available() else None)
    sizes = dict(sampler=sampler, learner=learner)[suite].defaults(shape)
    config = measure.model_config(sizes["preset"], dtype=sizes["dtype"])
    prompts = np.asarray(synthetic.prompts(config.vocab, sizes["prompts"], sizes["prompt"]).token)
    program = OUTSIDE[suite]
    return {program.__name__: program(config, prompts, sizes), "sizes": {k: sizes[k] for k in SAME}}


def main(arguments: list[str]) -> None:
    """Prints what `child` found as the last line; other output of libraries goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        found = child(arguments[0], arguments[1] if len(arguments) > 1 else None)
    print(json.dumps(found), flush=True)


def outside(suite: str, shape: str | None) -> dict:
    """Runs a suite's peers of torch in a child process; {} where there are none. To be called before JAX has a device."""
    name = OUTSIDE[suite].__name__
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            left_out(name, f"no package {package}")
            return {}
    command = [sys.executable, "-m", "treerl.bench.peers", suite, *([shape] if shape else [])]
    try:
        run = subprocess.run(command, env=dict(os.environ, JAX_PLATFORMS="cpu"), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        left_out(name, f"more than {SECONDS} s")
        return {}
    if run.returncode:
        left_out(name, (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1])
        return {}
    return json.loads(run.stdout.strip().splitlines()[-1])


def matching(found: dict | None, sizes: dict) -> dict[str, Peer]:
    """What `outside` found, if it was measured at these sizes."""
    if not found:
        return {}
    names, made = [name for name in found if name != "sizes"], found["sizes"]
    if made != {k: sizes[k] for k in SAME}:
        left_out(", ".join(names), f"measured at {made}")
        return {}
    as_peer = lambda x: Peer(None, x["first_seconds"], made["prompt"], measure.Times(x["seconds"]), x["peak_bytes"])
    return {name: as_peer(found[name]) for name in names}


if __name__ == "__main__":
    main(sys.argv[1:])
