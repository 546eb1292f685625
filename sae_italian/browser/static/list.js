// The list of latents: search, filters, sort. Only the rows in sight are in the document, each of one height (--row).

const TOKENS_SHOWN = 5;
const LABELS_SHOWN = 3;
const SPARE = 12; // rows drawn above and below what is in sight
const LOWEST = 80; // pixels; no row is lower
const PRINTED = 200; // rows on paper
const REST = 40; // ms that a pointer rests on a row before its card is read

// --- one row ---
function rowTags(ctx, row) {
  const tags = (ctx.marks?.of(row.latent).lists ?? []).map((name) => h("span", { class: "tag mine" }, text(name)));
  if (row.dead) tags.push(h("span", { class: "tag warn" }, ctx.t("dead")));
  if (row.density >= ULTRA) tags.push(h("span", { class: "tag warn" }, ctx.t("ultra")));
  if (row.status && !row.dead && row.status !== "not explained") tags.push(h("span", { class: "tag warn" }, ctx.name("status", row.status)));
  if (row.kind) tags.push(h("span", { class: "tag" }, ctx.name("kind", row.kind)));
  for (const label of row.gold.slice(0, LABELS_SHOWN)) tags.push(h("span", { class: "tag gold-tag", title: label }, text(labelName(label, ctx.lang))));
  if (row.gold.length > LABELS_SHOWN) {
    tags.push(h("span", { class: "tag gold-tag", title: row.gold.join(", ") }, "+" + (row.gold.length - LABELS_SHOWN)));
  }
  return tags;
}

function scoreCell(ctx, row) {
  if (row.detection === null) return "–";
  return [
    h("span", { class: "mini-bar score", "aria-hidden": "true" }, h("span", { class: "bar-fill", "--share": Math.max(0, 2 * row.detection - 1) })),
    h("span", { title: ctx.interval(row.detection_lo, row.detection_hi, ctx.fixed) }, ctx.fixed(row.detection)),
  ];
}

function explanationCell(ctx, row) {
  const main = headline(ctx, row);
  const llm = main && main === ctx.pick(row, "llm");
  return [h("div", { class: "clamp called" + (main ? "" : " muted") }, llm && h("span", { class: "tag" }, "LLM"), llm && " ", main ? text(cut(main, 400)) : ctx.t("no.explanation")),
    row.sample && h("div", { class: "sample clamp", dir: "auto" }, marked(row.sample))];
}

function rowElement(ctx, row, index, onOpen) {
  const shown = (name, { show }) => (show === "score" ? scoreCell(ctx, row) : ctx[show](row[name]));
  const cell = ([name, column]) => h("td", { class: "num c-" + name, "data-label": ctx.t("column." + name) }, shown(name, column));
  return h("tr", { "data-latent": row.latent, "aria-rowindex": index + 2, class: row.dead ? "dead" : null, onclick: (event) => onOpen(row.latent, event) },
    h("th", { scope: "row", class: "c-latent num" }, h("a", { href: ctx.href(row.latent) }, String(row.latent))),
    h("td", { class: "c-explanation" }, explanationCell(ctx, row),
      h("div", { class: "chips one-line" }, rowTags(ctx, row), row.top_tokens.slice(0, TOKENS_SHOWN).map((item) => token(item)))),
    Object.entries(COLUMNS).slice(1).map(cell));
}

// --- the parts around the rows ---
function filterGroup(ctx, counts, state, onChange) {
  const words = { bar: ctx.fixed(GOOD, 1), ultra: ctx.integer(100 * ULTRA) };
  return h("div", { class: "filters", role: "group", "aria-label": ctx.t("filter") }, Object.keys(FILTERS).filter((name) => name === "all" || counts[name] || name === state.filter).map((name) =>
    h("button", { type: "button", "data-filter": name, "aria-pressed": String(state.filter === name), onclick: () => onChange(name) },
      ctx.t("filter." + name, words), " ", h("span", { class: "count" }, ctx.integer(counts[name])))));
}

