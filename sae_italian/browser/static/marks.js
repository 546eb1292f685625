// What a reader keeps of latents: stars, named lists and notes, in this browser alone; exported and imported as JSON.

const STAR = "★"; // the list of the stars
const NOTED = "✎"; // not a list: whatever has a note
const MARKS = "sae-italian-marks";

function marksOf(run) {
  const { model, hook_name: hook, d_sae: size, sae_hash: hash = "" } = run;
  const key = ["marks", model, hook, size, hash].filter(Boolean).join(".");
  let held = {}; // by latent, all numbers
  const of = (latent) => held[latent] ?? { lists: [], note: "" };
  const marks = { stale: false, kept: true, changed() {}, star() {}, boxes() {} }; // what shows them says what to do then
  function set(latent, change) {
    held[latent] = { ...of(latent), ...change };
    if (!held[latent].lists.length && !held[latent].note) delete held[latent];
  }
  const keep = () => { marks.kept = prefs.set(key, JSON.stringify(held)); };
  function take(found) {
    for (const [latent, one] of Object.entries(found)) {
      if (!/^\d+$/.test(latent) || latent >= size) continue;
      const had = of(Number(latent));
      const lists = listed([...had.lists, ...(Array.isArray(one?.lists) ? one.lists : [])]);
      const note = typeof one?.note !== "string" || had.note.includes(one.note) ? had.note : [had.note, one.note].filter(Boolean).join("\n");
      set(Number(latent), { lists, note });
    }
  }
  function again() { // what stands in the browser: another tab may have written
    if (!marks.kept) return;
    held = {};
    try { take(JSON.parse(prefs.get(key)) ?? {}); } catch { /* not ours */ }
  }
  again(); // a card that is open shows it too: what is typed there next is written as a whole
  for (const event of ["storage", "focus", "pageshow"]) window.addEventListener(event, () => { again(); marks.stale = true; marks.star(); marks.boxes(); });
  return Object.assign(marks, {
    of,
    put(latent, change) { again(); set(latent, change); keep(); marks.stale = true; },
    has: (latent, list) => (list === NOTED ? Boolean(of(latent).note) : of(latent).lists.includes(list)),
    counts(chosen) { // the chosen one too, though nothing may be left in it
      const all = Object.values(held).flatMap(({ lists, note }) => [...lists, ...(note ? [NOTED] : [])]);
      return Object.entries({ ...(chosen && { [chosen]: [] }), ...Object.groupBy([...all].sort(), (name) => name) }).map(([name, some]) => [name, some.length]);
    },
    text: () => JSON.stringify({ format: MARKS, model, hook_name: hook, d_sae: size, sae_hash: hash, latents: held }, null, 2),
    // Adds what a file holds. Throws for one of another SAE, or of another kind.
    read(text) {
      const file = JSON.parse(text);
      if (file?.format !== MARKS || file.hook_name !== hook || file.d_sae !== size || file.model !== model || (file.sae_hash ?? hash) !== hash) throw new Error("another SAE");
      again();
      take(file.latents);
      keep();
      marks.changed();
    },
  });
}

// Names as they are written: apart by commas, each once. What says that there is a note is no name.
const listed = (names) => [...new Set(names.flatMap((name) => String(name).split(",")).map((name) => name.trim()).filter((name) => name && name !== NOTED))];

// --- on a card: the star, and what is written down. What the browser does not keep, for want of room or leave, is said ---
function write(ctx, latent, change) {
  ctx.marks.put(latent, change);
  const said = ctx.root.querySelector(".unkept");
  if (ctx.marks.kept) said?.remove();
  else if (!said) ctx.root.querySelector(".card-head").prepend(h("p", { class: "unkept tag warn", role: "alert" }, ctx.t("mine.unkept")));
}

function starButton(ctx, latent) {
  const button = h("button", { type: "button", class: "copy star", onclick() {
    const { lists } = ctx.marks.of(latent);
    write(ctx, latent, { lists: lists.includes(STAR) ? lists.filter((name) => name !== STAR) : [...lists, STAR] });
    show();
  } }, STAR + " " + ctx.t("star"));
  const show = () => button.setAttribute("aria-pressed", String(ctx.marks.has(latent, STAR)));
  (ctx.marks.star = show)();
  return button;
}

function notesPanel(ctx, latent) {
  const own = () => ctx.marks.of(latent).lists.filter((name) => name !== STAR);
  const written = () => listed([names.value.replaceAll(STAR, "")]);
  const change = (made) => () => write(ctx, latent, made()); // with each letter: a page may be closed at any time
  const names = h("input", { type: "text", oninput: change(() => ({ lists: [...(ctx.marks.has(latent, STAR) ? [STAR] : []), ...written()] })) });
  const words = h("textarea", { rows: 2, oninput: change(() => ({ note: words.value.trim() })) });
  (ctx.marks.boxes = () => { // what says the same stays as it is being typed
    if (String(written()) !== String(own())) names.value = own().join(", ");
    if (words.value.trim() !== ctx.marks.of(latent).note.trim()) words.value = ctx.marks.of(latent).note;
  })();
  return h("details", { class: "panel mine", open: Boolean(words.value || names.value) }, h("summary", {}, h("h3", {}, ctx.t("mine"))),
    h("p", { class: "note muted" }, ctx.t("mine.note")),
    h("label", {}, ctx.t("mine.lists"), names), h("label", {}, ctx.t("mine.words"), words));
}

// --- beside the list: which of them to show, and the file ---
function marksBar(ctx, state, onChange, redraw) {
  const told = h("span", { role: "status", class: "muted" });
  const say = (words, role) => { told.setAttribute("role", role); told.textContent = words; };
  const select = h("select", { "aria-label": ctx.t("list"), onchange: (event) => onChange({ list: event.target.value }) });
  const option = ([name, n]) => h("option", { value: name, selected: state.list === name }, `${name} ${[STAR, NOTED].includes(name) ? ctx.t("list." + name) : ""} (${ctx.integer(n)})`);
  const fill = () => select.replaceChildren(h("option", { value: "" }, ctx.t("any.list")), ...ctx.marks.counts(state.list).map(option));
  fill();
  ctx.marks.changed = () => { ctx.marks.stale = false; fill(); redraw(); };
  const save = () => {
    const href = URL.createObjectURL(new Blob([ctx.marks.text()], { type: "application/json" }));
    h("a", { href, download: `${ctx.run.sae}-${ctx.t("mine.file")}.json` }).click();
    window.setTimeout(() => URL.revokeObjectURL(href), 1000);
  };
  const file = h("input", { type: "file", accept: ".json,application/json", class: "hidden", "aria-label": ctx.t("import"), async onchange() {
    try {
      ctx.marks.read(await file.files[0].text());
      say(...(ctx.marks.kept ? [ctx.t("imported"), "status"] : [ctx.t("mine.unkept"), "alert"]));
    } catch {
      say(ctx.t("import.bad"), "alert");
    }
    file.value = ""; // the same file, mended, can be chosen again
  } });
  return h("fieldset", { class: "marks-bar" }, h("legend", {}, ctx.t("list")), select, " ",
    h("button", { type: "button", class: "link", onclick: save }, ctx.t("export")), " ",
    h("button", { type: "button", class: "link", onclick: () => file.click() }, ctx.t("import")), file, " ", told);
}
