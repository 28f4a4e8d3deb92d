"""Text tasks: where examples come from, what the model reads, how answers are graded, and mistakes in files and fields."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from treerl import prompts, tasks
from treerl.config import check, default
from treerl.errors import UserError
from treerl.tasks import text as T
from treerl.tokenizers import CharTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:grader")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def make(name="addition", data_dir="/nowhere", tokenizer=None, train_size=20, heldout_size=5, seed=0, **text) -> tasks.Task:
    config = default()
    config.task.update(name=name, train_size=train_size, heldout_size=heldout_size, seed=seed)
    for field, value in dict(dict(chat=False), **text).items():
        config.text[field] = ConfigDict(value) if isinstance(value, dict) else value
    check(config)
    return tasks.make(config.task, str(data_dir), config.text, tokenizer)


def mistake(*args, **changes) -> str:
    with pytest.raises(UserError) as error:
        make(*args, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def examples(source) -> list[dict]:
    return [source[i] for i in range(len(source))]


class Chat:
    """The tokenizer of a model: characters with a template."""

    def __getattr__(self, name):
        return getattr(CharTokenizer(T.PRINTABLE), name)

    def chat(self, messages):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def read(task, example) -> str:
    return task.tokenizer.decode(task.encode(example).prompt)


def graded(task, answers: list[tuple[int, str]], width=40, end=True):
    """Scores and faults of (row, answer) pairs, as tokens behind which there is junk."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, task.tokenizer.vocab_size, (len(answers), width), dtype=np.int32)
    length = np.zeros(len(answers), np.int32)
    for i, (_, answer) in enumerate(answers):
        ids = task.tokenizer.encode(answer) + [task.tokenizer.eos_id] * end
        tokens[i, : len(ids)], length[i] = ids, len(ids)
    return task.host.grade(tokens, length, {"row": np.array([row for row, _ in answers], np.int32)})


# --- what the model reads -------------------------------------------------------------------------


SHOTS = (("1 + 1?", "2"), ("{prompt} {}?", "3 {0}"))


def test_a_prompt_without_a_template():
    task = make(system="Be brief.", shots=SHOTS, template="{Q}: {prompt} A:")
    example = dict(row=0, prompt="4 {x} {prompt}?", answer="5", completion=None)
    assert read(task, example) == ("Be brief.\n\n{Q}: 1 + 1? A:\n2\n\n{Q}: {prompt} {}? A:\n3 {0}\n\n{Q}: 4 {x} {prompt}? A:\n")
    assert read(make(), example) == "4 {x} {prompt}?\n"


def test_a_prompt_in_a_chat_template():
    example = dict(row=0, prompt="4?", answer="5", completion=None)
    task = make(tokenizer=Chat(), chat=True, system="Be brief.", shots=SHOTS[:1], template="Q: {prompt}")
    assert read(task, example) == "<system>Be brief.<user>Q: 1 + 1?<assistant>2<user>Q: 4?<assistant>"
    assert read(make(tokenizer=Chat(), chat=True), example) == "<user>4?<assistant>"


@pytest.mark.parametrize("answer, completion, expected", [("5", None, "5"), ("5", "4+1=5", "4+1=5"), (None, None, "")])
def test_the_reference_answer(answer, completion, expected):
    task = make()
    encoded = task.encode(dict(row=7, prompt="4?", answer=answer, completion=completion))
    assert encoded.answer == task.tokenizer.encode(expected) + [task.tokenizer.eos_id]
    assert encoded.data.keys() == {"row"} and encoded.data["row"] == 7 and encoded.data["row"].dtype == np.int32


def test_a_question_of_a_user():
    task = make(template="Q: {prompt}")
    example = task.parse("What is 1 + 1?")
    assert read(task, example) == "Q: What is 1 + 1?\n" and task.encode(example).data["row"] == -1
    assert task.encode(example).answer == [task.tokenizer.eos_id]
    with pytest.raises(UserError, match="^--prompt is empty; write a question.$"):
        task.parse(" \n")
    with pytest.raises(UserError, match="^--prompt cannot be written in tokens: character 'é' is unknown"):
        task.encode(task.parse("L'été"))


