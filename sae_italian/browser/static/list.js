// The list of latents: search, filter, sort, pages. Only one page of rows is ever in the document.
"use strict";
(function () {
  const S = window.saeItalian;
  const { h } = S;
  const PAGE = 50;
  const GOOD = 0.8;
  const TOKENS_SHOWN = 5;
  const LABELS_SHOWN = 3;

  const FILTERS = {
    all: () => true,
    explained: (row) => row.detection !== null && row.detection >= GOOD,
    gold: (row) => row.gold.length > 0,
    dead: (row) => row.dead,
    few: (row) => !row.dead && row.status.startsWith("too few"),
  };
  const COLUMNS = ["latent", "density", "max", "detection", "fuzzing", "gain"];

  S.listState = () => ({ query: "", filter: "all", sort: "detection", descending: true, page: 0, selected: -1 });

  function haystack(row) {
    row.folded ??= S.fold([row.latent, row.explanation_it, row.explanation_en, ...row.top_tokens, ...row.gold].join("\n"));
    return row.folded;
  }

  // The rows that the state asks for, in its order; what next and previous walk along.
  S.selectRows = function (rows, state) {
    const words = S.fold(state.query).split(/\s+/).filter(Boolean);
    const keep = FILTERS[state.filter];
    const found = rows.filter((row) => keep(row) && words.every((word) => haystack(row).includes(word)));
    return found.sort((a, b) => S.compare(a[state.sort], b[state.sort], state.descending) || a.latent - b.latent);
  };

  // --- one row ---
  S.rowTags = function (ctx, row) {
    const tags = [];
    if (row.dead) tags.push(h("span", { class: "tag warn" }, ctx.t("dead")));
    if (row.status && !row.dead && row.status !== "not explained") tags.push(h("span", { class: "tag warn" }, ctx.name("status", row.status)));
    if (row.kind) tags.push(h("span", { class: "tag" }, ctx.name("kind", row.kind)));
    for (const label of row.gold.slice(0, LABELS_SHOWN)) tags.push(h("span", { class: "tag gold-tag" }, S.text(label)));
    if (row.gold.length > LABELS_SHOWN) {
      tags.push(h("span", { class: "tag gold-tag", title: row.gold.join(", ") }, "+" + (row.gold.length - LABELS_SHOWN)));
    }
    return tags;
  };

  function scoreCell(ctx, row) {
    if (row.detection === null) return "–";
    return [
      h("span", { class: "mini-bar score", "aria-hidden": "true" }, h("span", { class: "bar-fill", "--share": Math.max(0, 2 * row.detection - 1) })),
      h("span", { title: ctx.interval(row.detection_lo, row.detection_hi, ctx.fixed) }, ctx.fixed(row.detection)),
    ];
  }

  function rowElement(ctx, row, onOpen) {
    const explanation = ctx.pick(row, "explanation");
    const cell = (name, ...content) => h("td", { class: "num c-" + name, "data-label": ctx.t(name) }, content);
    return h("tr", { "data-latent": row.latent, class: row.dead ? "dead" : null, onclick: (event) => onOpen(row.latent, event) },
      h("th", { scope: "row", class: "c-latent num" }, h("a", { href: ctx.href(row.latent) }, String(row.latent))),
      h("td", { class: "c-explanation" },
        h("div", { class: "clamp" + (explanation ? "" : " muted") }, explanation ? S.text(explanation.slice(0, 400)) : ctx.t("no.explanation")),
        h("div", { class: "chips" }, S.rowTags(ctx, row), row.top_tokens.slice(0, TOKENS_SHOWN).map((token) => S.token(token)))),
      cell("density", ctx.density(row.density)),
      cell("max", ctx.activation(row.max)),
      cell("detection", scoreCell(ctx, row)),
      cell("fuzzing", ctx.fixed(row.fuzzing)),
      cell("gain", ctx.signed(row.gain)));
  }

  // --- the parts around the rows ---
  function filterGroup(ctx, rows, state, onChange) {
    const bar = ctx.fixed(GOOD, 1);
    return h("div", { class: "filters", role: "group", "aria-label": ctx.t("filter") }, Object.entries(FILTERS).map(([name, keep]) => {
      const n = rows.reduce((sum, row) => sum + (keep(row) ? 1 : 0), 0);
      return h("button", { type: "button", "data-filter": name, "aria-pressed": String(state.filter === name), onclick: () => onChange(name) },
        ctx.t("filter." + name, { bar }), " ", h("span", { class: "count" }, ctx.integer(n)));
    }));
  }

  function sortMenu(ctx, state, onChange) {
    const options = COLUMNS.map((name) => h("option", { value: name, selected: state.sort === name }, ctx.t(name)));
    const select = h("select", { onchange: (event) => onChange(event.target.value) }, options);
    return [h("label", {}, ctx.t("sort"), " ", select),
      h("button", { type: "button", class: "icon", "aria-label": ctx.t("sort.flip"), onclick: () => onChange(state.sort) }, "⇅")];
  }

  function tableHead(ctx, state, onSort) {
    const header = (name) => S.sortHeader(ctx, {
      name, numeric: true, active: state.sort === name, descending: state.descending,
      title: ["density", "detection", "gain"].includes(name) ? ctx.t(name + ".title") : null,
      onSort: () => onSort(name), className: "c-" + name,
    });
    const [first, ...rest] = COLUMNS.map(header);
    return h("thead", {}, h("tr", {}, first, h("th", { scope: "col", class: "c-explanation" }, ctx.t("explanation")), rest));
  }

  function pager(ctx, state, total, onPage) {
    const pages = Math.max(1, Math.ceil(total / PAGE));
    const button = (page, label, sign) =>
      h("button", { type: "button", class: "icon", "aria-label": ctx.t(label), disabled: page < 0 || page >= pages, onclick: () => onPage(page) }, sign);
    const range = { from: ctx.integer(state.page * PAGE + 1), to: ctx.integer(Math.min(total, (state.page + 1) * PAGE)), n: ctx.integer(total) };
    return total <= PAGE ? [] : [
      button(state.page - 1, "page.previous", "‹"), h("span", {}, ctx.t("page.range", range)), button(state.page + 1, "page.next", "›")];
  }

  // --- the list; `update` redraws what depends on the state and leaves the search box alone ---
  S.renderList = function (ctx, rows, state, { onOpen, onRows }) {
    const search = h("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false", placeholder: ctx.t("search"), "aria-label": ctx.t("search") });
    const filters = h("div", {});
    const menu = h("div", { class: "sort-menu" });
    const found = h("p", { class: "found muted", role: "status" });
    const table = h("table", { class: "latents" }, h("caption", { class: "hidden" }, ctx.t("list.caption")));
    const empty = h("p", { class: "empty muted", hidden: true }, ctx.t("nothing"));
    const pages = h("nav", { class: "pager", "aria-label": ctx.t("pages") });
    let current = [];

    const again = (change) => { Object.assign(state, { page: 0, selected: -1 }, change); update(); };
    const open = (latent, event) => {
      if (event?.target.closest?.("a") || event?.metaKey || event?.ctrlKey || String(window.getSelection())) return;
      state.selected = Math.max(0, current.findIndex((row) => row.latent === latent));
      onOpen(latent);
    };
    const sortBy = (name) => {
      const fromTable = table.contains(document.activeElement);
      again({ sort: name, descending: state.sort === name ? !state.descending : name !== "latent" });
      if (fromTable) table.querySelector(`[data-sort="${name}"]`).focus();
    };
    search.value = state.query;
    search.addEventListener("input", () => again({ query: search.value }));

    function drawPage() {
      const body = current.slice(state.page * PAGE, (state.page + 1) * PAGE).map((row) => rowElement(ctx, row, open));
      table.replaceChildren(table.caption, tableHead(ctx, state, sortBy), h("tbody", {}, body));
      pages.replaceChildren(...pager(ctx, state, current.length, (page) => {
        Object.assign(state, { page, selected: page * PAGE });
        drawPage();
        table.scrollIntoView({ block: "start" });
      }));
      mark();
    }
    function mark() {
      const chosen = current[state.selected]?.latent;
      for (const row of table.querySelectorAll("tbody tr")) row.classList.toggle("selected", row.dataset.latent === String(chosen));
    }
    function update() {
      current = S.selectRows(rows, state);
      const pressed = filters.contains(document.activeElement);
      filters.replaceChildren(filterGroup(ctx, rows, state, (filter) => again({ filter })));
      if (pressed) filters.querySelector('[aria-pressed="true"]').focus();
      const sorting = menu.contains(document.activeElement) && document.activeElement.tagName;
      menu.replaceChildren(...sortMenu(ctx, state, sortBy));
      if (sorting) menu.querySelector(sorting).focus();
      const n = ctx.integer(current.length);
      found.replaceChildren(current.length === rows.length ? ctx.t("found", { n }) : ctx.t("found.of", { n, total: ctx.integer(rows.length) }));
      table.hidden = !current.length;
      empty.hidden = Boolean(current.length);
      drawPage();
      onRows(current);
    }
    function select(index, { focus = true } = {}) {
      if (!current.length) return;
      state.selected = Math.max(0, Math.min(current.length - 1, index));
      const page = Math.floor(state.selected / PAGE);
      if (page !== state.page) { state.page = page; drawPage(); }
      mark();
      const link = table.querySelector("tr.selected a");
      if (focus && link) { link.focus({ preventScroll: true }); link.closest("tr").scrollIntoView({ block: "nearest" }); }
    }
    update();
    return {
      element: h("section", { class: "list", id: "latents", "aria-labelledby": "latents-title", tabindex: "-1" },
        h("div", { class: "list-head" }, h("h2", { id: "latents-title" }, ctx.t("latents")), found),
        h("div", { class: "toolbar" }, search, filters, menu), table, empty, pages),
      current: () => current,
      select,
      selectLatent(latent) {
        const index = current.findIndex((row) => row.latent === latent);
        if (index >= 0) select(index);
      },
      openSelected: () => current.length && onOpen(current[Math.max(0, state.selected)].latent),
      clear() {
        search.value = "";
        if (state.query) again({ query: "" });
      },
      search,
    };
  };
})();
