// One latent: renderCard turns a row and its card record into a DOM element. It knows nothing of where it is shown.

const LONG_TEXT = 400;
const TITLE = 60; // letters of a heading, where a latent has no title of its own

const section = (title, note, ...content) =>
  h("section", { class: "panel" }, h("h3", {}, title), note && h("p", { class: "note muted" }, note), content);

// --- what a latent is called: its title, else the beginning of its explanation ---
const explained = (ctx, row) => ctx.pick(row, "llm") || ctx.pick(row, "explanation");
const headline = (ctx, row) => ctx.pick(row, "title") || explained(ctx, row);
const shortened = (words, most) => (words.length <= most ? words : cut(words, most - 1).replace(/\s+\S*$/, "").replace(/[\s,;:]+$/, "") + "…");

// --- head ---
function scoresLine(ctx, row, card) {
  const fact = (name, value, note) => h("span", { class: "fact" }, name, " ", h("b", {}, value), note && h("small", {}, " ", note));
  const facts = [
    row.detection !== null && fact(ctx.t("column.detection"), ctx.fixed(row.detection), ctx.interval(row.detection_lo, row.detection_hi, ctx.fixed)),
    row.gain !== null && fact(ctx.t("column.gain"), ctx.signed(row.gain), ctx.t("over.lookup", { x: ctx.fixed(row.detection - row.gain) })),
    ["title", "whole"].map((of) => row[`${of}_detection`] != null && fact(ctx.t(`${of}.score`), ctx.fixed(row[`${of}_detection`]))),
    row.fuzzing !== null && fact(ctx.t("scorer.fuzzing"), ctx.fixed(row.fuzzing)),
    fact(ctx.t("column.density"), ctx.density(row.density), ctx.t("active.tokens", { n: ctx.integer(row.n_active) })), fact(ctx.t("column.max"), ctx.activation(row.max))];
  const panel = card && explanationsPanel(ctx, card);
  if (!panel) return h("p", { class: "scores-line muted" }, facts);
  const line = h("details", { class: "scores-line", open: ctx.state.scores, ontoggle: () => { ctx.state.scores = line.open; } }, h("summary", { class: "muted" }, facts), panel);
  return line;
}

function cardHead(ctx, row, card) {
  const name = `${ctx.t("latent")} ${row.latent}`;
  const explanation = explained(ctx, row);
  const heading = ctx.pick(row, "title") || shortened(explanation, TITLE);
  const whole = explanation && explanation !== heading && folded(ctx, text(explanation), explanation.length > LONG_TEXT, "lead");
  const tryIt = ctx.tryable && h("button", { type: "button", class: "copy try", onclick: (event) => event.target.closest(".card").querySelector(".live textarea").focus() }, ctx.t("try"));
  const copies = h("span", { class: "copies" }, tryIt, ctx.marks && starButton(ctx, row.latent), copyButton(ctx, ctx.t("copy.link"), () => ctx.permalink(row.latent)),
    copyButton(ctx, ctx.t("copy.json"), () => JSON.stringify({ ...plain(row), ...card }, null, 2)));
  return h("header", { class: "card-head" }, h("div", { class: "chips" }, h("span", { class: "which" }, name), rowTags(ctx, row), card?.seeds && h("span", { class: "tag" }, ctx.t("seeds.found", card.seeds)), copies),
    h("h1", { tabindex: "-1" }, heading ? text(heading) : name),
    whole || (!explanation && h("p", { class: "lead muted" }, ctx.t(row.dead ? "never.fired" : "no.explanation"))), scoresLine(ctx, row, card));
}

// --- what it reacts to ---
function tokensPanel(ctx, items) {
  const top = items.reduce((a, item) => Math.max(a, item.share), 0) || 1;
  return section(ctx.t("fires.on"), ctx.t("fires.note"), barTable({ caption: ctx.t("fires.on"),
    items: items.map((item) => ({ head: token(item.token), share: item.share / top, text: ctx.share(item.share) })) }));
}

