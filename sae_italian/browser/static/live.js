// Live work in one element: a sentence's latents; on a latent's card also steering, ablation and an explanation now.
// Every text from model, corpus or keyboard goes in as a text node.

function mountLive(element, live, context) {
  const view = { live, ctx: context, text: context.text, say: (key, vars) => context.t("live." + key, vars), memory: (context.state.live ??= {}), gone: false };
  const parts = context.latent === null ? [sentencePart, ...(live.near ? [nearPart] : [])] : [sentencePart, steerPart, ablatePart, explainPart];
  const title = view.say(context.latent === null ? "title" : "title.latent");
  element.replaceChildren(h("h2", {}, title), h("div", { class: "live-parts" }, parts.map((part) => part(view))));
  if (context.latent === null && context.state.sentence) element.querySelector("form").requestSubmit(); // the address has one
  return () => { view.gone = true; };
}

// --- a form, the work behind it, and what it shows ---
let last = 0;

function field(view, name, label, value, rows) {
  last += 1;
  const id = "live-" + last;
  const input = h(rows ? "textarea" : "input", { id, name, rows, maxlength: 10000, autocomplete: "off", spellcheck: "false", lang: "it" });
  input.value = view.memory[name] ?? value;
  input.addEventListener("input", () => { view.memory[name] = input.value; });
  if (rows) {
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      input.form.requestSubmit();
    });
  }
  return { input, element: h("div", { class: "live-field" }, h("label", { for: id }, label), input) };
}

function part(view, name, note, fields, work, show) {
  const button = h("button", { type: "submit", class: "live-go" }, view.say(name + ".go"));
  const status = h("p", { class: "live-status muted", role: "status" });
  const result = h("div", { class: "live-result" });
  const form = h("form", { class: "live-form", "data-work": name }, fields.map((one) => one.element), button);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.disabled) return;
    button.disabled = true;
    status.setAttribute("role", "status");
    status.textContent = view.say("busy");
    try {
      const found = await work();
      if (!view.gone) result.replaceChildren(...show(found));
      status.textContent = view.say("done");
    } catch (error) {
      result.replaceChildren();
      status.setAttribute("role", "alert");
      status.textContent = error.said?.[view.ctx.lang] || error.message;
    }
    button.disabled = false;
  });
  return h("section", { class: "live-part", "data-part": name }, h("h3", {}, view.say(name)),
    h("p", { class: "note muted" }, note), form, status, result);
}

// Each cell knows its column's head: on a narrow screen rows are stacked and the heads are not there.
function table(heads, rows) {
  const names = heads.map(([head]) => (typeof head === "string" ? head : head.textContent));
  for (const row of rows) [...row.children].forEach((cell, index) => { cell.dataset.head = names[index]; });
  return h("div", { class: "scroll" }, h("table", { class: "stacked" },
    h("thead", {}, h("tr", {}, heads.map(([head, className]) => h("th", { scope: "col", class: className }, head)))), h("tbody", {}, rows)));
}
const link = (ctx, latent) => h("a", { href: ctx.href(latent) }, String(latent));

// --- a sentence: its latents by token, and the strongest of all ---
function sentencePart(view) {
  const { ctx, live } = view;
  const sentence = field(view, "sentence", view.say("sentence"), view.text || view.ctx.state.sentence || view.say("example"), 2);
  return part(view, "sentence", view.say("sentence.note"), [sentence], () => {
    ctx.state.sentence = sentence.input.value;
    ctx.keep();
    return live.tokens(sentence.input.value);
  }, (found) => {
    const detail = h("div", { class: "live-detail", role: "status" }, h("p", { class: "muted" }, view.say("pick")));
    const heats = heatsOf(found, ctx.latent);
    const pieces = found.tokens.map((piece, index) => pieceButton(view, piece, heats[index], detail));
    const silent = ctx.latent !== null && !heats.some((heat) => heat > 0);
    return [
      found.truncated && h("p", { class: "note" }, view.say("truncated", { n: ctx.integer(found.n_tokens) })),
      silent && h("p", { class: "note" }, view.say("silent.here", { latent: ctx.latent })),
      h("div", { class: "live-tokens", dir: "auto" }, pieces), detail, strongest(view, found),
    ].filter(Boolean);
  });
}