def test_prompts_stack():
    """As the host loop batches them."""
    task = make()
    batch = prompts.encode(task, [task.train[3], task.heldout[1]], np.arange(2), 32)
    assert batch.data["row"].tolist() == [3, 21] and batch.token.shape == (2, 32)


# --- examples -------------------------------------------------------------------------------------


def test_addition():
    task = make(train_size=3000, heldout_size=1095)
    train, heldout = examples(task.train), examples(task.heldout)
    assert [e["row"] for e in train + heldout] == list(range(4095))
    pairs = [tuple(int(x) for x in e["prompt"].removeprefix("What is ").removesuffix("?").split(" + ")) for e in train + heldout]
    assert {tuple(sorted(pair)) for pair in pairs} == {(a, b) for b in range(10, 100) for a in range(10, b + 1)}  # all, once
    assert any(a < b for a, b in pairs) and any(a > b for a, b in pairs)
    for (a, b), e in zip(pairs, train + heldout):
        assert e["answer"] == str(a + b) and e["completion"] == f"{a} + {b} = {a + b}"


def test_addition_of_other_digits():
    single = make(train_size=40, heldout_size=5, options={"digits": 1})
    assert all(len(e["prompt"]) == len("What is 1 + 1?") and "0" not in e["prompt"] for e in examples(single.train))
    assert len(make(options={"digits": 9}).train[0]["prompt"]) == len("What is 123456789 + 123456789?")


def test_examples_depend_on_the_seed_alone():
    one, again, other = (examples(make(seed=seed).train) for seed in (1, 1, 2))
    assert one == again != other


def test_reasoning_gym():
    options = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    graders = {"reasoning_gym": 1.0, "number": 1.0}
    sizes = dict(train_size=300, heldout_size=60)
    task = make("reasoning_gym", source="chain_sum", extract="number", graders=graders, options=options, **sizes)
    train, heldout = examples(task.train), examples(task.heldout)
    assert [e["row"] for e in train + heldout] == list(range(360))
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in heldout}  # of so few that without care they would meet
    assert all(e["entry"]["question"] == e["prompt"] and e["metadata"]["num_terms"] == 2 for e in train)
    assert examples(task.train) == train
    answers = [(row, f"I say {(train + heldout)[row]['answer']}") for row in (0, 5, 310)]
    scores, fault = graded(task, answers + [(1, "no")])
    assert scores.tolist() == [[1, 1]] * 3 + [[0, 0]] and not fault.any()


def write(path, *lines) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def rows(n, **more):
    return [dict(question=f"{i} + 1?", solution=f"adding\n#### {i + 1}", **more) for i in range(n)]


def test_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", *rows(7, level=3))
    task = make("jsonl", source=path, prompt="question", answer="solution", heldout_size=2)
    assert examples(task.train) == [
        dict(row=i, prompt=f"{i} + 1?", answer=str(i + 1), completion=f"adding\n#### {i + 1}", metadata={"level": 3}) for i in range(5)
    ]
    assert [(e["row"], e["prompt"]) for e in examples(task.heldout)] == [(5, "5 + 1?"), (6, "6 + 1?")]
    assert task.tokenizer.decode(task.encode(task.train[0]).answer) == "adding\n#### 1"


def test_jsonl_with_a_file_of_its_own_for_heldout(tmp_path):
    lines = dict(prompt="1?", answer=1), dict(prompt="2?", answer=-0.5), dict(prompt="3?", answer="x")
    train = write(tmp_path / "a.jsonl", *lines)
    heldout = write(tmp_path / "b.jsonl", dict(prompt="2?", answer="no"), dict(prompt="4?", answer="y"))
    task = make("jsonl", source=train, heldout=heldout)
    assert [(e["row"], e["prompt"], e["answer"]) for e in examples(task.train)] == [(0, "1?", "1"), (1, "3?", "x")]
    assert [(e["row"], e["prompt"], e["answer"]) for e in examples(task.heldout)] == [(2, "2?", "no"), (3, "4?", "y")]
    assert graded(task, [(1, "X"), (2, "no"), (3, "x")])[0].tolist() == [[1], [1], [0]]


GOOD = {"prompt": "1?", "answer": "1"}


