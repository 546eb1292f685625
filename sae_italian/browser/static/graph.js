// The attribution graph of a prompt: layers upwards, tokens across, circles as large as the influence. The canvas is only
// what is drawn; every node is reached by keys, told by a live region, and stands in a list of buttons.

const DATA = JSON.parse(document.getElementById("graph-data").textContent);
const PITCH = 20; // between nodes side by side, before any zoom
const FAINT_EDGES = 300; // drawn behind everything; those of a node come when it is looked at
const BRANCHES = 3; // edges followed at each step of a pinned node's paths
const SHOWN_EDGES = 8;
const KINDS = { latent: "circle", error: "cross", rest: "cross", embedding: "square", logit: "diamond" };

// --- the graph ---
class Net {
  constructor(data) {
    this.nodes = data.nodes.id.map((_, i) => Object.fromEntries(Object.entries(data.nodes).map(([name, column]) => [name, column[i]])));
    this.byId = new Map(this.nodes.map((node, i) => [node.id, i]));
    this.into = this.nodes.map(() => []); // edges by target, and by source, the strongest first
    this.out = this.nodes.map(() => []);
    data.edges.target.forEach((target, i) => {
      const edge = { target, source: data.edges.source[i], weight: data.edges.weight[i] };
      this.into[target].push(edge);
      this.out[edge.source].push(edge);
    });
    for (const some of [...this.into, ...this.out]) some.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    this.place(data.tokens.length, data.n_layers);
  }

  // A cell for each layer and token: as wide as the fullest cell of its token, as high as that of its layer.
  place(nTokens, nLayers) {
    const cells = new Map();
    for (const node of this.nodes) {
      node.row = node.kind === "embedding" ? 0 : node.layer + 1;
      node.column = node.position < 0 ? nTokens : node.position;
      const key = node.row + "," + node.column;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(node);
    }
    const wide = Array(nTokens + 1).fill(3), high = Array(nLayers + 2).fill(1);
    for (const own of cells.values()) {
      const across = Math.max(1, Math.ceil(Math.sqrt(2 * own.length)));
      wide[own[0].column] = Math.max(wide[own[0].column], across + 1);
      high[own[0].row] = Math.max(high[own[0].row], Math.ceil(own.length / across));
    }
    if (!this.nodes.some((node) => node.position < 0)) wide.pop();
    const starts = (sizes, extra) => sizes.reduce((sums, size) => [...sums, sums.at(-1) + (size + extra) * PITCH], [0]);
    this.columns = starts(wide, 0.5);
    this.rows = starts(high, 1);
    for (const own of cells.values()) {
      const across = Math.max(1, Math.ceil(Math.sqrt(2 * own.length)));
      const { column, row } = own[0];
      const middle = (this.columns[column] + this.columns[column + 1]) / 2;
      own.forEach((node, i) => {
        const inRow = Math.min(across, own.length - Math.floor(i / across) * across);
        node.x = middle + ((i % across) - (inRow - 1) / 2) * PITCH;
        node.y = -(this.rows[row] + (Math.floor(i / across) + 0.75) * PITCH);
      });
    }
    const largest = Math.max(...this.nodes.map((node) => node.influence), 1e-9);
    for (const node of this.nodes) node.radius = node.kind === "logit" ? 8 : 2.5 + 7 * Math.sqrt(node.influence / largest);
  }

  // The strongest edges from a node down to the inputs and up to the logits.
  paths(start, shown) {
    const found = new Set();
    for (const [edges, end] of [[this.into, "source"], [this.out, "target"]]) {
      const seen = new Set([start]);
      for (let front = [start]; front.length; ) {
        const next = [];
        for (const edge of front.flatMap((i) => edges[i].filter((e) => shown(e[end])).slice(0, BRANCHES))) {
          found.add(edge);
          if (!seen.has(edge[end])) next.push(edge[end]);
          seen.add(edge[end]);
        }
        front = next;
      }
    }
    return found;
  }
}

// --- what the address and a JSON file keep ---
const parsed = (json) => { try { return JSON.parse(json); } catch { return null; } };

function readState(net) {
  const fields = new URLSearchParams(window.location.hash.slice(1));
  const known = (ids) => (Array.isArray(ids) ? ids : []).map(String).filter((id) => net.byId.has(id));
  const groups = parsed(fields.get("super") || "[]");
  return {
    pins: known((fields.get("pins") || "").split(",")),
    groups: (Array.isArray(groups) ? groups : []).filter(Array.isArray).map(([name, ...ids]) => [String(name), ...known(ids)]).filter((group) => group.length > 1),
    share: Math.min(100, Math.max(10, Number(fields.get("share")) || 80)),
    current: net.byId.get(fields.get("node")) ?? null,
  };
}