function moreFilters(ctx, rows, state, onChange, redraw) {
  const number = (name, end) => h("input", { inputmode: "decimal", "data-range": `${name}-${end}`, value: state.ranges[name]?.[end] ?? null,
    "aria-label": `${ctx.t("column." + name)}: ${ctx.t(end ? "at.most" : "at.least")}`, placeholder: ctx.t(end ? "at.most" : "at.least"), onchange(event) {
      const range = [...(state.ranges[name] || [null, null])];
      const written = parseFloat(event.target.value.replace(",", ".").replace("−", "-"));
      event.target.value = range[end] = Number.isFinite(written) ? written : null; // what is no number is not left standing
      onChange({ ranges: { ...state.ranges, [name]: range } });
    } });
  const labels = [...new Set(rows.flatMap((row) => row.gold).concat(state.label || []))].sort((a, b) => labelName(a, ctx.lang).localeCompare(labelName(b, ctx.lang), ctx.lang));
  const select = h("select", { "aria-label": ctx.t("label"), onchange: (event) => onChange({ label: event.target.value }) },
    h("option", { value: "" }, ctx.t("any.label")), labels.map((label) => h("option", { value: label, selected: state.label === label }, labelName(label, ctx.lang))));
  const set = Object.values(state.ranges).flat().some((value) => value !== null) || state.label || state.list;
  return h("details", { class: "more-filters", open: Boolean(set) }, h("summary", {}, ctx.t("filter.more")),
    h("div", { class: "ranges" }, RANGES.map((name) =>
      h("fieldset", {}, h("legend", {}, ctx.t("column." + name) + (name === "density" ? " (%)" : "")), number(name, 0), number(name, 1))),
    labels.length > 0 && h("fieldset", {}, h("legend", {}, ctx.t("label")), select), marksBar(ctx, state, onChange, redraw)));
}

function sortMenu(ctx, state, onChange) {
  const options = Object.keys(COLUMNS).map((name) => h("option", { value: name, selected: state.sort === name }, ctx.t("column." + name)));
  const select = h("select", { onchange: (event) => onChange(event.target.value) }, options);
  return [h("label", {}, ctx.t("sort"), " ", select),
    h("button", { type: "button", class: "icon", "aria-label": ctx.t("sort.flip"), onclick: () => onChange(state.sort) }, "⇅")];
}

function tableHead(ctx, state, onSort) {
  const header = (name) => sortHeader(ctx, {
    name, numeric: true, active: state.sort === name, descending: state.descending,
    label: ctx.t("column." + name), title: ctx.maybe("column_title." + name),
    onSort: () => onSort(name), className: "c-" + name,
  });
  const [first, ...rest] = Object.keys(COLUMNS).map(header);
  return h("thead", {}, h("tr", { "aria-rowindex": 1 }, first, h("th", { scope: "col", class: "c-explanation" }, ctx.t("explanation")), rest));
}

// What a pointer rests on or presses is likely to be opened: its card is read meanwhile.
function prepareUnderPointer(ctx, body) {
  let resting = 0;
  const prepare = (event) => {
    const row = event.target.closest("tr[data-latent]");
    if (row) ctx.prepare(Number(row.dataset.latent));
  };
  const rest = (event) => {
    window.clearTimeout(resting);
    resting = window.setTimeout(prepare, REST, event);
  };
  body.addEventListener("pointerover", rest);
  body.addEventListener("pointerleave", () => window.clearTimeout(resting));
  body.addEventListener("pointerdown", prepare);
}

// --- the rows in sight ---
// `draw(from, to)` says which rows the table holds; the rest is two empty rows of the right height.
function rowWindow(ctx, table, current, onOpen) {
  const body = h("tbody");
  prepareUnderPointer(ctx, body);
  let held = [0, 0];
  const height = () => parseFloat(getComputedStyle(table).getPropertyValue("--row")) || 84;
  const space = (n) => h("tr", { class: "space", "aria-hidden": "true", "--space": n * height() + "px" }, h("td", { colspan: Object.keys(COLUMNS).length + 1 }));

  function draw(from, to, mark) {
    const rows = current();
    held = [Math.max(0, from), Math.min(rows.length, to)];
    const focused = body.contains(document.activeElement) && document.activeElement.closest("tr")?.dataset.latent;
    body.replaceChildren(space(held[0]), ...rows.slice(...held).map((row, i) => rowElement(ctx, row, held[0] + i, onOpen)), space(rows.length - held[1]));
    mark();
    if (focused) body.querySelector(`tr[data-latent="${focused}"] a`)?.focus({ preventScroll: true });
  }
  return {
    body,
    first: (mark) => draw(0, Math.ceil(window.innerHeight / LOWEST), mark), // the list may not be in the page yet
    all: (mark) => draw(0, PRINTED, mark),
    show(index, mark) { if (index < held[0] || index >= held[1]) draw(index - SPARE, index + SPARE, mark); },
    follow(mark) {
      if (!body.isConnected || !body.offsetParent) return;
      const top = -body.getBoundingClientRect().top;
      const [from, to] = [Math.floor(top / height()), Math.ceil((top + window.innerHeight) / height())];
      const inside = held[0] <= Math.max(0, from) && held[1] >= Math.min(current().length, to);
      if (!inside) draw(from - SPARE, to + SPARE, mark);
    },
  };
}