@pytest.mark.parametrize("line, message", [
    ("\n", "is empty; mend or remove that line."),
    ("{]\n", "is no JSON; mend or remove that line."),
    ('{"prompt": "1?", "answer"', "is no JSON; mend or remove that line."),
    ("[" * 100_000 + "\n", "is no JSON; mend or remove that line."),
    ("[1]\n", 'is no JSON object; write it as {"prompt": ..., "answer": ...}.'),
    ('{"prompt": "1?"}\n', "has no 'answer'; set text.answer to one of 'prompt'."),
    ('{"question": "1?", "answer": 1}\n', "has no 'prompt'; set text.prompt to one of 'question', 'answer'."),
    *[(json.dumps(dict(GOOD, answer=bad)) + "\n",
       ": 'answer' is empty, or neither text nor a number; mend it, or set text.answer to another column.")
      for bad in (None, True, [1], {"a": 1}, float("nan"), float("inf"), "", " ")],
    (json.dumps(dict(GOOD, prompt="")) + "\n",
     ": 'prompt' is empty, or neither text nor a number; mend it, or set text.prompt to another column."),
])  # fmt: skip
def test_lines_that_cannot_work(line, message, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, line, *([GOOD] * 9 if line.endswith("\n") else []))
    assert mistake("jsonl", source=path) == f"{path}:3{message if message[0] == ':' else ' ' + message}"
    good = write(tmp_path / "b.jsonl", GOOD)
    assert mistake("jsonl", source=good, heldout=path).startswith(f"{path}:3")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
    assert mistake("jsonl", source=str(tmp_path / "a.jsonl")) == f"{tmp_path}/a.jsonl:1 is no JSON; mend or remove that line."


def test_files_that_cannot_work(tmp_path):
    five = write(tmp_path / "a.jsonl", *[dict(prompt=f"{i}?", answer=1) for i in range(5)])
    empty = write(tmp_path / "b.jsonl")
    assert mistake("jsonl", source="/nowhere/a") == (
        "text.source='/nowhere/a' cannot be read (No such file or directory); set it to a file of JSON lines."
    )
    assert mistake("jsonl", source=five, heldout=str(tmp_path)) == (
        f"text.heldout='{tmp_path}' cannot be read (Is a directory); set it to a file of JSON lines."
    )
    assert mistake("jsonl", source=five, heldout_size=5) == (
        f"text.source='{five}' has 5 examples and task.heldout_size=5 holds out as many; lower it, or set text.heldout."
    )
    assert mistake("jsonl", source=five, heldout_size=0) == "task.heldout_size=0 cannot work; set it to 1 or more."
    assert mistake("jsonl", source=five, heldout=empty) == (
        f"text.heldout='{empty}' is empty; add lines, or set it to '' to hold out those of text.source."
    )
    assert mistake("jsonl", source=five, heldout=five) == (
        f"text.source='{five}' has no question that is not held out; add some, or change text.heldout."
    )


