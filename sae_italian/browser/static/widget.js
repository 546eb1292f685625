// The page in a notebook's output: records and live work are messages to the kernel (anywidget's protocol).
import { mount } from "./main.js";

export function render({ model, el }) {
  const waiting = new Map();
  let last = 0;

  function ask(name, argument) {
    last += 1;
    const id = last;
    return new Promise((resolve, reject) => {
      waiting.set(id, { resolve, reject });
      model.send({ id, name, argument: argument ?? null });
    });
  }

  function answered(message) {
    const one = waiting.get(message?.id);
    if (!one) return;
    waiting.delete(message.id);
    if (message.error) one.reject(Object.assign(new Error(message.error), { said: { it: message.error_it ?? message.error, en: message.error_en ?? message.error } }));
    else one.resolve(message.value);
  }

  model.on("msg:custom", answered);
  const records = (prefix) => ({
    run: () => ask(prefix + "run"), rows: () => ask(prefix + "rows"),
    card: (latent) => ask(prefix + "card", latent), wide: (latent) => ask(prefix + "wide", latent),
  });
  const source = records("");
  const other = model.get("other");
  if (other) source.compare = async () => ({ name: other, source: records("other."), matches: () => ask("matches") });
  if (model.get("has_live")) {
    source.live = {
      llm: model.get("has_llm"),
      tokens: (sentence) => ask("tokens", { sentence }),
      steer: (given) => ask("steer", given),
      ablate: (given) => ask("ablate", given),
      explain: (given) => ask("explain", given),
    };
  }
  const latent = model.get("latent");
  const element = document.createElement("div");
  el.append(element);
  const permalink = (number) => model.get("permalink").replace("LATENT", String(number));
  const mounted = mount(element, source, { routing: "memory", latent: latent < 0 ? undefined : latent, permalink });
  return async () => {
    model.off("msg:custom", answered);
    (await mounted).destroy();
  };
}