function writeState(net, state) {
  const fields = new URLSearchParams();
  if (state.pins.length) fields.set("pins", state.pins.join(","));
  if (state.groups.length) fields.set("super", JSON.stringify(state.groups));
  if (state.share !== 80) fields.set("share", state.share);
  if (state.current !== null) fields.set("node", net.nodes[state.current].id);
  window.history.replaceState(null, "", "#" + fields.toString());
}

// As Neuronpedia's and circuit-tracer's pages keep it.
const savedState = (state) => JSON.stringify({ pinnedIds: state.pins, supernodes: state.groups, pruningThreshold: state.share / 100 }, null, 1);

// --- words ---
function nameOf(ctx, node) {
  const told = ctx.lang === "it" ? node.label_it || node.label_en : node.label_en || node.label_it;
  const name = ctx.t("graph." + node.kind, { layer: node.layer, index: node.index, text: node.text.trim() || "␣", value: ctx.share(node.value) });
  return told ? `${name}: ${told}` : name;
}

// --- the page ---
function put(node, ...children) {
  node.replaceChildren();
  return fill(node, {}, children);
}

class GraphPage {
  constructor(root) {
    this.root = root;
    this.net = new Net(DATA);
    this.state = readState(this.net);
    this.view = null;
    this.frame = 0;
    const theme = preferredTheme();
    if (theme) setTheme(root, theme);
    onTheme(root, () => true, () => { this.colours = null; this.draw(); });
    window.addEventListener("hashchange", () => { Object.assign(this.state, readState(this.net)); this.changed(); });
    this.setLanguage(preferredLanguage());
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  shown = (i) => this.net.nodes[i].kind === "logit" || this.net.nodes[i].kind === "embedding" || this.net.nodes[i].before < this.state.share / 100 || this.kept.has(i);

  setLanguage(lang) {
    prefs.set("lang", lang);
    this.ctx = makeContext(lang);
    this.root.lang = document.documentElement.lang = lang;
    this.build();
    this.changed();
  }

  build() {
    const { ctx } = this, t = (key, vars) => ctx.t("graph." + key, vars);
    const button = (key, act) => h("button", { type: "button", "data-do": key, onclick: act }, t(key));
    const other = () => (currentTheme(this.root) === "dark" ? "light" : "dark");
    const top = h("div", { class: "top" }, h("span", { class: "brand" }, h("span", { class: "logo", "aria-hidden": "true" }), t("title")),
      h("span", { class: "where muted" }, text(DATA.model)),
      h("div", { class: "switch", role: "group", "aria-label": ctx.t("language") }, ["it", "en"].map((lang) =>
        h("button", { type: "button", lang, "data-lang": lang, "aria-pressed": String(ctx.lang === lang), onclick: () => { this.setLanguage(lang); this.root.querySelector(`[data-lang="${lang}"]`).focus(); } }, lang.toUpperCase()))),
      h("button", { type: "button", class: "icon theme", "aria-label": ctx.t("theme." + other()), onclick: (event) => {
        const theme = other();
        setTheme(this.root, theme);
        prefs.set("theme", theme);
        event.currentTarget.setAttribute("aria-label", ctx.t("theme." + other()));
      } }, "◐"));
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.plot = h("div", { class: "plot", tabindex: "0", role: "application", "aria-label": t("label", { n: ctx.integer(this.net.nodes.length) }), "aria-describedby": "graph-keys" }, this.canvas);
    this.live = h("p", { class: "hidden", role: "status", "aria-live": "polite" });
    this.count = h("output", {});
    this.slider = h("input", { type: "range", min: 10, max: 100, step: 1, value: this.state.share, oninput: (event) => { this.state.share = Number(event.target.value); this.changed(); } });
    this.about = h("aside", { class: "panel about", "aria-label": t("about") });
    this.pinned = h("section", { class: "panel pinned" });
    const list = h("details", { class: "panel node-list", ontoggle: (event) => event.target.open && this.listNodes(event.target) }, h("summary", {}, h("h2", {}, t("list"))));
    const tools = h("div", { class: "tools" }, h("label", {}, t("share"), this.slider, this.count), button("zoom.in", () => this.zoom(1.4)), button("zoom.out", () => this.zoom(1 / 1.4)), button("zoom.all", () => { this.view = null; this.draw(); }));
    const legend = h("p", { class: "legend muted" }, ["latent", "error", "embedding", "logit"].map((kind) => h("span", {}, t("legend." + kind))), h("span", {}, t("legend.edges")));
    const verdict = DATA["verdict_" + ctx.lang];
    this.root.replaceChildren(top, h("main", { class: "page graph-page" },
      h("header", { class: "graph-head" }, h("h1", {}, text(DATA.prompt)), h("p", { class: "sentence" }, text(DATA["sentence_" + ctx.lang])), h("p", { class: "verdict strong" }, text(verdict)),
        DATA.check && h("details", { class: "check" }, h("summary", {}, t("check")), h("img", { src: DATA.check, alt: t("check") }))),
      h("section", { class: "panel board", "aria-label": t("title") }, tools, this.plot, legend, h("p", { id: "graph-keys", class: "note muted" }, t("keys")), this.live),
      this.about, this.pinned, list));
    this.listen();
  }

  // Something of the state is another: everything that shows it is made again.
  changed() {
    const { net, state } = this;
    this.kept = new Set([...state.pins, ...state.groups.flatMap(([, ...ids]) => ids)].map((id) => net.byId.get(id)));
    if (state.current !== null) this.kept.add(state.current);
    this.bright = new Set(state.pins.flatMap((id) => [...net.paths(net.byId.get(id), this.shown)]));
    const some = net.into.flat().filter((edge) => this.shown(edge.target) && this.shown(edge.source));
    this.faint = some.sort((a, b) => Math.abs(b.weight) * this.weight(b.target) - Math.abs(a.weight) * this.weight(a.target)).slice(0, FAINT_EDGES);
    this.visible = net.nodes.map((_, i) => i).filter(this.shown);
    this.slider.value = state.share;
    this.count.textContent = this.ctx.t("graph.count", { share: this.ctx.integer(state.share), n: this.ctx.integer(this.visible.length) });
    writeState(net, state);
    this.tell(state.current);
    this.tellPinned();
    this.draw();
  }

  weight = (i) => (this.net.nodes[i].kind === "logit" ? 1 : this.net.nodes[i].influence);

  // --- drawing ---
  draw() {
    if (!this.frame) this.frame = window.requestAnimationFrame(() => { this.frame = 0; this.paint(); });
  }

  fit(width, height) {
    const { columns, rows } = this.net, left = 70, bottom = 40;
    const scale = Math.min((width - left - 10) / columns.at(-1), (height - bottom - 10) / rows.at(-1), 2.2);
    const k = Math.max(scale, 0.05); // a graph of few layers is drawn out to the height that there is
    return { k, v: Math.min(Math.max((height - bottom - 24) / (k * rows.at(-1)), 1), 6), x: left, y: height - bottom };
  }

  paint() {
    const { canvas, net, state } = this, ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    this.view ??= this.fit(width, height);
    const style = getComputedStyle(this.root);
    this.colours ??= Object.fromEntries(["bg", "panel", "raised", "text", "muted", "line", "accent", "warn"].map((name) => [name, this.resolved(style.getPropertyValue("--" + name))]));
    const pen = canvas.getContext("2d"), { k, v, x, y } = this.view, colours = this.colours;
    const at = (node) => [x + k * node.x, y + k * v * node.y];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.paintGrid(pen, width, height);
    const lines = (edges, alpha, wide) => {
      const largest = Math.max(...edges.map((edge) => Math.abs(edge.weight)), 1e-12);
      for (const edge of edges) {
        const [x0, y0] = at(net.nodes[edge.source]), [x1, y1] = at(net.nodes[edge.target]);
        pen.globalAlpha = alpha;
        pen.strokeStyle = edge.weight > 0 ? colours.accent : colours.warn;
        pen.lineWidth = 0.4 + (wide * Math.abs(edge.weight)) / largest;
        pen.beginPath();
        pen.moveTo(x0, y0);
        pen.bezierCurveTo(x0, (y0 + y1) / 2, x1, (y0 + y1) / 2, x1, y1);
        pen.stroke();
      }
    };
    lines(this.faint, this.bright.size || state.current !== null ? 0.12 : 0.3, 2);
    lines([...this.bright].filter((e) => this.shown(e.target) && this.shown(e.source)), 0.75, 3);
    if (state.current !== null) lines([...net.into[state.current], ...net.out[state.current]].filter((e) => this.shown(e.target) && this.shown(e.source)).slice(0, 60), 0.85, 3);
    pen.globalAlpha = 1;
    this.plot.dataset.at = state.current === null ? "" : at(net.nodes[state.current]).join(" "); // for magnifiers and tests
    for (const i of this.visible) {
      const [cx, cy] = at(net.nodes[i]);
      if (cx > -20 && cx < width + 20 && cy > -20 && cy < height + 20) this.paintNode(pen, i, cx, cy, Math.max(1.5, net.nodes[i].radius * Math.min(k, 1.6)));
    }
  }

  resolved(colour) {
    const probe = h("span", { style: "color:" + colour, hidden: true });
    this.root.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  paintGrid(pen, width, height) {
    const { net, colours } = this, { k, v, x, y } = this.view;
    pen.font = "11px system-ui, sans-serif";
    net.rows.slice(0, -1).forEach((start, row) => {
      const low = y - k * v * start, high = y - k * v * net.rows[row + 1];
      pen.fillStyle = row % 2 ? colours.panel : colours.raised;
      pen.fillRect(0, high, width, low - high);
      pen.fillStyle = colours.muted;
      const name = row === 0 ? "input" : row === net.rows.length - 2 ? "output" : "layer";
      pen.fillText(this.ctx.t("graph.row." + name, { layer: row - 1 }), 6, (low + high) / 2 + 4);
    });
    pen.fillStyle = colours.text;
    DATA.tokens.forEach((token, i) => {
      const middle = x + (k * (net.columns[i] + net.columns[i + 1])) / 2, room = k * (net.columns[i + 1] - net.columns[i]);
      const word = token.replace(/\n/g, "↵").trim() || "␣";
      pen.fillText(word.length * 6.5 > room ? word.slice(0, Math.max(1, Math.floor(room / 6.5))) : word, middle - Math.min(room, word.length * 6) / 2, Math.min(height - 8, y + 18));
    });
  }

  paintNode(pen, i, x, y, r) {
    const node = this.net.nodes[i], { colours } = this;
    pen.fillStyle = pen.strokeStyle = node.kind === "latent" ? colours.accent : node.kind === "logit" ? colours.text : colours.muted;
    pen.lineWidth = 1.5;
    pen.beginPath();
    if (KINDS[node.kind] === "circle") pen.arc(x, y, r, 0, 7);
    else if (KINDS[node.kind] === "square") pen.rect(x - r, y - r, 2 * r, 2 * r);
    else if (KINDS[node.kind] === "diamond") [[0, -r], [r, 0], [0, r], [-r, 0]].forEach(([dx, dy], n) => (n ? pen.lineTo(x + dx, y + dy) : pen.moveTo(x + dx, y + dy)));
    else { pen.moveTo(x - r, y - r); pen.lineTo(x + r, y + r); pen.moveTo(x + r, y - r); pen.lineTo(x - r, y + r); pen.stroke(); }
    pen.fill();
    const group = this.state.groups.findIndex(([, ...ids]) => ids.includes(node.id));
    if (this.state.pins.includes(node.id) || group >= 0 || i === this.state.current) {
      pen.strokeStyle = i === this.state.current ? colours.text : group >= 0 ? colours.warn : colours.accent;
      pen.lineWidth = i === this.state.current ? 2.5 : 1.5;
      pen.beginPath();
      pen.arc(x, y, r + 3.5, 0, 7);
      pen.stroke();
    }
    if (group >= 0 || node.kind === "logit") {
      pen.fillStyle = colours.text;
      const atEdge = x > this.plot.clientWidth - 90;
      pen.textAlign = atEdge ? "right" : "left";
      pen.fillText(group >= 0 ? this.state.groups[group][0] : node.text.trim(), x + (atEdge ? -1 : 1) * (r + 4), y + 4);
      pen.textAlign = "left";
    }
  }

  zoom(by, cx = this.plot.clientWidth / 2, cy = this.plot.clientHeight / 2) {
    const { k, v, x, y } = this.view ?? this.fit(this.plot.clientWidth, this.plot.clientHeight);
    const next = Math.min(8, Math.max(0.05, k * by));
    this.view = { k: next, v, x: cx - ((cx - x) * next) / k, y: cy - ((cy - y) * next) / k };
    this.draw();
  }

  // --- mouse and keys ---
  nearest(event) {
    const box = this.plot.getBoundingClientRect(), { k, v, x, y } = this.view;
    let best = null, least = 14 ** 2;
    for (const i of this.visible) {
      const node = this.net.nodes[i];
      const far = (x + k * node.x - event.clientX + box.left) ** 2 + (y + k * v * node.y - event.clientY + box.top) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  listen() {
    const { plot } = this;
    let drag = null;
    plot.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = plot.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    plot.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, view: this.view, moved: false }; plot.setPointerCapture(event.pointerId); });
    plot.addEventListener("pointermove", (event) => {
      if (drag && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4) drag.moved = true;
      if (drag?.moved) {
        this.view = { ...drag.view, x: drag.view.x + event.clientX - drag.x, y: drag.view.y + event.clientY - drag.y };
        return this.draw();
      }
      const found = this.view && this.nearest(event);
      if (found !== null && found !== this.state.current) this.look(found);
    });
    plot.addEventListener("pointerup", (event) => {
      const found = drag && !drag.moved ? this.nearest(event) : null;
      drag = null;
      if (found !== null) this.pin(found);
    });
    plot.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const { net, state } = this, at = state.current ?? this.visible.at(-1);
    const beside = (step) => {
      const row = this.visible.filter((i) => net.nodes[i].row === net.nodes[at].row).sort((a, b) => net.nodes[a].x - net.nodes[b].x || a - b);
      return row[(row.indexOf(at) + step + row.length) % row.length];
    };
    const follow = { ArrowUp: () => net.out[at].find((e) => this.shown(e.target))?.target, ArrowDown: () => net.into[at].find((e) => this.shown(e.source))?.source, ArrowLeft: () => beside(-1), ArrowRight: () => beside(1) };
    if (event.key in follow) {
      event.preventDefault();
      this.look(state.current === null ? at : follow[event.key]() ?? at);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (state.current !== null) this.pin(state.current);
    } else if (event.key === "Escape") this.look(null);
    else if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 1.4 : 1 / 1.4);
  }

