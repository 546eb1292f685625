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

const selectState = () => ({ query: "", filter: "all", label: "", ranges: {}, sort: "detection", descending: true, selected: -1 });

// null last, whatever the direction
function compare(a, b, descending) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(b, "it", { numeric: true }) : a - b;
  return descending ? -order : order;
}

// --- what the search looks through: folded once, many rows at a time, since one long text folds faster than many short ---
const BLOCK = 512;
const BETWEEN = "\u0000";
const haystacks = new WeakMap(); // of an array of rows: the folded text of each, as far as it is made

const names = new Map();
const named = (label) => {
  if (!names.has(label)) names.set(label, [labelName(label, "it"), labelName(label, "en")]);
  return names.get(label);
};
const searched = (row) => [row.latent, row.explanation_it, row.explanation_en, row.llm_it, row.llm_en, ...row.top_tokens, ...row.gold,
  ...row.gold.flatMap(named)].join("\n");

function foldBlock(rows, made) {
  const texts = rows.slice(made.length, made.length + BLOCK).map(searched);
  const folded = fold(texts.join(BETWEEN)).split(BETWEEN);
  made.push(...(folded.length === texts.length ? folded : texts.map(fold))); // a text may hold the character between
}

function haystack(rows) {
  if (!haystacks.has(rows)) haystacks.set(rows, []);
  return haystacks.get(rows);
}

// Folds the rows while nothing else is to be done, so that the first letter typed need not wait for all of them.
function prepareSearch(rows) {
  const made = haystack(rows);
  const some = () => {
    if (made.length < rows.length) foldBlock(rows, made);
    if (made.length < rows.length) whenIdle(some);
  };
  whenIdle(some);
}

function holding(rows, query) {
  const wanted = fold(query).split(/\s+/).filter(Boolean);
  if (!wanted.length) return () => true;
  const made = haystack(rows);
  while (made.length < rows.length) foldBlock(rows, made);
  return (at) => wanted.every((word) => made[at].includes(word));
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
function selectRows(rows, state) {
  const keep = FILTERS[state.filter];
  const holds = holding(rows, state.query);
  const found = [];
  for (const at of orderOf(rows, state.sort, state.descending)) {
    const row = rows[at];
    if (keep(row) && (!state.label || row.gold.includes(state.label)) && inRanges(row, state.ranges) && holds(at)) found.push(row);
  }
  return found;
}
