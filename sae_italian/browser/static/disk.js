// The source on disk: script files that call saeItalian.receive, because pages on file:// may load scripts but neither
// modules nor fetch. A file holds deflated JSON, 15 bits to a character.

const FIRST = 0x3400; // the character of the bits 000000000000000
const KEPT = 12; // shards of cards held, so that next and previous are instant

const waiting = new Map();

function receive(name, nBytes, characters) {
  waiting.get(name)?.({ nBytes, characters });
}

function unpack({ nBytes, characters }) {
  const bytes = new Uint8Array(nBytes);
  const code = (i) => characters.charCodeAt(i) - FIRST;
  let i = 0;
  let at = 0;
  for (; at + 15 <= nBytes; at += 15) { // 8 characters are 15 bytes; what is above a byte falls off
    const a = code(i), b = code(i + 1), c = code(i + 2), d = code(i + 3);
    const e = code(i + 4), f = code(i + 5), g = code(i + 6), h = code(i + 7);
    i += 8;
    bytes[at] = a >> 7;
    bytes[at + 1] = (a << 1) | (b >> 14);
    bytes[at + 2] = b >> 6;
    bytes[at + 3] = (b << 2) | (c >> 13);
    bytes[at + 4] = c >> 5;
    bytes[at + 5] = (c << 3) | (d >> 12);
    bytes[at + 6] = d >> 4;
    bytes[at + 7] = (d << 4) | (e >> 11);
    bytes[at + 8] = e >> 3;
    bytes[at + 9] = (e << 5) | (f >> 10);
    bytes[at + 10] = f >> 2;
    bytes[at + 11] = (f << 6) | (g >> 9);
    bytes[at + 12] = g >> 1;
    bytes[at + 13] = (g << 7) | (h >> 8);
    bytes[at + 14] = h;
  }
  for (let bits = 0, count = 0; at < nBytes; at += 1) {
    if (count < 8) {
      bits = ((bits << 15) | code(i)) & 0x7fffff;
      count += 15;
      i += 1;
    }
    count -= 8;
    bytes[at] = bits >> count;
  }
  const { readable, writable } = new DecompressionStream("deflate-raw");
  const writer = writable.getWriter(); // a Blob's bytes would go to another process and back
  for (const end of [writer.write(bytes), writer.close()]) end.catch(() => {}); // what is damaged fails below
  return new Response(readable).json();
}

const loading = new Map(); // what is on its way; asked for twice, it comes once

function load(folder, kind, index) {
  const key = `${folder}/${kind}/${String(index).padStart(4, "0")}`;
  if (!loading.has(key)) loading.set(key, read(key).finally(() => loading.delete(key)));
  return loading.get(key);
}

function read(key) {
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

// A context on disk is [document, largest, text, [begin, length, activation, ...], cut]; activations as 4 digits of it.
function contextOf([doc, max, text, spans, cut], documents) {
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
  return { doc_id: docId, source, max, cut, segments };
}

const record = (columns, at) => Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[at]]));

function cardOf(card, documents) {
  card.scores = card.scores.value.map((_, at) => record(card.scores, at));
  for (const group of card.groups) group.contexts = group.contexts.map((context) => contextOf(context, documents));
  return card;
}

function diskSource(folder = "data") {
  const shards = new Map();
  const parts = new Map(); // of the rows, until all of them are read
  let facts = null;
  const about = () => (facts ??= load(folder, "run", 0));

  function part(index) {
    if (!parts.has(index)) parts.set(index, load(folder, "rows", index));
    return parts.get(index);
  }

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

  return {
    run: async () => (await about()).run,
    async rows() {
      const { row_shards: n } = await about();
      const read = await Promise.all(Array.from({ length: n }, (_, index) => part(index)));
      parts.clear();
      return Object.fromEntries(Object.keys(read[0] || {}).map((name) => [name, [].concat(...read.map((one) => one[name]))]));
    },
    async row(latent) {
      const { rows_per_shard: size, rows: n } = await about();
      return latent < n ? record(await part(Math.floor(latent / size)), latent % size) : null;
    },
    async prepare(latent) {
      const { cards_per_shard: size, rows: n } = await about();
      if (latent < n) await shardOf(Math.floor(latent / size)).catch(() => {}); // said when its card is opened
    },
    async card(latent) {
      const { cards_per_shard: size, rows: n } = await about();
      if (latent >= n) return null;
      const { cards, documents } = await shardOf(Math.floor(latent / size));
      return cardOf(structuredClone(cards[latent]), documents);
    },
    async compare() {
      const { compare } = await about();
      return compare ? { name: compare, source: diskSource("other"), matches: () => load(folder, "matches", 0) } : null;
    },
  };
}

window.saeItalian = { receive };
mount(document.getElementById("app"), diskSource());
