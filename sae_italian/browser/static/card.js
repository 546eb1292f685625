// One latent: renderCard turns a row and its card record into a DOM element. It knows nothing of where it is shown.
"use strict";
(function () {
  const S = window.saeItalian;
  const { h } = S;
  const LONG_TEXT = 600;
  const LONG_CONTEXT = 1600;
  const CONTEXTS_SHOWN = 5;
  const CONTROL = "token-lookup";
  const MAIN_METRIC = "balanced_accuracy";
  const METRICS = [MAIN_METRIC, "tpr", "tnr", "f1", "auroc"];

  const section = (title, note, ...content) =>
    h("section", { class: "panel" }, h("h2", {}, title), note && h("p", { class: "note muted" }, note), content);

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

  // --- head: explanation and facts ---
  function cardHead(ctx, row) {
    const explanation = ctx.pick(row, "explanation");
    const facts = [
      [ctx.t("detection"), ctx.fixed(row.detection), ctx.interval(row.detection_lo, row.detection_hi, ctx.fixed)],
      [ctx.t("gain"), ctx.signed(row.gain), ""],
      [ctx.t("density"), ctx.density(row.density), ""],
      [ctx.t("max"), ctx.activation(row.max), ""],
      [ctx.t("active.tokens"), ctx.integer(row.n_active), ""],
    ];
    return h("header", { class: "card-head" },
      h("div", { class: "chips" }, h("h1", { tabindex: "-1" }, ctx.t("latent") + " " + row.latent), S.rowTags(ctx, row)),
      explanation ? folded(ctx, S.text(explanation), explanation.length > LONG_TEXT, "lead") : h("p", { class: "lead muted" }, ctx.t("no.explanation")),
      h("dl", { class: "facts" }, facts.map(([name, value, note]) =>
        h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value, note && h("small", {}, note))))));
  }

  // --- scores: the explanation beside its control, test by test ---
  function byTest(scores) {
    const tests = new Map();
    for (const score of scores) {
      const key = [score.scorer, score.judge, score.negatives].join("\u0000");
      if (!tests.has(key)) tests.set(key, []);
      tests.get(key).push(score);
    }
    return [...tests.values()];
  }

  function explainersOf(scores) {
    const names = [...new Set(scores.map((score) => score.explainer))];
    return names.sort((a, b) => (a === CONTROL) - (b === CONTROL));
  }

  function scoreCell(ctx, score, control) {
    if (!score) return h("td", { class: "num" }, "–");
    return h("td", { class: "num value" }, h("span", { class: control ? "" : "strong" }, ctx.fixed(score.value)), " ",
      h("small", { class: "muted" }, ctx.interval(score.lo, score.hi, ctx.fixed)));
  }

  function testName(ctx, { scorer, judge, negatives }) {
    const detail = [ctx.t("negatives.of", { name: ctx.name("negatives", negatives) }), ctx.t("judge.of", { name: ctx.name("judge", judge) })];
    return h("th", { scope: "row" }, ctx.name("scorer", scorer), h("small", {}, S.text(detail.join(", "))));
  }

  function scoreRow(ctx, scores, explainers, metric) {
    const of = (explainer) => scores.find((score) => score.explainer === explainer && score.metric === metric);
    const main = of(explainers[0]);
    const label = `${ctx.name("scorer", scores[0].scorer)}: ${ctx.fixed(main?.value)}`;
    return h("tr", {}, testName(ctx, scores[0]),
      h("td", { class: "track-cell" }, S.scoreTrack(main, explainers.length > 1 ? of(CONTROL) : null, label)),
      explainers.map((explainer) => scoreCell(ctx, of(explainer), explainer === CONTROL)));
  }

  const keyMark = (explainer) => h("span", { class: "key " + (explainer === CONTROL ? "key-ring" : "key-dot"), "aria-hidden": "true" });

  function scoreTable(ctx, tests, explainers, metric) {
    return h("table", { class: "scores" },
      h("caption", { class: "hidden" }, ctx.name("metric", metric)),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ctx.t("scorer")), h("td", {}),
        explainers.map((explainer) => h("th", { scope: "col", class: "num" }, keyMark(explainer), ctx.name("explainer", explainer))))),
      h("tbody", {}, tests.map((scores) => scoreRow(ctx, scores, explainers, metric))));
  }

  function allMetrics(ctx, tests, explainers) {
    const body = tests.map((scores) => {
      const names = [...new Set(scores.map((score) => score.metric))].sort((a, b) => METRICS.indexOf(a) - METRICS.indexOf(b));
      return h("tbody", {},
        h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: 2 + explainers.length },
          ctx.name("scorer", scores[0].scorer), ", ", S.text(ctx.t("negatives.of", { name: ctx.name("negatives", scores[0].negatives) })))),
        names.map((metric) => {
          const of = (explainer) => scores.find((score) => score.explainer === explainer && score.metric === metric);
          const any = scores.find((score) => score.metric === metric);
          return h("tr", {}, h("th", { scope: "row" }, ctx.name("metric", metric)),
            explainers.map((explainer) => scoreCell(ctx, of(explainer), explainer === CONTROL)),
            h("td", { class: "num muted" }, `${ctx.integer(any.n_pos)}/${ctx.integer(any.n_neg)}`));
        }));
    });
    return h("details", {}, h("summary", {}, ctx.t("scores.all")),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": ctx.t("scores.all") },
        h("table", {}, h("caption", { class: "hidden" }, ctx.t("scores.all")),
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ctx.t("metric")),
            explainers.map((explainer) => h("th", { scope: "col", class: "num" }, ctx.name("explainer", explainer))),
            h("th", { scope: "col", class: "num" }, ctx.t("examples")))), body)));
  }

  function scoresPanel(ctx, scores) {
    if (!scores.length) return null;
    const explainers = explainersOf(scores);
    const tests = byTest(scores);
    const metric = scores.some((score) => score.metric === MAIN_METRIC) ? MAIN_METRIC : scores[0].metric;
    return section(ctx.t("scores"), metric === MAIN_METRIC ? ctx.t("scores.note") : ctx.name("metric", metric),
      scoreTable(ctx, tests.filter((test) => test.some((score) => score.metric === metric)), explainers, metric),
      allMetrics(ctx, tests, explainers));
  }

  // --- contexts: the true text, activations as tint ---
  function segment(ctx, [text, activation], max, peak) {
    if (!(activation > 0)) return text;
    const heat = max > 0 ? Math.min(1, activation / max) : 0;
    const title = ctx.t("activation", { x: ctx.activation(activation) });
    return h("mark", { "--heat": Math.round(heat * 1000) / 1000, class: activation === peak ? "peak-word" : null, title }, text);
  }

  function contextItem(ctx, context, max) {
    const length = context.segments.reduce((sum, [text]) => sum + text.length, 0);
    const text = h("div", { dir: "auto", class: "words" }, context.segments.map((item) => segment(ctx, item, max, context.max)));
    const origin = [context.source, context.doc_id].filter(Boolean).join(" · ");
    return h("li", { class: "context" },
      h("span", { class: "peak num", title: ctx.t("highest") }, ctx.activation(context.max)),
      h("div", { class: "passage" }, folded(ctx, text, length > LONG_CONTEXT, "passage-text"),
        origin && h("div", { class: "origin muted" }, S.text(origin))));
  }

  function contextGroup(ctx, group, max) {
    const list = h("ol", { class: "contexts" }, group.contexts.slice(0, CONTEXTS_SHOWN).map((context) => contextItem(ctx, context, max)));
    const rest = group.contexts.slice(CONTEXTS_SHOWN);
    const more = rest.length > 0 && h("button", { type: "button", class: "link", onclick() {
      list.append(...rest.map((context) => contextItem(ctx, context, max)));
      more.remove();
    } }, ctx.t("more.contexts", { n: ctx.integer(rest.length) }));
    const range = group.lo === null || group.hi === null ? "" : ctx.t("range", { lo: ctx.activation(group.lo), hi: ctx.activation(group.hi) });
    return h("section", { class: "context-group" }, h("h3", {}, S.text(ctx.pick(group, "name")), " ", h("small", { class: "muted" }, range)), list, more);
  }

  // --- the side: histogram, logits, tokens, gold, rule ---
  function logitsPanel(ctx, items, title) {
    const top = items.reduce((a, item) => Math.max(a, Math.abs(item.value)), 0) || 1;
    return h("div", { class: "half" }, h("h2", {}, title), S.barTable({
      caption: title,
      items: items.map((item) => ({ head: S.token(item.token), share: Math.abs(item.value) / top, text: ctx.signed(item.value) })),
    }));
  }

  function goldPanel(ctx, gold) {
    const row = (item) => h("tr", {}, h("th", { scope: "row" }, S.text(item.label)),
      h("td", { class: "num strong" }, ctx.fixed(item.f1)), h("td", { class: "num" }, ctx.fixed(item.precision)), h("td", { class: "num" }, ctx.fixed(item.recall)));
    return section(ctx.t("gold"), null, h("table", {}, h("caption", { class: "hidden" }, ctx.t("gold")),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ctx.t("label")),
        ["f1", "precision", "recall"].map((name) => h("th", { scope: "col", class: "num" }, ctx.t(name))))),
      h("tbody", {}, gold.map(row))));
  }

  function side(ctx, card) {
    const top = card.tokens.reduce((a, item) => Math.max(a, item.share), 0) || 1;
    const tokens = card.tokens.map((item) => ({ head: S.token(item.token), share: item.share / top, text: ctx.share(item.share) }));
    return h("div", { class: "side" },
      card.tokens.length > 0 && section(ctx.t("fires.on"), ctx.t("fires.note"), S.barTable({ caption: ctx.t("fires.on"), items: tokens })),
      section(ctx.t("histogram"), null, S.histogram(ctx, card.histogram)),
      card.promoted.length + card.suppressed.length > 0 && h("section", { class: "panel" },
        h("div", { class: "halves" }, logitsPanel(ctx, card.promoted, ctx.t("promoted")), logitsPanel(ctx, card.suppressed, ctx.t("suppressed"))),
        h("p", { class: "note muted" }, ctx.t("logits.note"))),
      card.gold.length > 0 && goldPanel(ctx, card.gold),
      card.rule && h("details", { class: "panel rule" }, h("summary", {}, ctx.t("rule")),
        h("pre", { tabindex: "0" }, JSON.stringify(card.rule, null, 2))));
  }

  S.renderCard = function (ctx, row, card) {
    if (!card) return h("article", { class: "card" }, cardHead(ctx, row), h("p", { class: "muted" }, ctx.t("no.card")));
    const groups = card.groups.filter((group) => group.contexts.length);
    return h("article", { class: "card" }, cardHead(ctx, row),
      h("div", { class: "columns" },
        h("div", { class: "main" }, scoresPanel(ctx, card.scores),
          groups.length > 0 && section(ctx.t("contexts"), ctx.t("contexts.note"), groups.map((group) => contextGroup(ctx, group, row.max)))),
        side(ctx, card)));
  };
})();
