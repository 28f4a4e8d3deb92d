"""Countdown: the grader against a plain-Python oracle, the puzzles, the errors, the tokenizer."""

import errno
import random
import re
import sys

import jax
import numpy as np
import pytest
from countdown_oracle import countdown_grade, countdown_value
from ml_collections import ConfigDict

from treerl import tasks
from treerl.errors import UserError
from treerl.tasks import countdown
from treerl.tokenizers import CharTokenizer

SIZE = 40  # tokens of an answer, S
COUNT = 4  # numbers of a puzzle, N
CHARS = "_$" + countdown.TOKENIZER.alphabet  # with _ for the pad and $ for EOS
LARGEST = 127  # 2**3 * 127**4 is just below 2**31
GRADE = jax.jit(jax.vmap(countdown.grade))


def small(**changes) -> ConfigDict:
    config = ConfigDict(
        dict(
            name="countdown",
            numbers_min=3,
            numbers_max=4,
            largest=12,
            operators="+-*/",
            target_max=50,
            orders=1,
            train_size=200,
            heldout_size=60,
            seed=7,
        )
    )
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tasks.make(small(), tmp_path_factory.mktemp("data"))


def graded(cases: list, seed: int = 0) -> np.ndarray:
    """Grades (text, numbers, target) triples in one call; junk follows each text's tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, len(CHARS), (len(cases), SIZE), dtype=np.int32)
    numbers = np.zeros((len(cases), COUNT), np.int32)
    for i, (text, given, _) in enumerate(cases):
        tokens[i, : len(text)] = [CHARS.index(char) for char in text]
        numbers[i, : len(given)] = given
    length = np.array([len(text) for text, _, _ in cases], np.int32)
    target = np.array([target for _, _, target in cases], np.int32)
    data = {"numbers": numbers, "target": target}
    rewards = np.asarray(GRADE(tokens, length, data))
    assert rewards.dtype == np.float32 and set(rewards.tolist()) <= {0.0, 1.0}
    return rewards == 1


def expected(text: str, numbers: list[int], target: int) -> bool:
    return text.endswith("$") and countdown_grade(text[:-1], numbers, target)


def expression(rng: random.Random, numbers: list[int]) -> str:
    """Some expression that uses the numbers in order, with more parentheses than it needs."""
    if len(numbers) == 1:
        text = str(numbers[0])
    else:
        cut = rng.randrange(1, len(numbers))
        parts = expression(rng, numbers[:cut]), expression(rng, numbers[cut:])
        text = rng.choice(countdown.OPERATORS).join(parts)
    return f"({text})" if rng.random() < 0.4 / len(numbers) ** 0.5 else text


def spaced(rng: random.Random, text: str) -> str:
    """Spaces beside parentheses and operators, where they are allowed."""
    space = lambda match: " " * rng.randrange(2) + match[0] + " " * rng.randrange(2)
    return re.sub(r"[-+*/()]", space, text)


def mutated(rng: random.Random, text: str) -> str:
    """The text with one thing about it changed; it may still be right."""
    i, j = sorted(rng.sample(range(len(text) + 1), 2))
    char, pieces = rng.choice(CHARS), re.findall(r"\d+|.", text)
    k = rng.randrange(len(pieces))
    number = next((p for p in pieces[k:] if p.isdigit()), "1")
    big = str(int(number) + 2**32 * rng.choice([1, 10, 23]))
    nest = rng.randrange(16)
    return rng.choice(
        [
            lambda: text[:i] + text[i + 1 :],
            lambda: text[:i] + char + text[i:],
            lambda: text[:i] + char + text[i + 1 :],
            lambda: text[:i] + text[i:j][::-1] + text[j:],
            lambda: text[:i] + "(" + text[i:j] + ")" + text[j:],
            lambda: text[:i] + " " + text[i:],
            lambda: text[:j],
            lambda: text + "$" + text[:i],
            lambda: text[:i] + ")*(" + text[i:],
            lambda: text + rng.choice(["=24", ":", "+0", "*1", "-", "*", "/", ")", "(", "_"]),
            lambda: text + rng.choice("+*") + number,
            lambda: text + f"/({number}-{number})",
            lambda: text + f"-{number}/{number}+1",
            lambda: text.replace(number, big, 1),
            lambda: text.replace(number, "99999999999", 1),
            lambda: text.replace(number, "0" + number, 1),
            lambda: text.replace(number, number[0] + " " + number[1:], 1),
            lambda: "(" * nest + text + ")" * (nest + rng.choice([0, 0, 0, -1, 1])),
            lambda: "*".join([number] * 9) + "*" + text,
            lambda: rng.choice("+-") + text,
        ]
    )()


def soup(rng: random.Random) -> str:
    """Tokens at random, often where they could stand."""
    text = ""
    for _ in range(rng.randrange(14)):
        likely = "123456789((" if not text or text[-1] in "(+-*/" else "+-*/))12 "
        text += rng.choice(likely if rng.random() < 0.85 else CHARS)
    return text + ")" * max(0, (text.count("(") - text.count(")")) * rng.choice([0, 1, 1]))


def cases(seed: int) -> list:
    """Triples (text, numbers, target) of every kind, most of them near misses."""
    rng, found = random.Random(seed), []

    def add(text, numbers, target, eos="$"):
        if len(text + eos) <= SIZE:
            found.append((text + eos, numbers, target))

    while len(found) < 115_000:
        largest = rng.choice([4, 9, 20, LARGEST])
        numbers = [rng.randint(1, largest) for _ in range(rng.randint(2, COUNT))]
        text = expression(rng, numbers)
        value = countdown_value(text)
        rng.shuffle(numbers)
        if value is None or value[0].denominator != 1 or value[0] < 1:
            add(text, numbers, rng.randint(1, 50))
            continue
        target = int(value[0])
        for right in (text, spaced(rng, text)):
            add(right, numbers, target)
        add(text, numbers, target + rng.choice([-1, 1]))
        add(text, numbers[:-1] + [numbers[-1] % LARGEST + 1], target)
        add(text, numbers, target, eos="")
        for _ in range(6):
            add(mutated(rng, text), numbers, target, eos="$" * (rng.random() < 0.95))
    for _ in range(35_000):
        text = soup(rng)
        value = countdown_value(text)
        if value and len(value[1]) <= COUNT and max(value[1]) <= LARGEST:
            add(text, value[1], int(max(1, value[0])))
        else:
            add(text, [1, 2, 3], 6)
    return found


@pytest.mark.slow
def test_grade_agrees_with_oracle():
    triples = cases(seed=0)
    truth = np.array([expected(*triple) for triple in triples])
    assert len(triples) >= 100_000
    assert truth.sum() >= 10_000 and (~truth).sum() >= 50_000
    wrong = np.flatnonzero(graded(triples) != truth)
    assert not len(wrong), [(triples[i], truth[i]) for i in wrong[:10]]


@pytest.mark.parametrize(
    "text, numbers, target",
    [
        ("(3+5)*2+7$", [3, 5, 2, 7], 23),
        ("7+2*(5+3)$", [3, 5, 2, 7], 23),
        (" ( 3 + 5 ) * 2 + 7 $", [3, 5, 2, 7], 23),
        ("((((((((((((((((((3))))))))))))))))))+1$", [1, 3], 4),
        ("8/(3-8/3)$", [3, 3, 8, 8], 24),  # through 1/3
        ("6/(1-3/4)$", [1, 3, 4, 6], 24),
        ("(1-5)/(2-4)$", [1, 2, 4, 5], 2),  # negative over negative
        ("10-3-2$", [2, 3, 10], 5),  # left to right
        ("12/3/2$", [2, 3, 12], 2),
        ("127*127*127*127$", [127] * 4, 127**4),
    ],
)
def test_right_answers(text, numbers, target):
    assert graded([(text, numbers, target)])[0]
    assert expected(text, numbers, target)


@pytest.mark.parametrize(
    "text, numbers, target",
    [
        ("$", [1, 2], 3),
        ("", [1, 2], 3),
        ("  $", [1, 2], 3),
        ("1+2", [1, 2], 3),  # no EOS
        ("1+2_", [1, 2], 3),
        ("1+2=$", [1, 2], 3),
        ("1+2=3$", [1, 2], 3),
        ("1+2:$", [1, 2], 3),
        ("1_+2$", [1, 2], 3),
        ("1$+2$", [1, 2], 3),
        ("1+2$1+2$", [1, 2], 3),  # the length takes in both
        ("1+2+$", [1, 2], 3),
        ("1+2+$", [1, 2], 4),
        ("1+2*$", [1, 2], 3),
        ("1)*(2$", [1, 2], 2),
        ("+1+2$", [1, 2], 3),
        ("-1+2$", [1, 2], 1),
        ("2-(-1)$", [1, 2], 3),
        ("2--1$", [1, 2], 3),
        ("(1)(2)$", [1, 2], 2),
        ("2(1)$", [1, 2], 2),
        ("(2)1$", [1, 2], 2),
        ("(1+2$", [1, 2], 3),
        ("1+2)$", [1, 2], 3),
        (")1+2($", [1, 2], 3),
        ("()1+2$", [1, 2], 3),
        ("1+2+()$", [1, 2], 3),
        ("(" * 39 + "$", [1, 2], 3),
        ("1 2+3$", [12, 3], 15),
        ("1 2$", [1, 2], 12),
        ("01+2$", [1, 2], 3),
        ("1+2+0$", [1, 2], 3),
        ("1+2+0$", [1, 2, 0], 3),
        ("1+2+2$", [1, 2], 5),  # once too often
        ("3$", [1, 2], 3),
        ("1+2$", [1, 2, 3], 3),  # not all
        ("1+2$", [1, 1, 2], 3),
        ("1+1+2$", [1, 2, 2], 4),
        ("1+2$", [1, 2], 4),
        ("1/(2-2)$", [1, 2, 2], 1),
        ("1/(2-2)$", [1, 2, 2], 0),
        ("(2-2)/(2-2)$", [2, 2, 2, 2], 1),
        ("2-2/(2-2)$", [2, 2, 2, 2], 2),
        ("7/2$", [2, 7], 3),  # no rounding
        ("4294967299+2$", [3, 2], 5),  # 2**32 + 3
        ("42949672970+2$", [10, 2], 12),
        ("65536*65536+1+2$", [1, 2], 3),
        ("99999999999+2$", [3, 2], 5),
    ],
)
def test_wrong_answers(text, numbers, target):
    assert not graded([(text, numbers, target)])[0]
    assert not expected(text, numbers, target)


def test_grade_reads_only_length_tokens_and_needs_no_batch():
    data = {"numbers": np.array([1, 2, 0, 0], np.int32), "target": np.int32(3)}
    tokens = np.array(countdown.TOKENIZER.encode("1+2") + [1, 5, 1], np.int32)
    grade = jax.jit(countdown.grade)
    rewards = [float(grade(tokens, np.int32(n), data)) for n in range(-1, 9)]
    assert rewards == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]  # only length 4 is right


def test_reference_solutions_are_right(task):
    for source in (task.train, task.heldout):
        encoded = [task.encode(source[i]) for i in range(len(source))]
        data = jax.tree.map(lambda *x: np.stack(x), *[e.data for e in encoded])
        assert data["numbers"].shape == (len(source), COUNT)
        tokens = np.zeros((len(source), SIZE), np.int32)
        for row, e in zip(tokens, encoded):
            row[: len(e.answer)] = e.answer
        length = np.array([len(e.answer) for e in encoded])
        assert jax.jit(jax.vmap(task.grade))(tokens, length, data).tolist() == [1.0] * len(source)


def test_encode(task):
    example = {"numbers": [3, 5, 2], "target": np.int32(16), "solution": b"(3+5)*2"}
    encoded = task.encode(example)
    assert task.tokenizer.decode(encoded.prompt) == "3 5 2=16:"
    assert task.tokenizer.decode(encoded.answer) == "(3+5)*2"
    assert encoded.answer[-1] == task.tokenizer.eos_id
    assert encoded.data["numbers"].tolist() == [3, 5, 2, 0]
    assert encoded.data["target"].shape == () and encoded.data["target"] == 16
    assert all(x.dtype == np.int32 for x in encoded.data.values())


def plain(source) -> list:
    examples = [source[i] for i in range(len(source))]
    return [(list(map(int, e["numbers"])), int(e["target"]), e["solution"]) for e in examples]


def test_examples(task):
    train, heldout = plain(task.train), plain(task.heldout)
    assert (len(train), len(heldout)) == (200, 60)
    puzzles = {(*sorted(numbers), target) for numbers, target, _ in train + heldout}
    assert len(puzzles) == 260  # within and across the splits
    for numbers, target, _ in train + heldout:
        assert 3 <= len(numbers) <= 4 and 1 <= min(numbers) and max(numbers) <= 12
        assert 1 <= target <= 50
    assert {len(numbers) for numbers, _, _ in train} == {3, 4}
    assert set("+-*/") <= set("".join(solution.decode() for _, _, solution in train))


def test_examples_depend_on_the_config_alone(task, tmp_path):
    random.seed(0)
    again = tasks.make(small(operators="/*-+"), tmp_path)
    assert plain(again.train) == plain(task.train)
    assert plain(again.heldout) == plain(task.heldout)
    other = tasks.make(small(seed=8), tmp_path)  # beside the first, in the same folder
    assert plain(other.train) != plain(task.train)
    assert plain(tasks.make(small(), tmp_path).train) == plain(task.train)
    sums = tasks.make(small(operators="+"), tmp_path)
    assert all(re.fullmatch(rb"[0-9+]+", solution) for _, _, solution in plain(sums.train))


def test_prepares_without_tensorflow(task):
    assert len(task.train) == 200 and "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "left, operator, right, text",
    [
        ("1+2", "+", "3-4", "1+2+3-4"),
        ("1+2", "-", "3-4", "1+2-3+4"),
        ("1+2", "*", "3-4", "(1+2)*(3-4)"),
        ("6*2", "*", "4/2", "6*2*4/2"),
        ("6*2", "/", "4/2", "6*2/(4/2)"),
        ("6*2", "-", "4/2", "6*2-4/2"),
        ("7", "/", "7", "7/7"),
    ],
)
def test_combine_spares_parentheses(left, operator, right, text):
    made = countdown.combine(parsed(left), operator, parsed(right))
    assert (made.value, made.text) == (countdown_value(text)[0], text)
    assert made.rank == (1 if operator in "+-" else 2)


def parsed(text) -> countdown.Expression:
    """The expression of a text without parentheses, built from its parts."""
    for operators in ("+-", "*/"):
        at = max(text.rfind(o) for o in operators)
        if at > 0:
            return countdown.combine(parsed(text[:at]), text[at], parsed(text[at + 1 :]))
    return countdown.single(int(text), 3, text)


def test_a_sum_starts_with_a_positive_term():
    two_less_five = countdown.combine(parsed("2"), "-", parsed("5"))
    assert countdown.combine(parsed("0"), "-", two_less_five).text == "0-2+5"
    assert countdown.combine(two_less_five, "*", parsed("3")).text == "(2-5)*3"
    flipped = countdown.Expression(3, 1, ((-1, "2"), (1, "5")))
    assert flipped.text == "5-2"


def test_combine_stays_among_the_integers():
    assert countdown.combine(parsed("7"), "/", parsed("2")) is None
    assert countdown.combine(parsed("7"), "/", parsed("3-3")) is None


def test_orders_repeat_training_puzzles_and_never_heldout_ones(tmp_path):
    twice = tasks.make(small(orders=3), tmp_path)
    train, heldout = plain(twice.train), plain(twice.heldout)
    assert (len(train), len(heldout)) == (600, 60)
    key = lambda example: (*sorted(example[0]), example[1])
    assert [key(e) for e in train[:200]] == [key(e) for e in train[200:400]]
    assert len({key(e) for e in train}) == 200 and not {key(e) for e in train} & {key(e) for e in heldout}
    assert sum(a[0] != b[0] for a, b in zip(train[:200], train[200:400])) > 100


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="chess"), f"task.name='chess' is unknown; known are {', '.join(tasks.NAMES)}."),
        (dict(numbers_min=0), "task.numbers_min=0 cannot work; set it to 2 or more."),
        (dict(numbers_min=1), "task.numbers_min=1 cannot work; set it to 2 or more."),
        (dict(numbers_max=2), "task.numbers_max=2 cannot work; set it to 3 or more."),
        (dict(largest=0), "task.largest=0 cannot work; set it to 1 or more."),
        (dict(target_max=0), "task.target_max=0 cannot work; set it to 1 or more."),
        (dict(orders=0), "task.orders=0 cannot work; set it to 1 or more."),
        (dict(train_size=0), "task.train_size=0 cannot work; set it to 1 or more."),
        (dict(heldout_size=0), "task.heldout_size=0 cannot work; set it to 1 or more."),
        (dict(operators=""), "task.operators='' cannot work; set it to one or more of '+-*/'."),
        (dict(operators="+^"), "task.operators='+^' cannot work; set it to one or more of '+-*/'."),
        (
            dict(largest=128),
            "task.largest=128 with task.numbers_max=4 makes values up to 2147483648, beyond the grader's "
            "int32; lower either until 2**(numbers_max-1) * largest**numbers_max < 2**31.",
        ),
        (
            dict(numbers_min=2, numbers_max=2, largest=2, operators="+"),  # 1+1, 1+2, 2+2
            "task.train_size=200 + task.heldout_size=60 asks for 260 distinct puzzles and 3 were found; lower the "
            "sizes or raise task.numbers_max, task.largest, task.target_max or the choice of task.operators.",
        ),
    ],
)
def test_errors(changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        tasks.make(small(**changes), tmp_path)
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def test_largest_that_fits_is_accepted():
    countdown.check(small(largest=LARGEST))


def test_folder_that_cannot_be_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError) as error:
        tasks.make(small(), path)
    assert str(error.value) == (
        f"data_dir={path} cannot be written (Not a directory); set data_dir to a folder that can, with room for the examples."
    )


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        # what array_record makes of a full disk
        (RuntimeError("Failed to finalize: write() failed: No space left on device; at byte 8"), "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(error, words, tmp_path, monkeypatch):
    def refuse(self):
        raise error

    monkeypatch.setattr(countdown.Countdown, "download_and_prepare", refuse)
    with pytest.raises(UserError) as raised:
        tasks.make(small(), tmp_path)
    assert str(raised.value) == (
        f"data_dir={tmp_path} cannot be written ({words}); set data_dir to a folder that can, with room for the examples."
    )


def test_bugs_of_a_preparation_stay_bugs(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("index out of range")

    monkeypatch.setattr(countdown.Countdown, "download_and_prepare", fail)
    with pytest.raises(RuntimeError, match="index out of range"):
        tasks.make(small(), tmp_path)


def test_examples_that_another_process_writes_at_the_same_time_are_read(tmp_path, monkeypatch):
    own = countdown.Countdown.download_and_prepare

    def after_another(self):
        other = countdown.Countdown(config=self.builder_config, data_dir=tmp_path, file_format="array_record")
        other.puzzles = self.puzzles
        own(other)
        own(self)

    monkeypatch.setattr(countdown.Countdown, "download_and_prepare", after_another)
    assert len(tasks.make(small(), tmp_path).train) > 0


@pytest.mark.parametrize("numbers", [[], [1, 2, 3, 4, 5]])
def test_an_example_without_numbers_or_with_too_many(numbers):
    with pytest.raises(UserError) as error:
        countdown.encode(dict(numbers=numbers, target=3, solution="1+2"), numbers_max=4)
    assert str(error.value) == (
        f"a Countdown example has {len(numbers)} numbers, not 1 to task.numbers_max=4; mend the example or task.numbers_max."
    )


def test_tokenizer():
    tokenizer = CharTokenizer("ab c")
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("a cb") == [2, 4, 5, 3]
    assert tokenizer.decode(np.array([2, 4, 5, 3])) == "a cb"
    assert tokenizer.decode([0, 2, 0, 3, 1, 4]) == "ab"  # pads skipped, stops at EOS
    alphabet = countdown.TOKENIZER.alphabet
    ids = countdown.TOKENIZER.encode(alphabet)
    assert ids == list(range(2, countdown.TOKENIZER.vocab_size))
    assert countdown.TOKENIZER.decode(ids) == alphabet


def test_tokenizer_errors():
    with pytest.raises(ValueError) as error:
        CharTokenizer("ab").encode("abx")
    assert str(error.value) == "character 'x' is unknown: use only those of the alphabet 'ab'."
    with pytest.raises(ValueError) as error:
        CharTokenizer("aba")
    assert str(error.value) == "alphabet 'aba' repeats a character: list each one once."


@pytest.mark.parametrize("text", [
    "3 5 2=23:", "3 5 2=23", " 3  5 2 = 23 : ", "3,5,2=23", "3, 5, 2 = 23", "03 5 2=023",
])  # fmt: skip
def test_parse(task, text):
    encoded = task.encode(task.parse(text))
    assert task.tokenizer.decode(encoded.prompt) == "3 5 2=23:" and encoded.answer == [task.tokenizer.eos_id]
    assert encoded.data["numbers"].tolist() == [3, 5, 2, 0] and encoded.data["target"] == 23


def test_parse_reads_what_the_model_reads(task):
    for example in [task.heldout[i] for i in range(20)]:
        encoded = task.encode(example)
        again = task.encode(task.parse(task.tokenizer.decode(encoded.prompt)))
        assert again.prompt == encoded.prompt and jax.tree.all(jax.tree.map(np.array_equal, again.data, encoded.data))


LIKE = ", as in --prompt='1 2 3=6'."
NO_PUZZLE = " is no Countdown puzzle; write the numbers, an equals sign and the target" + LIKE


@pytest.mark.parametrize("text, message", [
    ("hello", NO_PUZZLE),
    ("3 5 2=23=4", NO_PUZZLE),
    ("3 5 2=2 3", NO_PUZZLE),
    ("3+5*2=13", NO_PUZZLE),
    ("-3 5 2=4", NO_PUZZLE),
    ("3 5 2=4.0", NO_PUZZLE),
    ("٣ 5 2=10", NO_PUZZLE),
    ("3 5 2=\n<script>", NO_PUZZLE),
    ("3 5 99999999999999999999=4", NO_PUZZLE),
    ("3 5 2", " has no target; write one behind an equals sign" + LIKE),
    ("3 5 2=:", " has no target; write one behind an equals sign" + LIKE),
    ("", " has no target; write one behind an equals sign" + LIKE),
    ("=23", " gives no numbers; this run's puzzles have 3 to 4" + LIKE),
    ("3 5=8", " gives 2 numbers; this run's puzzles have 3 to 4" + LIKE),
    ("1 2 3 4 5=8", " gives 5 numbers; this run's puzzles have 3 to 4" + LIKE),
    ("3 5 13=8", " gives a number outside this run's range; choose numbers from 1 to 12" + LIKE),
    ("3 5 0=8", " gives a number outside this run's range; choose numbers from 1 to 12" + LIKE),
    ("3 5 2=51", " gives a target outside this run's range; choose one from 1 to 50" + LIKE),
    ("3 5 2=0", " gives a target outside this run's range; choose one from 1 to 50" + LIKE),
])  # fmt: skip
def test_parse_errors(task, text, message):
    with pytest.raises(ValueError) as error:
        task.parse(text)
    assert str(error.value) == f"--prompt={text!r}" + message
