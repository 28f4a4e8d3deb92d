"""Countdown: reach a target with given numbers, each used exactly once, and + - * / ( ).

Prompt "3 5 2 7=23:", answer "(3+5)*2+7". The grader is a parser in XLA with exact rational
arithmetic in int32, so that grading stays inside the training program.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jax import lax
from ml_collections import ConfigDict

from treerl.errors import UserError, writing
from treerl.tasks import Encoded, Task
from treerl.tokenizers import CharTokenizer

OPERATORS = "+-*/"
TOKENIZER = CharTokenizer("0123456789" + OPERATORS + "()=: ")
ZERO, PLUS, MINUS, TIMES, OVER, OPEN, CLOSE, SPACE = TOKENIZER.encode("0+-*/() ")


def make(config: ConfigDict, data_dir: epath.PathLike) -> Task:
    """Prepares the puzzles under data_dir (once a difficulty) and returns the task.

    Args:
      config: numbers_min, numbers_max (how many numbers a puzzle gives), largest (given numbers
        are 1..largest), operators (those that the reference solutions use; an answer may use
        all four), target_max (targets are 1..target_max), orders (training examples a puzzle),
        train_size, heldout_size (puzzles), seed.
      data_dir: a folder that may be written.

    Raises:
      UserError: a field cannot work, there are too few distinct puzzles, or data_dir cannot be
        written.
    """
    check(config)
    builder = _prepared(Difficulty.of(config), data_dir)
    return Task(
        tokenizer=TOKENIZER,
        train=builder.as_data_source(split="train"),
        heldout=builder.as_data_source(split="heldout"),
        encode=functools.partial(encode, numbers_max=config.numbers_max),
        grade=grade,
        parse=functools.partial(parse, config=config),
    )


def check(config: ConfigDict) -> None:
    """Raises UserError, naming the field and the fix, where the config cannot work."""
    low, high, largest = config.numbers_min, config.numbers_max, config.largest
    least = dict(largest=1, target_max=1, orders=1, train_size=1, heldout_size=1, numbers_min=2, numbers_max=low)
    for field, bound in least.items():
        if config[field] < bound:
            raise UserError(f"task.{field}={config[field]} cannot work; set it to {bound} or more.")
    if not config.operators or not set(config.operators) <= set(OPERATORS):
        raise UserError(f"task.operators={config.operators!r} cannot work; set it to one or more of {OPERATORS!r}.")
    bound = 2 ** (high - 1) * largest**high
    if bound >= 2**31:  # see `grade`
        raise UserError(
            f"task.largest={largest} with task.numbers_max={high} makes values up to {bound}, beyond the "
            "grader's int32; lower either until 2**(numbers_max-1) * largest**numbers_max < 2**31."
        )


def encode(example: dict, numbers_max: int) -> Encoded:
    """Prompt, reference answer and the grader's data of one example.

    data: numbers int32 [numbers_max], padded with 0; target int32 []. Raises UserError where the
    example has no numbers, or more than numbers_max.
    """
    given = np.asarray(example["numbers"], np.int32)
    if not 1 <= len(given) <= numbers_max:
        raise UserError(
            f"a Countdown example has {len(given)} numbers, not 1 to task.numbers_max={numbers_max}; mend the example or task.numbers_max."
        )
    numbers = np.zeros(numbers_max, np.int32)
    numbers[: len(given)] = given
    solution = example["solution"]
    solution = solution.decode() if isinstance(solution, bytes) else solution
    return Encoded(
        prompt=TOKENIZER.encode(f"{' '.join(map(str, given))}={example['target']}:"),
        answer=TOKENIZER.encode(solution) + [TOKENIZER.eos_id],
        data={"numbers": numbers, "target": np.asarray(example["target"], np.int32)},
    )


def parse(text: str, config: ConfigDict) -> dict:
    """The example of a prompt, "3 5 2 7=23:"; the colon may be missing, and commas may separate.

    Raises:
      UserError: the text is no puzzle, or none of those that the config's task can hold.
    """
    low, high, largest = config.numbers_min, config.numbers_max, config.largest
    like = [1 + i % largest for i in range(low)]
    like = f"as in --prompt='{' '.join(map(str, like))}={min(sum(like), config.target_max)}'."

    def wrong(what: str, fix: str):
        return UserError(f"--prompt={text!r} {what}; {fix}, {like}")

    left, equals, right = text.strip().removesuffix(":").partition("=")
    words, target = left.replace(",", " ").split(), right.strip()
    good = all(re.fullmatch("[0-9]{1,9}", word) for word in words + [target] * bool(target))
    if not good:
        raise wrong("is no Countdown puzzle", "write the numbers, an equals sign and the target")
    if not target:
        raise wrong("has no target", "write one behind an equals sign")
    numbers = [int(word) for word in words]
    if not low <= len(numbers) <= high:
        many = f"{low}" if low == high else f"{low} to {high}"
        raise wrong(f"gives {len(numbers) or 'no'} numbers", f"this run's puzzles have {many}")
    if not all(1 <= number <= largest for number in numbers):
        raise wrong("gives a number outside this run's range", f"choose numbers from 1 to {largest}")
    if not 1 <= int(target) <= config.target_max:
        raise wrong("gives a target outside this run's range", f"choose one from 1 to {config.target_max}")
    return {"numbers": np.asarray(numbers, np.int32), "target": int(target), "solution": ""}


# The grader.


class Frame(NamedTuple):
    """An open parenthesis, or the whole answer: sum + term (* or /) the next factor."""

    sum_num: jax.Array
    sum_den: jax.Array
    term_num: jax.Array  # carries the sign in front of the term
    term_den: jax.Array
    divide: jax.Array  # 1 where the next factor divides, 0 where it multiplies

    def total(self) -> tuple[jax.Array, jax.Array]:
        """Numerator and denominator of sum + term."""
        cross = self.sum_num * self.term_den + self.term_num * self.sum_den
        return cross, self.sum_den * self.term_den


class Parser(NamedTuple):
    """State between two tokens. D = S // 2 parentheses can be open, beside the whole answer."""

    frame: Frame  # the innermost, [] each
    outer: Frame  # those around it, [D] each; entry i was set aside when i were open
    depth: jax.Array  # [], open parentheses
    wants: jax.Array  # [] bool, an operand must come next
    number: jax.Array  # [], of the digits read so far; 0 between numbers
    uses: jax.Array  # [N], how often the number numbers[i] was used
    good: jax.Array  # [] bool, nothing wrong so far


