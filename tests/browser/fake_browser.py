"""A seeded, realistic data set for the browser: Italian passages, latents for words and endings, scores, gold labels."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from sae_italian.browser.page import COLUMNS, Record

SENTENCES = """Perché la città di Torino cambia volto ogni volta che una fabbrica chiude e un museo apre?
Le ragazze sono arrivate tardi alla stazione, stanche ma contente della gita al lago di Como.
Il governo ha approvato il decreto sulle pensioni dopo una lunga notte di trattative.
Mia nonna preparava gli gnocchi il giovedì, e la cucina profumava di burro e salvia.
Non so se verrà anche lui, perché ieri non ha risposto al telefono.
La squadra avrebbe vinto la partita se il portiere non avesse sbagliato l'uscita.
Nel 1861 il Regno d'Italia fu proclamato a Torino, e la capitale vi restò per quattro anni.
I bambini giocavano nel cortile mentre le madri parlavano sotto il portico.
Quest'anno la vendemmia è cominciata presto: l'estate è stata calda e senza piogge.
Se potessi, partirei domani mattina con il primo treno per Napoli.
Il professore spiegò più volte la regola, ma gli studenti continuavano a confondere i tempi.
Le colline toscane, coperte di vigne e di cipressi, sono tra i paesaggi più fotografati d'Europa.
Dovrebbero riaprire la strada entro lunedì, salvo nuove frane lungo il versante.
Il farmaco va assunto dopo i pasti; in caso di dubbio si consulti il medico.
Gliel'ho detto mille volte, eppure continua a dimenticare le chiavi sul tavolo.
Alla Scala è andata in scena una Traviata sobria, applaudita per dieci minuti.
Secondo l'ISTAT, nel secondo trimestre l'occupazione femminile è cresciuta dello 0,4 %.
Un tempo qui si parlava soltanto dialetto, e l'italiano lo si imparava a scuola.
La sentenza è stata impugnata davanti alla Corte di cassazione, che l'ha annullata con rinvio.
Aggiungete la farina setacciata, mescolate bene e lasciate riposare l'impasto per mezz'ora.
Chi dorme non piglia pesci, diceva mio padre alzandosi alle cinque per andare al porto.
Sono le otto e mezza di sera: il bar chiude, le sedie salgono sui tavoli.
La caffettiera brontola, il gatto dorme sulla poltrona, fuori piove piano.
Gli economisti temono che l'inflazione, benché in calo, resti sopra l'obiettivo fino al 2026.""".splitlines()

WORD = re.compile(r"\w+['’]?|[^\w\s]|\s+", re.UNICODE)
SHARE_FEW = 0.05
SHARE_DEAD = 0.04


@dataclass(frozen=True)
class Planted:
    """A pattern a fake latent fires on, with what the page should say about it."""

    pattern: str
    it: str
    en: str
    kind: str
    gold: tuple[str, ...] = ()

    def fires(self, word: str) -> bool:
        return bool(re.fullmatch(self.pattern, word, re.IGNORECASE))


PLANTED = [
    Planted("perché", "«perché», causale o interrogativo", "“perché”, causal or interrogative", "token"),
    Planted(
        r"\w{3,}e",
        "parole in -e, spesso femminili plurali: «ragazze», «contente»",
        "words in -e, often feminine plural: “ragazze”",
        "shape",
        ("gender=f+number=pl",),
    ),
    Planted(
        r"l[ae]|una|alla",
        "articolo e preposizione articolata femminile",
        "feminine article or articulated preposition",
        "token",
        ("gender=f",),
    ),
    Planted(
        r"il|gli|i|nel|un",
        "articolo e preposizione articolata maschile",
        "masculine article or articulated preposition",
        "token",
        ("gender=m",),
    ),
    Planted(
        r"\w+(rei|rebbe|rebbero)",
        "condizionale presente: «partirei», «dovrebbero»",
        "present conditional: “partirei”, “dovrebbero”",
        "shape",
        ("mood=cond", "tense=pres"),
    ),
    Planted(
        r"\w+(av|ev|iv)a(no)?",
        "imperfetto indicativo: «parlavano», «preparava»",
        "imperfect indicative: “parlavano”",
        "shape",
        ("tense=impf",),
    ),
    Planted(
        r"\w+ss[ei](ro)?",
        "congiuntivo imperfetto dopo «se»",
        "imperfect subjunctive after “se”",
        "context",
        ("mood=subj",),
    ),
    Planted(r"\d+", "numeri e anni scritti in cifre", "numbers and years in digits", "shape"),
    Planted(
        r"\w+[àèéìòù]",
        "parole tronche con l’accento finale: «città», «più», «lunedì»",
        "words with a final accent: “città”, “più”",
        "shape",
    ),
    Planted(
        r"\w+['’]", "elisione davanti a vocale: «l’», «quest’», «d’»", "elision before a vowel: “l’”, “quest’”", "shape"
    ),
    Planted(
        r"di|del|della|dello|d'",
        "preposizione «di», semplice o articolata",
        "preposition “di”, plain or articulated",
        "token",
    ),
    Planted(
        r"non",
        "negazione: «non» e il verbo che la segue",
        "negation: “non” and its verb",
        "context",
        ("construction=negation",),
    ),
    Planted(
        r"torino|como|napoli|italia|europa",
        "nomi di luogo, soprattutto città italiane",
        "place names, mostly Italian cities",
        "context",
    ),
    Planted(
        r"ha|hanno|è|sono|fu",
        "ausiliare dei tempi composti e del passivo",
        "auxiliary of compound tenses and passive",
        "token",
        ("pos=aux",),
    ),
]


def _segments(
    text: str, planted: Planted, rng: random.Random, top: float, threshold: float = 0.0
) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    for match in WORD.finditer(text):
        word = match.group()
        value = round(top * rng.uniform(0.45, 1.0), 3) if planted.fires(word) else 0.0
        value = value if value >= threshold else 0.0
        if pieces and pieces[-1][1] == 0 and value == 0:
            pieces[-1] = (pieces[-1][0] + word, 0.0)
        else:
            pieces.append((word, value))
    return pieces


@cache
def _sentences_with(planted: Planted) -> list[str]:
    return [sentence for sentence in SENTENCES if any(map(planted.fires, WORD.findall(sentence)))] or SENTENCES


def _context(planted: Planted, rng: random.Random, top: float) -> Record:
    text = " ".join([rng.choice(SENTENCES), rng.choice(_sentences_with(planted))])
    segments = _segments(text, planted, rng, top)
    source = rng.choice(["wikipedia-it", "cultura-x-it", "gazzetta-ufficiale"])
    return {
        "doc_id": f"{source[:4]}-{rng.randrange(10**6):06d}",
        "source": source,
        "max": max([value for _, value in segments] or [0.0]),
        "cut": 0,
        "segments": segments,
    }


def _contexts(planted: Planted, rng: random.Random, top: float, n: int) -> list[Record]:
    return sorted((_context(planted, rng, top) for _ in range(n)), key=lambda context: -context["max"])


def _scores(rng: random.Random, detection: float, fuzzing: float, gain: float) -> list[Record]:
    scores: list[Record] = []
    for scorer, base in (("detection", detection), ("fuzzing", fuzzing)):
        for negatives in ("random", "similar") if scorer == "detection" else ("same-token",):
            for explainer, centre in (("rules", base), ("token-lookup", base - gain)):
                centre -= 0.07 if negatives == "similar" else 0.0
                for metric, shift in (
                    ("balanced_accuracy", 0.0),
                    ("tpr", -0.06),
                    ("tnr", 0.06),
                    ("f1", -0.01),
                    ("auroc", 0.03),
                ):
                    value = min(1.0, max(0.0, centre + shift))
                    lo, hi = max(0.0, value - 0.05), min(1.0, value + 0.04)
                    scores.append(
                        {
                            "scorer": scorer,
                            "judge": "rule",
                            "negatives": negatives,
                            "metric": metric,
                            "value": value,
                            "lo": lo,
                            "hi": hi,
                            "n_pos": 50,
                            "n_neg": 50,
                            "explainer": explainer,
                        }
                    )
    return scores


def make_row(latent: int, seed: int = 0) -> Record:
    rng = random.Random(f"{seed}-{latent}")
    planted = PLANTED[latent % len(PLANTED)]
    fate = rng.random() if latent >= len(PLANTED) else 1.0
    dead, few = fate < SHARE_DEAD, SHARE_DEAD <= fate < SHARE_DEAD + SHARE_FEW
    row: Record = {
        "latent": latent,
        "density": 0.0,
        "max": 0.0,
        "n_active": 0,
        "sample": "",
        "title_it": "",
        "title_en": "",
        "title_detection": None,
        "whole_detection": None,
        "explanation_it": "",
        "explanation_en": "",
        "llm_it": "",
        "llm_en": "",
        "kind": "",
        "detection": None,
        "detection_lo": None,
        "detection_hi": None,
        "fuzzing": None,
        "gain": None,
        "top_tokens": [],
        "gold": [],
        "dead": dead,
        "x": round(rng.uniform(-1, 1), 4),
        "y": round(rng.uniform(-1, 1), 4),
        "status": "too few activations" if few else "",
    }
    if dead:
        return row
    row["density"] = 10 ** rng.uniform(-5.6, -5.0) if few else 10 ** min(-0.8, rng.gauss(-2.9, 0.65))
    row["n_active"] = max(1, int(row["density"] * 2_000_000))
    row["max"] = round(rng.lognormvariate(1.8, 0.6), 3)
    home = next((s for s in SENTENCES if any(planted.fires(w) for w in WORD.findall(s))), SENTENCES[0])
    pieces = _segments(home, planted, rng, 1.0)
    row["sample"] = "".join(f"\x01{text}\x02" if value else text for text, value in pieces)
    words = sorted({w for s in SENTENCES for w in WORD.findall(s) if planted.fires(w)})
    row["top_tokens"] = [" " + word for word in rng.sample(words, min(5, len(words)))]
    if few:
        return row
    detection = min(0.995, max(0.42, rng.gauss(0.77, 0.11)))
    row.update(
        {
            "title_it": planted.it[:60],
            "title_en": planted.en[:60],
            "title_detection": detection - 0.01,
            "whole_detection": detection + 0.003,
            "explanation_it": planted.it,
            "explanation_en": planted.en,
            "kind": planted.kind,
            "detection": detection,
            "detection_lo": max(0.0, detection - 0.05),
            "detection_hi": min(1.0, detection + 0.04),
            "fuzzing": min(0.99, max(0.4, detection - rng.uniform(-0.03, 0.14))),
            "gain": rng.gauss(0.06, 0.07),
            "gold": list(planted.gold) if latent < len(PLANTED) or rng.random() < 0.08 else [],
        }
    )
    return row


def make_card(row: Record, seed: int = 0) -> Record:
    rng = random.Random(f"card-{seed}-{row['latent']}")
    planted = PLANTED[row["latent"] % len(PLANTED)]
    top = row["max"]
    bounds: list[tuple[str, str, float | None, float | None]] = [
        ("Attivazioni più forti", "Strongest activations", None, None)
    ]
    bounds += [
        (f"Quantile {q}", f"Quantile {q}", top * (0.8 - 0.2 * i), top * (1.0 - 0.2 * i))
        for i, q in enumerate(("75–100 %", "50–75 %", "25–50 %"))
    ]
    words = row["top_tokens"] or [" di"]
    shares = sorted((rng.random() ** 2 for _ in words), reverse=True)
    vocabulary = sorted({" " + w for s in SENTENCES for w in WORD.findall(s) if w.isalpha()})
    scored = row["detection"] is not None
    dead = row["dead"]
    counts = [int(row["n_active"] * 0.12 * 0.86**i * rng.uniform(0.7, 1.2)) for i in range(39)] + [1]
    others = [rng.randrange(320) for _ in range(4)]
    return {
        "latent": row["latent"],
        "explanations": _explanations(row, planted) if scored else [],
        "scores": _scores(rng, row["detection"] or 0.5, row["fuzzing"] or 0.5, row["gain"] or 0.0) if scored else [],
        "histogram": {
            "edges": [round(top * i / 40, 4) for i in range(41)] if not dead else [],
            "counts": counts if not dead else [],
        },
        "logits": {
            "edges": [i / 10 for i in range(-10, 11)],
            "counts": [int(4 ** (5 - abs(i - 10) / 2)) for i in range(20)],
        },
        "positions": [0.1] * 10 if not dead else [],
        "promoted": [{"token": t, "value": 2.4 - 0.18 * i} for i, t in enumerate(rng.sample(vocabulary, 10))],
        "suppressed": [{"token": t, "value": -1.9 + 0.13 * i} for i, t in enumerate(rng.sample(vocabulary, 10))],
        "decoder": [{"latent": other, "value": 0.8 - 0.1 * i} for i, other in enumerate(others)],
        "cofiring": [{"latent": other, "value": 0.4 - 0.1 * i} for i, other in enumerate(others[:3])],
        "groups": [
            {
                "name_it": it,
                "name_en": en,
                "lo": lo,
                "hi": hi,
                "contexts": _contexts(planted, rng, hi or top, 8 if lo is None else 4),
            }
            for it, en, lo, hi in (bounds if not dead else [])
        ],
        "tokens": [{"token": t, "share": s / (sum(shares) * 1.1)} for t, s in zip(words, shares, strict=True)],
        "sources": [
            {"source": "wikipedia-it", "documents": 31, "tokens": 90},
            {"source": "", "documents": 2, "tokens": 2},
        ],
        "more_sources": 3,
        "labels": [
            {
                "label": label,
                "source": "gold",
                "f1": 0.91,
                "lo": 0.87,
                "hi": 0.94,
                "precision": 0.94,
                "recall": 0.88,
                "n": 80,
            }
            for label in row["gold"]
        ],
        "rule": {"kind": planted.kind, "pattern": planted.pattern, "threshold": round(top * 0.1, 3)},
        "seeds": None if dead else {"found": 2, "of": 3},
        "graphs": [] if dead else [{"prompt": "La ragazza che", "href": "../graph/index.html#node=2_7_3"}],
    }


def _explanations(row: Record, planted: Planted) -> list[Record]:
    texts = [
        ("rules", "rule", planted.it, planted.en),
        ("llm:qwen:it1", "llm", "parole italiane", "Italian words"),
        ("token-lookup", "rule", "solo il token", "the token alone"),
    ]
    titled = {True: lambda text: text[:60], False: lambda _: ""}  # an LLM's has none
    return [
        {"explainer": name, "kind": kind, "status": "ok", "text_it": it, "text_en": en, "now": ""}
        | {"title_it": titled[kind == "rule"](it), "title_en": titled[kind == "rule"](en)}
        for name, kind, it, en in texts
    ]


METRICS = """
l0 | L0 | L0 | 31.8 | 0.3 | | latenti attivi per token | active latents per token
ev | Varianza spiegata, centrata | Explained variance, centred | 0.8123 | 0.004 | | come in SAELens | as in SAELens
ev_raw | Varianza spiegata, non centrata| Explained variance, uncentred | 0.9471 | 0.002 | | come in Llama Scope | as in Llama Scope
ce | Entropia incrociata recuperata | Cross-entropy recovered | 97.31 | 0.42 | % | rispetto ad azzerare il sito | against zeroing the site
ce_delta | Aumento dell’entropia incrociata | Cross-entropy increase | 0.084 | 0.006 | nats | |
dead | Latenti morti | Dead latents | 12 | | | mai attivi su 2 milioni di token | never active on 2 M tokens
detected | Latenti con detection ≥ 0,8 | Latents with detection ≥ 0.8 | 41.2 | 2.6 | % | |
"""
CONTROLS = """
shuffled | Spiegazioni rimescolate | Shuffled explanations | 0.503 | 0.012 | | detection media; atteso 0,5 | mean detection; expected 0.5
lookup | Solo il token | Token lookup | 0.712 | 0.014 | | detection media | mean detection
random_sae | SAE casuale | Random SAE | 0.588 | 0.017 | | detection media, stessi latenti | mean detection, same latents
"""
LABELS = {
    "gender": "f m",
    "number": "sg pl",
    "gender+number": "f+sg f+pl m+sg m+pl",
    "tense": "pres impf past fut",
    "mood": "ind subj cond imp",
    "construction": "negation passive clitic question",
}


def _metric(line: str) -> Record:
    name, label_it, label_en, number, half, unit, note_it, note_en = (cell.strip() for cell in line.split("|"))
    value = float(number)
    lo, hi = (value - float(half), value + float(half)) if half else (None, None)
    texts = {"label_it": label_it, "label_en": label_en, "note_it": note_it, "note_en": note_en}
    return cast(Record, {"name": name, "value": value, "lo": lo, "hi": hi, "unit": unit, **texts})


def _gold(category: str, value: str, d_sae: int, rng: random.Random) -> Record:
    f1 = min(0.99, rng.betavariate(6, 2))
    return {
        "label": f"{category}={value}",
        "category": category,
        "n": rng.randrange(80, 4000),
        "latent": rng.randrange(d_sae),
        "f1": f1,
        "precision": min(1, f1 + 0.03),
        "recall": max(0, f1 - 0.03),
    }


def make_run(d_sae: int = 320) -> Record:
    rng = random.Random(7)
    return {
        "title": "Minerva-350M, residuo dello strato 8",
        "created": "2026-09-14T10:20:00Z",
        "version": "0.1.0",
        "model": "sapienzanlp/Minerva-350M-base-v1.0",
        "model_note": "base, Apache-2.0",
        "model_note_it": "di base, Apache-2.0",
        "sae": "L8R-16x",
        "hook_name": "blocks.8.hook_resid_post",
        "d_in": 1152,
        "d_sae": d_sae,
        "k": 32,
        "sae_hash": "22b2c29f",
        "corpus": "CulturaX, italiano",
        "n_tokens": 2_000_000,
        "context_size": 256,
        "n_documents": 3184,
        "metrics": [_metric(line) for line in METRICS.strip().splitlines()],
        "controls": [_metric(line) for line in CONTROLS.strip().splitlines()],
        "gold": [_gold(category, value, d_sae, rng) for category, values in LABELS.items() for value in values.split()],
    }


@dataclass
class FakeSource:
    """A source of made-up records; `rows` and `cards` may be changed before it is written."""

    run_record: Record
    row_records: list[Record]
    cards: dict[int, Record]  # those that are not made from their row

    def run(self) -> Record:
        return self.run_record

    def rows(self) -> dict[str, list[Any]]:
        return {name: [row.get(name) for row in self.row_records] for name in COLUMNS}

    def card(self, latent: int) -> Record:
        return self.cards.get(latent) or make_card(self.row_records[latent])


def make_source(n: int = 320, seed: int = 0) -> FakeSource:
    return FakeSource(make_run(n), [make_row(latent, seed) for latent in range(n)], {})
