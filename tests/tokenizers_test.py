"""The tokenizer of a published model, on a tiny one."""

import os
import pickle

import pytest
from tokenizers import Tokenizer, processors
from tokenizers.processors import TemplateProcessing
from tokenizers_oracle import CHAT, ENCODED, RENDERED, SETTINGS, TEMPLATE, write

from treerl.errors import UserError
from treerl.tokenizers import CharTokenizer, TextTokenizer, check_vocabulary


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


def test_ids_are_those_of_transformers(folder):
    tokenizer = TextTokenizer(folder)
    assert {text: tokenizer.encode(text) for text in ENCODED} == ENCODED
    assert tokenizer.vocab_size == 267


def test_text_comes_back_without_special_tokens(folder):
    tokenizer = TextTokenizer(folder)
    hello, end, pad, tool = 263, 2, 3, 266
    assert tokenizer.decode([1, hello, pad, tool, end, hello]) == "hello<tool>"
    assert tokenizer.decode([hello, -1, 267, 10**6, hello]) == "hellohello"
    assert tokenizer.decode([end]) == tokenizer.decode([]) == ""
    text = "  Naïve ,\n\t don't .  日本🙂 "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("é")[:1] + [175]) == "é\ufffd"  # a character cut in two


def test_a_pad_that_is_no_special_token_is_skipped_too(tmp_path):
    tokenizer = TextTokenizer(write(tmp_path / "m", dict(SETTINGS, pad_token="<tool>")))
    assert tokenizer.pad_id == 266 and tokenizer.decode([263, 266, 263]) == "hellohello"


def test_text_that_is_no_unicode_is_one_sentence(folder):
    with pytest.raises(UserError, match=r"text 'a\\ud800' is not valid Unicode .*; mend the examples."):
        TextTokenizer(folder).encode("a\ud800")


def test_a_chat_is_rendered_as_by_transformers(folder):
    assert TextTokenizer(folder).chat(CHAT) == RENDERED
    assert TextTokenizer(folder).chat(CHAT * 3).count("<user>") == 3  # break


def test_the_clock_and_indentation_are_there_for_templates(tmp_path):
    template = "{{ strftime_now('%Y') | length }} {{ {'b': 'é<', 'a': [1]} | tojson(indent=1) }}"
    tokenizer = TextTokenizer(write(tmp_path / "m", dict(SETTINGS, chat_template=template)))
    assert tokenizer.chat([]) == '4 {\n "b": "é<",\n "a": [\n  1\n ]\n}'


def test_a_template_of_its_own_file_comes_first_and_of_several_the_default(tmp_path):
    several = [dict(name="tool_use", template="tools"), dict(name="default", template="the default")]
    folder = write(tmp_path / "m", dict(SETTINGS, chat_template=several))
    assert TextTokenizer(folder).chat([]) == "the default"
    (tmp_path / "m/chat_template.jinja").write_text("its own")
    assert TextTokenizer(folder).chat([]) == "its own"


@pytest.mark.parametrize("template", [None, [dict(name="tool_use", template="x")], 7])
def test_a_model_without_template_takes_no_chat(tmp_path, template):
    tokenizer = TextTokenizer(write(tmp_path / "m", dict(SETTINGS, chat_template=template)))
    with pytest.raises(UserError, match="model in .*m has no chat template; set text.chat=False, or use another model."):
        tokenizer.chat(CHAT)


@pytest.mark.parametrize(
    "template, reason",
    [
        (TEMPLATE, "no messages"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('two\\nlines') }}", "two"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ messages[0].content + 1 }}", "has no element 0"),
    ],
)
def test_a_template_that_fails_is_one_sentence(tmp_path, template, reason):
    tokenizer = TextTokenizer(write(tmp_path / "m", dict(SETTINGS, chat_template=template)))
    with pytest.raises(UserError, match=f"^the chat template of .*m fails .*{reason}.*; set text.chat=False, or use another"):
        tokenizer.chat([])


def test_characters_take_no_chat():
    with pytest.raises(UserError, match="tokenizer of characters has no chat template; set text.chat=False"):
        CharTokenizer("ab").chat(CHAT)


NO_EOS = {key: value for key, value in SETTINGS.items() if key != "eos_token"}


