// The first page: the run, its numbers and controls, two clouds of latents, gold labels, live work, and the list.
import { h, keyHelp } from "./base.js";
import { renderList } from "./list.js";
import { renderFacts, renderGold, renderMetrics } from "./overview.js";
import { latentMap, scoreScatter } from "./scatter.js";

const panel = (...content) => h("section", { class: "panel" }, content);

export function overviewPage(ctx, run, rows) {
  const clouds = [];
  const pictures = h("div", { class: "clouds" });
  const list = renderList(ctx, rows, ctx.state.list, { onOpen: ctx.open, onRows: (found) => clouds.forEach((cloud) => cloud.show(found)) });
  const live = h("section", { class: "panel live", hidden: true });
  const numbers = [
    renderMetrics(ctx, run.metrics, { title: ctx.t("metrics"), head: ctx.t("measure") }),
    renderMetrics(ctx, run.controls, { title: ctx.t("controls"), head: ctx.t("control"), note: ctx.t("controls.note") })];
  const element = h("main", { class: "page home" }, renderFacts(ctx, run),
    h("div", { class: "summary-grid" }, numbers, pictures), renderGold(ctx, run.gold, ctx.state.gold), live, list.element, keyHelp(ctx));

  // The clouds come after the first paint: they are the slow part of many latents.
  function later() {
    for (const [title, note, draw] of [["scatter", null, scoreScatter], ["map", "map.note", latentMap]]) {
      const cloud = draw(ctx, rows, ctx.open);
      if (!cloud) continue;
      clouds.push(cloud);
      cloud.show(list.current());
      pictures.append(panel(h("h2", {}, ctx.t(title)), note && h("p", { class: "note muted" }, ctx.t(note)), cloud.element));
    }
    if (!clouds.length) pictures.remove();
  }
  return { element, list, live, later: () => window.requestAnimationFrame(() => window.setTimeout(later)) };
}