  look(i) {
    this.state.current = i;
    this.kept = new Set([...this.state.pins, ...this.state.groups.flatMap(([, ...ids]) => ids)].map((id) => this.net.byId.get(id)).concat(i ?? []));
    this.visible = this.net.nodes.map((_, n) => n).filter(this.shown);
    writeState(this.net, this.state);
    this.tell(i);
    this.draw();
  }

  pin(i) {
    const { id } = this.net.nodes[i], { pins } = this.state;
    this.state.pins = pins.includes(id) ? pins.filter((other) => other !== id) : [...pins, id];
    this.changed();
  }

  // --- what is said ---
  edgeList(edges, end) {
    const { ctx, net } = this, total = edges.reduce((sum, edge) => sum + Math.abs(edge.weight), 0);
    return h("ul", { class: "edges" }, edges.slice(0, SHOWN_EDGES).map((edge) => h("li", {},
      h("span", { class: "num" + (edge.weight < 0 ? " takes" : ""), title: ctx.share(Math.abs(edge.weight) / total) }, ctx.signed(edge.weight)),
      h("button", { type: "button", onclick: () => { this.look(edge[end]); this.plot.focus(); } }, text(nameOf(ctx, net.nodes[edge[end]]))))));
  }

  tell(i) {
    const { ctx, net, state } = this, t = (key, vars) => ctx.t("graph." + key, vars);
    if (i === null) return void put(this.about, h("h2", {}, t("about")), h("p", { class: "muted" }, t("about.none")));
    const node = net.nodes[i], card = DATA.cards[node.layer + "_" + node.index] || {}, pinned = state.pins.includes(node.id);
    const facts = t("facts", { influence: ctx.fixed(node.influence, 3), value: ctx.activation(node.value) });
    this.live.textContent = `${nameOf(ctx, node)}. ${facts}.${pinned ? " " + t("is.pinned") : ""}`;
    const contexts = (node.kind === "latent" && card.contexts) || [];
    put(this.about, h("h2", {}, text(nameOf(ctx, node))), h("p", { class: "muted" }, facts),
      h("div", { class: "actions" }, h("button", { type: "button", "data-do": "pin", onclick: () => this.pin(i) }, t(pinned ? "unpin" : "pin")), node.kind === "latent" && card.href && h("a", { href: card.href }, t("card"))),
      contexts.length > 0 && [h("h3", {}, ctx.t("contexts")), h("ol", { class: "contexts" }, contexts.map(({ max, segments }) => h("li", {}, h("bdi", {}, segments.map(([piece, x]) => (x > 0 ? h("mark", { "--heat": Math.min(1, x / max).toFixed(3) }, piece) : piece))))))],
      net.into[i].length > 0 && [h("h3", {}, t("into")), this.edgeList(net.into[i], "source")], net.out[i].length > 0 && [h("h3", {}, t("out")), this.edgeList(net.out[i], "target")]);
  }