class Sums(tfds.core.GeneratorBasedBuilder):
    """Sums of one digit, as others might have prepared them."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = pathlib.Path(__file__)

    def _info(self):
        features = dict(q=tfds.features.Text(), a=np.int32, why=tfds.features.Text(), parts=tfds.features.Sequence(np.int32))
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, dict(q=f"{i} + {count}?", a=i + count, why="so", parts=[i, count])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Sums(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(prepared):
    task = make("tfds", prepared, source="sums", prompt="q", answer="a", heldout_size=4)
    made = [(e["row"], e["prompt"], e["answer"]) for e in examples(task.train)]
    assert made == [(i, f"{i} + 10?", str(i + 10)) for i in range(6)]
    assert [(e["row"], e["prompt"]) for e in examples(task.heldout)] == [(i, f"{i} + 10?") for i in range(6, 10)]
    task = make("tfds", prepared, source="sums", prompt="q", answer="a", split="train[:50%]", heldout="test")
    assert [e["prompt"] for e in examples(task.train)] == [f"{i} + 10?" for i in range(5)]
    assert [(e["row"], e["prompt"]) for e in examples(task.heldout)] == [(5 + i, f"{i} + 3?") for i in range(3)]
    assert graded(task, [(0, "10"), (5, "3"), (5, "10")])[0].tolist() == [[1], [1], [0]]
    assert "tensorflow" not in sys.modules


def test_tfds_that_cannot_work(prepared, tmp_path):
    sums = dict(source="sums", prompt="q", answer="a")
    wrong = lambda **changes: mistake("tfds", prepared, **dict(sums, **changes))
    assert wrong(source="gsm8k") == (
        f"text.source='gsm8k' is no dataset prepared under data_dir={prepared}; prepare it there, and write a config behind "
        "a slash, as in 'name/config'."
    )
    assert wrong(split="dev") == "text.split='dev' is no split of text.source='sums'; known are train, test."
    assert wrong(heldout="dev") == "text.heldout='dev' is no split of text.source='sums'; known are train, test."
    assert wrong(answer="b") == "sums train[0] has no 'b'; set text.answer to one of 'a', 'parts', 'q', 'why'."
    assert wrong(answer="parts") == (
        "sums train[0]: 'parts' is empty, or neither text nor a number; mend it, or set text.answer to another column."
    )
    assert wrong(heldout_size=10) == (
        "text.split='train' of text.source='sums' has 10 examples and task.heldout_size=10 holds out as many; lower it, or set "
        "text.heldout."
    )


# --- grading --------------------------------------------------------------------------------------


def test_graders_read_tokens():
    """With the answer's end and what follows it aside; a truncated answer is graded as it is."""
    task = make(graders={"number": 1.0, "sample_graders:length": 0.25}, extract="number")
    answer = task.train[3]["answer"]
    assert task.grade is None
    assert (task.host.names, task.host.weights) == (("number", "sample_graders:length"), (1.0, 0.25))
    answers = [(3, f"it is {answer}"), (3, answer), (3, ""), (22, task.heldout[2]["answer"]), (-1, answer), (3, answer)]
    for end in (True, False):
        scores, fault = graded(task, answers, end=end)
        assert (scores.dtype, scores.shape, fault.dtype) == (np.float32, (6, 2), np.int8)
        lengths = [len(text) for _, text in answers]
        lengths[4] = 0
        assert scores[:, 0].tolist() == [1, 1, 0, 1, 0, 1] and scores[:, 1].tolist() == lengths and not fault.any()


def test_an_answer_without_tokens_is_worth_nothing():
    task = make(graders={"sample_graders:half": 1.0})
    tokens = np.full((2, 4), task.tokenizer.eos_id, np.int32)
    scores, fault = task.host.grade(tokens, np.array([0, 1], np.int32), {"row": np.zeros(2, np.int32)})
    assert scores.tolist() == [[0.0], [0.5]] and not fault.any()
    assert task.host.grade(tokens[:0], np.zeros(0, np.int32), {"row": np.zeros(0, np.int32)})[0].shape == (0, 1)


def test_faults_come_through():
    task = make(graders={"sample_graders:told": 1.0}, workers=1)
    scores, fault = graded(task, [(0, "good"), (1, "raise"), (2, "good")])
    assert scores.tolist() == [[1], [0], [1]] and fault.tolist() == [0, 1, 0]


def test_reference_answers_are_right():
    task = make(extract="number", graders={"number": 1.0, "exact": 1.0, "math": 1.0})
    tokens, length, _ = prompts.encode_answers(task, examples(task.train), 40)
    scores, fault = task.host.grade(tokens, length, {"row": np.arange(len(task.train), dtype=np.int32)})
    assert (scores == 1).all() and not fault.any()


@pytest.mark.parametrize("how, answers, key", [
    ("text", [" New York", "new\nyork "], "new york"),
    ("number", ["it is 1,000.0", "1000"], "1000"),
    ("boxed", [r"\boxed{X}", r"\boxed{1} \boxed{ x }"], "x"),
    ("boxed", ["x", ""], ""),
])  # fmt: skip
def test_answers_that_vote_together(how, answers, key):
    task = make(extract=how)
    for answer in answers:
        ids = task.tokenizer.encode(answer)
        assert task.host.key(np.array(ids + [1, 5, 5], np.int32), len(ids) + 1) == key