def _frame(sum_num, sum_den, sign) -> Frame:
    """A frame in which sum_num / sum_den and a sign were read, and nothing of the term."""
    return Frame(*(jnp.asarray(x, jnp.int32) for x in (sum_num, sum_den, sign, 1, 0)))


def _select(mask, x: Frame, y: Frame) -> Frame:
    return jax.tree.map(functools.partial(jnp.where, mask), x, y)


def _is_digit(token):
    return (token >= ZERO) & (token < ZERO + 10)


def _step(numbers: jax.Array, state: Parser, tokens: tuple) -> tuple[Parser, None]:
    """Reads one token. numbers [N]; tokens: this one and the next, [] each."""
    token, following = tokens
    digit = _is_digit(token)
    plus, minus, times, over = (token == t for t in (PLUS, MINUS, TIMES, OVER))
    opens, closes = token == OPEN, token == CLOSE
    operator = plus | minus | times | over

    starts = digit & (state.number == 0)
    ends = digit & ~_is_digit(following)
    # Saturates: with largest**2 * 2 < 2**31 no given number is as large as the ceiling.
    number = jnp.minimum(state.number * 10 + (token - ZERO), 10**8)
    number = jnp.where(digit, number, 0)
    same = numbers == number

    # One-hot masks: vmapped on CPU they take 10% less time than a gather and a scatter.
    slot = jnp.arange(state.outer.divide.shape[0])
    outside = jax.tree.map(lambda x: jnp.sum(jnp.where(slot == state.depth - 1, x, 0)), state.outer)
    outer = _select((slot == state.depth) & opens, state.frame, state.outer)

    # A number or a closed parenthesis is the next factor of a term.
    total_num, total_den = state.frame.total()
    frame = _select(closes, outside, state.frame)
    factor = ends | closes
    num = jnp.where(closes, total_num, number)
    den = jnp.where(closes, total_den, 1)
    divide = frame.divide == 1
    frame = frame._replace(
        term_num=jnp.where(factor, frame.term_num * jnp.where(divide, den, num), frame.term_num),
        term_den=jnp.where(factor, frame.term_den * jnp.where(divide, num, den), frame.term_den),
        divide=jnp.where(times | over, over.astype(jnp.int32), frame.divide),
    )
    frame = _select(plus | minus, _frame(total_num, total_den, jnp.where(minus, -1, 1)), frame)
    frame = _select(opens, _frame(0, 1, 1), frame)

    wrong = (
        ~(digit | operator | opens | closes | (token == SPACE))
        | ((starts | opens) & ~state.wants)
        | ((operator | closes) & state.wants)
        | (starts & (token == ZERO))
        | (closes & (state.depth == 0))
        | (ends & ~jnp.any(same))
        | (factor & divide & (num == 0))
    )
    state = Parser(
        frame=frame,
        outer=outer,
        depth=state.depth + opens - closes,
        wants=(state.wants & ~digit) | operator | opens,
        number=number,
        uses=state.uses + (same & ends),
        good=state.good & ~wrong,
    )
    return state, None