// On a card the tint is this latent's activation; on the list's page that of the strongest latent of each token.
function heatsOf(found, latent) {
  const values = found.tokens.map(({ latents }) => (latent === null ? latents[0]?.[1] : latents.find(([other]) => other === latent)?.[1]) || 0);
  const top = Math.max(0, ...values);
  return values.map((value) => (top > 0 ? value / top : 0));
}

function pieceButton(view, piece, heat, detail) {
  const button = h("button", { type: "button", class: "piece", "--heat": Math.round(heat * 1000) / 1000, "aria-pressed": "false" }, token(piece.text));
  button.addEventListener("click", () => {
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    const rows = piece.latents.map(([latent, value]) => h("tr", {}, h("th", { scope: "row" }, link(view.ctx, latent)),
      h("td", { class: "num" }, view.ctx.activation(value)), h("td", { class: "wide" }, about(view.ctx, latent))));
    detail.replaceChildren(h("h4", {}, view.say("of.token"), " ", token(piece.text)),
      rows.length ? table([[view.say("latent")], [view.say("activation"), "num"], [view.say("explanation"), "wide"]], rows) : h("p", { class: "muted" }, view.say("silent")));
  });
  return button;
}

function about(ctx, latent) {
  const row = ctx.row?.(latent);
  const words = row ? headline(ctx, row) : "";
  return h("span", { class: "clamp" }, text(words.length > 300 ? cut(words, 300) + "…" : words || "–"));
}

const SHOWN = 10;

function strongest(view, found) {
  const { ctx } = view;
  const rows = found.strongest.map((one, index) => h("tr", { class: one.latent === ctx.latent ? "selected" : null, hidden: index >= SHOWN },
    h("th", { scope: "row" }, link(ctx, one.latent)), h("td", { class: "num strong" }, ctx.activation(one.value)),
    h("td", { class: "num" }, one.share === null ? "–" : ctx.share(one.share)), h("td", {}, token(found.tokens[one.token].text)), h("td", { class: "wide" }, about(ctx, one.latent))));
  const heads = [[view.say("latent")], [view.say("activation"), "num"], [view.say("share"), "num"], [view.say("on")], [view.say("explanation"), "wide"]];
  const more = rows.length > SHOWN && h("button", { type: "button", class: "link", onclick() {
    for (const row of rows) row.hidden = false;
    more.remove();
  } }, view.say("all", { n: rows.length }));
  return h("section", { class: "live-strongest" }, h("h4", {}, view.say("strongest")),
    rows.length ? [table(heads, rows), more] : h("p", { class: "muted" }, view.say("silent")));
}

// --- latents that are about what a text says, whatever its words (opening.py) ---
function nearPart(view) {
  const { ctx, live } = view;
  const meaning = field(view, "meaning", view.say("meaning"), "", 1);
  const row = (one) => h("tr", {}, h("th", { scope: "row" }, link(ctx, one.latent)), h("td", { class: "num" }, ctx.fixed(one.cosine)), h("td", { class: "wide" }, about(ctx, one.latent)));
  const heads = [[view.say("latent")], [view.say("cosine"), "num"], [view.say("explanation"), "wide"]];
  return part(view, "near", view.say("near.note"), [meaning], () => live.near(meaning.input.value), (found) => [table(heads, found.near.map(row))]);
}

// --- steering: continuations with and without ---
function numbersOf(view, written) {
  const numbers = written.replace(/−/g, "-").replace(/,/g, ".").split(/[\s;]+/).filter(Boolean).map(Number);
  if (!numbers.length || numbers.length > 6 || numbers.some((x) => !Number.isFinite(x))) throw new Error(view.say("strengths.bad"));
  return numbers;
}

