// The source behind a server or a notebook's kernel: `ask(name, argument)` answers with a record, or with live work.
function remoteSource(ask, prefix = "") {
  let facts = null; // what cannot be had now is asked for again
  const about = () => (facts ??= ask(prefix + "run").catch((error) => { facts = null; throw error; }));
  return {
    about,
    run: async () => (await about()).run,
    rows: () => ask(prefix + "rows"),
    card: (latent) => ask(prefix + "card", latent),
    wide: (latent) => ask(prefix + "wide", latent),
  };
}

async function mountRemote(element, ask, options) {
  const source = remoteSource(ask);
  const about = await source.about().catch(() => null); // what failed is shown by the page itself
  if (about?.compare) source.compare = async () => ({ name: about.compare, source: remoteSource(ask, "other/"), matches: () => ask("matches") });
  if (about?.live) {
    source.live = { llm: about.live.llm, tokens: (sentence) => ask("tokens", { sentence }) };
    if (about.live.near) source.live.near = (sentence) => ask("near", { sentence });
    for (const work of ["steer", "ablate", "explain"]) source.live[work] = (given) => ask(work, given);
  }
  return mount(element, source, options);
}

// An error that already says what to do, in both languages.
const fault = (it, en) => Object.assign(new Error(en), { said: { it, en } });
