// The source on disk: script files that call saeItalian.receive, because pages on file:// may load scripts but neither
// modules nor fetch. A file holds deflated JSON, 15 bits to a character.
import { rowsOf } from "./base.js";

const FIRST = 0x3400; // the character of the bits 000000000000000
const KEPT = 6; // shards of cards held, so that next and previous are instant

const waiting = new Map();

export function receive(name, nBytes, characters) {
  waiting.get(name)?.({ nBytes, characters });
}

export function unpack({ nBytes, characters }) {
  const bytes = new Uint8Array(nBytes);
  let [bits, count, at] = [0, 0, 0];
  for (let i = 0; i < characters.length; i += 1) {
    bits = (bits << 15) | (characters.charCodeAt(i) - FIRST);
    count += 15;
    while (count >= 8 && at < nBytes) {
      count -= 8;
      bytes[at] = (bits >> count) & 255;
      at += 1;
    }
    bits &= (1 << count) - 1;
  }
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).json();
}

function load(folder, kind, index) {
  const key = `${folder}/${kind}/${String(index).padStart(4, "0")}`;
  const file = key + ".js";
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const done = () => { script.remove(); waiting.delete(key); reject(new Error(file)); }; // no effect once received
    waiting.set(key, resolve);
    script.src = file;
    script.onload = done;
    script.onerror = done;
    document.head.append(script);
  }).then(unpack);
}

// A context on disk is [document, largest, text, [begin, length, activation, ...]]; activations as 4 digits of it.
function contextOf([doc, max, text, spans], documents) {
  const segments = [];
  let end = 0;
  for (let i = 0; i < spans.length; i += 3) {
    const begin = end + spans[i];
    if (begin > end) segments.push([text.slice(end, begin), 0]);
    end = begin + spans[i + 1];
    segments.push([text.slice(begin, end), (spans[i + 2] / 999) * max]);
  }
  if (end < text.length) segments.push([text.slice(end), 0]);
  const [source, docId] = documents[doc];
  return { doc_id: docId, source, max, segments };
}

function cardOf(card, documents) {
  card.scores = rowsOf(card.scores);
  for (const group of card.groups) group.contexts = group.contexts.map((context) => contextOf(context, documents));
  return card;
}

export function diskSource(folder = "data") {
  const shards = new Map();
  let facts = null;
  const about = () => (facts ??= load(folder, "run", 0));

  async function shardOf(index) {
    const shard = shards.get(index) || load(folder, "cards", index);
    shards.delete(index);
    shards.set(index, shard);
    if (shards.size > KEPT) shards.delete(shards.keys().next().value);
    try {
      return await shard;
    } catch (error) {
      shards.delete(index);
      throw error;
    }
  }

  const source = {
    run: async () => (await about()).run,
    async rows() {
      const { row_shards: n } = await about();
      const parts = await Promise.all(Array.from({ length: n }, (_, index) => load(folder, "rows", index)));
      const all = {};
      for (const name of Object.keys(parts[0] || {})) all[name] = parts.flatMap((part) => part[name]);
      return all;
    },
    async card(latent) {
      const { cards_per_shard: size } = await about();
      const { cards, documents } = await shardOf(Math.floor(latent / size));
      const card = cards[latent];
      return card ? cardOf(structuredClone(card), documents) : null;
    },
    async compare() {
      const { compare } = await about();
      return compare ? { name: compare, source: diskSource("other"), matches: () => load(folder, "matches", 0) } : null;
    },
  };
  return source;
}