@pytest.mark.parametrize(
    "settings, files, eos, pad",
    [
        (SETTINGS, {}, (2,), 3),
        (SETTINGS, dict(generation_config=dict(eos_token_id=[7, 2]), config=dict(eos_token_id=8)), (2, 7, 8), 3),
        (SETTINGS, dict(generation_config=dict(eos_token_id=None), config=dict(eos_token_id=[9])), (2, 9), 3),
        (NO_EOS, dict(config=dict(eos_token_id=0)), (0,), 3),
        (dict(NO_EOS, pad_token=None), dict(generation_config=dict(eos_token_id=5, pad_token_id=6)), (5,), 6),
        (dict(SETTINGS, pad_token="<none>"), dict(config=dict(pad_token_id=-1)), (2,), 2),
        (None, dict(config=dict(eos_token_id=4)), (4,), 4),
    ],
)
def test_the_ids_that_end_an_answer_and_fill_a_prompt(tmp_path, settings, files, eos, pad):
    tokenizer = TextTokenizer(write(tmp_path / "m", settings, **files))
    assert (tokenizer.eos_ids, tokenizer.pad_id) == (eos, pad)


@pytest.mark.parametrize(
    "settings, files, message",
    [
        (NO_EOS, {}, "m names no EOS; set eos_token_id in its generation_config.json."),
        (SETTINGS, dict(config=dict(eos_token_id="2")), "m sets eos_token_id='2', which is no token id; mend its JSON files."),
        (SETTINGS, dict(config=dict(eos_token_id=[-1])), "m sets eos_token_id=-1, which is no token id"),
        (SETTINGS, dict(config=dict(eos_token_id=True)), "m sets eos_token_id=True, which is no token id"),
        ("{", {}, "tokenizer_config.json cannot be read (Expecting"),
        (SETTINGS, dict(generation_config="[]"), "generation_config.json cannot be read (no JSON object); copy the file again."),
        (SETTINGS, dict(tokenizer="{"), "tokenizer.json is damaged or cut short (EOF"),
        (SETTINGS, dict(tokenizer="{}"), "tokenizer.json is damaged or cut short ("),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_sentence(tmp_path, settings, files, message):
    with pytest.raises(UserError) as error:
        TextTokenizer(write(tmp_path / "m", settings, **files))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json is missing; use a model that has one, or write it with"):
        TextTokenizer(str(tmp_path))


def test_a_vocabulary_may_be_larger_but_not_smaller(tmp_path, folder):
    tokenizer = TextTokenizer(folder)
    check_vocabulary(tokenizer, 267, folder)
    check_vocabulary(tokenizer, 320, folder)  # padded
    check_vocabulary(CharTokenizer("ab"), 4, folder)
    with pytest.raises(UserError, match="the tokenizer of .*model has ids up to 266, but vocab_size=266 in config.json; use"):
        check_vocabulary(tokenizer, 266, folder)
    beyond = TextTokenizer(write(tmp_path / "m", config=dict(eos_token_id=300)))
    with pytest.raises(UserError, match="has ids up to 300, but vocab_size=300"):
        check_vocabulary(beyond, 300, folder)
    check_vocabulary(beyond, 301, folder)


def test_processes_can_hand_a_tokenizer_on(folder):
    tokenizer = TextTokenizer(folder)
    assert tokenizer.chat(CHAT) == RENDERED  # its template is compiled
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.chat(CHAT) == RENDERED and again.encode("hello") == [263] and again.eos_ids == (2,)


@pytest.mark.parametrize("behind", [[], ["</s>"]])
def test_a_prompt_without_a_template_starts_as_the_tokenizer_says(tmp_path, behind):
    """With BOS in front, as base models were trained; an EOS that the tokenizer would put behind is left out."""
    folder = write(tmp_path / "m", SETTINGS)
    path = os.path.join(folder, "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    around = TemplateProcessing(single=" ".join(["<s>", "$A", *behind]), special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = processors.Sequence([around])
    tokenizer.save(path)
    found = TextTokenizer(folder)
    assert found.encode_start("hello") == [1, *found.encode("hello")] and found.encode("hello")
    assert TextTokenizer(write(tmp_path / "plain", SETTINGS)).encode_start("hello") == found.encode("hello")


def test_a_template_is_given_options(tmp_path):
    template = "{{ messages[0].content }}{% if thinking is defined and not thinking %} briefly{% endif %}"
    tokenizer = TextTokenizer(write(tmp_path / "m", dict(SETTINGS, chat_template=template)))
    messages = [dict(role="user", content="hi")]
    assert tokenizer.chat(messages) == "hi" and tokenizer.chat(messages, thinking=False) == "hi briefly"
