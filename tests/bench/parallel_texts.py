"""The same sentences in Italian, English, Spanish and French: what free software says to its users, from its packages.

    pip download --no-deps -d PACKAGES django wagtail djangorestframework django-allauth django-cms django-oscar sphinx \\
        plone.app.locales django-filer mezzanine wger
    python -m tests.bench.parallel_texts PACKAGES OUT

writes it.jsonl, en.jsonl, es.jsonl and fr.jsonl: document by document translations, six messages each. Taken are messages
that all four have, of 25 characters or more, without places to fill in, each once.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

LANGUAGES = ("it", "en", "es", "fr")
QUOTED = r'((?:"(?:[^"\\]|\\.)*"\s*)+)'
ENTRY = re.compile(rf"msgid {QUOTED}\s*msgstr {QUOTED}")
IN_ENGLISH = re.compile(r'#\. Default: ((?:"(?:[^"\\]|\\.)*"\s*(?:#\. )?)+)')  # Plone's keys are no sentences
SHORTEST, A_DOCUMENT = 25, 6


def messages(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Return by context and key each message of a .po file and its English, where the file says it."""
    found = {}
    for entry in re.split(r"\n\s*\n", text):
        both = ENTRY.search(entry)
        if not both or "msgid_plural" in entry or ("#, " in entry and "fuzzy" in entry):
            continue
        context, english = re.search(r'msgctxt "(.*)"', entry), IN_ENGLISH.search(entry)
        key = (context[1] if context else "", _whole(both[1]))
        if key[1]:
            found[key] = _whole(both[2]), _whole(english[1]) if english else key[1]
    return found


def _whole(quoted: str) -> str:
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"', quoted)
    return "".join(json.loads(f'"{part}"', strict=False) for part in parts)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text)).strip()


def texts(packages: Path) -> dict[str, list[str]]:
    """Return the documents of each language."""
    files: dict[str, dict[str, str]] = defaultdict(dict)
    for wheel in packages.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if place := re.search(r"/(it|en|es|fr)/LC_MESSAGES/.*\.po$", name):
                    whole = name.replace(f"/{place[1]}/LC_MESSAGES/", "/*/")
                    files[whole][place[1]] = archive.read(name).decode("utf-8", "replace")
    documents: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    seen: set[str] = set()
    for _, by_language in sorted(files.items()):
        if not {"it", "es", "fr"} <= set(by_language):
            continue
        known = {language: messages(text) for language, text in by_language.items()}
        rows = []
        for key, (italian, english) in known["it"].items():
            others = (known.get(language, {}).get(key, ("", ""))[0] for language in ("en", "es", "fr"))
            en, es, fr = others
            row = [_plain(text) for text in (italian, en or english, es, fr)]
            if min(map(len, row)) < SHORTEST or len(set(row)) < len(row) or row[1] in seen:
                continue
            if not any(re.search(r"[%{}$]|_[a-z]", text) for text in row):
                seen.add(row[1])
                rows.append([text if text[-1] in ".!?:" else f"{text}." for text in row])
        for first in range(0, len(rows) - 3, A_DOCUMENT):
            for place, language in enumerate(LANGUAGES):
                documents[language].append(" ".join(row[place] for row in rows[first : first + A_DOCUMENT]))
    return documents


def main(packages: str, out: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    for language, documents in texts(Path(packages)).items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        (Path(out) / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{language}: {len(documents)} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main(*sys.argv[1:3])
