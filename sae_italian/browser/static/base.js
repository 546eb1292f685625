// What every view needs: DOM building (text only, never markup), preferences, numbers, text folding.

// --- preferences; file:// may refuse localStorage ---
const prefs = {
  get(key) {
    try { return window.localStorage.getItem("sae-italian." + key); } catch { return null; }
  },
  set(key, value) {
    try { window.localStorage.setItem("sae-italian." + key, value); return true; } catch { return false; } // kept for this page only
  },
};

const LANGUAGES = [["it", "Italiano"], ["en", "English"]];

// A notebook's theme, as JupyterLab and VS Code say it of their page.
function followHost(root) {
  const look = () => {
    const { jpThemeLight: light, vscodeThemeKind: kind } = document.body.dataset;
    if (light || kind) setTheme(root, light === "true" || /light/.test(kind) ? "light" : "dark");
  };
  new MutationObserver(look).observe(document.body, { attributes: true });
  look();
}
function setTheme(root, theme) {
  root.dataset.theme = theme;
}
function currentTheme(root) {
  return root.dataset.theme || (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}
function preferredTheme() {
  const theme = prefs.get("theme");
  return theme === "dark" || theme === "light" ? theme : null;
}

// Calls when the theme changes, by the button or in the system, as long as `alive` says so.
function onTheme(root, alive, changed) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const watch = new MutationObserver(() => look());
  const look = () => {
    if (alive()) return changed();
    watch.disconnect();
    return system.removeEventListener("change", look);
  };
  watch.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  system.addEventListener("change", look);
}

// --- DOM ---
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child); // a string becomes a text node
  }
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Text from the corpus: isolated, so that its direction marks end where it ends.
const text = (text) => h("bdi", {}, text);

// At most so many letters of a text: none of them is halved.
const cut = (text, most) => text.slice(0, most).replace(/[\uD800-\uDBFF]$/, "");

// --- tokens with their white space visible ---
const SIGNS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
const INVISIBLE = /^ +| +$|[\n\r\t\u00a0]|(?!\u200d)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;
const MAX_TOKEN = 48;

