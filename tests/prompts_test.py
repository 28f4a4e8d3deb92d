"""Prompts: the stream of examples, its resumption, and padding."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from treerl import prompts as P, sharding
from treerl.errors import UserError
from treerl.tasks import Encoded, Task
from treerl.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abcdef")


def encode(example: dict) -> Encoded:
    return Encoded(
        prompt=TOKENIZER.encode(example["ask"]),
        answer=TOKENIZER.encode(example["reply"]) + [TOKENIZER.eos_id],
        data={"goal": np.int32(len(example["reply"])), "pair": np.arange(2, dtype=np.int32)},
    )


TASK = Task(tokenizer=TOKENIZER, train=[], heldout=[], encode=encode, grade=lambda tokens, length, data: 0.0)


# --- the stream -----------------------------------------------------------------------------------


def drawn(stream, position, count) -> list:
    examples, positions = stream.examples(position, count)
    np.testing.assert_array_equal(positions, np.arange(position, position + count))
    return list(examples)


@pytest.mark.parametrize("few, read", [(None, 5), (2, 2)])
def test_a_check_reads_what_a_run_will_and_few_of_what_is_made_when_asked_for(few, read):
    asked = []
    look = lambda example: asked.append(example["ask"]) or encode(example)
    train = [dict(ask="abc"[: 1 + i % 3], reply="a") for i in range(9)]
    task = dataclasses.replace(TASK, train=train, encode=look, few=few)
    P.check(task, P.Stream(train, 0), 5, ConfigDict(dict(prompts=2, prompt_length=3)))
    assert asked == [example["ask"] for example in drawn(P.Stream(train, 0), 0, read)]
    with pytest.raises(UserError, match="longer than sampler.prompt_length=1"):
        P.check(dataclasses.replace(task, few=None), P.Stream(train, 0), 9, ConfigDict(dict(prompts=2, prompt_length=1)))


def test_each_pass_is_a_new_permutation():
    size, passes = 23, 6
    stream = P.Stream(range(size), seed=3)
    orders = [tuple(drawn(stream, n * size, size)) for n in range(passes)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(set(orders)) == passes
    assert tuple(range(size)) not in orders


def test_stream_is_deterministic_and_differs_by_seed():
    one, same, other = P.Stream(range(50), 0), P.Stream(range(50), 0), P.Stream(range(50), 1)
    assert drawn(one, 0, 120) == drawn(same, 0, 120)
    assert drawn(one, 0, 120) != drawn(other, 0, 120)


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 13, 20, 34])
def test_resumes_at_any_position(position):
    """A fresh stream goes on as the one that was read from its beginning, batch by batch."""
    whole = drawn(P.Stream(range(7), seed=5), 0, 40)
    assert drawn(P.Stream(range(7), seed=5), position, 5) == whole[position : position + 5]


def test_order_of_calls_does_not_matter():
    stream = P.Stream(range(11), seed=2)
    whole = drawn(P.Stream(range(11), seed=2), 0, 60)
    for position in np.random.default_rng(0).permutation(50):  # back and forth between passes
        assert drawn(stream, int(position), 3) == whole[position : position + 3]


@pytest.mark.parametrize("count", [4, 7, 10, 25])
def test_batches_span_passes(count):
    """Batches that do not divide the data, or are larger than it, neither skip nor repeat."""
    size = 10
    stream = P.Stream(range(size), seed=9)
    batches = [drawn(stream, n * count, count) for n in range(8)]
    flat = sum(batches, [])
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size))


# --- encoding -------------------------------------------------------------------------------------

EXAMPLES = [dict(ask="abc", reply="f"), dict(ask="a", reply="fed"), dict(ask="abcde", reply="")]


def test_encode_pads_on_the_right():
    prompts = P.encode(TASK, EXAMPLES, np.array([7, 9, 4]), width=5)
    np.testing.assert_array_equal(prompts.token, [[2, 3, 4, 0, 0], [2, 0, 0, 0, 0], [2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(prompts.length, [3, 1, 5])
    np.testing.assert_array_equal(prompts.index, [7, 9, 4])
    np.testing.assert_array_equal(prompts.data["goal"], [1, 3, 0])
    assert prompts.data["pair"].shape == (3, 2)
    assert {x.dtype for x in jax.tree.leaves(prompts)} == {np.dtype(np.int32)}
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(prompts))


def test_encode_answers_pads_and_keeps_the_end():
    token, length, _ = P.encode_answers(TASK, EXAMPLES, width=4)
    np.testing.assert_array_equal(token, [[7, 1, 0, 0], [7, 6, 5, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(length, [2, 4, 1])
    assert token.dtype == length.dtype == np.int32


def test_too_long_a_prompt():
    with pytest.raises(ValueError) as error:
        P.encode(TASK, EXAMPLES, np.arange(3), width=4)
    assert str(error.value) == ("a prompt of 5 tokens is longer than sampler.prompt_length=4; raise sampler.prompt_length.")


def test_too_long_an_answer():
    with pytest.raises(ValueError) as error:
        P.encode_answers(TASK, EXAMPLES, width=3)
    assert str(error.value) == ("a reference answer of 4 tokens is longer than sampler.answer_length=3; raise sampler.answer_length.")


def test_place_keeps_values_and_places_them():
    target = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    prompts = P.encode(TASK, EXAMPLES, np.arange(3), width=6)
    placed = sharding.place(prompts, target)
    assert all(isinstance(x, jax.Array) and x.sharding == target for x in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, placed, prompts)
