// Where the data come from when the page is opened from disk: script files that call saeItalian.receive.
// Another host (a server, a notebook) replaces saeItalian.load and keeps the views.
"use strict";
(function () {
  const S = window.saeItalian;
  const waiting = new Map();

  S.receive = function (kind, index, value) {
    const key = kind + "/" + index;
    waiting.get(key)?.(value);
    waiting.delete(key);
  };

  S.fileOf = (kind, index) => `data/${kind}/${String(index).padStart(4, "0")}.js`;

  S.load = function (kind, index) {
    const file = S.fileOf(kind, index);
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const fail = () => reject(new Error(file));
      waiting.set(kind + "/" + index, resolve);
      script.src = file;
      script.onload = () => { script.remove(); fail(); }; // no effect once received
      script.onerror = () => { script.remove(); fail(); };
      document.head.append(script);
    });
  };

  // The last few shards stay in memory, so that next and previous are instant.
  const KEPT = 6;
  const shards = new Map();

  S.loadCard = async function (row) {
    if (row.shard === null) return null;
    const shard = shards.get(row.shard) || S.load("cards", row.shard);
    shards.delete(row.shard);
    shards.set(row.shard, shard);
    if (shards.size > KEPT) shards.delete(shards.keys().next().value);
    try {
      return (await shard).find((card) => card.latent === row.latent);
    } catch (error) {
      shards.delete(row.shard);
      throw error;
    }
  };
})();
