/** Jobs, why they give no answer, and the types of their keys. */

import { promptsOf, readAnswer, readStep, timeOf } from "./wire.js";

/**
 * What the module says no with, and jobs that ended without an answer. Errors of the connection,
 * and of the server itself, are node-redis' own, and so is `ERR`, which is everybody's: nothing
 * tells the module's from others.
 */
export class FlorenceError extends Error {
  /** The error's first word. @type {string} */
  static code = "";

  /** @param {string} message @param {Job<any>} [job] */
  constructor(message, job) {
    super(message);
    this.name = new.target.name;
    this.code = new.target.code;
    /** The job that ended so; none where a command was refused. */
    this.job = job;
  }

  /** Whether the same may succeed later. @returns {boolean} */
  get retryable() {
    return this.job?.error?.retryable ?? false;
  }
}

/** No task of Florence-2, or a text where none is taken. */
export class BadPromptError extends FlorenceError {
  static code = "BADPROMPT";
}
/** A source or an address that is not permitted. */
export class DeniedError extends FlorenceError {
  static code = "DENIED";
}
/** Another request lives under this key. */
export class JobExistsError extends FlorenceError {
  static code = "JOBEXISTS";
}
/** The key holds something else than a job. */
export class WrongTypeError extends FlorenceError {
  static code = "WRONGTYPE";
}
/** The key is a hash, but no job. */
export class NotAJobError extends FlorenceError {
  static code = "NOTAJOB";
}
/** There is no such job, or no longer: it was deleted, or its time is over. */
export class NoJobError extends FlorenceError {
  static code = "NOJOB";
}
/** The queue is full; nothing was stored. */
export class BusyError extends FlorenceError {
  static code = "BUSY";
  /** After which to try again. */
  retryAfterMs = 1000;
  get retryable() {
    return true;
  }
}
/** The model is not the one that was asked for, or cannot be loaded. */
export class NoModelError extends FlorenceError {
  static code = "NOMODEL";
}
/** The picture could not be downloaded or read. */
export class FetchError extends FlorenceError {
  static code = "FETCH";
}
/** Format, size or damage of the picture. */
export class ImageError extends FlorenceError {
  static code = "IMAGE";
}
/** Refused by the model's tokenizer. */
export class PromptError extends FlorenceError {
  static code = "PROMPT";
}
/** The attempt took longer than the job's `attemptTimeoutMs`. */
export class AttemptTimeoutError extends FlorenceError {
  static code = "TIMEOUT";
}
/** The server died twice while working on the job. */
export class CrashError extends FlorenceError {
  static code = "CRASH";
}
/** The job's hash holds what the module does not write: somebody else has written it. */
export class InvalidJobError extends FlorenceError {
  static code = "INVALID";
}
/** A fault of the module. */
export class InternalError extends FlorenceError {
  static code = "INTERNAL";
}
/** The job was cancelled. */
export class JobCancelledError extends FlorenceError {
  static code = "CANCELLED";
}
/** The job was not started in time. */
export class JobExpiredError extends FlorenceError {
  static code = "EXPIRED";
}
/** The answer was asked for before the job ended. */
export class NotEndedError extends FlorenceError {
  static code = "NOTENDED";
}
/** The time to wait has passed; the jobs go on. */
export class WaitTimeoutError extends FlorenceError {
  static code = "WAITTIMEOUT";

  /** @param {readonly string[]} keys those that have not ended */
  constructor(keys) {
    super(`not ended in time: ${keys.slice(0, 3).join(", ")}${keys.length > 3 ? ", ..." : ""}`);
    this.keys = keys;
  }
}

/**
 * Whatever may be wrong with a job that somebody else has written is an error of that job.
 * @param {string} key
 * @param {unknown} cause
 * @param {Job<any>} [job]
 */
const unreadable = (key, cause, job) =>
  Object.assign(new InvalidJobError(`${key}: what is stored cannot be read (${cause})`, job), {
    cause,
  });

/**
 * Error classes by code, but for that of a wait whose time is over.
 * @type {ReadonlyMap<string, typeof FlorenceError>}
 */
export const ERRORS = new Map(
  [
    BadPromptError,
    DeniedError,
    JobExistsError,
    WrongTypeError,
    NotAJobError,
    NoJobError,
    BusyError,
    NoModelError,
    FetchError,
    ImageError,
    PromptError,
    AttemptTimeoutError,
    CrashError,
    InvalidJobError,
    InternalError,
    JobCancelledError,
    JobExpiredError,
    NotEndedError,
  ].map((error) => [error.code, error]),
);

/**
 * The key of a job: a string, whose type says what the answer is.
 * @template T
 * @typedef {string & { readonly answer?: T }} JobKey
 */

/**
 * What the job of such a key answers; of keys of different questions, one of their answers.
 * @template K
 * @typedef {K extends JobKey<infer T> ? T : never} AnswerOf
 */

/** @typedef {"queued" | "fetching" | "running" | "retrying"} Unfinished */
/** @typedef {Unfinished | "done" | "failed" | "cancelled" | "expired"} State */
/** @typedef {{ code: string, message: string, retryable: boolean }} Failure why a job gave no answer */
/** @typedef {{ attempt: number, at: Date, code: string, message: string }} FailedAttempt followed by another */

/**
 * A job in a list of many.
 * @typedef {object} Listed
 * @property {JobKey<any>} key
 * @property {State} state
 * @property {Date} [dueAt] when it is started, if it waits for a moment
 * @property {Date} [finishedAt]
 * @property {string} [code] why it failed: the code of the error
 * @property {string} [stream] key of the stream that the text goes to while it is generated
 */

/**
 * One of the best beams.
 * @typedef {object} Ranked
 * @property {number} score by which they are ranked: a logarithm, at most 0
 * @property {string} text what the model has written
 * @property {any} answer as the job's answer to the question
 */