function labelsPanel(ctx, labels) {
  const row = (item) => h("tr", {}, h("th", { scope: "row" }, text(labelName(item.label, ctx.lang)), h("small", { class: "muted" }, text([item.label, item.source].filter(Boolean).join(" · "))), item.f1 < 0.5 && h("span", { class: "tag warn" }, ctx.t("label.fails"))),
    h("td", { class: "num" }, h("span", { class: "strong" }, ctx.fixed(item.f1)), h("small", { class: "muted" }, ctx.interval(item.lo, item.hi, ctx.fixed))),
    h("td", { class: "num" }, ctx.fixed(item.precision)), h("td", { class: "num" }, ctx.fixed(item.recall)));
  return section(ctx.t("gold.detects"), null, h("table", { class: "labels" }, h("caption", { class: "hidden" }, ctx.t("gold.detects")),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ctx.t("label")),
      ["f1", "precision", "recall"].map((name) => h("th", { scope: "col", class: "num" }, ctx.t(name))))),
    h("tbody", {}, labels.map(row))));
}

function sourcesPanel(ctx, { sources, more_sources: more }) {
  const top = sources[0].documents;
  return section(ctx.t("sources"), null, barTable({ caption: ctx.t("sources"), items: sources.map((item) => ({
    head: text(item.source || ctx.t("no.source")), share: item.documents / top, text: ctx.t("documents", { n: ctx.integer(item.documents) }) })) }),
  more > 0 && h("p", { class: "note muted" }, ctx.t("more.sources", { n: ctx.integer(more) })));
}

// --- what it writes ---
function logitsHalf(ctx, items, title) {
  const top = items.reduce((a, item) => Math.max(a, Math.abs(item.value)), 0) || 1;
  return h("div", { class: "half" }, h("h4", {}, title), barTable({ caption: title,
    items: items.map((item) => ({ head: token(item.token), share: Math.abs(item.value) / top, text: ctx.signed(item.value) })) }));
}

function writesPanel(ctx, { promoted, suppressed }) {
  return h("section", { class: "panel writes" }, h("h3", { title: ctx.t("logits.note") }, ctx.t("logits")),
    h("div", { class: "halves" }, logitsHalf(ctx, promoted, ctx.t("promoted")), logitsHalf(ctx, suppressed, ctx.t("suppressed"))));
}

// What another latent is about; nothing while its row is still to come.
function words(ctx, latent) {
  const other = ctx.row(latent);
  const found = other ? headline(ctx, other) || other.top_tokens.map((item) => item.trim()).join(" ") : "";
  return text(cut(found, 160));
}

function neighboursPanel(ctx, items, name) {
  const row = ({ latent, value }) => h("li", {}, h("a", { href: ctx.href(latent) }, String(latent)),
    h("span", { class: "one-line", "data-words": latent }, words(ctx, latent)), h("span", { class: "num muted" }, ctx.fixed(value)));
  return section(ctx.t(name), ctx.t(name + ".note"), h("ol", { class: "neighbours " + name }, items.map(row)));
}

function renderCard(ctx, row, card) {
  if (!card) return h("article", { class: "card" }, cardHead(ctx, row, null), h("p", { class: "muted" }, ctx.t("no.card")));
  const has = (...parts) => parts.some((part) => (part.counts ?? part).length > 0);
  return h("article", { class: "card" }, cardHead(ctx, row, card),
    h("div", { class: "columns" }, h("div", { class: "main" }, contextsPanel(ctx, card.groups, row.max)),
      h("div", { class: "side" }, has(card.histogram) && section(ctx.t("histogram"), null, histogram(ctx, card.histogram)),
        has(card.promoted, card.suppressed) && writesPanel(ctx, card))),
    h("section", { class: "panel live", hidden: true }),
    h("div", { class: "rest" }, ctx.marks && notesPanel(ctx, row.latent), has(card.labels) && labelsPanel(ctx, card.labels), has(card.tokens) && tokensPanel(ctx, card.tokens),
      has(card.positions) && section(ctx.t("profile"), ctx.t("profile.note"), profile(ctx, card.positions)), has(card.decoder) && neighboursPanel(ctx, card.decoder, "decoder"),
      has(card.cofiring) && neighboursPanel(ctx, card.cofiring, "cofiring"), has(card.logits) && section(ctx.t("logits.histogram"), null, histogram(ctx, card.logits, "logits")),
      has(card.sources) && sourcesPanel(ctx, card), has(card.graphs) && section(ctx.t("graph.title"), null, h("ul", {}, card.graphs.map((graph) => h("li", {}, h("a", { href: graph.href }, text(graph.prompt)))))),
      card.rule && h("details", { class: "panel rule" }, h("summary", {}, ctx.t("rule")), h("pre", { tabindex: "0" }, JSON.stringify(card.rule, null, 2)))));
}
