// Gold and UD labels in words: "Gender=Fem,Number=Plur" is "femminile plurale" and "feminine plural".
const WORDS = {
  "gender=fem": ["femminile", "feminine"], "gender=f": ["femminile", "feminine"],
  "gender=masc": ["maschile", "masculine"], "gender=m": ["maschile", "masculine"],
  "number=plur": ["plurale", "plural"], "number=pl": ["plurale", "plural"],
  "number=sing": ["singolare", "singular"], "number=sg": ["singolare", "singular"],
  "person=1": ["prima persona", "first person"], "person=2": ["seconda persona", "second person"], "person=3": ["terza persona", "third person"],
  "tense=pres": ["presente", "present"], "tense=past": ["passato", "past"], "tense=imp": ["imperfetto", "imperfect"],
  "tense=impf": ["imperfetto", "imperfect"], "tense=fut": ["futuro", "future"],
  "mood=ind": ["indicativo", "indicative"], "mood=sub": ["congiuntivo", "subjunctive"], "mood=subj": ["congiuntivo", "subjunctive"],
  "mood=cnd": ["condizionale", "conditional"], "mood=cond": ["condizionale", "conditional"], "mood=imp": ["imperativo", "imperative"],
  "verbform=inf": ["infinito", "infinitive"], "verbform=part": ["participio", "participle"], "verbform=ger": ["gerundio", "gerund"],
  "verbform=fin": ["verbo finito", "finite verb"], "definite=def": ["determinativo", "definite"], "definite=ind": ["indeterminativo", "indefinite"],
  "degree=sup": ["superlativo", "superlative"], "degree=cmp": ["comparativo", "comparative"], "clitic=yes": ["clitico", "clitic"],
  "prontype=rel": ["pronome relativo", "relative pronoun"], "prontype=int": ["interrogativo", "interrogative"], "prontype=dem": ["dimostrativo", "demonstrative"],
  "polarity=neg": ["negazione", "negation"], "poss=yes": ["possessivo", "possessive"], "numtype=card": ["numero cardinale", "cardinal number"],
  "pos=noun": ["sostantivo", "noun"], "pos=propn": ["nome proprio", "proper noun"], "pos=verb": ["verbo", "verb"], "pos=aux": ["ausiliare", "auxiliary"],
  "pos=adj": ["aggettivo", "adjective"], "pos=adv": ["avverbio", "adverb"], "pos=det": ["articolo o determinante", "determiner"],
  "pos=adp": ["preposizione", "adposition"], "pos=pron": ["pronome", "pronoun"], "pos=num": ["numero", "number"], "pos=punct": ["punteggiatura", "punctuation"],
  "pos=cconj": ["congiunzione coordinante", "coordinating conjunction"], "pos=sconj": ["congiunzione subordinante", "subordinating conjunction"],
  "construction=date": ["data", "date"], "construction=impersonal_si": ["si impersonale", "impersonal si"], "construction=negation": ["negazione", "negation"],
  "construction=existential": ["c’è, ci sono", "there is"], "construction=enclitic": ["pronome enclitico", "enclitic pronoun"],
  "construction=comparative": ["comparazione", "comparison"], "construction=ioi": ["oggetto indiretto", "indirect object"],
  "construction=relative": ["frase relativa", "relative clause"], "construction=imperative": ["imperativo", "imperative"],
  "construction=infinitive_command": ["infinito di comando", "infinitive as command"], "construction=clitic_left": ["clitico prima del verbo", "clitic before the verb"],
  "construction=subjunctive": ["congiuntivo", "subjunctive"], "construction=question": ["domanda", "question"], "construction=quote": ["discorso diretto", "direct speech"],
  "construction=conditional": ["periodo ipotetico", "conditional sentence"], "construction=passive": ["passivo", "passive"], "construction=clitic": ["clitico", "clitic"],
};
const TREEBANK = { upos: "pos" };

function partName(part, language) {
  const [feature, value = ""] = part.split("=", 2);
  const name = TREEBANK[feature.toLowerCase()] || feature.toLowerCase();
  const known = WORDS[`${name}=${value.toLowerCase()}`];
  if (known) return known[language === "it" ? 0 : 1];
  return name === "lemma" && value ? `lemma «${value}»` : part;
}

export const labelName = (label, language) => label.split(/[ |+,]+/).filter(Boolean).map((part) => partName(part, language)).join(" ");