/**
 * What follows in the text of an answer: all pieces together are the text. Another attempt begins
 * all texts anew.
 * @typedef {object} Piece
 * @property {number} attempt
 * @property {number} step of a chain, counted from 0
 * @property {number} index which question of the step
 * @property {string} text
 */

/**
 * A job as it was when the server told of it.
 * @template T
 */
export class Job {
  /** @type {readonly import("./questions.js").Step[] | undefined} */
  #chain;

  /**
   * What FLORENCE.GET tells of a job, or as an exception why it cannot be read.
   * @param {Record<string, any>} got its map
   */
  static read(got) {
    try {
      return new Job(got);
    } catch (error) {
      throw unreadable(got.id, error);
    }
  }

  /** @param {Record<string, any>} got the map of FLORENCE.GET */
  constructor(got) {
    const json = (/** @type {string | null} */ text) =>
      text === null ? undefined : JSON.parse(text);
    /** @type {JobKey<T>} */
    this.key = got.id;
    /** @type {State} */
    this.state = got.state;
    /** @type {readonly string[]} */
    this.prompts = promptsOf(got.prompt);
    /** Where the picture comes from, without what gives access to it. @type {string} */
    this.image = got.image;
    /** @type {number} */
    this.attempts = got.attempts;
    /** The answer's JSON, as the module gives it. @type {Record<string, any> | undefined} */
    this.result = json(got.result);
    /**
     * What a chain asked after the prompt: word and prompt.
     * @type {readonly (readonly [word: string, prompt: string])[]}
     */
    this.steps = (json(got.steps) ?? []).flatMap((/** @type {Record<string, string>} */ step) =>
      Object.entries(step),
    );
    const isChain = this.steps.length > 0;
    const texts =
      got.text === null
        ? []
        : isChain || this.prompts.length > 1
          ? JSON.parse(got.text)
          : [got.text];
    /**
     * What the model has written, for each prompt; of a chain its steps have that, and the scores.
     * @type {readonly string[]}
     */
    this.texts = isChain ? [] : texts;
    const scores = json(got.scores);
    /**
     * How sure the model was, 0 to 1, for each prompt: of each label, or of the whole text.
     * @type {readonly (readonly number[])[]}
     */
    this.scores = !scores || isChain ? [] : this.prompts.length > 1 ? scores : [scores];
    /**
     * The best beams for each prompt, the answer first, where `nbest` asked for them.
     * @type {readonly (readonly Ranked[])[]}
     */
    this.nbest = (json(got.nbest ?? null) ?? []).map(
      (/** @type {any[]} */ best) =>
        best.map(({ score, text, result }) => ({ score, text, answer: readAnswer(result) })),
    );
    this.#chain =
      isChain && this.result
        ? this.result.steps.map((/** @type {any} */ step, /** @type {number} */ i) =>
            readStep(step, texts[i], scores[i]),
          )
        : undefined;
    /** Of the picture, as the answer's coordinates mean it. @type {number | undefined} */
    this.width = got.width ?? undefined;
    /** @type {number | undefined} */
    this.height = got.height ?? undefined;
    /** @type {Failure | undefined} */
    this.error = json(got.error);
    /** Of earlier attempts, the newest ten. @type {readonly FailedAttempt[]} */
    this.errors = (json(got.errors) ?? []).map((/** @type {any} */ error) => ({
      ...error,
      at: new Date(error.at),
    }));
    /** @type {string | undefined} */
    this.model = got.model ?? undefined;
    /** What the answer was spared. @type {"result" | "features" | "miss" | undefined} */
    this.cache = got.cache ?? undefined;
    /** @type {string | undefined} */
    this.phase = got.phase ?? undefined;
    /** @type {number | undefined} */
    this.position = got.position ?? undefined;
    /** @type {number | undefined} */
    this.tokens = got.tokens ?? undefined;
    /** Key of the stream that the text goes to while it is generated. @type {string | undefined} */
    this.stream = got.stream ?? undefined;
    this.submittedAt = new Date(got.submitted_at);
    this.startedAt = timeOf(got.started_at);
    this.finishedAt = timeOf(got.finished_at);
    /** When a job is started that waits for a moment: for its delay to pass, or its next attempt. */
    this.dueAt = timeOf(got.due_at);
    this.retryAt = timeOf(got.retry_at);
    /** @type {number | undefined} */
    this.etaMs = got.eta_ms ?? undefined;
    /** @type {number | undefined} */
    this.queueMs = got.queue_ms ?? undefined;
    /** @type {number | undefined} */
    this.fetchMs = got.fetch_ms ?? undefined;
    /** @type {number | undefined} */
    this.inferMs = got.infer_ms ?? undefined;
  }

  /** Whether the job will not change any more, unless it is queued again. */
  get hasEnded() {
    return ["done", "failed", "cancelled", "expired"].includes(this.state);
  }

  /** The answer, or as an exception why there is none; of `several`, a list; of a `chain`, its steps. @returns {T} */
  get answer() {
    const { result } = this;
    if (!result) throw this.#whyNot();
    if (this.#chain) return /** @type {T} */ (this.#chain);
    try {
      const isOne = this.prompts.length === 1;
      const answers = this.prompts.map((prompt) => readAnswer(result, isOne ? undefined : prompt));
      return /** @type {T} */ (isOne ? answers[0] : answers);
    } catch (error) {
      throw unreadable(this.key, error, this);
    }
  }

  #whyNot() {
    const { error, key, state } = this;
    const code = error?.code ?? state.toUpperCase();
    const known = ERRORS.get(code) ?? (error ? FlorenceError : NotEndedError);
    return new known(error ? `${key}: ${error.message}` : `${key} is ${state}`, this);
  }
}