function sign(run) {
  if (run[0] in SIGNS) return [...run].map((c) => SIGNS[c]).join("");
  return "U+" + run.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

function token(token, title) {
  const short = token.length > MAX_TOKEN ? cut(token, MAX_TOKEN) + "…" : token;
  const parts = [];
  let end = 0;
  for (const match of short.matchAll(INVISIBLE)) {
    parts.push(short.slice(end, match.index), h("span", { class: "ws" }, sign(match[0])));
    end = match.index + match[0].length;
  }
  parts.push(short.slice(end));
  if (!token) parts.push(h("span", { class: "ws" }, "∅"));
  return h("span", { class: "tok", title: title || (short === token ? null : token.slice(0, 500)) }, h("bdi", {}, parts));
}

// Gold and UD labels in words: "Gender=Fem,Number=Plur" is "femminile plurale" and "feminine plural".
function partName(part, language) {
  const [feature, value = ""] = part.split("=", 2);
  const name = feature.toLowerCase() === "upos" ? "pos" : feature.toLowerCase(); // as treebanks call it
  const keys = value ? [`${name}=${value.toLowerCase()}`] : ["pos", "gender", "number"].map((one) => `${one}=${name}`); // NOUN Fem Sing
  const known = keys.map((key) => LABELS[`gold.${key}`]).find(Boolean)?.[language === "it" ? 0 : 1];
  return known ?? ((value && { lemma: `lemma «${value}»`, language: value }[name]) || part); // a language as its corpus is named
}
const labelName = (label, language) => label.split(/[ |+,]+/).filter(Boolean).map((part) => partName(part, language)).join(" ");

// --- search text: case, accents and kinds of apostrophe do not count ---
const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").replace(/[’‘ʼ`]/g, "'").toLowerCase();

// --- a context: language, words and numbers, and where links lead; what a view is handed ---
function makeContext(lang, host = {}) {
  const words = (key) => (LABELS["page." + key] ?? LABELS[key])?.[lang === "it" ? 0 : 1];
  const locale = lang === "it" ? "it-IT" : "en-GB";
  const format = (options) => new Intl.NumberFormat(locale, { signDisplay: "negative", useGrouping: "always", ...options });
  const later = (options) => { // a format costs a millisecond: it is made when it is first asked for
    let made = null;
    return { format: (x) => (made ??= format(options)).format(x) };
  };
  const formats = {
    integer: later({ maximumFractionDigits: 0 }),
    two: later({ maximumSignificantDigits: 2 }),
    three: later({ minimumSignificantDigits: 3, maximumSignificantDigits: 3 }),
    signed: later({ minimumFractionDigits: 2, maximumFractionDigits: 2, signDisplay: "exceptZero" }),
  };
  const fixed = [0, 1, 2, 3].map((digits) => later({ minimumFractionDigits: digits, maximumFractionDigits: digits }));
  const or = (f) => (x) => (x === null || x === undefined ? "–" : f.format(x).replace("-", "−"));
  const ctx = {
    lang,
    t: (key, vars) => (words(key) ?? key).replace(/\{(\w+)\}/g, (_, name) => vars?.[name] ?? ""),
    maybe: (key) => words(key) ?? null,
    name: (group, value) => words(group + "." + value) ?? value,
    pick: (record, field) => record[field + "_" + lang] || record[field + "_" + (lang === "it" ? "en" : "it")] || "",
    integer: or(formats.integer),
    activation: (x) => (x === 0 || Math.abs(x) >= 100 ? ctx.integer(x) : or(formats.three)(x)),
    signed: or(formats.signed),
    fixed: (x, digits = 2) => or(fixed[digits])(x),
    density: (x) => or(formats.two)(x * 100) + "\u00a0%",
    share: (x) => (x > 0 && x < 0.001 ? "< " + ctx.fixed(0.1, 1) : ctx.fixed(x * 100, 1)) + "\u00a0%",
    interval: (lo, hi, show) =>
      lo === null || hi === null || lo === undefined ? "" : `[${show(lo)}${lang === "it" ? ";" : ","} ${show(hi)}]`,
    metric(x, unit = "", after = { "%": "\u00a0%", nats: "\u00a0nat" }[unit] ?? "") { // per cent with one digit, all else with three
      if (x === null) return "–";
      return (unit === "%" ? ctx.fixed(x, 1) : Number.isInteger(x) ? ctx.integer(x) : ctx.fixed(x, Math.abs(x) >= 10 ? 1 : 3)) + after;
    },
    date: (iso) => {
      const date = new Date(iso);
      return Number.isNaN(date.getTime()) ? iso : date.toLocaleDateString(locale, { dateStyle: "long" });
    },
    ...host,
  };
  return ctx;
}

function preferredLanguage() {
  const kept = prefs.get("lang");
  if (kept === "it" || kept === "en") return kept;
  return (navigator.language || "it").toLowerCase().startsWith("en") ? "en" : "it";
}

// Copies a text and says so in the button's own label for a while; where the clipboard is refused, a field is shown.
function copyButton(ctx, label, make) {
  const button = h("button", { type: "button", class: "copy" }, label);
  button.addEventListener("click", async () => {
    const value = make();
    try {
      await navigator.clipboard.writeText(value);
    } catch {
      const field = h("textarea", { class: "copy-field", readonly: true, rows: 2, "aria-label": label }, value);
      button.parentElement.querySelector(".copy-field")?.remove();
      button.parentElement.append(field);
      field.select();
      if (!document.execCommand("copy")) return;
      field.remove();
      button.focus();
    }
    button.textContent = ctx.t("copied");
    window.setTimeout(() => { button.textContent = label; }, 1600);
  });
  return button;
}

// --- rows: columns as they travel. A row reads its columns, so that 65,536 of them cost nothing before they are shown ---
function rowsOf(columns) {
  class Row {
    #at;
    constructor(at) { this.#at = at; }
    static {
      for (const [name, values] of Object.entries(columns)) {
        Object.defineProperty(this.prototype, name, { enumerable: true, get() { return values[this.#at]; } });
      }
    }
  }
  return Array.from(Object.values(columns)[0] || [], (_, at) => new Row(at));
}

function plain(row) {
  const fields = {};
  for (const name in row) fields[name] = row[name]; // those that it reads from its columns too
  return fields;
}

// --- work for when nothing else is to be done; where a browser has no word for that, soon ---
const whenIdle = (work) => (window.requestIdleCallback ? window.requestIdleCallback(work, { timeout: 500 }) : window.setTimeout(work, 30));

function keyHelp(ctx) {
  const key = (...names) => names.map((name) => h("kbd", {}, name));
  return h("footer", { class: "keys muted" },
    h("span", {}, key("j", "k"), ctx.t("keys")), h("span", {}, key("Enter"), ctx.t("keys.open")),
    h("span", {}, key("Esc"), ctx.t("keys.back")), h("span", {}, key("/"), ctx.t("keys.search")));
}
