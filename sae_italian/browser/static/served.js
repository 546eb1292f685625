// The source of a page from the server: records and live work as JSON, by relative addresses of the same origin only.
import { mount } from "./main.js";

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch("api/" + path, options);
  } catch {
    throw fault("Il server non risponde: è ancora in funzione?", "The server does not answer; is it still running?");
  }
  let value;
  try {
    value = await response.json();
  } catch {
    throw fault(`Risposta incompleta (${response.status}).`, `The answer is incomplete (${response.status}).`);
  }
  if (!response.ok) throw fault(value.error_it, value.error_en);
  return value;
}

// An error that already says what to do, in both languages.
function fault(it, en) {
  return Object.assign(new Error(en), { said: { it, en } });
}

// The records of one cache; what cannot be had now is asked for again.
function records(prefix) {
  let facts = null;
  const about = () => (facts ??= ask(prefix + "run").catch((error) => { facts = null; throw error; }));
  return {
    about,
    run: async () => (await about()).run,
    rows: () => ask(prefix + "rows"),
    card: (latent) => ask(`${prefix}card/${latent}`),
    wide: (latent) => ask(`${prefix}wide/${latent}`),
  };
}

async function start() {
  const element = document.getElementById("app");
  const source = records("");
  const about = await source.about().catch(() => null); // what failed is shown by the page itself
  if (about?.compare) source.compare = async () => ({ name: about.compare, source: records("other/"), matches: () => ask("matches") });
  const works = about?.live;
  if (works) {
    source.live = {
      llm: works.llm,
      tokens: (sentence) => ask("live/tokens", { sentence }),
      steer: (given) => ask("live/steer", given),
      ablate: (given) => ask("live/ablate", given),
      explain: (given) => ask("live/explain", given),
    };
  }
  await mount(element, source);
}
start();
