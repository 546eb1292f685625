// The page in a notebook's output: records and live work are messages to the kernel (anywidget's protocol).
function render({ model, el }) {
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
    if (message.error) one.reject(fault(message.error_it ?? message.error, message.error_en ?? message.error));
    else one.resolve(message.value);
  }

  model.on("msg:custom", answered);
  const latent = model.get("latent");
  const element = document.createElement("div");
  el.append(element);
  const permalink = (number) => model.get("permalink").replace("LATENT", String(number));
  const mounted = mountRemote(element, ask, { routing: "memory", latent: latent < 0 ? undefined : latent, permalink });
  return async () => {
    model.off("msg:custom", answered);
    (await mounted).destroy();
  };
}
