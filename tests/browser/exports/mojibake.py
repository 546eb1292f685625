"""Letters that bytes were taken for: what no export may hold, since its text comes from character offsets."""

from transformers.convert_slow_tokenizer import bytes_to_unicode


def is_mojibake(text: str) -> bool:
    """Return whether a text is UTF-8 that was read as Windows-1252, or bytes shown as byte-level BPE's letters."""
    if text.isascii():
        return False
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for read in (lambda: text.encode("cp1252"), lambda: bytes(letters[letter] for letter in text)):
        try:
            decoded = read().decode("utf-8")
        except (UnicodeError, KeyError):
            continue
        if decoded != text and all(letter.isprintable() or letter.isspace() for letter in decoded):
            return True
    return False
