"""A tiny tokenizer's folder, with a template that uses what templates use, and what transformers makes of it.

`python tests/tokenizers_oracle.py` (needs transformers) prints what is recorded in ENCODED and RENDERED.
"""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ã", "©")]
TEMPLATE = """\
{%- if not messages %}
    {{ raise_exception('no messages') }}
{% endif %}
{{ bos_token }}{% for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {% set note = namespace(text='') %}
    {% generation %}<{{ m.role }}>{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}

    {{ m | tojson }}{{ note.text }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}{{ tools is none }}{{ missing }}"""
SETTINGS = dict(
    tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    bos_token=dict(content="<s>", lstrip=False, rstrip=False, single_word=False, normalized=False, special=True, __type="AddedToken"),
    chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
)  # fmt: skip
CHAT = [{"role": "user", "content": " Is 1 < 2 & é?\n"}, {"role": "user", "content": "b"}]
# what transformers 5.24 gives
RENDERED = (
    "<s><user>Is 1 < 2 & é?</s>\n"
    '    {"role": "user", "content": " Is 1 < 2 & é?\\n"}\n'
    "<user>b</s>\n"
    '    {"role": "user", "content": "b"}\n'
    "<assistant>True"
)
ENCODED = {
    "hello te": [263, 264, 72],
    "<s>hello</s> <tool> 12\n": [1, 263, 2, 224, 266, 224, 20, 21, 202],
    "é日🙂": [265, 166, 249, 102, 176, 257, 251, 228],
    "<s": [31, 86],
    "": [],
}


def write(folder, settings=SETTINGS, **files):
    """Writes a tokenizer's folder; the other files' contents are objects, or text as it is."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet + [a + b for a, b in MERGES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens(["<tool>"])  # beyond the model of the tokenizer: id 266
    tokenizer.enable_truncation(4)  # some published files keep what their training used
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in dict(tokenizer_config=settings, **files).items():
        if value is not None:
            (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return str(folder)


def main():
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        other = AutoTokenizer.from_pretrained(write(pathlib.Path(folder) / "model"))
    encoded = {text: other.encode(text, add_special_tokens=False) for text in ENCODED}
    rendered = other.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    print(f"ENCODED = {encoded}\nRENDERED = {rendered!r}\nas recorded: {(encoded, rendered) == (ENCODED, RENDERED)}")


if __name__ == "__main__":
    main()
