// The first page: the run, its numbers and controls, two clouds of latents, gold labels, live work, and the list.

const CLOUDS = { scatter: scoreScatter, map: latentMap };

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
  return { element, update, begin: () => show(names.includes(ctx.state.cloud) ? ctx.state.cloud : names[0]) };
}

function overviewPage(ctx, run, rows) {
  let clouds = null;
  const list = renderList(ctx, rows, ctx.state.list, { onOpen: ctx.open, onRows: (found) => clouds?.update(found) });
  clouds = cloudPanel(ctx, rows, list);
  const live = h("section", { class: "panel live", hidden: true });
  const numbers = [
    renderMetrics(ctx, run.metrics, { title: ctx.t("metrics"), head: ctx.t("measure") }),
    renderMetrics(ctx, run.controls, { title: ctx.t("controls"), head: ctx.t("control"), note: ctx.t("controls.note") })];
  const element = h("main", { class: "page home" }, renderFacts(ctx, run),
    h("div", { class: "summary-grid" }, numbers, clouds?.element), renderGold(ctx, run.gold, ctx.state.gold), live, list.element, keyHelp(ctx));
  // the cloud comes after the first paint: it is the slow part of many latents
  const later = () => clouds && window.requestAnimationFrame(() => window.setTimeout(clouds.begin));
  return { element, list, live, later };
}
