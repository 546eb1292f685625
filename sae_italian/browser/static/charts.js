// Small charts in SVG: score with interval, histogram, bars, scatter. Colours come from the style sheet.

const round = (x) => Math.round(x * 100) / 100;

// One track from 0 to 1: the score (dot and interval), the control (ring) and chance (tick).
function scoreTrack(score, control, label) {
  const [width, pad, y] = [150, 5, 9];
  const x = (value) => round(pad + Math.min(1, Math.max(0, value)) * (width - 2 * pad));
  const parts = [
    svg("line", { class: "track", x1: x(0), x2: x(1), y1: y, y2: y }),
    svg("line", { class: "chance", x1: x(0.5), x2: x(0.5), y1: 3, y2: 15 }),
  ];
  if (score && score.lo !== null && score.hi !== null) {
    parts.push(svg("line", { class: "interval", x1: x(score.lo), x2: x(score.hi), y1: y, y2: y }));
  }
  if (control && control.value !== null) parts.push(svg("circle", { class: "ring", cx: x(control.value), cy: y, r: 3.5 }));
  if (score && score.value !== null) parts.push(svg("circle", { class: "dot", cx: x(score.value), cy: y, r: 4 }));
  return svg("svg", { class: "score-track", viewBox: `0 0 ${width} 18`, role: "img", "aria-label": label }, parts);
}

function histogramBar(ctx, { x0, x1, top, bottom, lo, hi, count }) {
  const title = svg("title", {}, `${ctx.activation(lo)}–${ctx.activation(hi)}: ${ctx.integer(count)}`);
  return svg("rect", { class: "bar", x: round(x0), width: round(Math.max(0.5, x1 - x0 - 1)), y: round(top), height: round(bottom - top) }, title);
}

// Counts on a log axis that starts at half a token, so that a bin of one token is still seen.
function histogram(ctx, { edges, counts }, words = "histogram") {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return h("p", { class: "muted" }, ctx.t("none"));
  const box = { left: 44, right: 316, top: 8, bottom: 92 };
  const [lo, hi] = [edges[0], edges[edges.length - 1]];
  const decades = Math.max(1, Math.ceil(Math.log10(Math.max(...counts))));
  const x = (value) => box.left + ((value - lo) / (hi - lo || 1)) * (box.right - box.left);
  const y = (count) => box.bottom - ((Math.log10(count) + 0.3) / (decades + 0.3)) * (box.bottom - box.top);
  const step = Math.ceil(decades / 4);
  const ticks = Array.from({ length: decades + 1 }, (_, i) => i).filter((i) => i % step === 0);
  const grid = ticks.map((decade) => [
    svg("line", { class: "grid", x1: box.left, x2: box.right, y1: round(y(10 ** decade)), y2: round(y(10 ** decade)) }),
    svg("text", { x: box.left - 6, y: round(y(10 ** decade)) + 4, "text-anchor": "end" }, ctx.integer(10 ** decade)),
  ]);
  const bars = counts.map((count, i) =>
    count > 0 && histogramBar(ctx, { x0: x(edges[i]), x1: x(edges[i + 1]), top: y(count), bottom: box.bottom, lo: edges[i], hi: edges[i + 1], count }));
  const axis = [[lo, "start"], [(lo + hi) / 2, "middle"], [hi, "end"]].map(([value, anchor]) =>
    svg("text", { x: round(x(value)), y: 108, "text-anchor": anchor }, ctx.activation(value)));
  const label = ctx.t(words + ".label", { n: ctx.integer(total), lo: ctx.activation(lo), hi: ctx.activation(hi) });
  return h("figure", { class: "chart" },
    svg("svg", { viewBox: "0 0 324 114", role: "img", "aria-label": label },
      grid, bars, svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }), axis),
    h("figcaption", { class: "axes muted" }, h("span", {}, "↑ " + ctx.t(words + ".y")), h("span", {}, ctx.t(words + ".x") + " →")));
}

// A table of names with a bar each; `share` is 0 to 1 of the row's width.
function barTable({ caption, items, className }) {
  const row = ({ head, share, text }) => h("tr", {}, h("th", { scope: "row" }, head),
    h("td", { class: "bar-cell", "aria-hidden": "true" }, h("span", { class: "bar-fill", "--share": Math.max(0, Math.min(1, share)) })), h("td", { class: "num" }, text));
  return h("table", { class: "bars " + (className || "") }, h("caption", { class: "hidden" }, caption), h("tbody", {}, items.map(row)));
}

// Shares in equal parts of the window, first to last, as bars from 0.
function profile(ctx, shares) {
  const box = { left: 44, right: 316, top: 8, bottom: 76 };
  const top = Math.max(...shares, 0.2);
  const step = (box.right - box.left) / shares.length;
  const bars = shares.map((share, i) => {
    const height = (share / top) * (box.bottom - box.top);
    const title = svg("title", {}, `${i + 1}/${shares.length}: ${ctx.share(share)}`);
    return svg("rect", { class: "bar", x: round(box.left + i * step), width: round(step - 1), y: round(box.bottom - height), height: round(height) }, title);
  });
  const even = round(box.bottom - (1 / shares.length / top) * (box.bottom - box.top));
  const label = ctx.t("profile.label", { shares: shares.map((share) => ctx.share(share)).join(", ") });
  return h("figure", { class: "chart" },
    svg("svg", { viewBox: "0 0 324 80", role: "img", "aria-label": label },
      svg("text", { x: box.left - 6, y: box.top + 8, "text-anchor": "end" }, ctx.share(top)), bars,
      svg("line", { class: "chance-line", x1: box.left, x2: box.right, y1: even, y2: even }),
      svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom })),
    h("figcaption", { class: "axes muted" }, h("span", {}, ctx.t("profile.first")), h("span", {}, ctx.t("profile.last"))));
}
