// Which latents the list shows, and in which order: search, filters, sort. No element is touched here.

const GOOD = 0.8;
const ULTRA = 0.1; // density from which a latent is ultra-active

const FILTERS = {
  all: () => true,
  explained: (row) => row.detection !== null && row.detection >= GOOD - 1e-9, // as base/statistics.reaches
  better: (row) => row.gain !== null && row.gain > 0,
  llm: (row) => Boolean(row.llm_it || row.llm_en),
  gold: (row) => row.gold.length > 0,
  dead: (row) => row.dead,
  few: (row) => !row.dead && row.status.startsWith("too few"),
  ultra: (row) => row.density >= ULTRA,
};
const RANGES = Object.keys(COLUMNS).filter((name) => COLUMNS[name].range); // density in per cent

const selectState = () => ({ query: "", filter: "all", label: "", list: "", ranges: {}, sort: "gain", descending: true, selected: -1 });

// null last, whatever the direction
function compare(a, b, descending) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(b, "it", { numeric: true }) : a - b;
  return descending ? -order : order;
}

// --- what the search looks through: folded once, many rows at a time, since one long text folds faster than many short ---
const BLOCK = 256;
const SHORT = 35; // of the 50 ms that a browser calls idle, those left to whoever clicks meanwhile
const BETWEEN = "\u0000";
const haystacks = new WeakMap(); // of an array of rows: the folded text of each, as far as it is made

const QUOTED = /(«[^»]*»|“[^”]*”)/u; // of a text split by it, every second piece is quoted
const WORD = /[\p{L}\p{N}.,]+/gu;
const SOME = 300; // rows whose explanations say what stands in most of them
const USUAL = 0.2; // share of them from which a word outside quotes tells nothing

// A function that answers once for each text: what stands between quotes is new, what stands around them comes again.
function once(answer) {
  const kept = new Map();
  return (piece) => kept.get(piece) ?? kept.set(piece, answer(piece)).get(piece);
}

const named = once((label) => LANGUAGES.map(([lang]) => labelName(label, lang)));

// What every explanation says («precision 0.78», «on the word») is not searched: a word that a fifth of them have, a number.
function usualWords(rows) {
  const seen = new Map();
  const some = rows.filter((row, at) => at % Math.ceil(rows.length / SOME) === 0 && row.explanation_it);
  const wordsOf = once((piece) => (piece.match(WORD) ?? []).filter((word) => /^\p{L}/u.test(word)));
  for (const row of some) {
    const pieces = [row.explanation_it, row.explanation_en].flatMap((words) => words.split(QUOTED).filter((_, at) => at % 2 === 0));
    for (const word of new Set(pieces.flatMap(wordsOf))) seen.set(word, (seen.get(word) ?? 0) + 1);
  }
  return new Set([...seen].filter(([, n]) => some.length > 20 && n >= USUAL * some.length).map(([word]) => word));
}

function searched(row, telling, labels) {
  const told = (words) => words.split(QUOTED).map((piece, at) => (at % 2 ? piece : telling(piece))).join("");
  const gold = [...row.gold, ...(labels.get(row.latent) ?? []).map(({ label }) => label)];
  return [row.title_it, row.title_en, told(row.explanation_it), told(row.explanation_en), row.llm_it, row.llm_en, ...row.top_tokens, ...gold, ...gold.flatMap(named)].join("\n");
}

function foldBlock(rows, { made, telling, labels }) {
  const texts = rows.slice(made.length, made.length + BLOCK).map((row) => searched(row, telling, labels));
  const folded = fold(texts.join(BETWEEN)).split(BETWEEN);
  made.push(...(folded.length === texts.length ? folded : texts.map(fold))); // a text may hold the character between
}

const golds = new WeakMap(); // of an array of rows: the run's labels, each searched by the latent that finds it best

function haystack(rows) {
  if (!haystacks.has(rows)) {
    const usual = usualWords(rows);
    const telling = once((piece) => piece.replace(WORD, (word) => (/^[\d.,]+$/.test(word) || usual.has(word) ? "" : word)));
    haystacks.set(rows, { made: [], telling, labels: Map.groupBy(golds.get(rows) ?? [], ({ latent }) => latent) });
  }
  return haystacks.get(rows);
}

// Folds the rows while nothing else is to be done, so that the first letter typed need not wait for all of them.
function prepareSearch(rows, gold) {
  golds.set(rows, gold);
  const some = (idle) => {
    const hay = haystack(rows);
    do foldBlock(rows, hay); while (idle?.timeRemaining() > SHORT && hay.made.length < rows.length);
    if (hay.made.length < rows.length) whenIdle(some);
  };
  rested().then(() => haystack(rows) && whenIdle(some)); // the list comes first
}

// A word that no latent has is left out, and told: `state.missing`.
function holding(rows, state) {
  const wanted = fold(state.query).split(/\s+/).filter(Boolean);
  const hay = wanted.length && haystack(rows);
  while (wanted.length && hay.made.length < rows.length) foldBlock(rows, hay);
  state.missing = wanted.filter((word) => /\D/.test(word) && !hay.made.some((text) => text.includes(word)));
  const known = wanted.filter((word) => !state.missing.includes(word));
  return (at) => (known.length ? known.every((word) => hay.made[at].includes(word)) : !wanted.length);
}

// --- order: each is made once ---
const orders = new WeakMap();

function orderOf(rows, sort, descending) {
  if (!orders.has(rows)) orders.set(rows, new Map());
  const kept = orders.get(rows);
  const name = sort + descending;
  if (!kept.has(name)) {
    const key = rows.map((row) => row[sort]);
    kept.set(name, Uint32Array.from(key.keys()).sort((a, b) => compare(key[a], key[b], descending) || a - b));
  }
  return kept.get(name);
}

function inRanges(row, ranges) {
  for (const name in ranges) {
    const [lo, hi] = ranges[name];
    if (lo === null && hi === null) continue;
    const value = name === "density" ? 100 * row.density : row[name];
    if (value === null || (lo !== null && value < lo) || (hi !== null && value > hi)) return false;
  }
  return true;
}

// The rows that the state asks for, in its order; what next and previous walk along. Rows come ordered by latent.
function selectRows(rows, state, marks) {
  const holds = holding(rows, state);
  const found = [];
  for (const at of orderOf(rows, state.sort, state.descending)) {
    const row = rows[at];
    const narrow = FILTERS[state.filter](row) && (!state.label || row.gold.includes(state.label)) && (!state.list || marks.has(row.latent, state.list));
    if (narrow && inRanges(row, state.ranges) && holds(at)) found.push(row);
  }
  const own = rows[/^\d+$/.test(state.query.trim()) ? Number(state.query) : -1]; // a number is a latent's first of all
  return own ? [own, ...found.filter((row) => row !== own)] : found;
}
