// One latent: renderCard turns a row and its card record into a DOM element. It knows nothing of where it is shown.

const LONG_TEXT = 600;

const section = (title, note, ...content) =>
  h("section", { class: "panel" }, h("h3", {}, title), note && h("p", { class: "note muted" }, note), content);

// --- head: explanation and facts ---
function cardHead(ctx, row, card) {
  const explanation = ctx.pick(row, "llm") || ctx.pick(row, "explanation");
  const facts = [
    [ctx.t("column.detection"), ctx.fixed(row.detection), ctx.interval(row.detection_lo, row.detection_hi, ctx.fixed)],
    [ctx.t("column.gain"), ctx.signed(row.gain), ""],
    [ctx.t("column.density"), ctx.density(row.density), ""],
    [ctx.t("column.max"), ctx.activation(row.max), ""],
    [ctx.t("active.tokens"), ctx.integer(row.n_active), ""],
  ];
  return h("header", { class: "card-head" },
    h("div", { class: "chips" }, h("h1", { tabindex: "-1" }, ctx.t("latent") + " " + row.latent), rowTags(ctx, row),
      card.seeds && h("span", { class: "tag" }, ctx.t("seeds.found", card.seeds)), h("span", { class: "copies" }, copyButton(ctx, ctx.t("copy.link"), () => ctx.permalink(row.latent)),
        copyButton(ctx, ctx.t("copy.json"), () => JSON.stringify({ ...plain(row), ...card }, null, 2)))),
    explanation ? folded(ctx, text(explanation), explanation.length > LONG_TEXT, "lead") : h("p", { class: "lead muted" }, ctx.t(row.dead ? "never.fired" : "no.explanation")),
    h("dl", { class: "facts" }, facts.map(([name, value, note]) =>
      h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value, note && h("small", {}, note))))));
}

// --- what it reacts to ---
function tokensPanel(ctx, items) {
  const top = items.reduce((a, item) => Math.max(a, item.share), 0) || 1;
  return section(ctx.t("fires.on"), ctx.t("fires.note"), barTable({ caption: ctx.t("fires.on"),
    items: items.map((item) => ({ head: token(item.token), share: item.share / top, text: ctx.share(item.share) })) }));
}

function labelsPanel(ctx, labels) {
  const row = (item) => h("tr", {}, h("th", { scope: "row" }, text(labelName(item.label, ctx.lang)), h("small", { class: "muted" }, text([item.label, item.source].filter(Boolean).join(" · ")))),
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

function writesPanel(ctx, { promoted, suppressed, logits }) {
  return h("section", { class: "panel" }, h("h3", {}, ctx.t("logits")), h("p", { class: "note muted" }, ctx.t("logits.note")),
    h("div", { class: "halves" }, logitsHalf(ctx, promoted, ctx.t("promoted")), logitsHalf(ctx, suppressed, ctx.t("suppressed"))),
    logits.counts.length > 0 && histogram(ctx, logits, "logits"));
}

// What another latent is about; nothing while its row is still to come.
function words(ctx, latent) {
  const other = ctx.row(latent);
  const found = other ? ctx.pick(other, "llm") || ctx.pick(other, "explanation") || other.top_tokens.map((item) => item.trim()).join(" ") : "";
  return text(found.slice(0, 160));
}

function neighboursPanel(ctx, items, name) {
  const row = ({ latent, value }) => h("li", {}, h("a", { href: ctx.href(latent) }, String(latent)),
    h("span", { class: "one-line", "data-words": latent }, words(ctx, latent)), h("span", { class: "num muted" }, ctx.fixed(value)));
  return section(ctx.t(name), ctx.t(name + ".note"), h("ol", { class: "neighbours" }, items.map(row)));
}

function reacts(ctx, row, card) {
  return h("section", { class: "reacts" }, h("h2", {}, ctx.t("reacts")), h("div", { class: "columns" },
    h("div", { class: "main" }, explanationsPanel(ctx, card), contextsPanel(ctx, card.groups, row.max)),
    h("div", { class: "side" },
      card.labels.length > 0 && labelsPanel(ctx, card.labels),
      card.tokens.length > 0 && tokensPanel(ctx, card.tokens),
      card.histogram.counts.length > 0 && section(ctx.t("histogram"), null, histogram(ctx, card.histogram)),
      card.positions.length > 0 && section(ctx.t("profile"), ctx.t("profile.note"), profile(ctx, card.positions)),
      card.cofiring.length > 0 && neighboursPanel(ctx, card.cofiring, "cofiring"),
      card.sources.length > 0 && sourcesPanel(ctx, card))));
}

function writes(ctx, card) {
  if (!card.promoted.length && !card.decoder.length && !card.logits.counts.length) return null;
  return h("section", { class: "writes" }, h("h2", {}, ctx.t("writes")), h("div", { class: "pair" },
    card.promoted.length + card.suppressed.length + card.logits.counts.length > 0 && writesPanel(ctx, card),
    card.decoder.length > 0 && neighboursPanel(ctx, card.decoder, "decoder")));
}

function renderCard(ctx, row, card) {
  if (!card) return h("article", { class: "card" }, cardHead(ctx, row, {}), h("p", { class: "muted" }, ctx.t("no.card")));
  return h("article", { class: "card" }, cardHead(ctx, row, card), reacts(ctx, row, card), writes(ctx, card),
    card.rule && h("details", { class: "panel rule" }, h("summary", {}, ctx.t("rule")), h("pre", { tabindex: "0" }, JSON.stringify(card.rule, null, 2))));
}
