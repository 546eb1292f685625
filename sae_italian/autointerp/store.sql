-- The tables of a store, one statement a paragraph. A `rule`, `notes`, `falls` or `reply` is JSON, compressed where it is long.

-- what the store belongs to, and what was noticed while it was filled
CREATE TABLE IF NOT EXISTS run (key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (key))

CREATE TABLE IF NOT EXISTS feature ( -- how much there is to see of a latent: what decides whether it can be explained
    latent INTEGER NOT NULL,
    n_active INTEGER NOT NULL, -- tokens on which it fires
    maximum REAL NOT NULL,
    n_train INTEGER NOT NULL, -- segments on which it is active, to draw positives from
    n_val INTEGER NOT NULL,
    n_test INTEGER NOT NULL,
    PRIMARY KEY (latent))

CREATE TABLE IF NOT EXISTS explanation ( -- one explainer's text about one latent
    id INTEGER PRIMARY KEY,
    latent INTEGER NOT NULL,
    explainer TEXT NOT NULL, -- rules, token-lookup, llm:MODEL:it1, ...
    status TEXT NOT NULL, -- ok, dead, too few activations, failed (the LLM's answer is unusable), no answer
    text_it TEXT NOT NULL,
    text_en TEXT NOT NULL,
    rule TEXT, -- NULL for an LLM's, and unless ok
    kind TEXT NOT NULL, -- rule or llm
    prompt TEXT NOT NULL, -- version and hash of the prompt
    notes TEXT, -- wrong language, examples dropped, why it failed
    UNIQUE (latent, explainer))

-- one metric of one explanation under one judge; kept by its key, and its names by number, or the file would be twice as large
CREATE TABLE IF NOT EXISTS score_by_number (
    explanation_id INTEGER NOT NULL,
    latent INTEGER NOT NULL, -- whose examples were judged
    control INTEGER NOT NULL, -- "", shuffled: the explanation of another latent, empty: a text that explains nothing, ...
    scorer INTEGER NOT NULL,
    judge INTEGER NOT NULL,
    negatives INTEGER NOT NULL,
    metric INTEGER NOT NULL,
    value REAL,
    lo REAL,
    hi REAL,
    n_positive INTEGER NOT NULL,
    n_negative INTEGER NOT NULL,
    n_failed INTEGER NOT NULL, -- examples without a usable answer
    split INTEGER NOT NULL,
    PRIMARY KEY (latent, explanation_id, control, scorer, judge, negatives, metric)) WITHOUT ROWID

CREATE TABLE IF NOT EXISTS word (id INTEGER PRIMARY KEY, word TEXT NOT NULL UNIQUE)

-- whoever reads, adds or deletes scores need not know of the numbers
CREATE VIEW IF NOT EXISTS score AS
    SELECT explanation_id, latent, control_.word AS control, scorer_.word AS scorer, judge_.word AS judge,
           negatives_.word AS negatives, metric_.word AS metric, value, lo, hi, n_positive, n_negative, n_failed,
           split_.word AS split
    FROM score_by_number kept
    JOIN word control_ ON control_.id = kept.control
    JOIN word scorer_ ON scorer_.id = kept.scorer
    JOIN word judge_ ON judge_.id = kept.judge
    JOIN word negatives_ ON negatives_.id = kept.negatives
    JOIN word metric_ ON metric_.id = kept.metric
    JOIN word split_ ON split_.id = kept.split

CREATE TRIGGER IF NOT EXISTS score_comes INSTEAD OF INSERT ON score BEGIN
    INSERT OR IGNORE INTO word (word)
    VALUES (new.control), (new.scorer), (new.judge), (new.negatives), (new.metric), (new.split);
    INSERT INTO score_by_number VALUES (
        new.explanation_id, new.latent,
        (SELECT id FROM word WHERE word = new.control),
        (SELECT id FROM word WHERE word = new.scorer),
        (SELECT id FROM word WHERE word = new.judge),
        (SELECT id FROM word WHERE word = new.negatives),
        (SELECT id FROM word WHERE word = new.metric),
        new.value, new.lo, new.hi, new.n_positive, new.n_negative, new.n_failed,
        (SELECT id FROM word WHERE word = new.split));
END

CREATE TRIGGER IF NOT EXISTS score_goes INSTEAD OF DELETE ON score BEGIN
    DELETE FROM score_by_number
    WHERE latent = old.latent AND explanation_id = old.explanation_id
        AND control = (SELECT id FROM word WHERE word = old.control)
        AND scorer = (SELECT id FROM word WHERE word = old.scorer)
        AND judge = (SELECT id FROM word WHERE word = old.judge)
        AND negatives = (SELECT id FROM word WHERE word = old.negatives)
        AND metric = (SELECT id FROM word WHERE word = old.metric);
END

CREATE TABLE IF NOT EXISTS falls ( -- by how much balanced accuracies fall where a group of documents is left out
    explanation_id INTEGER NOT NULL,
    latent INTEGER NOT NULL,
    control TEXT NOT NULL,
    judge TEXT NOT NULL,
    falls TEXT, -- "detection random": thousandths by group, null where it has no example
    PRIMARY KEY (latent, explanation_id, control, judge)) WITHOUT ROWID

CREATE TABLE IF NOT EXISTS judgement ( -- one judge's answer about one example; of a simulation only what is missing of it
    explanation_id INTEGER NOT NULL,
    latent INTEGER NOT NULL,
    control TEXT NOT NULL,
    scorer TEXT NOT NULL,
    judge TEXT NOT NULL,
    example INTEGER NOT NULL, -- place in what the scorer showed
    first INTEGER NOT NULL, -- position of its first token in the cache
    negatives TEXT NOT NULL, -- source of a negative, "" for a positive
    said INTEGER NOT NULL, -- 1 yes, 0 no, -1 an unusable answer, -2 no answer
    probability REAL,
    PRIMARY KEY (latent, explanation_id, control, scorer, judge, example)) WITHOUT ROWID

CREATE TABLE IF NOT EXISTS call ( -- one question to a language model, and what came back: paid for, so never dropped
    request_hash TEXT NOT NULL, -- of model, messages and parameters, not of the endpoint
    model TEXT NOT NULL,
    purpose TEXT NOT NULL, -- explain, repair, detection, fuzzing, simulation
    status TEXT NOT NULL, -- ok, or why there is no answer
    reply TEXT, -- text, finish reason, log-probabilities; never compressed, to be readable anywhere
    tokens_in INTEGER, -- NULL where the server does not say
    tokens_cached INTEGER,
    tokens_out INTEGER,
    usd REAL, -- NULL where the price is not known
    usd_uncertain REAL NOT NULL, -- at most this much for attempts whose answer was lost
    latency REAL NOT NULL, -- seconds
    attempts INTEGER NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (request_hash))

CREATE TABLE IF NOT EXISTS label ( -- one label that a latent detects, on words that did not choose the latent
    latent INTEGER NOT NULL,
    label TEXT NOT NULL, -- UPOS=NOUN, Gender=Fem,Number=Plur, Language=it
    source TEXT NOT NULL, -- whose words: UD ISDT
    f1 REAL NOT NULL,
    lo REAL, -- 95 % interval over sentences or documents
    hi REAL,
    precision REAL NOT NULL,
    recall REAL NOT NULL,
    n INTEGER NOT NULL, -- words that bear the label among those that were judged
    threshold REAL NOT NULL, -- the latent says yes above this share of its maximum
    PRIMARY KEY (latent, label, source))
