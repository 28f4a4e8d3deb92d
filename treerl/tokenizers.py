"""Tokenizers: text to token ids and back."""

import datetime
import functools
import json
import os

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from treerl.errors import UserError


class CharTokenizer:
    """One token a character, for the built-in tasks.

    Id 0 is the pad, id 1 ends a sequence, the characters follow from 2 in alphabet order.
    """

    pad_id = 0
    eos_id = 1
    eos_ids = (1,)

    def __init__(self, alphabet: str):
        """Raises ValueError where the alphabet repeats a character."""
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet {alphabet!r} repeats a character: list each one once.")
        self.alphabet = alphabet
        self.vocab_size = 2 + len(alphabet)
        self._ids = {char: 2 + i for i, char in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Ids of the characters; adds no EOS. Raises ValueError on a character it lacks."""
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            raise ValueError(f"character {error.args[0]!r} is unknown: use only those of the alphabet {self.alphabet!r}.") from None

    def decode(self, ids) -> str:
        """Text up to the first EOS; pads are skipped, and ids that only a larger vocabulary has are U+FFFD."""
        text = []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            if i != self.pad_id:
                text.append(self.alphabet[i - 2] if i < self.vocab_size else "\ufffd")
        return "".join(text)

    def decode_prompt(self, ids) -> str:
        """The same of a prompt, in which no EOS ends anything."""
        return self.decode(i for i in ids if i != self.eos_id)

    def encode_start(self, text: str) -> list[int]:
        """Ids of a prompt without a template: the same."""
        return self.encode(text)

    def chat(self, messages: list[dict], **_) -> str:
        """Raises UserError: characters have no chat template."""
        raise UserError("a tokenizer of characters has no chat template; set text.chat=False, or use a published model.")


class WordTokenizer:
    """One token a word, for environments whose language is small.

    Id 0 is the pad, id 1 ends what an agent says and reads ".", the words follow from 2 in their order. As an end does
    not end an episode, decoding goes on behind it.
    """

    pad_id = 0
    eos_id = 1
    eos_ids = (1,)

    def __init__(self, words: tuple[str, ...]):
        """Raises ValueError where a word is repeated, or is no single word."""
        words = tuple(words)
        wrong = [word for word in words if word.split() != [word] or word == "." or words.count(word) > 1]
        if wrong:
            raise ValueError(f"word {wrong[0]!r} is repeated, is the end '.', or is no single word; list each word once.")
        self.words = words
        self.vocab_size = 2 + len(words)
        self._ids = {word: i for i, word in enumerate(("", ".", *words))}

    def encode(self, text: str) -> list[int]:
        """Ids of the words between blanks; adds no end. Raises ValueError on a word it lacks."""
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as error:
            raise ValueError(f"word {error.args[0]!r} is unknown: use only {' '.join(self.words)}.") from None

    def decode(self, ids) -> str:
        """The words, pads left out; ids that only a larger vocabulary has are U+FFFD."""
        names = (".", *self.words)
        return " ".join(names[i - 1] if i < self.vocab_size else "\ufffd" for i in map(int, ids) if i != self.pad_id)

    decode_prompt = decode
    encode_start = encode

    def chat(self, messages: list[dict], **_) -> str:
        """Raises UserError: words have no chat template."""
        raise UserError("a tokenizer of words has no chat template; set text.chat=False, or use a published model.")


class TextTokenizer:
    """The tokenizer of a published model, from its folder.

    vocab_size is 1 + its highest id, added tokens included. eos_ids are all ids that end an answer: those of
    generation_config.json, config.json and tokenizer_config.json. pad_id fills up prompts.
    """

    def __init__(self, folder: str):
        """Raises UserError where a file is missing or damaged, or no EOS is known."""
        self.folder = folder
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing; use a model that has one, or write it with transformers' save_pretrained.")
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library has one plain Exception for everything
            raise UserError(f"{path} is damaged or cut short ({_reason(error)}); copy the file again.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        settings = _read_json(folder, "tokenizer_config.json")
        self._words = {key: _content(settings[key]) for key in _WORDS if _content(settings.get(key)) is not None}
        others = [_read_json(folder, name) for name in ("generation_config.json", "config.json")]
        self.eos_ids = self._end(others)
        pads = [self._id("pad_token"), *(other.get("pad_token_id") for other in others), self.eos_ids[0]]
        self.pad_id = next(i for i in pads if _is_id(i))
        self._template = _template(folder, settings)

    def encode(self, text: str) -> list[int]:
        """Ids of the text; adds none, and knows special tokens that are written in it, as by a chat template."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # half a surrogate pair, of JSON that was cut
            raise UserError(f"text {text[:40]!r} is not valid Unicode ({_reason(error)}); mend the examples.") from error

    def encode_start(self, text: str) -> list[int]:
        """Ids of a prompt without a template: with what the tokenizer itself puts in front, such as BOS, and no EOS behind."""
        own = self.encode(text)
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        before = next((i for i in range(len(ids)) if ids[i : i + len(own)] == own), 0)
        return ids[:before] + own

    def decode(self, ids) -> str:
        """Text up to the first EOS; pads, special tokens and ids beyond the vocabulary are skipped."""
        kept = []
        for i in map(int, ids):
            if i in self.eos_ids:
                break
            if i != self.pad_id and 0 <= i < self.vocab_size:
                kept.append(i)
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def decode_prompt(self, ids) -> str:
        """Text of a prompt as the model reads it, special tokens included."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def chat(self, messages: list[dict], **options) -> str:
        """The messages, [{'role': ..., 'content': ...}], in the model's own template, up to where its answer begins.

        Args:
          options: what else the template is given, such as enable_thinking=False.

        Raises:
          UserError: the model has no template, or it does not take these messages.
        """
        fix = "set text.chat=False, or use another model"
        if self._template is None:
            raise UserError(f"the model in {self.folder} has no chat template; {fix}.")
        given = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        try:
            return _compiled(self._template).render(**{**self._words, **given, **options})
        except Exception as error:  # a template is a program of somebody else's
            raise UserError(f"the chat template of {self.folder} fails ({_reason(error)}); {fix}.") from error

    def _id(self, word: str) -> int | None:
        return self._tokenizer.token_to_id(self._words[word]) if word in self._words else None

    def _end(self, others: list[dict]) -> tuple[int, ...]:
        # the tokenizer's own first: it ends a turn where generation_config.json lists the end of a document before it
        found = [self._id("eos_token")]
        for other in others:
            value = other.get("eos_token_id")
            found += value if isinstance(value, list) else [value]
        found = tuple(dict.fromkeys(i for i in found if i is not None))
        if not found:
            raise UserError(f"{self.folder} names no EOS; set eos_token_id in its generation_config.json.")
        if wrong := [i for i in found if not _is_id(i)]:
            raise UserError(f"{self.folder} sets eos_token_id={wrong[0]!r}, which is no token id; mend its JSON files.")
        return found


def check_vocabulary(tokenizer: CharTokenizer | TextTokenizer, vocab: int, folder: str) -> None:
    """Raises UserError where a tokenizer has ids that its model, of `vocab` tokens, lacks; the model may have more."""
    highest = max(tokenizer.vocab_size - 1, *tokenizer.eos_ids, tokenizer.pad_id)
    if highest >= vocab:
        raise UserError(
            f"the tokenizer of {folder} has ids up to {highest}, but vocab_size={vocab} in config.json; "
            "use the tokenizer that the model was trained with."
        )


# --- files of a model's folder --------------------------------------------------------------------

_WORDS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _read_json(folder: str, name: str) -> dict:
    """A JSON object, empty where there is no such file. Raises UserError where it is none."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the file again.") from error
    return found


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _content(token) -> str | None:
    """The text of a token, which is a string or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _template(folder: str, settings: dict) -> str | None:
    """The chat template: of its own file, else of tokenizer_config.json; of several, the default one."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy the file again.") from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


# --- templates ------------------------------------------------------------------------------------


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the model wrote: its inside, as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message):
    raise jinja2.TemplateError(message)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """A template in a sandbox, with what transformers gives to templates."""
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    plain = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})  # HTML is not escaped
    now = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = plain
    environment.globals |= dict(raise_exception=_raise, strftime_now=now)
    return environment.from_string(template)
