// The browser of latents in one element, for every host: a folder on disk, a server, a notebook.
//
//   mount(element, source, options) -> { go(latent), destroy() }
//
// source:  async run() -> RunRecord; async rows() -> { latent: [...], density: [...], ... } (RowRecord by column);
//          async card(latent) -> CardRecord or null; async row(latent) -> RowRecord or null (optional: a card that the
//          address names is then shown before the list is read); prepare(latent), read a card ahead (optional);
//          async compare() -> null or { name, source, matches() } (optional);
//          async wide(latent) -> the card's groups with passages as wide as their window (optional);
//          live (optional): { tokens(sentence), steer({ latent, prompt, strengths }), ablate({ latent, prompt }),
//          explain({ latent }) }, which live.js shows: mountLive(element, live, context), context.latent null on the
//          list's page; context.open(latent) opens a card; a function that it returns is called before it is removed.
// options: routing "hash" (the page's address, the default) or "memory" (a notebook's output, whose theme is the host's);
//          latent to open first; permalink(latent) -> address to copy (default: this page's with #latent=N).

async function mount(element, source, options = {}) {
  const app = new App(element, source, options);
  await app.start();
  return { go: (latent) => app.go(latent), destroy: () => app.destroy() };
}

class App {
  constructor(element, source, options) {
    this.inNotebook = options.routing === "memory";
    this.router = this.inNotebook ? memoryRouter() : addressRouter();
    const { list, lang, sentence } = readRoute(this.router.current());
    Object.assign(this, { root: element, source, options, lang: lang ?? preferredLanguage(), rows: [], leaving: [], late: [] });
    this.state = { list, lang, sentence, gold: { sort: "f1", descending: true, open: false }, width: prefs.get("width") };
    element.classList.add("sae-italian");
    element.classList.toggle("in-notebook", this.inNotebook);
    if (this.inNotebook) followHost(element);
    else if (preferredTheme()) setTheme(element, preferredTheme());
    this.onClick = (event) => this.follow(event);
    this.onKey = (event) => this.key(event);
  }

  async start() {
    const ctx = this.context();
    this.root.replaceChildren(h("p", { class: "notice", role: "status" }, ctx.t("loading")));
    this.stop = this.router.watch(() => this.arrive()); // first of all: what is in sight can be used
    (this.inNotebook ? this.root : document).addEventListener("keydown", this.onKey);
    this.root.addEventListener("click", this.onClick);
    await this.early();
    try {
      const [run] = await Promise.all([this.source.run(), this.loadRows()]);
      this.run = run;
      this.marks ??= marksOf(run);
      this.compare = (await this.source.compare?.()) || null;
    } catch (error) {
      this.root.replaceChildren(failure(ctx, error));
      return;
    }
    if (this.options.latent !== undefined && !this.router.current()) this.router.keep(writeRoute(this.options.latent, this.state));
    if (this.card && this.ctx.lang === this.lang && this.latent() === this.shown) this.join();
    else this.render();
    for (const action of this.late.splice(0)) action();
  }

  // --- the address: a link within the page changes the latent alone, any other step says everything ---
  latent() { return readRoute(this.router.current()).latent; }
  go(latent) { this.router.go(writeRoute(latent, this.state)); }
  keep() { this.router.keep(writeRoute(this.latent(), this.state)); }

