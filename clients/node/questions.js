/** What can be asked about a picture, how, and what the answers are. */

/**
 * A text is an address that the server reads: a URL, or a path below one of its file-roots. Bytes
 * are sent. `{ key }` is a string key of the server.
 * @typedef {string | URL | ArrayBufferView | ArrayBuffer | Blob | { key: string }} Image
 */

/**
 * A part of a picture, in thousandths of its width and height, 0 to 999.
 * @typedef {readonly [x1: number, y1: number, x2: number, y2: number]} Region
 */

/** @typedef {readonly [x1: number, y1: number, x2: number, y2: number]} Box in pixels */
/** @typedef {readonly [x: number, y: number]} Point in pixels */
/** @typedef {readonly Point[]} Polygon */
/** @typedef {{ bboxes: Box[], labels: string[] }} Boxes */
/** @typedef {{ quadBoxes: Polygon[], labels: string[] }} Quads */
/** @typedef {{ polygons: Polygon[][], labels: string[] }} Polygons each shape of one polygon or more */
/**
 * @typedef {object} BoxesAndPolygons
 * @property {Box[]} bboxes
 * @property {string[]} bboxesLabels
 * @property {Polygon[][]} polygons
 * @property {string[]} polygonsLabels
 */

/**
 * A prompt, or several, or a chain with its next steps, word and prompt; its type says what the
 * answer is.
 * @template T
 * @typedef {object} Question
 * @property {readonly string[]} prompts
 * @property {readonly (readonly [word: string, prompt: string])[]} [steps]
 * @property {T} [answer]
 */

/**
 * What was answered about a region.
 * @typedef {object} Part
 * @property {Box} region
 * @property {string} label
 * @property {any} answer
 * @property {string} text what the model has written
 * @property {readonly number[]} scores
 */

/**
 * A step of a chain: an answer, undefined where nothing was found to ask about, or one about each
 * region of the answer before.
 * @typedef {object} Step
 * @property {string} prompt
 * @property {any} [answer]
 * @property {readonly Part[]} [parts]
 * @property {number} [leftOut] regions that were not asked about
 * @property {string} [asked] the prompt with what was found before in it
 * @property {string} [text]
 * @property {readonly number[]} [scores]
 */

/** @type {(prompt: string) => Question<string>} */
const text = (prompt) => ({ prompts: [prompt] });
/** @type {(prompt: string) => Question<Boxes>} */
const boxes = (prompt) => ({ prompts: [prompt] });
/** @type {(prompt: string) => Question<Quads>} */
const quads = (prompt) => ({ prompts: [prompt] });
/** @type {(prompt: string) => Question<Polygons>} */
const polygons = (prompt) => ({ prompts: [prompt] });
/** @type {(prompt: string) => Question<BoxesAndPolygons>} */
const boxesAndPolygons = (prompt) => ({ prompts: [prompt] });

/** @param {Region} region */
const places = (region) => region.map((place) => `<loc_${place}>`).join("");

/** The fifteen tasks, as questions; the client has methods of the same names. */
export const tasks = {
  caption: text("<CAPTION>"),
  detailedCaption: text("<DETAILED_CAPTION>"),
  moreDetailedCaption: text("<MORE_DETAILED_CAPTION>"),
  detect: boxes("<OD>"),
  denseRegionCaption: boxes("<DENSE_REGION_CAPTION>"),
  regionProposal: boxes("<REGION_PROPOSAL>"),
  ocr: text("<OCR>"),
  ocrWithRegion: quads("<OCR_WITH_REGION>"),
  /** @param {string} phrase */
  phraseGrounding: (phrase) => boxes(`<CAPTION_TO_PHRASE_GROUNDING>${phrase}`),
  /** @param {string} phrase */
  openVocabularyDetection: (phrase) => boxesAndPolygons(`<OPEN_VOCABULARY_DETECTION>${phrase}`),
  /** @param {string} phrase */
  referringExpressionSegmentation: (phrase) =>
    polygons(`<REFERRING_EXPRESSION_SEGMENTATION>${phrase}`),
  /** @param {Region} region */
  regionToSegmentation: (region) => polygons(`<REGION_TO_SEGMENTATION>${places(region)}`),
  /** @param {Region} region */
  regionToCategory: (region) => text(`<REGION_TO_CATEGORY>${places(region)}`),
  /** @param {Region} region */
  regionToDescription: (region) => text(`<REGION_TO_DESCRIPTION>${places(region)}`),
  /** @param {Region} region */
  regionToOcr: (region) => text(`<REGION_TO_OCR>${places(region)}`),
};

/**
 * A text that is none of the fifteen tasks, for checkpoints that were tuned to others; the server
 * takes it with `florence.prompts any` only.
 */
