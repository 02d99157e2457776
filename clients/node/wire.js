/** How requests and replies are written: keys, arguments, maps and the JSON of answers. */

import { randomBytes } from "node:crypto";
import { types } from "node:util";

/** @typedef {import("./questions.js").Image} Image */
/** @typedef {import("./questions.js").Options} Options */
/** @typedef {import("./questions.js").Point} Point */

/** What a cluster puts keys into slots by: what is in the first braces, if anything is. @param {string} key */
const tagOf = (key) => /^[^{]*\{([^}]+)\}/.exec(key)?.[1] ?? key;

/** A key that nobody else has: in a cluster, of a node by chance, or of the image key's. @param {string} prefix @param {Image} image */
export const newKey = (prefix, image) => {
  let number = (BigInt(Date.now()) << 80n) | BigInt(`0x${randomBytes(10).toString("hex")}`);
  let name = "";
  for (; name.length < 26; number >>= 5n) {
    name = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"[Number(number & 31n)] + name;
  }
  const isKey = typeof image === "object" && "key" in image;
  return isKey ? `${prefix}{${tagOf(image.key)}}:${name}` : prefix + name;
};

/** As many keys as WAIT, CANCEL and RETRY take. */
const MOST_KEYS = 1000;

/** Keys that one command can take: in a cluster those of one slot. @param {readonly string[]} keys @param {boolean} isCluster */
export const groupsOf = (keys, isCluster) => {
  /** @type {Map<string, string[]>} */
  const byTag = new Map();
  for (const key of keys) {
    const tag = isCluster ? tagOf(key) : "";
    byTag.set(tag, [...(byTag.get(tag) ?? []), key]);
  }
  return [...byTag.values()].flatMap((group) =>
    Array.from({ length: Math.ceil(group.length / MOST_KEYS) }, (_, i) =>
      group.slice(i * MOST_KEYS, (i + 1) * MOST_KEYS),
    ),
  );
};

/** The word of each option that has a value. @type {Record<string, string>} */
export const OPTIONS = {
  priority: "PRIORITY",
  delayMs: "DELAY",
  expiresMs: "EXPIRES",
  model: "MODEL",
  attemptTimeoutMs: "TIMEOUT",
  retries: "RETRIES",
  ttlSeconds: "TTL",
  beams: "BEAMS",
  nbest: "NBEST",
  maxTokens: "MAXTOKENS",
  ngram: "NGRAM",
  lengthPenalty: "LENGTHPENALTY",
  temperature: "TEMPERATURE",
  topK: "TOPK",
  topP: "TOPP",
  seed: "SEED",
  margin: "MARGIN",
  thumbnail: "THUMBNAIL",
  tokens: "TOKENS",
};

/** @param {Omit<Options, "key">} options */
export const optionArguments = (options) =>
  Object.entries(options).flatMap(([name, value]) => {
    if (value == null) return [];
    if (name === "noCache") return value ? ["NOCACHE"] : [];
    if (name === "exif") return [value ? "EXIF" : "NOEXIF"];
    const word = OPTIONS[name];
    if (!word) throw new TypeError(`there is no option ${name}`);
    return [word, String(value)];
  });

/** @param {Image} image @returns {Promise<(string | Buffer)[]>} */
export const imageArguments = async (image) => {
  if (typeof image === "string") return [image];
  if (image instanceof URL) return [image.href];
  if (image instanceof Blob) return ["DATA", Buffer.from(await image.arrayBuffer())];
  if (types.isAnyArrayBuffer(image)) return ["DATA", Buffer.from(image)];
  if (ArrayBuffer.isView(image)) {
    return ["DATA", Buffer.from(image.buffer, image.byteOffset, image.byteLength)];
  }
  if (typeof image?.key === "string") return ["KEY", image.key];
  throw new TypeError("a picture is its bytes, an address or { key }");
};

/** @param {unknown} value */
export const plain = (value) =>
  value instanceof Uint8Array ? Buffer.from(value).toString() : value;