  follow(event) {
    const link = event.target.closest?.("a[href^='#']");
    if (!link || event.defaultPrevented || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    this.go(readRoute(link.getAttribute("href").slice(1)).latent);
  }

  arrive() {
    const { list, lang, sentence } = readRoute(this.router.current());
    const changed = writeRoute(null, { list }) !== writeRoute(null, { list: this.state.list });
    Object.assign(this.state.list, list);
    Object.assign(this.state, { sentence: sentence ?? this.state.sentence });
    if (lang && lang !== this.lang) return this.setLanguage(lang);
    if (!this.home) return this.early();
    if (changed) this.home.list.restore();
    return this.route();
  }

  async loadRows() {
    this.rows = rowsOf(await this.source.rows());
    this.byLatent = new Map(this.rows.map((row) => [row.latent, row]));
  }

  // The page again with what was stored meanwhile.
  async refresh() {
    try {
      await this.loadRows();
    } catch (error) {
      return void this.card.prepend(failure(this.ctx, error));
    }
    return this.render();
  }

  // The card that the address names, before the list is read. What fails here fails again with the list, and is said there.
  async early() {
    const latent = this.latent();
    if (latent === null || !this.source.row) return;
    try {
      const [run, row, card, compare] = await Promise.all([this.source.run(), this.source.row(latent), this.source.card(latent), this.source.compare?.()]);
      if (!row || this.home || this.latent() !== latent) return; // overtaken
      this.marks ??= marksOf(run);
      Object.assign(this, { run, byLatent: new Map([[latent, row]]), compare: compare || null, shown: latent });
      const ctx = this.begin();
      this.card = h("main", { class: "page card-page" });
      this.root.replaceChildren(this.topBar(ctx), this.card);
      this.entitle(latent);
      this.putCard(latent, row, renderCard(ctx, row, card), card);
      await rested();
    } catch { /* as above */ }
  }

  // The list takes its place behind a card that is there already, which learns what it needs of it.
  join() {
    this.home = overviewPage(this.ctx, this.run, this.rows);
    this.home.element.hidden = true;
    this.card.before(this.home.element);
    this.live(this.home.live, null);
    this.card.querySelector(".card-nav").replaceWith(this.cardNav(this.shown));
    for (const node of this.card.querySelectorAll("[data-words]")) node.replaceChildren(words(this.ctx, Number(node.dataset.words)));
    this.home.later();
    this.prepareNeighbours(this.shown);
  }

  destroy() {
    this.leave();
    this.stop?.();
    this.root.removeEventListener("keydown", this.onKey);
    document.removeEventListener("keydown", this.onKey);
    this.root.removeEventListener("click", this.onClick);
    this.root.replaceChildren();
  }

  context() {
    const open = (latent) => this.go(latent);
    const keep = () => this.keep();
    const permalink = this.options.permalink || ((latent) => window.location.href.split("#")[0] + "#latent=" + latent);
    const href = (latent) => "#" + writeRoute(latent, this.state); // all of it: a link may be opened in another tab
    const row = (latent) => this.byLatent?.get(latent);
    const prepare = (latent) => this.source.prepare?.(latent);
    const refresh = () => this.refresh();
    return makeContext(this.lang, { root: this.root, run: this.run, marks: this.marks, open, keep, href, permalink, prepare, refresh, row, state: this.state });
  }

  // --- the bar at the top ---
  languageSwitch(ctx) {
    return h("div", { class: "switch", role: "group", "aria-label": ctx.t("language") }, LANGUAGES.map(([lang, name]) =>
      h("button", { type: "button", lang, "data-lang": lang, "aria-pressed": String(this.lang === lang), "aria-label": name, onclick: () => this.setLanguage(lang) }, lang.toUpperCase())));
  }

  themeButton(ctx) {
    const other = currentTheme(this.root) === "dark" ? "light" : "dark";
    const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
      svg("circle", { cx: 8, cy: 8, r: 6, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }), svg("path", { d: "M8 2a6 6 0 0 1 0 12z", fill: "currentColor" }));
    return h("button", { type: "button", class: "icon theme", "aria-label": ctx.t("theme." + other), title: ctx.t("theme." + other), onclick: (event) => {
      setTheme(this.root, other);
      prefs.set("theme", other);
      event.currentTarget.replaceWith(this.themeButton(ctx));
      this.root.querySelector(".theme").focus();
    } }, icon);
  }

