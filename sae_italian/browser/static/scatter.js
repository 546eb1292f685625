// Clouds of latents: density against detection, and the map of decoder directions. All dots are two paths, so that
// 65,536 of them stay fast; the nearest dot under the pointer opens its card.
import { h, svg, text } from "./base.js";

const round = (x) => Math.round(x * 10) / 10;
const BOX = { left: 30, right: 326, top: 8, bottom: 312 };

function nearest(points, scale, x, y) {
  let best = null;
  let least = 12 ** 2;
  for (const row of points) {
    const distance = (scale.x(row) - x) ** 2 + (scale.y(row) - y) ** 2;
    if (distance < least) [best, least] = [row, distance];
  }
  return best;
}

function cloud(ctx, rows, { scale, axes, label, className, onOpen }) {
  const dots = (subset) => subset.map((row) => `M${round(scale.x(row))} ${round(scale.y(row))}h0`).join("");
  const size = rows.length > 3000 ? "dense" : "sparse";
  const all = svg("path", { class: "dots all " + size, d: dots(rows) });
  const shown = svg("path", { class: "dots shown " + size });
  const cursor = svg("circle", { class: "cursor", r: 4.5, visibility: "hidden" });
  const picture = svg("svg", { viewBox: "0 0 332 332", role: "img", "aria-label": label }, axes, all, shown, cursor);
  const readout = h("figcaption", { class: "readout muted" }, ctx.t("scatter.hint"));
  const has = new Set(rows);
  let visible = rows;
  let under = null;

  function point(event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    under = nearest(visible, scale, at.x, at.y);
    picture.classList.toggle("pointing", Boolean(under));
    cursor.setAttribute("visibility", under ? "visible" : "hidden");
    if (!under) return readout.replaceChildren(ctx.t("scatter.hint"));
    cursor.setAttribute("cx", round(scale.x(under)));
    cursor.setAttribute("cy", round(scale.y(under)));
    const words = ctx.pick(under, "explanation").slice(0, 120) || under.top_tokens.join(" ");
    return readout.replaceChildren(`${under.latent} · ${ctx.density(under.density)} · ${ctx.fixed(under.detection)} · `, text(words));
  }
  picture.addEventListener("pointermove", point);
  picture.addEventListener("click", (event) => {
    point(event);
    if (under) onOpen(under.latent);
  });
  return {
    element: h("figure", { class: "chart scatter " + className }, picture, readout),
    show(subset) {
      visible = subset.filter((row) => has.has(row));
      shown.setAttribute("d", dots(visible));
    },
  };
}

function scoreScale(rows) {
  const logs = rows.map((row) => Math.log10(row.density));
  const lo = logs.reduce((a, b) => Math.min(a, b), 0) - 0.15;
  const hi = logs.reduce((a, b) => Math.max(a, b), lo) + 0.15;
  const bottom = rows.reduce((a, row) => Math.min(a, row.detection), 0.4);
  const floor = Math.floor(bottom * 10) / 10;
  const x = (density) => BOX.left + ((Math.log10(density) - lo) / (hi - lo || 1)) * (BOX.right - BOX.left);
  const y = (score) => BOX.bottom - ((score - floor) / (1 - floor)) * (BOX.bottom - BOX.top);
  return { lo, hi, floor, x, y };
}

function scoreAxes(ctx, { lo, hi, floor, x, y }) {
  const first = Math.ceil(lo);
  const step = Math.max(1, Math.ceil((hi - first) / 5));
  const decades = Array.from({ length: Math.max(0, Math.floor((hi - first) / step) + 1) }, (_, i) => first + i * step);
  const scores = [0, 0.2, 0.4, 0.6, 0.8, 1].filter((score) => score >= floor - 1e-9);
  return [
    scores.map((score) => [
      svg("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: round(y(score)), y2: round(y(score)) }),
      svg("text", { x: BOX.left - 6, y: round(y(score)) + 4, "text-anchor": "end" }, ctx.fixed(score, 1)),
    ]),
    svg("line", { class: "chance-line", x1: BOX.left, x2: BOX.right, y1: round(y(0.5)), y2: round(y(0.5)) }),
    svg("text", { x: BOX.right, y: round(y(0.5)) - 3, "text-anchor": "end" }, ctx.t("chance")),
    decades.map((decade) => svg("text", { x: round(x(10 ** decade)), y: BOX.bottom + 15, "text-anchor": "middle" }, ctx.density(10 ** decade))),
  ];
}

// Density (log scale) against detection.
export function scoreScatter(ctx, rows, onOpen) {
  const drawn = rows.filter((row) => row.density > 0 && row.detection !== null);
  if (!drawn.length) return null;
  const scale = scoreScale(drawn);
  return cloud(ctx, drawn, {
    scale: { x: (row) => scale.x(row.density), y: (row) => scale.y(row.detection) }, axes: scoreAxes(ctx, scale),
    label: ctx.t("scatter.label", { n: ctx.integer(drawn.length) }), className: "by-score", onOpen,
  });
}

// The map: near dots are near decoder directions, as far as two axes can show it.
export function latentMap(ctx, rows, onOpen) {
  const drawn = rows.filter((row) => row.x !== null && row.y !== null);
  if (!drawn.length) return null;
  const of = (name, from, to) => {
    const values = drawn.map((row) => row[name]);
    const lo = values.reduce((a, b) => Math.min(a, b));
    const hi = values.reduce((a, b) => Math.max(a, b));
    return (row) => from + ((row[name] - lo) / (hi - lo || 1)) * (to - from);
  };
  return cloud(ctx, drawn, {
    scale: { x: of("x", 10, 322), y: of("y", 322, 10) }, axes: svg("rect", { class: "frame", x: 1, y: 1, width: 330, height: 330, rx: 6 }),
    label: ctx.t("map.label", { n: ctx.integer(drawn.length) }), className: "by-direction", onOpen,
  });
}
