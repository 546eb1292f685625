// The run at a glance: facts, metrics with intervals, controls, gold labels.

const GOOD_F1 = 0.8;

const fact = (name, value, note) =>
  h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value, note && h("small", {}, note)));

function renderFacts(ctx, run) {
  const size = ctx.t("size", { d_in: ctx.integer(run.d_in), d_sae: ctx.integer(run.d_sae) }) +
    (run.k === null ? "" : ctx.t("size.k", { k: ctx.integer(run.k) }));
  const corpus = ctx.t("tokens.in", { documents: ctx.integer(run.n_documents), context: ctx.integer(run.context_size) });
  return h("dl", { class: "facts" },
    fact(ctx.t("fact.model"), text(run.model), text(ctx.lang === "it" ? run.model_note_it : run.model_note)),
    fact(ctx.t("fact.sae"), text(run.sae), h("code", {}, run.hook_name)),
    fact(ctx.t("fact.size"), size), fact(ctx.t("fact.corpus"), text(run.corpus)), fact(ctx.t("fact.tokens"), ctx.integer(run.n_tokens), corpus),
    fact(ctx.t("fact.made"), ctx.date(run.created), `sae_italian ${run.version}`));
}

function metricRow(ctx, metric) {
  const note = ctx.pick(metric, "note");
  return h("tr", { "data-metric": metric.name },
    h("th", { scope: "row" }, text(ctx.pick(metric, "label")), note && h("small", {}, text(note))),
    h("td", { class: "num strong" }, ctx.metric(metric.value, metric.unit)),
    h("td", { class: "num muted" }, ctx.interval(metric.lo, metric.hi, (x) => ctx.metric(x, metric.unit, ""))));
}

function renderMetrics(ctx, metrics, { title, head, note }) {
  if (!metrics.length) return null;
  return h("section", { class: "panel" }, h("table", { class: "metrics" }, h("caption", {}, title, note && h("small", {}, note)),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, head), ["value", "interval"].map((name) => h("th", { scope: "col", class: "num" }, ctx.t(name))))),
    h("tbody", {}, metrics.map((metric) => metricRow(ctx, metric)))));
}

// --- gold labels: grouped by category, sorted inside each group ---
const GOLD_COLUMNS = ["label", "n", "latent", "f1", "precision", "recall"];

function sortHeader(ctx, { name, label, title, active, descending, numeric, onSort, className }) {
  const arrow = active ? (descending ? "↓" : "↑") : "";
  return h("th", { scope: "col", class: [numeric && "num", className].filter(Boolean).join(" "), "aria-sort": active ? (descending ? "descending" : "ascending") : null },
    h("button", { class: "sort", type: "button", title, onclick: onSort, "data-sort": name }, label ?? ctx.t(name), h("span", { class: "arrow", "aria-hidden": "true" }, arrow)));
}

function goldRow(ctx, gold) {
  const bar = gold.f1 !== null && h("span", { class: "mini-bar", "aria-hidden": "true" }, h("span", { class: "bar-fill", "--share": gold.f1 }));
  return h("tr", {},
    h("th", { scope: "row" }, text(labelName(gold.label, ctx.lang)), " ", h("small", { class: "muted" }, text(gold.label))),
    h("td", { class: "num" }, ctx.integer(gold.n)),
    h("td", { class: "num" }, gold.latent === null ? "–" : h("a", { href: ctx.href(gold.latent) }, String(gold.latent))),
    h("td", { class: "num f1" }, bar, ctx.fixed(gold.f1)), [gold.precision, gold.recall].map((value) => h("td", { class: "num" }, ctx.fixed(value))));
}

function goldTable(ctx, gold, state) {
  const table = h("table", { class: "gold-table" }, h("caption", {}, ctx.t("gold.caption")));
  const groups = new Map();
  for (const item of gold) groups.set(item.category, [...(groups.get(item.category) || []), item]);
  const draw = () => {
    const head = GOLD_COLUMNS.map((name) => sortHeader(ctx, {
      name, numeric: name !== "label", active: state.sort === name, descending: state.descending,
      onSort() {
        state.descending = state.sort === name ? !state.descending : name !== "label" && name !== "latent";
        state.sort = name;
        draw();
        table.querySelector(`[data-sort="${name}"]`).focus();
      },
    }));
    const bodies = [...groups].map(([category, items]) => h("tbody", {},
      h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: GOLD_COLUMNS.length }, ctx.name("category", category))),
      [...items].sort((a, b) => compare(a[state.sort], b[state.sort], state.descending)).map((item) => goldRow(ctx, item))));
    table.replaceChildren(table.caption, h("thead", {}, h("tr", {}, head)), ...bodies);
  };
  draw();
  return table;
}

function renderGold(ctx, gold, state) {
  if (!gold.length) return null;
  const good = gold.filter((item) => item.f1 !== null && item.f1 >= GOOD_F1 - 1e-9).length;
  const summary = ctx.t("gold.summary", { n: ctx.integer(gold.length), good: ctx.integer(good), bar: ctx.fixed(GOOD_F1, 1) });
  return h("details", { class: "panel gold", open: state.open, ontoggle: (event) => (state.open = event.target.open) },
    h("summary", {}, h("h2", {}, ctx.t("gold")), h("span", { class: "muted" }, summary)),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": ctx.t("gold") }, goldTable(ctx, gold, state)));
}