def grade(tokens: jax.Array, length: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
    """1.0 where the answer uses every given number exactly once and equals the target, else 0.0.

        expr = term {(+|-) term}    term = factor {(*|/) factor}    factor = number | ( expr )

    No unary signs, no implied products, no leading zeros; spaces between tokens are allowed. A
    missing EOS, a division by zero or any other token gives 0.

    Exact in int32. With every given number at most M, a value made of k of them is kept as an
    unreduced num/den with |num|, den's size <= 2**(k-1) * M**k: true of one number over 1, and
    from parts of i and j numbers a product or quotient multiplies two entries, while a sum has
    a*d + b*c, at most 2 * 2**(i-1) * M**i * 2**(j-1) * M**j; the frame's own 0/1 and 1/1 add
    nothing. `check` keeps the bound for all N numbers below 2**31. So only an answer that uses
    numbers not given, or too often, can wrap around, and `uses` fails it whatever its value.

    Args:
      tokens: int32 [S], the answer; only the first `length` are read.
      length: int32 [], the answer's tokens, EOS included.
      data: numbers int32 [N], padded with 0; target int32 [].

    Returns:
      float32 [].
    """
    numbers, size = data["numbers"], tokens.shape[0]
    # A length of 0 leaves an empty text, one beyond S an EOS inside it: both wrong below.
    terminated = tokens[jnp.clip(length - 1, 0, size - 1)] == TOKENIZER.eos_id
    text = jnp.where(jnp.arange(size) < length - 1, tokens, SPACE)  # spaces change nothing

    # An answer that opens more than S // 2 parentheses cannot close them within S tokens.
    start = Parser(
        frame=_frame(0, 1, 1),
        outer=Frame(*[jnp.zeros(size // 2, jnp.int32)] * 5),
        depth=jnp.int32(0),
        wants=jnp.bool_(True),
        number=jnp.int32(0),
        uses=jnp.zeros_like(numbers),
        good=jnp.bool_(True),
    )
    following = jnp.append(text[1:], SPACE)
    end, _ = lax.scan(functools.partial(_step, numbers), start, (text, following))

    given = jnp.sum(numbers[:, None] == numbers, axis=-1)
    exactly_once = jnp.all((end.uses == given) | (numbers == 0))
    num, den = end.frame.total()
    # target * den could wrap around, a quotient cannot.
    den = jnp.where(den == 0, 1, den)
    reached = (lax.rem(num, den) == 0) & (lax.div(num, den) == data["target"])
    closed = (end.depth == 0) & ~end.wants
    return (terminated & end.good & closed & exactly_once & reached).astype(jnp.float32)


# The puzzles.


class Expression(NamedTuple):
    """An integer, how tightly it holds (1 a sum, 2 a product, 3 a number), and its signed terms."""

    value: int
    rank: int
    terms: tuple[tuple[int, str], ...]  # (+1 or -1, text); at least one is positive

    @property
    def text(self) -> str:
        """How people write it: the first positive term in front, no parentheses to spare."""
        first = next(i for i, (sign, _) in enumerate(self.terms) if sign > 0)
        rest = self.terms[:first] + self.terms[first + 1 :]
        return self.terms[first][1] + "".join("+-"[sign < 0] + text for sign, text in rest)


def single(value: int, rank: int, text: str) -> Expression:
    """A number or a product."""
    return Expression(value, rank, ((1, text),))


def combine(left: Expression, operator: str, right: Expression) -> Expression | None:
    """left operator right; None where it is no integer. Sums are flat: a-(b-c) is a-b+c."""
    if operator in "+-":
        sign = 1 if operator == "+" else -1
        terms = left.terms + tuple((sign * s, text) for s, text in right.terms)
        return Expression(left.value + sign * right.value, 1, terms)
    if operator == "*":
        value = left.value * right.value
    elif right.value == 0 or left.value % right.value:
        return None
    else:
        value = left.value // right.value
    # a/(b*c) needs its parentheses; a*(b/c) does not.
    first = f"({left.text})" if left.rank < 2 else left.text
    second = f"({right.text})" if right.rank < 2 or (right.rank == 2 and operator == "/") else right.text
    return single(value, 2, first + operator + second)


class Puzzle(NamedTuple):
    numbers: tuple[int, ...]  # in the order of the prompt
    target: int
    solution: str


@dataclasses.dataclass(eq=False)
class Difficulty(tfds.core.BuilderConfig):
    """What decides the examples; its name is their folder's."""

    numbers_min: int = 0
    numbers_max: int = 0
    largest: int = 0
    operators: str = ""
    target_max: int = 0
    orders: int = 0
    train_size: int = 0
    heldout_size: int = 0
    seed: int = 0

    @classmethod
    def of(cls, config: ConfigDict) -> "Difficulty":
        """The difficulty of a checked config."""
        fields = {field: config[field] for field in cls.__annotations__}
        fields["operators"] = "".join(o for o in OPERATORS if o in config.operators)
        letters = fields["operators"].translate(str.maketrans(OPERATORS, "asmd"))
        fields["name"] = (
            f"{config.numbers_min}to{config.numbers_max}_largest{config.largest}_{letters}"
            f"_target{config.target_max}_train{config.train_size}x{config.orders}"
            f"_heldout{config.heldout_size}"
            f"_seed{config.seed}"
        )
        return cls(**fields)


def draw(rng: random.Random, difficulty: Difficulty) -> Puzzle | None:
    """A random expression over random numbers; None where its value is no target."""
    count = rng.randint(difficulty.numbers_min, difficulty.numbers_max)
    numbers = tuple(rng.randint(1, difficulty.largest) for _ in range(count))
    parts = [single(x, 3, str(x)) for x in rng.sample(numbers, count)]
    while len(parts) > 1:
        i = rng.randrange(len(parts) - 1)
        joined = combine(parts[i], rng.choice(difficulty.operators), parts[i + 1])
        if joined is None:
            return None
        parts[i : i + 2] = [joined]
    if not 1 <= parts[0].value <= difficulty.target_max:
        return None
    return Puzzle(numbers, parts[0].value, parts[0].text)


def puzzles(difficulty: Difficulty) -> tuple[list[Puzzle], list[Puzzle]]:
    """The train and heldout examples; no puzzle (target and multiset of numbers) is in both.

    Heldout has each of its puzzles once; train has `orders` examples of each, the numbers shown
    in another order, first every puzzle in one order, then every puzzle in the next.

    Raises UserError where too few are found in 100 attempts a puzzle (and 10,000 more).
    """
    rng = random.Random(difficulty.seed)
    size = difficulty.train_size + difficulty.heldout_size
    found: dict[tuple, Puzzle] = {}
    for _ in range(100 * size + 10_000):
        puzzle = draw(rng, difficulty)
        if puzzle is not None:
            found.setdefault((*sorted(puzzle.numbers), puzzle.target), puzzle)
        if len(found) == size:
            break
    else:
        raise UserError(
            f"task.train_size={difficulty.train_size} + task.heldout_size={difficulty.heldout_size} asks for "
            f"{size} distinct puzzles and {len(found)} were found; lower the sizes or raise "
            "task.numbers_max, task.largest, task.target_max or the choice of task.operators."
        )
    # Common puzzles are found first: without a shuffle the splits would differ in kind.
    chosen = list(found.values())
    rng.shuffle(chosen)
    once, heldout = chosen[: difficulty.train_size], chosen[difficulty.train_size :]
    shuffled = lambda puzzle: puzzle._replace(numbers=tuple(rng.sample(puzzle.numbers, len(puzzle.numbers))))
    more = [shuffled(puzzle) for _ in range(difficulty.orders - 1) for puzzle in once]
    return once + more, heldout


class Countdown(tfds.core.GeneratorBasedBuilder):
    """The puzzles of one difficulty on disk."""

    VERSION = tfds.core.Version("1.0.0")
    # What tfds would find itself, by way of a package that it does not install.
    code_path = pathlib.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "numbers": tfds.features.Sequence(np.int32),
                "target": np.int32,
                "solution": tfds.features.Text(),
            }
        )
        # in the order of `puzzles`: its first examples are different puzzles
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        train, heldout = self.puzzles
        return {
            "train": self._generate_examples(train),
            "heldout": self._generate_examples(heldout),
        }

    def _generate_examples(self, examples: list[Puzzle]):
        for i, puzzle in enumerate(examples):
            yield i, puzzle._asdict()


def _prepared(difficulty: Difficulty, data_dir: epath.PathLike) -> Countdown:
    """The builder of the difficulty, its examples written."""

    def build():
        # Only array_record is read without TensorFlow and with random access.
        return Countdown(config=difficulty, data_dir=data_dir, file_format="array_record")

    builder = build()
    if not os.path.exists(builder.data_path):
        builder.puzzles = puzzles(difficulty)  # before any folder is made: there may be too few
    with writing(f"data_dir={os.fspath(data_dir)}", "set data_dir to a folder that can, with room for the examples."):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout is the summary's
                builder.download_and_prepare()
        except OSError:
            # Another process may have finished the same folder first.
            builder = build()
            if not os.path.exists(builder.data_path):
                raise
    return builder if builder.info.splits else build()  # another process wrote them meanwhile
