// The host on disk: loads the data, routes by the address (#latent=12), keys, language and theme.
"use strict";
(function () {
  const S = window.saeItalian;
  const { h, svg } = S;
  const root = document.getElementById("app");
  const app = { lang: S.preferredLanguage(), run: null, rows: [], state: S.listState(), gold: { sort: "f1", descending: true, open: false }, list: null, scroll: 0 };

  const routedLatent = () => {
    const match = /(?:^#|&)latent=(\d+)(?:&|$)/.exec(window.location.hash);
    return match ? Number(match[1]) : null;
  };
  const go = (hash) => { window.location.hash = hash; };

  // --- the bar at the top ---
  function languageSwitch(ctx) {
    return h("div", { class: "switch", role: "group", "aria-label": ctx.t("language") }, [["it", "Italiano"], ["en", "English"]].map(([lang, name]) =>
      h("button", { type: "button", lang, "data-lang": lang, "aria-pressed": String(app.lang === lang), "aria-label": name, onclick: () => setLanguage(lang) }, lang.toUpperCase())));
  }

  function themeButton(ctx) {
    const other = S.currentTheme() === "dark" ? "light" : "dark";
    const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
      svg("circle", { cx: 8, cy: 8, r: 6, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }), svg("path", { d: "M8 2a6 6 0 0 1 0 12z", fill: "currentColor" }));
    return h("button", { type: "button", class: "icon theme", "aria-label": ctx.t("theme." + other), title: ctx.t("theme." + other), onclick(event) {
      S.setTheme(other);
      S.prefs.set("theme", other);
      event.currentTarget.replaceWith(themeButton(ctx));
      document.querySelector(".theme").focus();
    } }, icon);
  }

  function topBar(ctx) {
    return h("div", { class: "top" }, h("a", { class: "skip", href: "#latents", onclick: skip }, ctx.t("skip")),
      h("a", { class: "brand", href: "#" }, h("span", { class: "logo", "aria-hidden": "true" }), ctx.t("brand")),
      h("span", { class: "where muted" }, S.text(app.run.sae)), languageSwitch(ctx), themeButton(ctx));
  }

  function skip(event) {
    event.preventDefault();
    (document.getElementById("latents") || document.querySelector("h1"))?.focus();
  }

  function keyHelp(ctx) {
    const key = (...names) => names.map((name) => h("kbd", {}, name));
    return h("footer", { class: "keys muted" },
      h("span", {}, key("j", "k"), ctx.t("keys")), h("span", {}, key("Enter"), ctx.t("keys.open")),
      h("span", {}, key("Esc"), ctx.t("keys.back")), h("span", {}, key("/"), ctx.t("keys.search")));
  }

  // --- views ---
  function overview(ctx) {
    const scatter = app.rows.some((row) => row.detection !== null && row.density > 0) &&
      S.scatter(ctx, app.rows, { onOpen: (latent) => go("latent=" + latent) });
    app.list = S.renderList(ctx, app.rows, app.state, { onOpen: (latent) => go("latent=" + latent), onRows: (rows) => scatter && scatter.show(rows) });
    return h("main", { class: "page", id: "overview" }, S.renderFacts(ctx, app.run),
      h("div", { class: "summary-grid" },
        S.renderMetrics(ctx, app.run.metrics, { title: ctx.t("metrics"), head: ctx.t("measure") }),
        S.renderMetrics(ctx, app.run.controls, { title: ctx.t("controls"), head: ctx.t("control"), note: ctx.t("controls.note") }),
        scatter && h("section", { class: "panel" }, h("h2", {}, ctx.t("scatter")), scatter.element)),
      S.renderGold(ctx, app.run.gold, app.gold), app.list.element, keyHelp(ctx));
  }

  // Next and previous follow the list as it is filtered and sorted; a latent outside it follows the whole folder.
  function neighbours(latent) {
    let order = app.list.current();
    let at = order.findIndex((row) => row.latent === latent);
    if (at < 0) [order, at] = [app.rows, app.rows.findIndex((row) => row.latent === latent)];
    return { at, n: order.length, previous: order[at - 1], next: order[at + 1] };
  }

  function cardNav(ctx, latent) {
    const { at, n, previous, next } = neighbours(latent);
    const step = (row, key, rel, text) => row
      ? h("a", { class: "step", rel, href: ctx.href(row.latent), "aria-label": ctx.t(key) + ": " + row.latent }, text)
      : h("span", { class: "step off", "aria-hidden": "true" }, text);
    return h("nav", { class: "card-nav", "aria-label": ctx.t("latents") },
      h("a", { class: "back", href: "#" }, "← " + ctx.t("back")),
      h("span", { class: "muted where-at" }, ctx.t("position", { i: ctx.integer(at + 1), n: ctx.integer(n) })),
      step(previous, "previous", "prev", "‹ " + ctx.t("previous")), step(next, "next", "next", ctx.t("next") + " ›"));
  }

  const notice = (text) => h("p", { class: "notice", role: "alert" }, text);

  async function showCard(ctx, holder, latent) {
    const row = app.rows.find((candidate) => candidate.latent === latent);
    if (!row) return holder.replaceChildren(h("a", { class: "back", href: "#" }, "← " + ctx.t("back")), notice(ctx.t("no.latent", { latent })));
    let content;
    try {
      content = S.renderCard(ctx, row, await S.loadCard(row));
    } catch (error) {
      content = notice(ctx.t("load.failed", { file: error.message }));
    }
    if (routedLatent() !== latent) return undefined; // overtaken by the next key press
    holder.replaceChildren(cardNav(ctx, latent), content, keyHelp(ctx));
    holder.querySelector("h1")?.focus({ preventScroll: true });
    return window.scrollTo(0, 0);
  }

  function route() {
    const ctx = app.ctx;
    const latent = routedLatent();
    const [list, card] = [document.getElementById("overview"), document.getElementById("card")];
    if (latent !== null && !list.hidden) app.scroll = window.scrollY;
    const wasCard = !card.hidden;
    list.hidden = latent !== null;
    card.hidden = latent === null;
    document.title = (latent === null ? "" : `${ctx.t("latent")} ${latent} · `) + app.run.title;
    if (latent !== null) return showCard(ctx, card, latent);
    card.replaceChildren();
    if (wasCard) {
      window.scrollTo(0, app.scroll);
      if (app.shown !== undefined) app.list.selectLatent(app.shown);
      if (app.toSearch) app.list.search.focus();
      app.toSearch = false;
    }
    return undefined;
  }

  function render() {
    app.ctx = S.makeContext(app.lang);
    document.documentElement.lang = app.lang;
    root.replaceChildren(topBar(app.ctx), overview(app.ctx), h("main", { class: "page", id: "card", hidden: true }));
    route();
  }

  function setLanguage(lang) {
    app.lang = lang;
    S.prefs.set("lang", lang);
    render();
    document.querySelector(`[data-lang="${lang}"]`).focus();
  }

  // --- keys ---
  function stepList(by) {
    const fresh = !document.activeElement?.closest?.(".latents");
    app.list.select(fresh ? Math.max(0, app.state.selected) : app.state.selected + by);
  }
  function stepCard(by) {
    const { previous, next } = neighbours(routedLatent());
    const row = by > 0 ? next : previous;
    if (row) go("latent=" + row.latent);
  }
  const KEYS = {
    list: { j: () => stepList(1), k: () => stepList(-1), Escape: () => app.list.clear(), "/": () => { app.list.search.focus(); app.list.search.select(); } },
    card: { j: () => stepCard(1), k: () => stepCard(-1), Escape: () => go(""), "/": () => { app.toSearch = true; go(""); } },
  };

  function onKey(event) {
    if (!app.list || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (writing && event.key === "Escape") {
      event.preventDefault(); // the browser would empty the box without telling anyone
      return event.target.blur();
    }
    if (writing && event.target === app.list.search && event.key === "Enter") return app.list.openSelected();
    if (writing) return undefined;
    const action = KEYS[routedLatent() === null ? "list" : "card"][event.key];
    if (!action) return undefined;
    event.preventDefault();
    return action();
  }

  // --- start ---
  async function start() {
    const ctx = S.makeContext(app.lang);
    root.replaceChildren(h("p", { class: "notice", role: "status" }, ctx.t("loading")));
    try {
      const { run, row_shards: n } = await S.load("run", 0);
      app.run = run;
      for (let index = 0; index < n; index += 1) app.rows.push(...(await S.load("rows", index)));
    } catch (error) {
      root.replaceChildren(notice(ctx.t("load.failed", { file: error.message })));
      return;
    }
    app.rows.sort((a, b) => a.latent - b.latent);
    render();
    window.addEventListener("hashchange", (event) => {
      const before = /latent=(\d+)/.exec(event.oldURL);
      app.shown = before ? Number(before[1]) : undefined;
      route();
    });
    document.addEventListener("keydown", onKey);
  }
  start();
})();
