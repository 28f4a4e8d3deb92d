"""What transformers gives for SmolLM2-135M-Instruct: logits of two rollouts in float64, and greedy answers in float32.

`python tests/smollm2_oracle.py FOLDER` (needs torch and transformers; FOLDER is the converted model, see
`treerl.models.sources.resolve`) records them into smollm2_golden.npz, and prints how exact they are.
"""

import pathlib
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("smollm2_golden.npz")
CHATS = [
    [{"role": "user", "content": "Tell me how rain is made, in 3 sentences."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}],
]
GREEDY = 64  # tokens of an answer, at most
# the rollouts of the first chat: the greedy answer, and one that leaves it after some tokens
ROWS, SHARED = 40, 7
OTHER = (
    " In 1896, for example, 17 + 25 = 42 millimetres fell in a single day. This may sound like a lot, but it is not: a "
    "storm can bring ten times as much."
)
TOP, STRIDE = 20, 509  # recorded of each position: the highest logits, and one in so many of all


def compact(logits: np.ndarray) -> dict[str, np.ndarray]:
    """What is recorded of logits [..., V]."""
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP].astype(np.int32)
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    total = np.log(shifted.sum(-1)) + logits.max(-1)
    return dict(top=top, high=np.take_along_axis(logits, top, -1), some=logits[..., ::STRIDE], total=total.astype(np.float32))


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


def main(folder: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    make = lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    model, found = make(torch.float32), {}
    for i, chat in enumerate(CHATS):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        prompt = torch.tensor([ids])
        options = dict(do_sample=False, max_new_tokens=GREEDY, output_logits=True, return_dict_in_generate=True)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        answer = out.sequences[0, len(ids) :].tolist()
        high = torch.stack(out.logits)[:, 0].topk(2).values
        print(f"chat {i}: smallest lead of a greedy token {float((high[:, 0] - high[:, 1]).min()):.4f}")
        print(repr(tokenizer.decode(answer, skip_special_tokens=True)))
        found |= {f"prompt {i}": np.array(ids, np.int32), f"answer {i}": np.array(answer, np.int32)}
    own = (found["answer 0"][:SHARED].tolist() + tokenizer.encode(OTHER, add_special_tokens=False))[:ROWS]
    assert len(own) == ROWS == len(found["answer 0"][:ROWS])
    found["tokens"] = np.array([[*found["prompt 0"], *rollout] for rollout in (found["answer 0"][:ROWS], own)], np.int32)
    tokens = torch.tensor(found["tokens"].astype(np.int64))
    with torch.no_grad():
        logits, exact = model(tokens).logits.numpy(), make(torch.float64)(tokens).logits.numpy()
    print(f"float32 and float64 differ by {np.abs(logits - exact).max():.2e} of {np.abs(exact).max():.0f}")
    np.savez_compressed(GOLDEN, **found, **compact(exact.astype(np.float32)))


if __name__ == "__main__":
    main(sys.argv[1])
