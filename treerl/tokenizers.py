"""Tokenizers: text to token ids and back."""


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
            raise ValueError(
                f"character {error.args[0]!r} is unknown: use only those of the alphabet "
                f"{self.alphabet!r}."
            ) from None

    def decode(self, ids) -> str:
        """Text up to the first EOS; pads are skipped."""
        text = []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            if i != self.pad_id:
                text.append(self.alphabet[i - 2])
        return "".join(text)


class TextTokenizer:
    """The tokenizer of a published model, from its folder."""

