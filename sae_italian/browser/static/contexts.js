// The passages of a latent: true text, activations as tint, as wide as the reader likes.
import { h, prefs, text } from "./base.js";

const LONG_TEXT = 1600;
const CONTEXTS_SHOWN = 5;
const WORDS = { words: 6, passage: 16, all: Infinity }; // shown on either side of the strongest token
const WORD = /\S+\s*/g;

// --- long texts are folded, never cut ---
export function folded(ctx, content, long, className) {
  const body = h("div", { class: className + (long ? " folded" : "") }, content);
  if (!long) return body;
  const button = h("button", { type: "button", class: "link", "aria-expanded": "false" }, ctx.t("more"));
  button.addEventListener("click", () => {
    const open = !body.classList.toggle("folded");
    button.setAttribute("aria-expanded", String(open));
    button.textContent = ctx.t(open ? "less" : "more");
  });
  return h("div", {}, body, button);
}

function lastWords(piece, n) {
  const words = [...piece.matchAll(WORD)];
  return n >= words.length ? [piece, words.length] : [n > 0 ? piece.slice(words[words.length - n].index) : "", n];
}

function firstWords(piece, n) {
  const words = [...piece.matchAll(WORD)];
  return n >= words.length ? [piece, words.length] : [n > 0 ? piece.slice(0, words[n].index) : "", n];
}

// The segments within n words of the strongest one; "…" where some are left out.
export function narrowed(segments, n) {
  if (n === Infinity || !segments.length) return segments;
  const peak = segments.reduce((best, [, value], i) => (value > segments[best][1] ? i : best), 0);
  const walk = (order, cut) => {
    const kept = [];
    let left = n;
    for (const [piece, value] of order) {
      const [part, used] = cut(piece, left);
      if (part) kept.push([part, value]);
      left -= used;
      if (part !== piece) return [kept, true];
    }
    return [kept, false];
  };
  const [before, cutBefore] = walk(segments.slice(0, peak).reverse(), lastWords);
  const [after, cutAfter] = walk(segments.slice(peak + 1), firstWords);
  return [...(cutBefore ? [["… ", 0]] : []), ...before.reverse(), segments[peak], ...after, ...(cutAfter ? [["…", 0]] : [])];
}

function segment(ctx, [piece, activation], max, peak) {
  if (!(activation > 0)) return piece;
  const heat = max > 0 ? Math.min(1, activation / max) : 0;
  const title = ctx.t("activation", { x: ctx.activation(activation) });
  return h("mark", { "--heat": Math.round(heat * 1000) / 1000, class: activation === peak ? "peak-word" : null, title }, piece);
}

function contextItem(ctx, context, max) {
  const shown = narrowed(context.segments, WORDS[ctx.state.width]);
  const peak = context.segments.reduce((best, [, value]) => Math.max(best, value), 0);
  const length = shown.reduce((sum, [piece]) => sum + piece.length, 0);
  const words = h("div", { dir: "auto", class: "words" }, shown.map((item) => segment(ctx, item, max, peak)));
  const origin = [context.source, context.doc_id].filter(Boolean).join(" · ");
  return h("li", { class: "context" },
    h("span", { class: "peak num", title: ctx.t("highest") }, ctx.activation(context.max)),
    h("div", { class: "passage" }, folded(ctx, words, length > LONG_TEXT, "passage-text"),
      origin && h("div", { class: "origin muted" }, text(origin))));
}

function contextGroup(ctx, group, max) {
  const list = h("ol", { class: "contexts" }, group.contexts.slice(0, CONTEXTS_SHOWN).map((context) => contextItem(ctx, context, max)));
  const rest = group.contexts.slice(CONTEXTS_SHOWN);
  const more = rest.length > 0 && h("button", { type: "button", class: "link", onclick() {
    list.append(...rest.map((context) => contextItem(ctx, context, max)));
    more.remove();
  } }, ctx.t("more.contexts", { n: ctx.integer(rest.length) }));
  const range = group.lo === null || group.hi === null ? "" : ctx.t("range", { lo: ctx.activation(group.lo), hi: ctx.activation(group.hi) });
  return h("section", { class: "context-group" }, h("h3", {}, text(ctx.pick(group, "name")), " ", h("small", { class: "muted" }, range)), list, more);
}

export function contextsPanel(ctx, groups, max) {
  const full = groups.filter((group) => group.contexts.length);
  if (!full.length) return null;
  const holder = h("div", {});
  const draw = () => holder.replaceChildren(...full.map((group) => contextGroup(ctx, group, max)));
  const buttons = Object.keys(WORDS).map((width) => h("button", { type: "button", "data-width": width, "aria-pressed": String(ctx.state.width === width), onclick() {
    ctx.state.width = width;
    prefs.set("width", width);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.width === width));
    draw();
  } }, ctx.t("width." + width)));
  draw();
  return h("section", { class: "panel contexts-panel" },
    h("div", { class: "panel-head" }, h("h2", {}, ctx.t("contexts")), h("div", { class: "switch", role: "group", "aria-label": ctx.t("width") }, buttons)),
    h("p", { class: "note muted" }, ctx.t("contexts.note")), holder);
}