# --- mistakes in fields ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    (dict(chat=True),
     "text.chat=True renders prompts by a model's template and there is none; set text.chat=False, or model.source to a model "
     "that has one."),
    (dict(options={"digits": 1}, train_size=41),
     "task.train_size=41 + task.heldout_size=5 asks for 46 different sums and 45 have text.options digits=1; lower the sizes or "
     "raise digits."),
    (dict(options={"digits": 0}), "text.options: digits=0 cannot work; set it to 1 to 9."),
    (dict(options={"digits": 2.0}), "text.options: digits=2.0 cannot work; set it to 1 to 9."),
    (dict(options={"digit": 2}), "text.options has no 'digit' for task.name=addition; known is digits."),
    (dict(train_size=0), "task.train_size=0 cannot work; set it to 1 or more."),
    (dict(graders={"exac": 1.0}),
     "text.graders: 'exac' is unknown; known are exact, number, math, reasoning_gym, and module:function of your own."),
    (dict(graders={"reasoning_gym": 1.0}),
     "text.graders: reasoning_gym scores answers to its own tasks alone; set task.name=reasoning_gym."),
    (dict(extract="last"), "text.extract='last' cannot work; set it to text, number, boxed or tag."),
    (dict(grading="host"), "text.grading='host' cannot work; set it to split or callback."),
    (dict(template="Q:"), "text.template='Q:' cannot work; set it to text with {prompt} where the question belongs."),
    (dict(shots=(("1?",),)),
     "text.shots=(('1?',),) cannot work; set it to (question, answer) pairs of text, such as ((\"1 + 1?\", \"2\"),)."),
    (dict(shots=("12",)),
     "text.shots=('12',) cannot work; set it to (question, answer) pairs of text, such as ((\"1 + 1?\", \"2\"),)."),
    (dict(seconds=0.0), "text.seconds=0.0 cannot work; set it to a number above 0."),
    (dict(workers=0), "text.workers=0 cannot work; set it to 1 or more."),
    (dict(threshold=-0.5), "text.threshold=-0.5 cannot work; set it to 0 or more."),
])  # fmt: skip
def test_fields_that_cannot_work(changes, message):
    assert mistake(**changes) == message


@pytest.mark.parametrize("changes, message", [
    (dict(source="chainsum"),
     "text.source='chainsum' is no task of reasoning-gym; did you mean chain_sum or decimal_chain_sum or ransom_note?"),
    (dict(source="????"), "text.source='????' is no task of reasoning-gym; see reasoning_gym.factory.DATASETS."),
    (dict(source="chain_sum", options={"terms": 3}),
     "text.options has no 'terms' for text.source=chain_sum; known are allow_negation, max_digits, max_terms, min_digits, min_terms."),
    (dict(source="chain_sum", options={"seed": 3}), "text.options.seed is given by the section task; set task.seed."),
    (dict(source="chain_sum", options={"size": 3}), "text.options.size is given by the section task; set task.train_size."),
    (dict(source="chain_sum", options={"min_terms": 9}),
     "text.source=chain_sum cannot work with text.options={'min_terms': 9} (max_terms must be >= min_terms); change text.options "
     "or the task's sizes."),
    (dict(source="chain_sum", options={"min_terms": 1, "max_terms": 1, "max_digits": 1}, heldout_size=400),
     "text.source=chain_sum makes no training question that is not held out; lower task.heldout_size=400, raise "
     "task.train_size, or let text.options make more different questions."),
])  # fmt: skip
def test_tasks_of_reasoning_gym_that_cannot_work(changes, message):
    assert mistake("reasoning_gym", **changes) == message


def test_a_task_without_its_section():
    config = default()
    config.task.name = "addition"
    with pytest.raises(UserError, match="^task.name='addition' reads the section text of the config, and none was given; pass it on.$"):
        tasks.make(config.task, "/nowhere")


def test_an_example_that_the_tokenizer_cannot_write(tmp_path):
    path = write(tmp_path / "a.jsonl", *[dict(prompt="é?", answer="1")] * 2, dict(prompt="1", answer="1"))
    task = make("jsonl", source=path, heldout_size=1)
    with pytest.raises(UserError, match=rf"^example 0 of text.source='{path}' cannot be written in tokens: character 'é' is unknown"):
        task.encode(task.train[0])


def test_training_imports_no_library_of_graders():
    """Until a task asks for one."""
    code = "import sys, treerl.train, treerl.tasks.text; print({'reasoning_gym', 'math_verify', 'sympy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
