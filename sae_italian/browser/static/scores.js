// Explanations and how well each does: every explanation beside its control, test by test, judge by judge.

const CONTROL = "token-lookup";
const MAIN_METRIC = "balanced_accuracy";
const HEADLINE = { detection: "random", fuzzing: "same-token" }; // the negatives of the scores shown first
const METRICS = [MAIN_METRIC, "tpr", "tnr", "f1", "auroc"];

const NOW = "@now"; // ends the name of an explanation made on demand that says something else than the run's

function explainerName(ctx, explainer) {
  if (explainer.endsWith(NOW)) return ctx.t("explainer.now", { name: explainerName(ctx, explainer.slice(0, -NOW.length)) });
  return explainer.startsWith("llm:") ? explainer.slice(4) : ctx.name("explainer", explainer);
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

function judgedCell(ctx, score, control) {
  if (!score) return h("td", { class: "num" }, "–");
  return h("td", { class: "num value" }, h("span", { class: control ? "" : "strong" }, ctx.fixed(score.value)), " ",
    h("small", { class: "muted" }, ctx.interval(score.lo, score.hi, ctx.fixed)));
}

function testName(ctx, { scorer, judge, negatives }) {
  const detail = [ctx.t("negatives.of", { name: ctx.name("negatives", negatives) }), ctx.t("judge.of", { name: ctx.name("judge", judge) })];
  return h("th", { scope: "row" }, ctx.name("scorer", scorer), h("small", {}, text(detail.join(", "))));
}

// The control is a rule, judged as one: it stands beside a model's judgement of an explanation too.
function scoreRow(ctx, scores, explainers, metric, all) {
  const same = ({ scorer, negatives }) => scorer === scores[0].scorer && negatives === scores[0].negatives;
  const of = (explainer) => scores.find((score) => score.explainer === explainer && score.metric === metric) ??
    (explainer === CONTROL ? all.find((score) => score.explainer === CONTROL && score.metric === metric && same(score)) : undefined);
  const main = explainers.map(of).find(Boolean);
  const label = `${ctx.name("scorer", scores[0].scorer)}: ${ctx.fixed(main?.value)}`;
  return h("tr", {}, testName(ctx, scores[0]),
    h("td", { class: "track-cell" }, scoreTrack(main, explainers.length > 1 ? of(CONTROL) : null, label)),
    explainers.map((explainer) => judgedCell(ctx, of(explainer), explainer === CONTROL)));
}

const keyMark = (explainer) => h("span", { class: "key " + (explainer === CONTROL ? "key-ring" : "key-dot"), "aria-hidden": "true" });

function scoreTable(ctx, tests, explainers, metric, all) {
  return h("table", { class: "scores" }, h("caption", { class: "hidden" }, ctx.name("metric", metric)),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ctx.t("scorer")), h("td", {}),
      explainers.map((explainer) => h("th", { scope: "col", class: "num" }, keyMark(explainer), explainerName(ctx, explainer))))),
    h("tbody", {}, tests.map((scores) => scoreRow(ctx, scores, explainers, metric, all))));
}

function allMetrics(ctx, tests, explainers) {
  const body = tests.map((scores) => {
    const names = [...new Set(scores.map((score) => score.metric))].sort((a, b) => METRICS.indexOf(a) - METRICS.indexOf(b));
    return h("tbody", {},
      h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: 2 + explainers.length },
        ctx.name("scorer", scores[0].scorer), ", ", text(ctx.t("negatives.of", { name: ctx.name("negatives", scores[0].negatives) })))),
      names.map((metric) => {
        const of = (explainer) => scores.find((score) => score.explainer === explainer && score.metric === metric);
        const any = scores.find((score) => score.metric === metric);
        return h("tr", {}, h("th", { scope: "row" }, ctx.name("metric", metric)),
          explainers.map((explainer) => judgedCell(ctx, of(explainer), explainer === CONTROL)),
          h("td", { class: "num muted" }, `${ctx.integer(any.n_pos)}/${ctx.integer(any.n_neg)}`));
      }));
  });
  const heads = [...explainers.map((explainer) => explainerName(ctx, explainer)), ctx.t("examples")].map((name) => h("th", { scope: "col", class: "num" }, name));
  const table = h("table", {}, h("caption", { class: "hidden" }, ctx.t("scores.all")), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ctx.t("metric")), heads)), body);
  return h("details", {}, h("summary", {}, ctx.t("scores.all")), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": ctx.t("scores.all") }, table));
}

// --- the explanations themselves, in both languages where there are two ---
function explanationItem(ctx, item) {
  const main = ctx.pick(item, "text");
  const other = item["text_" + (ctx.lang === "it" ? "en" : "it")];
  const body = main ? folded(ctx, text(main), main.length > LONG_TEXT, "explanation-text") : h("p", { class: "muted" }, ctx.name("status", item.status));
  return h("li", { class: "explanation" + (item.explainer === CONTROL ? " control" : "") },
    h("div", { class: "explainer muted" }, h("span", { class: "tag" }, item.explainer === CONTROL ? ctx.t("control") : ctx.name("made", item.kind)), " ",
      item.explainer !== "rules" && text(explainerName(ctx, item.explainer)), item.now && [item.explainer !== "rules" && " · ", h("span", { class: "made-now" }, ctx.t("made.now", { date: ctx.date(item.now) }))]),
    body, other && other !== main && h("div", { class: "other-language muted", lang: ctx.lang === "it" ? "en" : "it" }, folded(ctx, text(other), other.length > LONG_TEXT, "")));
}

function explanationsPanel(ctx, { explanations, scores }) {
  if (!explanations.length && !scores.length) return null;
  const explainers = explainersOf(scores);
  const tests = byTest(scores);
  const first = tests.filter(([score]) => HEADLINE[score.scorer] === score.negatives);
  const metric = scores.some((score) => score.metric === MAIN_METRIC) ? MAIN_METRIC : scores[0]?.metric;
  return h("section", { class: "panel" }, h("h2", {}, ctx.t("explanations")),
    h("ul", { class: "explanations" }, explanations.map((item) => explanationItem(ctx, item))),
    scores.length > 0 && [h("h3", {}, ctx.t("scores")),
      h("p", { class: "note muted" }, metric === MAIN_METRIC ? ctx.t("scores.note") : ctx.name("metric", metric)),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": ctx.t("scores") },
        scoreTable(ctx, (first.length ? first : tests).filter((test) => test.some((score) => score.metric === metric)), explainers, metric, scores)),
      allMetrics(ctx, tests, explainers)]);
}