// --- the list; `update` redraws what depends on the state and leaves the search box alone ---
function renderList(ctx, rows, state, { onOpen, onRows }) {
  const search = h("input", { type: "search", class: "search", autocomplete: "off", spellcheck: "false", placeholder: ctx.t("search"), "aria-label": ctx.t("search") });
  const counts = Object.fromEntries(Object.entries(FILTERS).map(([name, keep]) => [name, rows.reduce((sum, row) => sum + (keep(row) ? 1 : 0), 0)]));
  const filters = h("div", {});
  const menu = h("div", { class: "sort-menu" });
  const found = h("p", { class: "found muted", role: "status" });
  const caption = h("caption", { class: "hidden" }, ctx.t("list.caption"));
  const table = h("table", { class: "latents" });
  const empty = h("p", { class: "empty muted", hidden: true }, ctx.t("nothing"));
  let current = [];
  const filtersNow = () => moreFilters(ctx, rows, state, (change) => again(change), () => update());
  let more = filtersNow();
  const inSight = rowWindow(ctx, table, () => current, (latent, event) => open(latent, event));

  const again = (change) => { Object.assign(state, { selected: -1 }, change); update(); ctx.keep(); };
  function open(latent, event) {
    if (event?.target.closest?.("a") || event?.metaKey || event?.ctrlKey || String(window.getSelection())) return;
    state.selected = Math.max(0, current.findIndex((row) => row.latent === latent));
    onOpen(latent);
  }
  function sortBy(name) {
    const fromTable = table.contains(document.activeElement);
    again({ sort: name, descending: state.sort === name ? !state.descending : name !== "latent" });
    if (fromTable) table.querySelector(`[data-sort="${name}"]`).focus();
  }
  function mark() {
    const chosen = current[state.selected]?.latent;
    for (const row of inSight.body.querySelectorAll("tr[data-latent]")) row.classList.toggle("selected", row.dataset.latent === String(chosen));
  }
  function update() {
    current = selectRows(rows, state, ctx.marks);
    const pressed = filters.contains(document.activeElement);
    filters.replaceChildren(filterGroup(ctx, counts, state, (filter) => again({ filter })));
    if (pressed) filters.querySelector('[aria-pressed="true"]').focus();
    const sorting = menu.contains(document.activeElement) && document.activeElement.tagName;
    menu.replaceChildren(...sortMenu(ctx, state, sortBy));
    if (sorting) menu.querySelector(sorting).focus();
    const n = ctx.integer(current.length);
    const words = current.length && state.missing.length ? ctx.t("found.without", { words: state.missing.map((word) => `«${word}»`).join(", ") }) : "";
    found.replaceChildren(current.length === rows.length ? ctx.t("found", { n }) : ctx.t("found.of", { n, total: ctx.integer(rows.length) }), words);
    table.hidden = !current.length;
    empty.hidden = Boolean(current.length);
    table.setAttribute("aria-rowcount", current.length + 1);
    table.replaceChildren(caption, tableHead(ctx, state, sortBy), inSight.body);
    inSight.first(mark);
    onRows(current); // what changes above the list changes what is in sight
    inSight.follow(mark);
  }
  function select(index) {
    if (!current.length) return;
    state.selected = Math.max(0, Math.min(current.length - 1, index));
    inSight.show(state.selected, mark);
    mark();
    ctx.prepare(current[state.selected].latent);
    const link = inSight.body.querySelector("tr.selected a");
    link.focus({ preventScroll: true });
    link.closest("tr").scrollIntoView({ block: "nearest" });
  }
  function scrolled() {
    if (table.isConnected) return inSight.follow(mark);
    document.removeEventListener("scroll", scrolled, true);
    window.removeEventListener("beforeprint", print);
    return window.removeEventListener("resize", scrolled);
  }
  const print = () => inSight.all(mark);
  search.value = state.query;
  search.addEventListener("input", () => again({ query: search.value }));
  const element = h("section", { class: "list", "aria-labelledby": "sae-italian-latents", tabindex: "-1" },
    h("div", { class: "list-head" }, h("h2", { id: "sae-italian-latents" }, ctx.t("latents")), found),
    h("div", { class: "toolbar" }, filters, menu, more), table, empty);
  prepareSearch(rows, ctx.run.gold);
  update();
  document.addEventListener("scroll", scrolled, { capture: true, passive: true });
  window.addEventListener("resize", scrolled);
  window.addEventListener("beforeprint", print);
  return {
    element,
    current: () => current,
    select,
    selectLatent(latent) {
      const index = current.findIndex((row) => row.latent === latent);
      if (index >= 0) select(index);
    },
    openSelected: () => current.length && onOpen(current[Math.max(0, state.selected)].latent),
    restore() {
      search.value = state.query;
      more.replaceWith(more = filtersNow());
      update();
    },
    clear() {
      search.value = "";
      if (state.query) again({ query: "" });
    },
    search,
  };
}
