// Small charts in SVG: score with interval, histogram, bars, scatter. Colours come from the style sheet.
"use strict";
(function () {
  const S = window.saeItalian;
  const { h, svg } = S;
  const round = (x) => Math.round(x * 100) / 100;

  // One track from 0 to 1: the score (dot and interval), the control (ring) and chance (tick).
  S.scoreTrack = function (score, control, label) {
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
  };

  function histogramBar(ctx, { x0, x1, top, bottom, lo, hi, count }) {
    const title = svg("title", {}, `${ctx.activation(lo)}–${ctx.activation(hi)}: ${ctx.integer(count)}`);
    return svg("rect", { class: "bar", x: round(x0), width: round(Math.max(0.5, x1 - x0 - 1)), y: round(top), height: round(bottom - top) }, title);
  }

  // Counts on a log axis that starts at half a token, so that a bin of one token is still seen.
  S.histogram = function (ctx, { edges, counts }) {
    const total = counts.reduce((sum, count) => sum + count, 0);
    if (!total) return h("p", { class: "muted" }, ctx.t("none"));
    const box = { left: 44, right: 316, top: 8, bottom: 132 };
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
      svg("text", { x: round(x(value)), y: 148, "text-anchor": anchor }, ctx.activation(value)));
    const label = ctx.t("histogram.label", { n: ctx.integer(total), lo: ctx.activation(lo), hi: ctx.activation(hi) });
    return h("figure", { class: "chart" },
      svg("svg", { viewBox: "0 0 324 154", role: "img", "aria-label": label },
        grid, bars, svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }), axis),
      h("figcaption", { class: "axes muted" }, h("span", {}, "↑ " + ctx.t("histogram.y")), h("span", {}, ctx.t("histogram.x") + " →")));
  };

  // A table of names with a bar each; `share` is 0 to 1 of the row's width.
  S.barTable = function ({ caption, items, className }) {
    return h("table", { class: "bars " + (className || "") },
      h("caption", { class: "hidden" }, caption),
      h("tbody", {}, items.map(({ head, share, text }) =>
        h("tr", {},
          h("th", { scope: "row" }, head),
          h("td", { class: "bar-cell", "aria-hidden": "true" }, h("span", { class: "bar-fill", "--share": Math.max(0, Math.min(1, share)) })),
          h("td", { class: "num" }, text)))));
  };

  function scatterScale(points) {
    const box = { left: 28, right: 326, top: 8, bottom: 312 };
    const logs = points.map((row) => Math.log10(row.density));
    const lo = logs.reduce((a, b) => Math.min(a, b), 0) - 0.15;
    const hi = logs.reduce((a, b) => Math.max(a, b), lo) + 0.15;
    const bottom = points.reduce((a, row) => Math.min(a, row.detection), 0.4);
    const floor = Math.floor(bottom * 10) / 10;
    return {
      box, lo, hi, floor,
      x: (density) => box.left + ((Math.log10(density) - lo) / (hi - lo || 1)) * (box.right - box.left),
      y: (score) => box.bottom - ((score - floor) / (1 - floor)) * (box.bottom - box.top),
    };
  }

  function scatterAxes(ctx, { box, lo, hi, floor, x, y }) {
    const first = Math.ceil(lo);
    const step = Math.ceil((hi - first) / 5);
    const decades = Array.from({ length: Math.floor((hi - first) / step) + 1 }, (_, i) => first + i * step);
    const scores = [0, 0.2, 0.4, 0.6, 0.8, 1].filter((score) => score >= floor - 1e-9);
    return [
      scores.map((score) => [
        svg("line", { class: "grid", x1: box.left, x2: box.right, y1: round(y(score)), y2: round(y(score)) }),
        svg("text", { x: box.left - 6, y: round(y(score)) + 4, "text-anchor": "end" }, ctx.fixed(score, 1)),
      ]),
      svg("line", { class: "chance-line", x1: box.left, x2: box.right, y1: round(y(0.5)), y2: round(y(0.5)) }),
      svg("text", { x: box.right, y: round(y(0.5)) - 3, "text-anchor": "end" }, ctx.t("chance")),
      decades.map((decade) => svg("text", { x: round(x(10 ** decade)), y: box.bottom + 15, "text-anchor": "middle" }, ctx.density(10 ** decade))),
    ];
  }

  function nearest(points, scale, x, y) {
    let best = null;
    let least = 12 ** 2;
    for (const row of points) {
      const distance = (scale.x(row.density) - x) ** 2 + (scale.y(row.detection) - y) ** 2;
      if (distance < least) [best, least] = [row, distance];
    }
    return best;
  }

  // Density against detection. All dots are two paths, so that 65,536 of them stay fast.
  S.scatter = function (ctx, rows, { onOpen }) {
    const drawable = rows.filter((row) => row.density > 0 && row.detection !== null);
    const scale = scatterScale(drawable);
    const dots = (subset) => subset.map((row) => `M${round(scale.x(row.density))} ${round(scale.y(row.detection))}h0`).join("");
    const size = drawable.length > 3000 ? "dense" : "sparse";
    const all = svg("path", { class: "dots all " + size, d: dots(drawable) });
    const shown = svg("path", { class: "dots shown " + size });
    const cursor = svg("circle", { class: "cursor", r: 4.5, visibility: "hidden" });
    const picture = svg("svg", { viewBox: "0 0 332 332", role: "img", "aria-label": ctx.t("scatter.label", { n: ctx.integer(drawable.length) }) },
      scatterAxes(ctx, scale), all, shown, cursor);
    const readout = h("figcaption", { class: "readout muted" }, ctx.t("scatter.hint"));
    let visible = drawable;
    let under = null;

    function point(event) {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
      under = nearest(visible, scale, at.x, at.y);
      picture.classList.toggle("pointing", Boolean(under));
      cursor.setAttribute("visibility", under ? "visible" : "hidden");
      if (!under) return readout.replaceChildren(ctx.t("scatter.hint"));
      cursor.setAttribute("cx", round(scale.x(under.density)));
      cursor.setAttribute("cy", round(scale.y(under.detection)));
      const text = ctx.pick(under, "explanation").slice(0, 120);
      return readout.replaceChildren(`${under.latent} · ${ctx.density(under.density)} · ${ctx.fixed(under.detection)} · `, S.text(text));
    }
    picture.addEventListener("pointermove", point);
    picture.addEventListener("click", (event) => {
      point(event);
      if (under) onOpen(under.latent);
    });
    return {
      element: h("figure", { class: "chart scatter" }, picture, readout),
      show(subset) {
        visible = subset.filter((row) => row.density > 0 && row.detection !== null);
        shown.setAttribute("d", dots(visible));
      },
    };
  };
})();
