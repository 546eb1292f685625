"""Letters that bytes were taken for: what no export may hold, since its text comes from character offsets."""

from sae_italian.autointerp.places import byte_letters


def is_mojibake(text: str) -> bool:
    """Return whether a text is UTF-8 that was read as Windows-1252, or bytes shown as byte-level BPE's letters."""
    if text.isascii():
        return False
    letters = byte_letters()
    for read in (lambda: text.encode("cp1252"), lambda: bytes(letters[letter] for letter in text)):
        try:
            decoded = read().decode("utf-8")
        except (UnicodeError, KeyError):
            continue
        if decoded != text and all(letter.isprintable() or letter.isspace() for letter in decoded):
            return True
    return False
