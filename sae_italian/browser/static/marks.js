// What a reader keeps of latents: stars, named lists and notes, in this browser alone; exported and imported as JSON.

const STAR = "★"; // the list of the stars
const NOTED = "✎"; // not a list: whatever has a note
const MARKS = "sae-italian-marks";

function marksOf(run) {
  const { model, hook_name: hook, d_sae: size } = run;
  const key = ["marks", model, hook, size].join(".");
  const held = Object.create(null);
  const of = (latent) => held[latent] ?? { lists: [], note: "" };
  const marks = { changed() {} }; // what shows them says what to do then
  function set(latent, change) {
    held[latent] = { ...of(latent), ...change };
    if (!held[latent].lists.length && !held[latent].note) delete held[latent];
  }
  function keep() {
    prefs.set(key, JSON.stringify(held));
    marks.changed();
  }
  function take(found) {
    for (const [latent, { lists = [], note = "" }] of Object.entries(found)) {
      if (!/^\d+$/.test(latent) || latent >= size || !Array.isArray(lists)) continue;
      set(latent, { lists: [...new Set([...of(latent).lists, ...lists.map(String)])], note: String(note) || of(latent).note });
    }
  }
  try { take(JSON.parse(prefs.get(key)) ?? {}); } catch { /* not ours */ }
  return Object.assign(marks, {
    of,
    put(latent, change) { set(latent, change); keep(); },
    has: (latent, list) => (list === NOTED ? Boolean(of(latent).note) : of(latent).lists.includes(list)),
    counts() {
      const all = Object.values(held).flatMap(({ lists, note }) => [...lists, ...(note ? [NOTED] : [])]);
      return Object.entries(Object.groupBy([...all].sort(), (name) => name)).map(([name, some]) => [name, some.length]);
    },
    text: () => JSON.stringify({ format: MARKS, model, hook_name: hook, d_sae: size, latents: held }, null, 2),
    // Adds what a file holds. Throws for one of another SAE, or of another kind.
    read(text) {
      const file = JSON.parse(text);
      if (file?.format !== MARKS || file.hook_name !== hook || file.d_sae !== size || file.model !== model) throw new Error("another SAE");
      take(file.latents);
      keep();
    },
  });
}

// --- on a card: the star, and what is written down ---
function starButton(ctx, latent) {
  const button = h("button", { type: "button", class: "copy star", onclick() {
    const { lists } = ctx.marks.of(latent);
    ctx.marks.put(latent, { lists: lists.includes(STAR) ? lists.filter((name) => name !== STAR) : [...lists, STAR] });
    show();
  } }, STAR + " " + ctx.t("star"));
  const show = () => button.setAttribute("aria-pressed", String(ctx.marks.has(latent, STAR)));
  show();
  return button;
}

function notesPanel(ctx, latent) {
  const { lists, note } = ctx.marks.of(latent);
  const own = lists.filter((name) => name !== STAR);
  const change = (made) => () => ctx.marks.put(latent, made());
  const names = h("input", { type: "text", value: own.join(", "), onchange: change(() => ({
    lists: [...ctx.marks.of(latent).lists.filter((name) => name === STAR), ...new Set(names.value.split(",").map((name) => name.trim()).filter(Boolean))] })) });
  const words = h("textarea", { rows: 2, onchange: change(() => ({ note: words.value.trim() })) }, note);
  return h("details", { class: "panel mine", open: Boolean(note || own.length) }, h("summary", {}, h("h3", {}, ctx.t("mine"))),
    h("p", { class: "note muted" }, ctx.t("mine.note")),
    h("label", {}, ctx.t("mine.lists"), names), h("label", {}, ctx.t("mine.words"), words));
}

// --- beside the list: which of them to show, and the file ---
function marksBar(ctx, state, onChange, redraw) {
  const told = h("span", { role: "status", class: "muted" });
  const say = (words, role) => { told.setAttribute("role", role); told.textContent = words; };
  const select = h("select", { "aria-label": ctx.t("list"), onchange: (event) => onChange({ list: event.target.value }) });
  const option = ([name, n]) => h("option", { value: name, selected: state.list === name }, `${name} ${[STAR, NOTED].includes(name) ? ctx.t("list." + name) : ""} (${ctx.integer(n)})`);
  const fill = () => select.replaceChildren(h("option", { value: "" }, ctx.t("any.list")), ...ctx.marks.counts().map(option));
  fill();
  ctx.marks.changed = () => { fill(); redraw(); };
  const save = () => {
    const href = URL.createObjectURL(new Blob([ctx.marks.text()], { type: "application/json" }));
    h("a", { href, download: `${ctx.run.sae}-${ctx.t("mine.file")}.json` }).click();
    window.setTimeout(() => URL.revokeObjectURL(href), 1000);
  };
  const file = h("input", { type: "file", accept: ".json,application/json", class: "hidden", "aria-label": ctx.t("import"), async onchange() {
    try {
      ctx.marks.read(await file.files[0].text());
      say(ctx.t("imported"), "status");
    } catch {
      say(ctx.t("import.bad"), "alert");
    }
  } });
  return h("fieldset", { class: "marks-bar" }, h("legend", {}, ctx.t("list")), select, " ",
    h("button", { type: "button", class: "link", onclick: save }, ctx.t("export")), " ",
    h("button", { type: "button", class: "link", onclick: () => file.click() }, ctx.t("import")), file, " ", told);
}