export const prompt = text;

/**
 * Two to 16 different questions about one picture, as one.
 * @template {readonly unknown[]} Answers
 * @param {{ [I in keyof Answers]: Question<Answers[I]> }} questions
 * @returns {Question<Answers>}
 */
export const several = (...questions) => {
  if (questions.length < 2) {
    // The server knows a single one only as itself: its answer would be no list.
    throw new TypeError("several takes two questions at least; a single one is asked as it is");
  }
  if (questions.some(({ steps }) => steps)) throw new TypeError("a chain is asked alone");
  return { prompts: questions.flatMap((question) => question.prompts) };
};

/** @param {Question<any>} question @param {string} place @returns {string} */
const onlyPrompt = ({ prompts, steps }, place) => {
  const [prompt] = prompts;
  if (prompt === undefined || prompts.length > 1 || steps) {
    throw new TypeError(`${place} one question, neither several nor a chain`);
  }
  return prompt;
};

/** @typedef {readonly [word: string, prompt: string]} Next what a chain asks next */

/** Asks about the picture again; `{}` in a text is what was answered before. @param {Question<any>} question @returns {Next} */
export const then = (question) => ["THEN", onlyPrompt(question, "a step asks")];

/**
 * Asks about each region that was found; a task of regions is given without one.
 * @param {Question<any> | ((region: any) => Question<any>)} question
 * @returns {Next}
 */
export const each = (question) => [
  "EACH",
  onlyPrompt(typeof question === "function" ? question([]) : question, "a step asks"),
];

/** Asks about each region as a picture of its own, with `margin` around it. @param {Question<any>} question @returns {Next} */
export const crop = (question) => ["CROP", onlyPrompt(question, "a step asks")];

/**
 * A question, and one to three more about what was found, as one job.
 * @param {Question<any>} question
 * @param {...Next} steps
 * @returns {Question<readonly Step[]>}
 */
export const chain = (question, ...steps) => {
  if (steps.length === 0) {
    throw new TypeError("a chain has a step at least; a question without one is asked as it is");
  }
  return { prompts: [onlyPrompt(question, "a chain begins with")], steps };
};

/**
 * A box as a region of a picture of this width and height.
 * @param {Box} box
 * @param {readonly [width: number, height: number]} size
 * @returns {Region}
 */
export const regionOf = ([x1, y1, x2, y2], [width, height]) => {
  /** @type {(pixels: number, whole: number) => number} */
  const place = (pixels, whole) => Math.min(999, Math.max(0, Math.trunc((pixels * 1000) / whole)));
  return [place(x1, width), place(y1, height), place(x2, width), place(y2, height)];
};

/**
 * How a job is to be run.
 * @typedef {object} Options
 * @property {string} [key] the job's key; one is made up if there is none
 * @property {number} [priority] 0 to 9, higher first
 * @property {number} [delayMs] not started before
 * @property {number} [expiresMs] not started by then: the job ends as expired
 * @property {string} [model] the model that answers, by its name; else the server's default one
 * @property {number} [attemptTimeoutMs] of one attempt, download and computation together
 * @property {number} [retries] further attempts after a failure that may pass
 * @property {number} [ttlSeconds] how long the ended job is kept, in whole seconds; 0 for ever
 * @property {number} [beams] 1 is greedy search
 * @property {number} [nbest] how many of the best beams are told, in the job's `nbest`
 * @property {number} [maxTokens] of the answer
 * @property {number} [ngram] no sequence of so many tokens occurs twice; 0 allows all
 * @property {number} [lengthPenalty] exponent of the length that a beam's score is divided by
 * @property {number} [temperature] draws tokens by chance, likely ones more often the lower it is;
 *   so do the next three
 * @property {number} [topK] of so many of the likeliest tokens; 0 for all
 * @property {number} [topP] of these, the likeliest that have this probability together
 * @property {number} [seed] the same seed draws the same tokens
 * @property {number} [margin] how much more than a region `crop` cuts out, in hundredths of its
 *   width and height
 * @property {boolean} [exif] turns the picture as its EXIF tag says, or leaves it as it is stored;
 *   else as the server is set
 * @property {boolean} [noCache] computes the answer even if it is known
 * @property {number} [thumbnail] longer side in pixels of a small copy of the picture, which
 *   `thumbnail` gives; 0 for none
 * @property {string} [tokens] key of a stream that the text goes to while it is generated: see
 *   `pieces`
 */

/**
 * How to wait; without these, for as long as the jobs take.
 * @typedef {object} Waiting
 * @property {number} [timeoutMs] then a WaitTimeoutError; the jobs go on
 * @property {AbortSignal} [signal] ends the waiting; the jobs go on
 */