function steerPart(view) {
  const { ctx, live } = view;
  const prompt = field(view, "prompt", view.say("prompt"), view.text || "La ragazza", 2);
  const strengths = field(view, "strengths", view.say("strengths"), ctx.lang === "it" ? "-1 0,5 1" : "-1 0.5 1");
  const work = async () => live.steer({ latent: ctx.latent, prompt: prompt.input.value, strengths: numbersOf(view, strengths.input.value) });
  return part(view, "steer", view.say("steer.note"), [prompt, strengths], work, (found) => {
    const row = (one, plain) => h("tr", { class: plain ? "plain" : null, "data-strength": one.strength },
      h("th", { scope: "row", class: "num" }, plain ? view.say("without") : ctx.signed(one.strength)),
      h("td", { class: "wide words", dir: "auto" }, h("span", { class: "muted" }, text(found.prompt)), h("span", { class: "written" }, text(one.text))),
      h("td", { class: "num" }, plain ? "–" : ctx.signed(one.cost)), h("td", { class: "num" }, plain ? "–" : ctx.fixed(one.divergence)));
    const cost = h("abbr", { title: view.say("cost.note") }, view.say("cost"));
    return [table([[view.say("strength"), "num"], [view.say("continuation"), "wide"], [cost, "num"], [view.say("kl.steer"), "num"]],
      [row(found.unsteered, true), ...found.steered.map((one) => row(one, false))])];
  });
}

// --- ablation: next tokens that change ---
function ablatePart(view) {
  const { ctx, live } = view;
  const prompt = field(view, "prompt", view.say("prompt"), view.text || "La ragazza", 2);
  const work = () => live.ablate({ latent: ctx.latent, prompt: prompt.input.value });
  const moves = (list) => h("td", { class: "half" }, h("ul", { class: "moves" }, list.slice(0, 6).map((one) => h("li", {}, token(one.token), " ", h("span", { class: "num" }, ctx.signed(one.logit))))));
  return part(view, "ablate", view.say("ablate.note"), [prompt], work, (found) => {
    if (!found.positions.length) return [h("p", { class: "note" }, view.say("silent.here", { latent: ctx.latent }))];
    const rows = found.positions.map((at) => h("tr", {}, h("th", { scope: "row" }, token(at.token)), h("td", { class: "num" }, ctx.activation(at.activation)),
      moves(at.lowered), moves(at.raised), h("td", { class: "num" }, ctx.fixed(at.divergence, 3))));
    const more = found.n_active > found.positions.length && h("p", { class: "note" }, view.say("more.positions", { n: found.positions.length, all: found.n_active }));
    return [table([[view.say("on")], [view.say("activation"), "num"], [view.say("lowered")], [view.say("raised")], [view.say("kl.ablate"), "num"]], rows), more].filter(Boolean);
  });
}

// --- an explanation now ---
function explainPart(view) {
  const { ctx, live } = view;
  const note = view.say(live.llm ? "explain.note.llm" : "explain.note");
  const kept = (found) => {
    if (!found.explanations.some((one) => one.status === "ok")) return null;
    if (found.not_kept) return h("p", { class: "note", "data-kept": "no" }, text(view.say("not.kept", { why: found.not_kept })));
    return h("p", { class: "note", "data-kept": "yes" }, view.say("kept"), " ", h("button", { type: "button", class: "link", onclick: () => ctx.refresh() }, view.say("kept.show")));
  };
  return part(view, "explain", note, [], () => live.explain({ latent: ctx.latent }), (found) => [h("dl", { class: "live-explained" }, found.explanations.map((one) => {
    const words = ctx.pick(one, "text");
    const numbers = one.precision !== null && view.say("rule.numbers", { precision: ctx.fixed(one.precision), recall: ctx.fixed(one.recall) });
    return [h("dt", {}, view.say(one.kind === "llm" ? "llm" : "rule"), one.kind === "llm" && [" ", h("small", {}, text(one.explainer))]),
      h("dd", { "data-explainer": one.kind }, text(words || view.say("status." + one.status)), numbers && h("small", {}, " " + numbers), one.problem && h("small", {}, text(" " + one.problem)))];
  })), kept(found)].filter(Boolean));
}