  topBar(ctx) {
    const skip = (event) => {
      event.preventDefault();
      const visible = this.root.querySelector(this.latent() === null ? ".list" : "h1[tabindex]");
      visible?.focus();
    };
    return h("div", { class: "top" }, h("a", { class: "skip", href: "#", onclick: skip }, ctx.t("skip")),
      h("a", { class: "brand", href: "#" }, h("span", { class: "logo", "aria-hidden": "true" }), ctx.t("brand")),
      h("span", { class: "where muted" }, text(this.run.sae)), this.languageSwitch(ctx), this.themeButton(ctx));
  }

  // --- views ---
  begin() {
    this.root.lang = this.lang;
    if (!this.inNotebook) document.documentElement.lang = this.lang;
    return (this.ctx = this.context());
  }

  render() {
    this.leave();
    const ctx = this.begin();
    this.home = overviewPage(ctx, this.run, this.rows);
    this.card = h("main", { class: "page card-page", hidden: true });
    this.root.replaceChildren(this.topBar(ctx), this.home.element, this.card);
    this.live(this.home.live, null);
    this.home.later();
    return this.route();
  }

  live(holder, latent, contexts = []) {
    if (!this.source.live || !holder) return;
    holder.hidden = false;
    const undo = mountLive(holder, this.source.live, { ...this.ctx, latent, text: contexts[0] && fires(contexts[0]) });
    if (undo) this.leaving.push([holder, undo]);
  }

  leave(inside = this.root) {
    this.leaving = this.leaving.filter(([holder, undo]) => !inside.contains(holder) || undo());
  }

  route() {
    const latent = this.latent();
    const list = this.home.element;
    const wasCard = !this.card.hidden;
    if (latent !== null && !list.hidden) this.scroll = this.scrolled();
    list.hidden = latent !== null;
    this.card.hidden = latent === null;
    this.entitle(latent);
    if (latent !== null) return this.showCard(latent);
    this.leave(this.card);
    this.card.replaceChildren();
    if (!wasCard) return undefined;
    if (this.marks.stale) this.marks.changed();
    this.scrollTo(this.scroll || 0);
    if (this.shown !== undefined) this.home.list.selectLatent(this.shown);
    if (this.toSearch) this.home.list.search.focus();
    this.toSearch = false;
    return undefined;
  }

  scrolled() { return this.inNotebook ? this.root.scrollTop : window.scrollY; }
  scrollTo(y) {
    if (this.inNotebook) this.root.scrollTop = y;
    else window.scrollTo(0, y);
  }

  entitle(latent) {
    if (!this.inNotebook) document.title = (latent === null ? "" : `${this.ctx.t("latent")} ${latent} · `) + this.run.title;
  }

  // Next and previous follow the list as it is filtered and sorted; a latent outside it follows the whole folder.
  neighbours(latent) {
    if (!this.home) return {};
    let order = this.home.list.current();
    let at = order.findIndex((row) => row.latent === latent);
    if (at < 0) [order, at] = [this.rows, this.rows.findIndex((row) => row.latent === latent)];
    return { at, n: order.length, previous: order[at - 1], next: order[at + 1] };
  }

  cardNav(latent) {
    const ctx = this.ctx;
    const { at, n, previous, next } = this.neighbours(latent);
    const step = (row, key, rel, label) => row
      ? h("a", { class: "step", rel, href: ctx.href(row.latent), "aria-label": ctx.t(key) + ": " + row.latent }, label)
      : h("span", { class: "step off", "aria-hidden": "true" }, label);
    return h("nav", { class: "card-nav", "aria-label": ctx.t("latents") },
      h("a", { class: "back", href: "#" }, "← " + ctx.t("back")),
      h("span", { class: "muted where-at" }, n && ctx.t("position", { i: ctx.integer(at + 1), n: ctx.integer(n) })),
      step(previous, "previous", "prev", "‹ " + ctx.t("previous")), step(next, "next", "next", ctx.t("next") + " ›"));
  }

