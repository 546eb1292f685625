// Where the page is: `latent=12`, or nothing for the list. In the address of a page, in memory in a notebook.
export function hashRouter() {
  return {
    current: () => window.location.hash.slice(1),
    go(route) { window.location.hash = route; },
    watch(changed) {
      window.addEventListener("hashchange", changed);
      return () => window.removeEventListener("hashchange", changed);
    },
  };
}

export function memoryRouter(element) {
  let route = "";
  let tell = () => {};
  const go = (to) => { route = to; tell(); };
  const follow = (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (!link || event.defaultPrevented) return;
    event.preventDefault();
    go(link.getAttribute("href").slice(1));
  };
  element.addEventListener("click", follow);
  return {
    current: () => route,
    go,
    watch(changed) {
      tell = changed;
      return () => { element.removeEventListener("click", follow); };
    },
  };
}