  listNodes(details) {
    const { ctx, net } = this, order = net.nodes.map((_, i) => i).sort((a, b) => net.nodes[b].influence - net.nodes[a].influence);
    details.querySelector("ol")?.remove();
    details.append(h("ol", {}, order.map((i) => h("li", {}, h("button", { type: "button", onclick: () => { this.look(i); this.about.scrollIntoView({ block: "nearest" }); } }, text(nameOf(ctx, net.nodes[i])), " ", h("small", {}, ctx.fixed(net.nodes[i].influence, 3)))))));
  }

  // Pinned nodes, supernodes made of them, and what goes from one to another.
  tellPinned() {
    const { ctx, net, state } = this, t = (key, vars) => ctx.t("graph." + key, vars);
    const free = state.pins.filter((id) => !state.groups.some(([, ...ids]) => ids.includes(id)));
    const boxes = free.map((id) => h("input", { type: "checkbox", value: id, "aria-label": nameOf(ctx, net.nodes[net.byId.get(id)]) }));
    const name = h("input", { type: "text", maxlength: 60, placeholder: t("super.name"), "aria-label": t("super.name") });
    const make = (event) => {
      event.preventDefault();
      const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
      if (!name.value.trim() || !chosen.length) return;
      state.groups = [...state.groups, [name.value.trim(), ...chosen]];
      this.changed();
    };
    const download = () => h("a", { href: URL.createObjectURL(new Blob([savedState(state)], { type: "application/json" })), download: "supernodes.json" }).click();
    put(this.pinned, h("h2", {}, t("pinned")), state.pins.length + state.groups.length === 0 && h("p", { class: "muted" }, t("pinned.none")),
      h("ul", {}, free.map((id, n) => h("li", {}, boxes[n], h("button", { type: "button", onclick: () => this.look(net.byId.get(id)) }, text(nameOf(ctx, net.nodes[net.byId.get(id)])))))),
      free.length ? h("form", { class: "actions", onsubmit: make }, name, h("button", { type: "submit", "data-do": "super" }, t("super.make"))) : null,
      h("ul", { class: "groups" }, state.groups.map((group, n) => h("li", {}, h("strong", {}, text(group[0])), " · ", h("span", { class: "muted" }, group.slice(1).map((id) => nameOf(ctx, net.nodes[net.byId.get(id)])).join("; ")),
        h("button", { type: "button", "aria-label": t("super.remove", { name: group[0] }), onclick: () => { state.groups = state.groups.filter((_, m) => m !== n); this.changed(); } }, "✕")))),
      this.between([...state.groups, ...free.map((id) => [nameOf(ctx, net.nodes[net.byId.get(id)]), id])]),
      h("div", { class: "actions" }, copyButton(ctx, ctx.t("copy.link"), () => window.location.href), copyButton(ctx, ctx.t("copy.json"), () => savedState(state)), h("button", { type: "button", "data-do": "save", onclick: download }, t("save"))));
  }

  between(parts) {
    const { ctx, net } = this, rows = [];
    const members = parts.map(([, ...ids]) => new Set(ids.map((id) => net.byId.get(id))));
    members.forEach((from, a) => members.forEach((to, b) => {
      if (a === b) return;
      const some = [...to].flatMap((i) => net.into[i]).filter((edge) => from.has(edge.source));
      if (some.length) rows.push([parts[a][0], parts[b][0], some.reduce((sum, edge) => sum + edge.weight, 0)]);
    }));
    if (!rows.length) return null;
    rows.sort((p, q) => Math.abs(q[2]) - Math.abs(p[2]));
    const head = ["from", "to", "sum"].map((key) => h("th", { scope: "col", class: key === "sum" ? "num" : null }, ctx.t("graph." + key)));
    return h("table", { class: "between" }, h("caption", {}, ctx.t("graph.between")), h("thead", {}, h("tr", {}, head)),
      h("tbody", {}, rows.slice(0, 40).map(([from, to, sum]) => h("tr", {}, h("td", {}, text(from)), h("td", {}, text(to)), h("td", { class: "num" }, ctx.signed(sum))))));
  }
}

new GraphPage(document.getElementById("graph"));
