// Clouds of latents: density against detection, and the map of decoder directions. The dots are points of one picture
// under the axes, so that 65,536 of them stay fast; the nearest dot under the pointer opens its card.

const BOX = { left: 30, right: 326, top: 8, bottom: 312 };
const SIDE = 332; // of the drawing, in its own units
const SHARP = 2; // points of the picture to a unit
const REACH = 12; // units from a dot at which the pointer is on it
const CELL = 84; // units of a part of the map that may have a name
const REGIONS = 7;
const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MANY = 3000; // from so many dots on, they are small

// Where each row's dot is, in units; by latent.
function places(rows, scale) {
  const n = rows.reduce((most, row) => Math.max(most, row.latent + 1), 0);
  const at = { x: new Float32Array(n).fill(NaN), y: new Float32Array(n).fill(NaN) };
  for (const row of rows) {
    at.x[row.latent] = scale.x(row);
    at.y[row.latent] = scale.y(row);
  }
  return at;
}

function nearest(rows, at, x, y) {
  let best = null;
  let least = REACH ** 2;
  for (const row of rows) {
    const distance = (at.x[row.latent] - x) ** 2 + (at.y[row.latent] - y) ** 2;
    if (distance < least) {
      best = row;
      least = distance;
    }
  }
  return best;
}

// The nearest row from one that lies in a direction; what lies aside counts twice.
function toward(rows, at, from, [right, down]) {
  let [best, least] = [null, Infinity];
  for (const row of rows) {
    const [x, y] = [at.x[row.latent] - at.x[from.latent], at.y[row.latent] - at.y[from.latent]];
    const along = x * right + y * down;
    const cost = along + 2 * Math.abs(x * down + y * right);
    if (along > 0.5 && cost < least) [best, least] = [row, cost];
  }
  return best ?? from;
}

// What most of the latents in a part of the map share: a label, or a token.
function regions(ctx, rows, at) {
  const cells = Map.groupBy(rows, ({ latent }) => `${Math.floor(at.x[latent] / CELL)},${Math.floor(at.y[latent] / CELL)}`);
  const fullest = [...cells.values()].sort((a, b) => b.length - a.length).slice(0, REGIONS);
  return fullest.map((some) => {
    const names = some.map((row) => (row.gold.length ? labelName(row.gold[0], ctx.lang) : (row.top_tokens[0] ?? "").trim())).filter((name) => /\p{L}{2}/u.test(name));
    const [name, same] = [...Map.groupBy(names, (one) => one)].sort(([, a], [, b]) => b.length - a.length)[0] ?? ["", []];
    const middle = (axis) => round(some.reduce((sum, { latent }) => sum + at[axis][latent], 0) / some.length);
    return same.length > 1 && svg("text", { class: "region", x: middle("x"), y: middle("y"), "text-anchor": "middle" }, cut(name, 20));
  });
}

// The points of a disc around 0, as steps in a picture of so many points a line.
function disc(radius, line) {
  const steps = [];
  const reach = Math.ceil(radius);
  for (let y = -reach; y <= reach; y += 1) {
    for (let x = -reach; x <= reach; x += 1) if (x * x + y * y <= radius * radius) steps.push(y * line + x);
  }
  return steps;
}

// Four bytes of a colour as they lie in a picture. Computed colours are rgb(r, g, b) or rgba(...).
function points(color, opacity) {
  const [r, g, b] = color.match(/[\d.]+/g).map(Number);
  return new Uint32Array(new Uint8ClampedArray([r, g, b, 255 * opacity]).buffer)[0];
}