  async showCard(latent) {
    const ctx = this.ctx;
    const row = this.byLatent.get(latent);
    this.shown = latent;
    this.leave(this.card);
    const back = h("a", { class: "back", href: "#" }, "← " + ctx.t("back"));
    if (!row) return this.card.replaceChildren(back, notice(ctx.t("no.latent", { latent })));
    let content, card;
    try {
      const wide = this.source.wide && (() => this.source.wide(latent));
      card = await this.source.card(latent);
      content = renderCard({ ...ctx, wide, tryable: Boolean(this.source.live) }, row, card);
    } catch (error) {
      content = failure(ctx, error);
    }
    if (this.latent() !== latent || ctx !== this.ctx) return undefined; // overtaken by the next key
    return this.putCard(latent, row, content, card);
  }

  putCard(latent, row, content, card) {
    const ctx = this.ctx;
    const match = this.compare && compareView(ctx, this.compare, row);
    const live = content.querySelector(".live") ?? h("section", { class: "panel live", hidden: true }); // where no card could be read
    this.card.replaceChildren(this.cardNav(latent), h("div", { class: "beside" }, content, match), ...(content.contains(live) ? [] : [live]), keyHelp(ctx));
    this.live(live, latent, card?.groups[0]?.contexts);
    this.card.querySelector("h1")?.focus({ preventScroll: true });
    this.scrollTo(0);
    this.prepareNeighbours(latent);
  }

  prepareNeighbours(latent) {
    if (!this.home || !this.source.prepare) return;
    whenIdle(() => {
      const { previous, next } = this.neighbours(latent);
      for (const row of [next, previous]) if (row) this.source.prepare(row.latent);
    });
  }

  async setLanguage(lang) {
    const y = this.scrolled();
    this.lang = this.state.lang = lang;
    prefs.set("lang", lang);
    this.keep();
    await (this.home ? this.render() : this.early());
    this.root.querySelector(`[data-lang="${lang}"]`)?.focus({ preventScroll: true });
    this.scrollTo(y);
  }

  // --- keys ---
  stepList(by) {
    const fresh = !document.activeElement?.closest?.(".latents");
    this.home.list.select(fresh ? Math.max(0, this.state.list.selected) : this.state.list.selected + by);
  }

  stepCard(by) {
    const { previous, next } = this.neighbours(this.latent());
    const row = by > 0 ? next : previous;
    if (row) this.go(row.latent);
  }

  actions() {
    const list = () => this.home.list;
    if (this.latent() === null) {
      return { j: () => this.stepList(1), k: () => this.stepList(-1), Escape: () => list().clear(), "/": () => { list().search.focus(); list().search.select(); } };
    }
    return { j: () => this.stepCard(1), k: () => this.stepCard(-1), Escape: () => this.go(null), "/": () => { this.toSearch = true; this.go(null); } };
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return undefined;
    const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (writing && event.key === "Escape") {
      event.preventDefault(); // the browser would empty the box without telling anyone
      return event.target.blur();
    }
    if (writing && event.target === this.home?.list.search && event.key === "Enter") return this.home.list.openSelected();
    const action = !writing && this.actions()[event.key];
    if (!action) return undefined;
    event.preventDefault();
    return this.home ? action() : this.late.push(action); // before the list is read, as soon as it is
  }
}

// Resolves when what was last put on the page has been drawn; a page that is not in sight does not wait for that.
const painted = () => new Promise((resolve) => {
  window.requestAnimationFrame(() => window.setTimeout(resolve));
  window.setTimeout(resolve, 250);
});
const rested = () => painted().then(() => new Promise(whenIdle));
const notice = (message) => h("p", { class: "notice", role: "alert" }, message);
// A source may say in both languages what is wrong and what to do; else it is a file that cannot be read.
const failure = (ctx, error) => notice(error.said?.[ctx.lang] || ctx.t("load.failed", { file: error.message }));
