// Which latents the list shows, and in which order: search, filters, sort. No element is touched here.
import { fold } from "./base.js";
import { labelName } from "./labels.js";

export const GOOD = 0.8;
export const ULTRA = 0.1; // density from which a latent is ultra-active

export const FILTERS = {
  all: () => true,
  explained: (row) => row.detection !== null && row.detection >= GOOD,
  better: (row) => row.gain !== null && row.gain > 0,
  llm: (row) => Boolean(row.llm_it || row.llm_en),
  gold: (row) => row.gold.length > 0,
  dead: (row) => row.dead,
  few: (row) => !row.dead && row.status.startsWith("too few"),
  ultra: (row) => row.density >= ULTRA,
};
export const RANGES = ["density", "max", "detection", "gain"]; // density in per cent
export const COLUMNS = ["latent", "density", "max", "detection", "fuzzing", "gain"];

export const selectState = () => ({ query: "", filter: "all", label: "", ranges: {}, sort: "detection", descending: true, selected: -1 });

// null last, whatever the direction
export function compare(a, b, descending) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(b, "it", { numeric: true }) : a - b;
  return descending ? -order : order;
}

function haystack(row) {
  row.folded ??= fold([row.latent, row.explanation_it, row.explanation_en, row.llm_it, row.llm_en, ...row.top_tokens, ...row.gold,
    ...row.gold.flatMap((label) => [labelName(label, "it"), labelName(label, "en")])].join("\n"));
  return row.folded;
}

function inRanges(row, ranges) {
  return Object.entries(ranges).every(([name, [lo, hi]]) => {
    if (lo === null && hi === null) return true;
    const value = name === "density" ? 100 * row.density : row[name];
    return value !== null && (lo === null || value >= lo) && (hi === null || value <= hi);
  });
}

// The rows that the state asks for, in its order; what next and previous walk along.
export function selectRows(rows, state) {
  const words = fold(state.query).split(/\s+/).filter(Boolean);
  const keep = FILTERS[state.filter];
  const found = rows.filter((row) => keep(row) && (!state.label || row.gold.includes(state.label)) && inRanges(row, state.ranges) &&
    words.every((word) => haystack(row).includes(word)));
  return found.sort((a, b) => compare(a[state.sort], b[state.sort], state.descending) || a.latent - b.latent);
}
