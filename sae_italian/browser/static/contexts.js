// The passages of a latent: true text, activations as tint, as wide as the reader likes.

const LONG_CONTEXT = 1600;
const CONTEXTS_SHOWN = 5;
const NEAR = 6; // words on either side of the strongest token, in the narrowest width
const WIDTHS = ["words", "sentence", "all", "window"];
const SHORTENED = "[Aa]rt|[Aa]vv|[Cc]fr|[Dd]ott|[Dd]r|[Ee]s|[Gg]en|[Ii]ng|[Mm]ons|[Oo]n|[Pp]ag|[Pp]rof|[Ss]en|[Ss]ig|[Ss]igg|[Ss]t";
const STOP = String.raw`[.!?…](?<!(?:(?<![.\w])[A-Z]|\b(?:${SHORTENED}))\.)["»”’')\]]*`; // «l'on. Moro» and an initial end nothing
const NEXT = String.raw`\s+(?![\s\p{Ll}\d])`; // nor do «n. 12» and «l'art. citato»
const BORDER = new RegExp(String.raw`(?:${STOP}(?=${NEXT})|(?=\n))(\s+)`, "gu");
const SENTENCE_END = new RegExp(String.raw`${STOP}(?=${NEXT}|$)|(?=\n)`, "u");

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

// Where in a passage the shown part begins and ends; the strongest token stands from `begin` to `end`.
function shownPart(whole, begin, end, width) {
  const [before, after] = [whole.slice(0, begin), whole.slice(end)];
  if (width === "words") {
    const words = [...before.matchAll(/\S+\s*/g)];
    const next = [...after.matchAll(/\s*\S+/g)].slice(0, NEAR).at(-1);
    return [words.length > NEAR ? words.at(-NEAR).index : 0, next ? end + next.index + next[0].length : whole.length];
  }
  if (width !== "sentence") return [0, whole.length];
  const lead = begin + Math.max(0, whole.slice(begin, end).search(/\S/));
  const border = [...whole.matchAll(BORDER)].findLast(({ index, 0: found, 1: space }) => index + found.length - space.length < lead);
  const last = whole.slice(begin, end).trim() ? end - 1 : end; // a line's end on which it fires ends nothing
  const stop = SENTENCE_END.exec(whole.slice(last));
  const first = border ? Math.min(lead, border.index + border[0].length) : 0;
  return [first + Math.max(0, whole.slice(first, end).search(/\S/)), stop ? last + stop.index + stop[0].length : whole.length];
}

// The segment that a passage stands for.
const anchor = ({ segments, max }) => Math.max(0, segments.findIndex(([, value]) => value === max));

// The segments of that part; "…" where the text goes on.
function narrowed(context, width) {
  const { segments, cut } = context;
  if (!segments.length) return segments;
  const whole = segments.map(([piece]) => piece).join("");
  const strongest = anchor(context);
  const begin = segments.slice(0, strongest).reduce((sum, [piece]) => sum + piece.length, 0);
  const [from, to] = shownPart(whole, begin, begin + segments[strongest][0].length, width);
  const kept = [];
  let at = 0;
  for (const [piece, value] of segments) {
    const part = piece.slice(Math.max(0, from - at), Math.max(0, to - at));
    if (part) kept.push([part, value]);
    at += piece.length;
  }
  const before = from > 0 ? width === "words" : cut & 1;
  const after = to < whole.length ? width === "words" : cut & 2;
  return [...(before ? [["… ", 0]] : []), ...kept, ...(after ? [["…", 0]] : [])];
}

// A context's text up to and with its strongest token: what the latent is tried on.
const fires = (context) => context.segments.slice(0, anchor(context) + 1).map(([piece]) => piece).join("").trimStart(); // it may fire on the line that ends

// A row's passage in one line; what fires stands between the characters 1 and 2 (contexts.py).
const marked = (sample) => h("bdi", {}, sample.split("\u0001").map((piece, i) => {
  const [on, off] = i ? piece.split("\u0002") : ["", piece];
  return [on && h("mark", { "--heat": 0.7 }, on), off];
}));

function segment(ctx, [piece, activation], max, peak) {
  if (!(activation > 0)) return piece;
  const heat = max > 0 ? Math.min(1, activation / max) : 0;
  const title = ctx.t("activation", { x: ctx.activation(activation) });
  const word = piece.trimStart() || piece; // a token's space is not tinted, unless it is all there is
  return [piece.slice(0, piece.length - word.length), h("mark", { "--heat": Math.round(heat * 1000) / 1000, class: activation === peak ? "peak-word" : null, title }, word)];
}

function contextItem(ctx, context, max, width) {
  const shown = narrowed(context, width);
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
  return groups.map((group, i) => ({ ...group, contexts: group.contexts.map((context, j) => ({ ...context, ...wide[i]?.contexts[j], max: context.max })) }));
}

function contextsPanel(ctx, groups, max) {
  if (!groups.some((group) => group.contexts.length)) return null;
  const widths = WIDTHS.filter((width) => width !== "window" || ctx.wide);
  const holder = h("div", {});
  const limits = h("p", { class: "note muted", role: "status" });
  let wide = null;
  async function draw() {
    const width = widths.includes(ctx.state.width) ? ctx.state.width : ctx.state.width === "window" ? "all" : "sentence";
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.width === width));
    limits.textContent = width === "all" ? ctx.t(ctx.wide ? "width.limit" : "width.limit.disk") : width === "window" ? ctx.t("width.limit.window", { n: ctx.integer(ctx.run?.context_size) }) : "";
    limits.hidden = !limits.textContent;
    limits.setAttribute("role", "status");
    let shown = groups;
    if (width === "window") {
      try {
        shown = await (wide ??= wideGroups(ctx, groups));
      } catch (error) {
        wide = null;
        limits.setAttribute("role", "alert");
        limits.textContent = failure(ctx, error).textContent;
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
    h("div", { class: "panel-head" }, h("h2", { title: ctx.t("contexts.note") }, ctx.t("contexts")),
      h("div", { class: "switch", role: "group", "aria-label": ctx.t("width") }, buttons)), limits, holder);
}