/** RESP3 gives a map, RESP2 a flat list. @param {any} reply @returns {Record<string, any>} */
export const asMap = (reply) => {
  const entries = Array.isArray(reply)
    ? reply.flatMap((name, i) => (i % 2 ? [] : [[name, reply[i + 1]]]))
    : reply instanceof Map
      ? [...reply]
      : Object.entries(reply);
  return Object.fromEntries(entries.map(([name, value]) => [plain(name), plain(value)]));
};

/** @param {number | null | undefined} at milliseconds since 1970 */
export const timeOf = (at) => (at == null ? undefined : new Date(at));

/**
 * A row of FLORENCE.JOBS.
 * @param {any} reply
 * @returns {import("./jobs.js").Listed}
 */
export const listed = (reply) => {
  const { id, state, due_at, finished_at, code, stream } = asMap(reply);
  return {
    key: id,
    state,
    ...(due_at !== undefined && { dueAt: timeOf(due_at) }),
    ...(finished_at !== undefined && { finishedAt: timeOf(finished_at) }),
    ...(code !== undefined && { code }),
    ...(stream !== undefined && { stream }),
  };
};

/** @param {number[]} flat @returns {Point[]} */
const points = (flat) =>
  flat.flatMap((x, i) => (i % 2 ? [] : [/** @type {Point} */ ([x, flat[i + 1]])]));
/** @param {number[][][]} shapes */
const shapes = (shapes) => shapes.map((parts) => parts.map(points));

/**
 * How answers are read that are not plain text, by the names of what they have.
 * @type {Record<string, (answer: any) => unknown>}
 */
const READERS = {
  "bboxes labels": ({ bboxes, labels }) => ({ bboxes, labels }),
  "labels quad_boxes": ({ quad_boxes, labels }) => ({ quadBoxes: quad_boxes.map(points), labels }),
  "labels polygons": ({ polygons, labels }) => ({ polygons: shapes(polygons), labels }),
  "bboxes bboxes_labels polygons polygons_labels": ({ bboxes, bboxes_labels, polygons, polygons_labels }) => ({
    bboxes,
    bboxesLabels: bboxes_labels,
    polygons: shapes(polygons),
    polygonsLabels: polygons_labels,
  }),
};

/**
 * The answer to one of several prompts, or to the only one, from the JSON of all.
 *
 * An answer says by itself what it is, and the only one is not looked for by its prompt: it is
 * under a token, or under what a text with `{}` has become.
 * @param {Record<string, any>} result
 * @param {string} [prompt]
 */
export const readAnswer = (result, prompt) => {
  const answer = prompt === undefined ? Object.values(result)[0] : result[prompt];
  if (typeof answer === "string") return answer;
  const read = READERS[Object.keys(answer).sort().join(" ")];
  if (!read) throw new TypeError(`no such answer: ${JSON.stringify(answer)}`);
  return read(answer);
};

/** One prompt, or a JSON list of them. With `florence.prompts any` one may begin with a bracket. @param {string} text @returns {readonly string[]} */
export const promptsOf = (text) => {
  try {
    const prompts = JSON.parse(text);
    const isList = Array.isArray(prompts) && prompts.length > 0;
    if (isList && prompts.every((prompt) => typeof prompt === "string")) return prompts;
  } catch {
    // A prompt that is no JSON.
  }
  return [text];
};

/**
 * A step, from the JSON of a chain's answers.
 * @param {any} step
 * @param {any} text
 * @param {any} scores
 * @returns {import("./questions.js").Step}
 */
export const readStep = (step, text, scores) => {
  const { prompt, asked, left_out } = step;
  const read = (/** @type {any} */ answer) => answer && readAnswer(answer);
  const parts = step.each ?? step.crop;
  if (parts) {
    const told = parts.map(
      (/** @type {any} */ { region, label, answer }, /** @type {number} */ i) => ({
        region,
        label,
        answer: read(answer),
        text: text[i],
        scores: scores[i],
      }),
    );
    return { prompt, parts: told, leftOut: left_out };
  }
  const answer = read(step.answer) ?? undefined;
  return { prompt, answer, text, scores, ...(asked !== undefined && { asked }) };
};
