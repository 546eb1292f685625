// Another SAE beside this one: the latent whose decoder direction is nearest, as a card of its own.

const loaded = new WeakMap();

function openOther(compare) {
  if (!loaded.has(compare)) {
    loaded.set(compare, Promise.all([compare.matches(), compare.source.rows(), compare.source.run()]).then(([matches, columns, run]) =>
      ({ matches, run, rows: new Map(rowsOf(columns).map((row) => [row.latent, row])) })).catch((error) => { loaded.delete(compare); throw error; }));
  }
  return loaded.get(compare);
}

async function fillOther(ctx, compare, row, holder) {
  const { matches, rows, run } = await openOther(compare);
  const [latent, cosine] = [matches.latent[row.latent], matches.cosine[row.latent]];
  const mutual = matches.back[latent] === row.latent;
  const card = await compare.source.card(latent);
  const other = { ...ctx, run, marks: null, tryable: false, row: (index) => rows.get(index), href: () => null, permalink: ctx.permalink, wide: compare.source.wide && (() => compare.source.wide(latent)) };
  const facts = ctx.t("match.is", { sae: compare.name, latent, cosine: ctx.fixed(cosine) }) + " " + ctx.t(mutual ? "match.mutual" : "match.one.way", { back: matches.back[latent] });
  const content = renderCard(other, rows.get(latent), card);
  content.querySelector("h1").replaceWith(h("h2", { class: "called" }, content.querySelector("h1").textContent));
  content.querySelector(".copies")?.remove();
  holder.replaceChildren(h("p", { class: "match" }, text(facts)), content);
}

// A section that opens on demand; the other SAE is not read before.
function compareView(ctx, compare, row) {
  const holder = h("div", { class: "other-sae" }, h("p", { class: "muted" }, ctx.t("loading")));
  const section = h("details", { class: "panel compare", open: ctx.state.comparing }, h("summary", {}, h("h2", {}, ctx.t("compare", { sae: compare.name }))), holder);
  let asked = false;
  const open = () => {
    ctx.state.comparing = section.open;
    if (!section.open || asked) return;
    asked = true;
    fillOther(ctx, compare, row, holder).catch((error) => { asked = false; holder.replaceChildren(failure(ctx, error)); });
  };
  section.addEventListener("toggle", open);
  if (section.open) open();
  return section;
}
