// The passages of a latent: true text, activations as tint, as wide as the reader likes.

const LONG_CONTEXT = 1600;
const CONTEXTS_SHOWN = 5;
const WIDTHS = { words: 6, passage: 16, all: Infinity, window: Infinity }; // shown on either side of the strongest token
const WORD = /\S+\s*/g;

// --- long texts are folded, never cut ---
function folded(ctx, content, long, className) {
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
function narrowed(segments, n) {
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

function contextItem(ctx, context, max, width) {
  const shown = narrowed(context.segments, WIDTHS[width]);
  const length = shown.reduce((sum, [piece]) => sum + piece.length, 0);
  const words = h("div", { dir: "auto", class: "words" }, shown.map((item) => segment(ctx, item, max, context.max)));
  const origin = [context.source, context.doc_id].filter(Boolean).join(" · ");
  return h("li", { class: "context" },
    h("span", { class: "peak num", title: ctx.t("highest") }, ctx.activation(context.max)),
    h("div", { class: "passage" },
      width === "window" ? h("div", { class: "passage-text window-text", tabindex: "0", role: "region", "aria-label": ctx.t("width.window") }, words) : folded(ctx, words, length > LONG_CONTEXT, "passage-text"),
      origin && h("div", { class: "origin muted" }, text(origin))));
}

// A window is taller than its box: the strongest token stands in the middle of it.
function centre(holder) {
  for (const box of holder.querySelectorAll(".window-text")) {
    const word = box.querySelector(".peak-word");
    if (word) box.scrollTop += word.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
  }
}

function contextGroup(ctx, group, max, width) {
  const list = h("ol", { class: "contexts" }, group.contexts.slice(0, CONTEXTS_SHOWN).map((context) => contextItem(ctx, context, max, width)));
  const rest = group.contexts.slice(CONTEXTS_SHOWN);
  const more = rest.length > 0 && h("button", { type: "button", class: "link", onclick() {
    list.append(...rest.map((context) => contextItem(ctx, context, max, width)));
    centre(list);
    more.remove();
  } }, ctx.t("more.contexts", { n: ctx.integer(rest.length) }));
  const range = group.lo === null || group.hi === null ? "" : ctx.t("range", { lo: ctx.activation(group.lo), hi: ctx.activation(group.hi) });
  return h("section", { class: "context-group" }, h("h3", {}, text(ctx.pick(group, "name")), " ", h("small", { class: "muted" }, range)), list, more);
}

// The same passages, each with all of its window; a passage keeps the number that it was chosen for.
async function wideGroups(ctx, groups) {
  const wide = await ctx.wide();
  return groups.map((group, i) => ({ ...group, contexts: group.contexts.map((context, j) => ({ ...context, segments: wide[i]?.contexts[j]?.segments ?? context.segments })) }));
}

function contextsPanel(ctx, groups, max) {
  if (!groups.some((group) => group.contexts.length)) return null;
  const widths = Object.keys(WIDTHS).filter((width) => width !== "window" || ctx.wide);
  const holder = h("div", {});
  const limits = h("p", { class: "note muted", role: "status" });
  let wide = null;
  async function draw() {
    const width = widths.includes(ctx.state.width) ? ctx.state.width : ctx.state.width === "window" ? "all" : "passage";
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.width === width));
    limits.textContent = width === "all" ? ctx.t(ctx.wide ? "width.limit" : "width.limit.disk") : width === "window" ? ctx.t("width.limit.window", { n: ctx.integer(ctx.run?.context_size) }) : "";
    limits.hidden = !limits.textContent;
    let shown = groups;
    if (width === "window") {
      try {
        shown = await (wide ??= wideGroups(ctx, groups));
      } catch (error) {
        wide = null;
        limits.textContent = error.said?.[ctx.lang] || ctx.t("load.failed", { file: error.message });
      }
      if (ctx.state.width !== width) return;
    }
    holder.replaceChildren(...shown.filter((group) => group.contexts.length).map((group) => contextGroup(ctx, group, max, width)));
    if (width === "window") window.requestAnimationFrame(() => centre(holder));
  }
  const buttons = widths.map((width) => h("button", { type: "button", "data-width": width, onclick() {
    ctx.state.width = width;
    prefs.set("width", width);
    draw();
  } }, ctx.t("width." + width)));
  draw();
  return h("section", { class: "panel contexts-panel" },
    h("div", { class: "panel-head" }, h("h2", {}, ctx.t("contexts")), h("div", { class: "switch", role: "group", "aria-label": ctx.t("width") }, buttons)),
    h("p", { class: "note muted" }, ctx.t("contexts.note")), limits, holder);
}
