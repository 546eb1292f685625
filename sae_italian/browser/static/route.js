// Where the page is and what it shows, as one text: `latent=12&q=perche&sort=density&order=up&lang=en`. What is not said is
// as at first. It stands in the address of a page, and is kept in memory in a notebook.

const SAID = { q: "query", filter: "filter", label: "label", list: "list", sort: "sort" }; // in the address: in the list's state
const LONG_SENTENCE = 400; // a longer one does not go into the address

function readRoute(route) {
  const said = new URLSearchParams(route);
  const list = selectState();
  for (const [word, name] of Object.entries(SAID)) list[name] = said.get(word) ?? list[name];
  if (!Object.hasOwn(FILTERS, list.filter)) list.filter = "all";
  if (!Object.hasOwn(COLUMNS, list.sort)) list.sort = selectState().sort;
  list.descending = said.get("order") !== "up";
  for (const name of RANGES.filter((one) => said.has(one))) {
    const ends = said.get(name).split("~").map((end) => (end === "" || !Number.isFinite(Number(end)) ? null : Number(end)));
    list.ranges[name] = [ends[0] ?? null, ends[1] ?? null];
  }
  const latent = /^\d+$/.test(said.get("latent") ?? "") ? Number(said.get("latent")) : null;
  return { latent, list, lang: LANGUAGES.some(([lang]) => lang === said.get("lang")) ? said.get("lang") : null, sentence: said.get("sentence") };
}

function writeRoute(latent, { list, lang, sentence }) {
  const said = new URLSearchParams();
  const first = selectState();
  if (latent !== null) said.set("latent", latent);
  for (const [word, name] of Object.entries(SAID)) if (list[name] !== first[name]) said.set(word, list[name]);
  if (!list.descending) said.set("order", "up");
  for (const [name, ends] of Object.entries(list.ranges)) if (ends.some((end) => end !== null)) said.set(name, ends.map((end) => end ?? "").join("~"));
  if (lang) said.set("lang", lang);
  if (sentence && sentence.length < LONG_SENTENCE) said.set("sentence", sentence);
  return String(said);
}

// `go` is a step that the reader can take back, `keep` is not; `watch` hears of steps alone.
function addressRouter() {
  return {
    current: () => window.location.hash.slice(1),
    go(route) { window.location.hash = route; },
    keep(route) { window.history.replaceState(null, "", "#" + route); },
    watch(changed) {
      window.addEventListener("hashchange", changed);
      return () => window.removeEventListener("hashchange", changed);
    },
  };
}

function memoryRouter() {
  let route = "";
  let tell = () => {};
  return {
    current: () => route,
    go(to) { route = to; tell(); },
    keep(to) { route = to; },
    watch(changed) {
      tell = changed;
      return () => {};
    },
  };
}
