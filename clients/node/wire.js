/** How requests and replies are written: keys, arguments, maps and the JSON of answers. */

import { randomBytes } from "node:crypto";

/** @typedef {import("./questions.js").Image} Image */
/** @typedef {import("./questions.js").Options} Options */
/** @typedef {import("./questions.js").Boxes} Boxes */
/** @typedef {import("./questions.js").Point} Point */
/** @typedef {import("./questions.js").Polygons} Polygons */

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
    if (value === undefined) return [];
    if (name === "noCache") return value ? ["NOCACHE"] : [];
    if (name === "exif") return [value ? "EXIF" : "NOEXIF"];
    const word = OPTIONS[name];
    if (!word) throw new TypeError(`there is no option ${name}`);
    return [word, String(value)];
  });

/** @param {Image} image @returns {(string | Buffer)[]} */
export const imageArguments = (image) => {
  if (typeof image === "string") return [image];
  if (image instanceof URL) return [image.href];
  if (!(image instanceof Uint8Array)) return ["KEY", image.key];
  return ["DATA", Buffer.from(image.buffer, image.byteOffset, image.byteLength)];
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
/** @param {any} answer @returns {Boxes} */
const readBoxes = ({ bboxes, labels }) => ({ bboxes, labels });
/** @param {any} answer @returns {Polygons} */
const readPolygons = ({ polygons, labels }) => ({ polygons: shapes(polygons), labels });

/**
 * How answers are read that are not plain text.
 * @type {Record<string, (answer: any) => unknown>}
 */
const READERS = {
  "<OD>": readBoxes,
  "<DENSE_REGION_CAPTION>": readBoxes,
  "<REGION_PROPOSAL>": readBoxes,
  "<CAPTION_TO_PHRASE_GROUNDING>": readBoxes,
  "<OCR_WITH_REGION>": ({ quad_boxes, labels }) => ({ quadBoxes: quad_boxes.map(points), labels }),
  "<REFERRING_EXPRESSION_SEGMENTATION>": readPolygons,
  "<REGION_TO_SEGMENTATION>": readPolygons,
  "<OPEN_VOCABULARY_DETECTION>": ({ bboxes, bboxes_labels, polygons, polygons_labels }) => ({
    bboxes,
    bboxesLabels: bboxes_labels,
    polygons: shapes(polygons),
    polygonsLabels: polygons_labels,
  }),
};

/**
 * The answer to a prompt, from the JSON of all answers to its job.
 * @param {string} prompt
 * @param {Record<string, any>} result
 */
export const readAnswer = (prompt, result) => {
  const token = prompt.slice(0, prompt.indexOf(">") + 1);
  // By prompt if there are several, by token if there is one.
  const answer = prompt in result ? result[prompt] : result[token];
  return READERS[token]?.(answer) ?? answer;
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
  const read = (/** @type {any} */ answer) => answer && readAnswer(prompt, answer);
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
