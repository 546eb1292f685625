// The first page: search, a sentence, six latents worth opening; numbers, controls, charts and labels on demand; the list.

const CLOUDS = { scatter: scoreScatter, map: latentMap };
const WORTH = 6;
const LOOKED_AT = 2000; // of the best, for six of other densities and words
const OWN_WORDS = 2; // of a latent's tokens, those that no other of the six may have

// One panel for both clouds; the one that is not shown is not drawn.
function cloudPanel(ctx, rows, list) {
  const there = { scatter: rows.some((row) => row.detection !== null && row.density > 0), map: rows.some((row) => row.x !== null) };
  const names = Object.keys(CLOUDS).filter((name) => there[name]);
  if (!names.length) return null;
  const holder = h("div", { class: "cloud" });
  const title = h("h2", {}, "");
  const note = h("p", { class: "note muted" });
  const drawn = {};
  const buttons = names.map((name) => h("button", { type: "button", "data-cloud": name, onclick: () => show(name) }, ctx.t("cloud." + name)));
  let shown = null;
  function show(name) {
    shown = ctx.state.cloud = name;
    drawn[name] ??= CLOUDS[name](ctx, rows, ctx.open);
    title.textContent = ctx.t(name);
    note.textContent = ctx.t(name + ".note");
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.cloud === name));
    holder.replaceChildren(drawn[name].element);
    drawn[name].show(list.current());
  }
  const update = (found) => shown && drawn[shown].show(found);
  const element = h("section", { class: "panel clouds" },
    h("div", { class: "panel-head" }, title, names.length > 1 && h("div", { class: "switch", role: "group", "aria-label": ctx.t("clouds") }, buttons)), note, holder);
  onTheme(ctx.root, () => element.isConnected, () => update(list.current()));
  return { element, update, begin: () => shown || show(names.includes(ctx.state.cloud) ? ctx.state.cloud : names[0]) };
}

// --- what is worth opening: most above the token lookup, two of each third of the densities, no word twice ---
const shines = (row) => row.gain > 0 && row.detection >= GOOD - 1e-9 && /\p{L}{2}/u.test(row.top_tokens[0]);

function worthOpening(rows) {
  const best = Array.from(orderOf(rows, "gain", true), (at) => rows[at]); // as the list is sorted anyhow
  const good = best.filter(shines);
  const all = good.length >= WORTH ? good : best.filter((row) => row.sample && !row.dead);
  const densities = Float64Array.from(all, (row) => row.density).sort();
  const third = (row) => [1, 2].filter((n) => row.density >= densities[Math.ceil((n * all.length) / 3)]).length;
  const taken = new Set();
  const said = new Set();
  for (const strict of [true, false]) {
    for (const row of all.slice(0, LOOKED_AT)) {
      if (taken.size === WORTH) break;
      const words = row.top_tokens.slice(0, OWN_WORDS).map((word) => word.trim().toLowerCase());
      if (strict && words.some((word) => said.has(word))) continue;
      if (strict && [...taken].filter((one) => third(one) === third(row)).length >= WORTH / 3) continue;
      taken.add(row);
      for (const word of words) said.add(word);
    }
  }
  return [...taken];
}

function worthPanel(ctx, rows) {
  const item = (row) => h("li", {}, h("a", { class: "panel", href: ctx.href(row.latent), onpointerenter: () => ctx.prepare(row.latent) },
    h("strong", { class: "clamp" }, text(headline(ctx, row) || `${ctx.t("latent")} ${row.latent}`)), h("span", { class: "sample clamp", dir: "auto" }, marked(row.sample)),
    h("small", {}, [row.gain !== null && ctx.t("worth.gain", { gain: ctx.signed(row.gain) }), ctx.t("worth.density", { density: ctx.density(row.density) })].filter(Boolean).join(" · "))));
  const found = worthOpening(rows);
  return h("section", { class: "worth", hidden: !found.length }, h("h2", { title: ctx.t("worth.note") }, ctx.t("worth")), h("ol", {}, found.map(item)));
}

function surprise(ctx, rows) {
  const one = (of) => ctx.open(of[Math.floor(Math.random() * of.length)].latent);
  const open = (good = rows.filter(shines)) => one(good.length ? good : rows.filter((row) => !row.dead));
  return h("button", { type: "button", class: "icon surprise", disabled: rows.every((row) => row.dead), onclick: () => open() }, ctx.t("surprise"));
}

function numbersPanel(ctx, run, clouds) {
  const told = [...run.metrics, ...run.controls].filter(({ name }) => name.endsWith("share_detected"));
  const words = told.map((metric) => `${ctx.pick(metric, "label")} ${ctx.metric(metric.value, metric.unit)}`).join(" · ");
  const state = ctx.state.numbers ??= { open: false };
  return h("details", { class: "numbers", open: state.open, ontoggle(event) {
    state.open = event.target.open;
    if (state.open) clouds?.begin();
  } }, h("summary", {}, h("h2", {}, ctx.t("numbers")), h("span", { class: "muted" }, words)), renderFacts(ctx, run),
  h("div", { class: "summary-grid" }, renderMetrics(ctx, run.metrics, { title: ctx.t("metrics"), head: ctx.t("measure") }),
    renderMetrics(ctx, run.controls, { title: ctx.t("controls"), head: ctx.t("control"), note: ctx.t("controls.note") }), clouds?.element),
  renderGold(ctx, run.gold, ctx.state.gold));
}

function overviewPage(ctx, run, rows) {
  let clouds = null;
  let [worth, numbers] = [];
  function aside() { // what is found comes next
    for (const part of [worth, numbers]) part?.classList.toggle("aside", Boolean(ctx.state.list.query) && !part.open);
  }
  const list = renderList(ctx, rows, ctx.state.list, { onOpen: ctx.open, onRows(found) {
    clouds?.update(found);
    aside();
  } });
  clouds = cloudPanel(ctx, rows, list);
  [worth, numbers] = [worthPanel(ctx, rows), numbersPanel(ctx, run, clouds)];
  aside();
  const live = h("section", { class: "panel live", hidden: true });
  const facts = ctx.t("run.facts", { latents: ctx.integer(run.d_sae), tokens: ctx.integer(run.n_tokens) });
  const element = h("main", { class: "page home" }, h("header", { class: "run" }, h("h1", {}, text(run.title)), h("p", { class: "muted" }, facts, text(run.corpus))),
    h("div", { class: "seek" }, h("div", { class: "find" }, list.search, surprise(ctx, rows)), live), worth, numbers, list.element, keyHelp(ctx));
  // the cloud comes after the first paint: it is the slow part of many latents
  const later = () => ctx.state.numbers?.open && clouds && window.requestAnimationFrame(() => window.setTimeout(clouds.begin));
  return { element, list, live, later };
}
