"""Text tasks: questions in words, answers graded on the host. See `sources` for where they come from."""

import dataclasses

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from treerl.errors import UserError
from treerl.graders import Graders, extract, last_number, normal
from treerl.tasks import Encoded, HostGraders, Task
from treerl.tasks.sources import SOURCES, View, plain
from treerl.tokenizers import CharTokenizer, TextTokenizer

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))


def make(task: ConfigDict, text: ConfigDict, data_dir: epath.PathLike, tokenizer: CharTokenizer | TextTokenizer | None) -> Task:
    """Makes or reads the examples of the task `task.name` and finds its graders.

    Args:
      task, text: sections of the config. tokenizer: None for one token a printable ASCII character.

    Raises:
      UserError: a field, a file or a line of it cannot work.
    """
    if tokenizer is None:
        tokenizer = CharTokenizer(PRINTABLE)
    if text.chat and isinstance(tokenizer, CharTokenizer):
        raise UserError(
            "text.chat=True renders prompts by a model's template and there is none; set text.chat=False, or model.source "
            "to a model that has one."
        )
    if "{prompt}" not in text.template:
        raise UserError(f"text.template={text.template!r} leaves out the question; write {{prompt}} where it belongs.")
    source = (text.source, plain(text.options)) if task.name == "reasoning_gym" else None
    train, heldout = SOURCES[task.name](task, text, data_dir)
    graders = Graders(
        plain(text.graders), extract=text.extract, threshold=text.threshold, seconds=text.seconds, workers=text.workers,
        source=source,
    )  # fmt: skip
    room = _Room(text, tokenizer, graders, _numbered(train, 0), _numbered(heldout, len(train)))
    return Task(
        tokenizer=tokenizer,
        train=room.train,
        heldout=room.heldout,
        encode=room.encode,
        grade=None,
        host=HostGraders(graders.names, graders.weights, room.grade, room.key),
        parse=parse,
        few=256 if task.name == "reasoning_gym" else None,
    )


def _numbered(examples, start: int) -> View:
    return View(len(examples), lambda i: dict(examples[i], row=start + i))


def parse(text: str) -> dict:
    """The example of a user's question; no reference answer, so that its answers are worth 0."""
    if not text.strip():
        raise UserError("--prompt is empty; write a question.")
    return dict(row=-1, prompt=text, answer=None, completion=None)


def render(question: str, text: ConfigDict, tokenizer: CharTokenizer | TextTokenizer) -> str:
    """The prompt of a question: system message, worked examples, the question in the template.

    Without a chat template: the system message and an empty line; each worked example as question, line, answer and an
    empty line; the question and a line, behind which the answer starts.
    """
    asked = [text.template.replace("{prompt}", q) for q in [*(q for q, _ in text.shots), question]]
    answers = [answer for _, answer in text.shots]
    if not text.chat:
        shots = "".join(f"{q}\n{a}\n\n" for q, a in zip(asked, answers))
        return f"{text.system}\n\n" * bool(text.system) + shots + asked[-1] + "\n"
    messages = [dict(role="system", content=text.system)] * bool(text.system)
    for q, a in zip(asked, answers):
        messages += [dict(role="user", content=q), dict(role="assistant", content=a)]
    return tokenizer.chat([*messages, dict(role="user", content=asked[-1])], **plain(text.chat_options))


@dataclasses.dataclass(frozen=True)
class _Room:
    """What encoding and grading share."""

    text: ConfigDict
    tokenizer: CharTokenizer | TextTokenizer
    graders: Graders
    train: View
    heldout: View

    def encode(self, example: dict) -> Encoded:
        """Prompt, reference answer and row of an example."""
        answer = example["answer"] if example["completion"] is None else example["completion"]
        prompt = render(example["prompt"], self.text, self.tokenizer)
        try:
            start = self.tokenizer.encode if self.text.chat else self.tokenizer.encode_start
            prompt, answer = start(prompt), self.tokenizer.encode(answer or "")
        except ValueError as error:
            what = "--prompt" if example["row"] < 0 else f"example {example['row']} of text.source={self.text.source!r}"
            raise UserError(f"{what} cannot be written in tokens: {error}") from error
        return Encoded(prompt, answer + [self.tokenizer.eos_ids[0]], {"row": np.int32(example["row"])})

    def read(self, tokens: np.ndarray, length: int | np.integer) -> str:
        """The text of an answer, its end aside."""
        ids = [int(token) for token in tokens[: max(int(length), 0)]]
        end = next((i for i, token in enumerate(ids) if token in self.tokenizer.eos_ids), len(ids))
        return self.tokenizer.decode(ids[:end])

    def grade(self, tokens: np.ndarray, length: np.ndarray, data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """See `HostGraders`. An answer without tokens, or to a question without reference (row -1), has 0."""
        row, length = np.asarray(data["row"]), np.asarray(length)
        scores, fault = np.zeros((len(row), len(self.graders.names)), np.float32), np.zeros(len(row), np.int8)
        graded = np.flatnonzero((row >= 0) & (length > 0))
        if len(graded):
            examples = {int(r): self.example(int(r)) for r in np.unique(row[graded])}
            completions = [self.read(tokens[i], length[i]) for i in graded]
            scores[graded], fault[graded] = self.graders.grade(completions, [examples[int(row[i])] for i in graded])
        return scores, fault

    def example(self, row: int) -> dict:
        first = len(self.train)
        return self.train[row] if row < first else self.heldout[row - first]

    def key(self, tokens: np.ndarray, length: int) -> str:
        """See `HostGraders`."""
        said = extract(self.read(tokens, length), self.text.extract)
        return last_number(said) if self.text.extract == "number" else normal(said)