function dotPicture(at, rows) {
  const line = SIDE * SHARP;
  const canvas = h("canvas", { class: "dots", width: line, height: line, "aria-hidden": "true" });
  const picture = new ImageData(line, line);
  const field = new Uint32Array(picture.data.buffer);
  const steps = disc((rows.length > MANY ? 1.1 : 2) * SHARP, line);
  const stamp = (subset, color) => {
    for (const { latent } of subset) {
      const centre = Math.round(at.y[latent] * SHARP) * line + Math.round(at.x[latent] * SHARP);
      if (at.x[latent] >= 0) for (const step of steps) field[centre + step] = color;
    }
  };
  const draw = (subset) => {
    const style = getComputedStyle(canvas);
    field.fill(0);
    stamp(rows, points(style.outlineColor, 1));
    stamp(subset, points(style.color, 0.55));
    canvas.getContext("2d").putImageData(picture, 0, 0);
  };
  return { canvas, draw };
}

function cloud(ctx, rows, { scale, axes, label, className, onOpen }) {
  const at = places(rows, scale);
  const { canvas, draw } = dotPicture(at, rows);
  const cursor = svg("circle", { class: "cursor", r: 4.5, visibility: "hidden" });
  const named = className === "by-direction" && regions(ctx, rows, at);
  const picture = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "img", tabindex: 0, "aria-label": `${label}. ${ctx.t("scatter.keys")}` }, axes, named, cursor);
  const readout = h("figcaption", { class: "readout muted", role: "status" }, ctx.t("scatter.hint"));
  const element = h("figure", { class: "chart scatter " + className }, h("div", { class: "plot" }, canvas, picture), readout);
  let [visible, under] = [rows, null];

  function point(event) {
    const spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    choose(nearest(visible, at, spot.x, spot.y));
  }
  function choose(row) {
    under = row;
    picture.classList.toggle("pointing", Boolean(under));
    cursor.setAttribute("visibility", under ? "visible" : "hidden");
    if (!under) return readout.replaceChildren(ctx.t("scatter.hint"));
    cursor.setAttribute("cx", round(at.x[under.latent]));
    cursor.setAttribute("cy", round(at.y[under.latent]));
    const words = cut(headline(ctx, under), 120) || under.top_tokens.join(" ");
    return readout.replaceChildren(`${under.latent} · ${ctx.density(under.density)} · ${ctx.fixed(under.detection)} · `, text(words));
  }
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && under) onOpen(under.latent);
    if (!WAYS[event.key] || !visible.length) return;
    event.preventDefault();
    choose(under ? toward(visible, at, under, WAYS[event.key]) : visible[0]);
  });
  picture.addEventListener("pointermove", point);
  picture.addEventListener("click", (event) => {
    point(event);
    if (under) onOpen(under.latent);
  });
  const show = (subset) => {
    visible = subset;
    if (canvas.isConnected) draw(visible);
  };
  return { element, show };
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
function scoreScatter(ctx, rows, onOpen) {
  const drawn = rows.filter((row) => row.density > 0 && row.detection !== null);
  if (!drawn.length) return null;
  const scale = scoreScale(drawn);
  return cloud(ctx, drawn, {
    scale: { x: (row) => scale.x(row.density), y: (row) => scale.y(row.detection) }, axes: scoreAxes(ctx, scale),
    label: ctx.t("scatter.label", { n: ctx.integer(drawn.length) }), className: "by-score", onOpen,
  });
}

// The map: near dots are near decoder directions, as far as two axes can show it.
function latentMap(ctx, rows, onOpen) {
  const drawn = rows.filter((row) => row.x !== null && row.y !== null);
  if (!drawn.length) return null;
  const of = (name, from, to) => {
    const values = drawn.map((row) => row[name]);
    const lo = values.reduce((a, b) => Math.min(a, b));
    const hi = values.reduce((a, b) => Math.max(a, b));
    return (row) => from + ((row[name] - lo) / (hi - lo || 1)) * (to - from);
  };
  return cloud(ctx, drawn, {
    scale: { x: of("x", 10, 322), y: of("y", 322, 10) }, axes: svg("rect", { class: "frame", x: 1, y: 1, width: SIDE - 2, height: SIDE - 2, rx: 6 }),
    label: ctx.t("map.label", { n: ctx.integer(drawn.length) }), className: "by-direction", onOpen,
  });
}
