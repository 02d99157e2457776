/**
 * Typed client of Florence for Redis over node-redis, for a client or a cluster.
 *
 * Every job is given its key here, so that a command whose reply was lost can be sent again and
 * makes no second job. WAIT holds up its whole connection, so it goes over connections of its own,
 * for a second at most at a time; each waits for all jobs that no other waits for.
 */

import { setTimeout } from "node:timers/promises";

import { ERRORS, FlorenceError, Job, NoJobError, WaitTimeoutError } from "./jobs.js";
import { tasks } from "./questions.js";
import { asMap, groupsOf, imageArguments, listed, newKey, optionArguments, plain } from "./wire.js";

export * from "./jobs.js";
export * from "./questions.js";

/** @typedef {import("./questions.js").Image} Image */
/** @typedef {import("./questions.js").Region} Region */
/** @typedef {import("./questions.js").Options} Options */
/** @typedef {import("./questions.js").Waiting} Waiting */
/** @typedef {Options & Waiting} AskOptions */
/** @template T @typedef {import("./questions.js").Question<T>} Question */
/** @template T @typedef {import("./jobs.js").JobKey<T>} JobKey */
/** @template K @typedef {import("./jobs.js").AnswerOf<K>} AnswerOf */

/** @typedef {readonly (string | Buffer)[]} Arguments of a command, its name first */

/**
 * What is needed of a client of node-redis, from `createClient`.
 * @typedef {object} Single
 * @property {(args: Arguments, options?: any) => Promise<any>} sendCommand
 * @property {(overrides?: any) => any} duplicate
 */

/**
 * What is needed of a cluster of node-redis, from `createCluster`.
 * @typedef {object} Cluster
 * @property {(key: any, isReadonly: any, args: any, options?: any) => Promise<any>} sendCommand
 * @property {(overrides?: any) => any} duplicate
 * @property {readonly any[]} masters
 * @property {(node: any) => any} nodeClient
 */

/** @typedef {(end: Job<any> | Error) => void} Tell what became of a job */
/** @typedef {{ tell: Tell | undefined }} Wanted a job's end, until nobody wants to know any more */

/** How often a command is sent again that got no reply, and how long before the first time. */
const [RETRIES, PAUSE_MS] = [5, 100];

/** Errors after which nobody knows whether the server has run the command. */
const LOST = ["SocketClosedUnexpectedlyError", "SocketTimeoutError"];

/**
 * Whether the connection broke before the reply came, or the server is about to be ready.
 * @param {any} error
 */
const isLost = (error) =>
  LOST.includes(error?.constructor?.name) ||
  "syscall" in error ||
  error.message.startsWith("LOADING ");

/** The pause doubles. @param {number} losses */
const pauseAfter = (losses) => setTimeout(PAUSE_MS * 2 ** (losses - 1));

/** What node-redis calls replies that are strings of any bytes. */
const BLOB_STRING = "$".charCodeAt(0);

/** Longest WAIT, in milliseconds. */
const SLICE = 1000;

/** Below so long a wait, in milliseconds, jobs are looked at once before. */
const SHORT = 100;

/** The longest time that a timer takes. */
const LONGEST = 2 ** 31 - 1;

/** Calls after a time, however long; gives what calls it off. @param {number} ms @param {() => void} call */
const callAfter = (ms, call) => {
  /** @type {NodeJS.Timeout} */
  let timer;
  const set = (/** @type {number} */ left) => {
    const next = left > LONGEST ? () => set(left - LONGEST) : call;
    timer = globalThis.setTimeout(next, Math.min(left, LONGEST));
  };
  set(ms);
  return () => clearTimeout(timer);
};

/** How often a stream is looked at, and how many entries are read at once. */
const [LOOK_MS, ENTRIES] = [50, 1000];

/** A command's error as one of ours; errors of others stay what they are. @param {unknown} error */
const refusal = (error) => {
  if (!(error instanceof Error)) return error;
  const [, code, message] = /^(\w+) (.*)$/s.exec(error.message) ?? [];
  const known = ERRORS.get(code ?? "");
  return known ? new known(message ?? "") : error;
};

/** @param {Record<string, any>} got */
const jobOrError = (got) => {
  try {
    return Job.read(got);
  } catch (error) {
    return /** @type {Error} */ (error);
  }
};

export class Florence {
  #client;
  #prefix;
  #isCluster;
  #slice;
  #mostConnections;
  /** All connections of its own, how many of them wait, and those that could. @type {Set<any>} */
  #connections = new Set();
  #waiting = 0;
  /** @type {any[]} */
  #idle = [];
  /** Jobs that no connection waits for yet, and who is to be told. @type {Map<string, Set<Wanted>>} */
  #wanted = new Map();
  /** Everyone who is to be told. @type {Set<Wanted>} */
  #callers = new Set();
  /** Who stops with which signal, and what forgets the signal. @type {WeakMap<AbortSignal, { stops: Set<() => void>, forget: () => void }>} */
  #signals = new WeakMap();
  #isClosed = false;

  /**
   * @param {Single | Cluster} client connected; it stays the caller's
   * @param {{ prefix?: string, connections?: number }} [options] `prefix` begins the keys of jobs
   *   that are given none; `connections` wait for jobs, at most
   */
  constructor(client, { prefix = "florence:", connections = 4 } = {}) {
    this.#client = client;
    this.#prefix = prefix;
    this.#isCluster = "nodeClient" in client;
    this.#mostConnections = connections;
    const options = /** @type {any} */ (client);
    const { socket } = (this.#isCluster ? options._options.defaults : options.options) ?? {};
    this.#slice = Math.min(SLICE, (socket?.socketTimeout || Infinity) / 2);
  }

  /** Closes the connections that wait. The client that it was made with stays open. */
  async close() {
    this.#isClosed = true;
    for (const connection of this.#connections) if (connection.isOpen) connection.destroy();
    this.#tellClosed();
  }

  /**
   * Submits and waits: the answer, or an exception that says why there is none.
   * @template T
   * @param {Image} image
   * @param {Question<T>} question
   * @param {AskOptions} [options]
   * @returns {Promise<T>}
   */
  async ask(image, question, { timeoutMs, signal, ...options } = {}) {
    signal?.throwIfAborted();
    const key = await this.submit(image, question, options);
    return (await this.wait(key, { timeoutMs, signal })).answer;
  }

  /**
   * Creates a job: its key. The same request again under the same key changes nothing.
   * @template T
   * @param {Image} image
   * @param {Question<T>} question
   * @param {Options} [options]
   * @returns {Promise<JobKey<T>>}
   */
  async submit(image, { prompts, steps = [] }, { key, ...options } = {}) {
    const asked = prompts.length === 1 ? prompts : ["PROMPTS", String(prompts.length), ...prompts];
    const picture = await imageArguments(image);
    const args = [...picture, ...asked, ...steps.flat(), ...optionArguments(options)];
    const name = key ?? newKey(this.#prefix, image);
    const reply = plain(await this.#send(["FLORENCE.SUBMIT", name, ...args]));
    return /** @type {JobKey<T>} */ (reply);
  }

  /**
   * The job as it is now; undefined if there is no such key.
   * @template {JobKey<any>} K
   * @param {K} key
   * @returns {Promise<Job<AnswerOf<K>> | undefined>}
   */
  async get(key) {
    const reply = await this.#send(["FLORENCE.GET", key]);
    return reply === null ? undefined : Job.read(asMap(reply));
  }

  /**
   * The job when it has ended, in whatever way.
   * @template {JobKey<any>} K
   * @param {K} key
   * @param {Waiting} [waiting]
   * @returns {Promise<Job<AnswerOf<K>>>}
   */
  async wait(key, waiting) {
    const [job] = await this.waitMany([key], waiting);
    return /** @type {Job<AnswerOf<K>>} */ (job);
  }

  /**
   * The jobs when all have ended, in the order of the keys.
   * @template {JobKey<any>} K
   * @param {Iterable<K>} keys
   * @param {Waiting} [waiting]
   * @returns {Promise<Job<AnswerOf<K>>[]>}
   */
  async waitMany(keys, waiting) {
    const order = [...keys];
    /** @type {Map<string, Job<AnswerOf<K>>>} */
    const ended = new Map();
    for await (const job of this.asCompleted(order, waiting)) ended.set(job.key, job);
    return order.map((key) => /** @type {Job<AnswerOf<K>>} */ (ended.get(key)));
  }

  /**
   * Each job when it ends; at last, as an exception, what is no job.
   * @template {JobKey<any>} K
   * @param {Iterable<K>} keys
   * @param {Waiting} [waiting]
   * @returns {AsyncGenerator<Job<AnswerOf<K>>, void, undefined>}
   */
  async *asCompleted(keys, { timeoutMs, signal } = {}) {
    signal?.throwIfAborted();
    /** @type {(Job<AnswerOf<K>> | Error | { stop: unknown })[]} */
    const news = [];
    let wake = () => {};
    const tell = (/** @type {Job<AnswerOf<K>> | Error | { stop: unknown }} */ end) => {
      news.push(end);
      wake();
    };
    /** @type {Map<string, () => void>} */
    const pending = new Map();
    const all = [...new Set(keys)];
    // In so short a time there may be no reply to a WAIT.
    const isShort = timeoutMs != null && timeoutMs < SHORT && !this.#isClosed;
    const told = isShort ? await this.#endsOf(all) : new Map();
    signal?.throwIfAborted();
    news.push(...told.values());
    for (const key of all.filter((key) => !told.has(key))) {
      const forget = this.#want(key, (end) => {
        pending.delete(key);
        tell(end);
      });
      pending.set(key, forget);
    }
    const stop = () => tell({ stop: signal?.reason });
    const late = () => tell({ stop: new WaitTimeoutError([...pending.keys()]) });
    const forgetTimer = timeoutMs == null ? undefined : callAfter(timeoutMs, late);
    const forgetSignal = signal ? this.#stopWith(signal, stop) : undefined;
    let problem;
    try {
      while (pending.size > 0 || news.length > 0) {
        const end = news.shift();
        if (end === undefined) await new Promise((resolve) => (wake = () => resolve(undefined)));
        else if (end instanceof Job) yield end;
        else if ("stop" in end) throw end.stop;
        else problem ??= end;
      }
      if (problem) throw problem;
    } finally {
      forgetTimer?.();
      forgetSignal?.();
      for (const forget of pending.values()) forget();
    }
  }

  /**
   * The text of a job that was submitted with `tokens`, as it grows, until the job ends. It looks
   * twenty times a second. What was told before is told first.
   * @param {JobKey<any>} key
   * @param {Waiting} [waiting]
   * @returns {AsyncGenerator<import("./jobs.js").Piece, void, undefined>}
   */
  async *pieces(key, { timeoutMs, signal } = {}) {
    const until = performance.now() + (timeoutMs ?? Infinity);
    const { stream } = await this.#existing(key);
    if (stream === undefined) throw new TypeError(`${key} has no stream: submit it with tokens`);
    for (let last = "-"; ; ) {
      signal?.throwIfAborted();
      // The job is looked at first: its end comes into the stream with it.
      const job = await this.get(key);
      const range = ["XRANGE", stream, last, "+", "COUNT", String(ENTRIES)];
      /** @type {any[]} */
      const found = await this.#send(range);
      const hasEnded = (!job || job.hasEnded) && found.length < ENTRIES;
      for (const [id, fields] of found) {
        last = `(${plain(id)}`;
        const { job, attempt, step, index, text } = asMap(fields);
        if (job !== key || text === undefined) continue;
        yield { attempt: Number(attempt), step: Number(step), index: Number(index), text };
      }
      if (hasEnded) return;
      if (performance.now() >= until) throw new WaitTimeoutError([key]);
      if (found.length === 0) await setTimeout(LOOK_MS);
    }
  }

  /** Ends jobs that have not ended: how many. @param {...string} keys */
  cancel(...keys) {
    return this.#change("FLORENCE.CANCEL", keys);
  }

  /** Queues jobs again that failed, expired or were cancelled: how many. @param {...string} keys */
  retry(...keys) {
    return this.#change("FLORENCE.RETRY", keys);
  }

  /**
   * The small copy of a job's picture, a JPEG file, if it has one: see the option `thumbnail`.
   * @param {string} key
   * @returns {Promise<Buffer | undefined>}
   */
  async thumbnail(key) {
    const typeMapping = { [BLOB_STRING]: Buffer };
    return (await this.#send(["HGET", key, "thumbnail"], { typeMapping })) ?? undefined;
  }

  /**
   * Unfinished jobs, those in a state, or those that have ended, the newest end first; in a cluster
   * those of all masters, at most `count` of each.
   * @param {{ state?: import("./jobs.js").State | "ended", count?: number }} [options]
   * @returns {Promise<import("./jobs.js").Listed[]>}
   */
  async jobs(options = {}) {
    if (typeof options !== "object") throw new TypeError("jobs takes { state, count }");
    const { state, count } = options;
    const states = state == null ? [] : ["STATE", state];
    const counts = count == null ? [] : ["COUNT", String(count)];
    const replies = await this.#everywhere(["FLORENCE.JOBS", ...states, ...counts]);
    const rows = replies.flat().map(listed);
    return rows.sort((one, other) => Number(other.finishedAt ?? 0) - Number(one.finishedAt ?? 0));
  }

  /** The counters of every master. */
  async stats() {
    return (await this.#everywhere(["FLORENCE.STATS"])).map(asMap);
  }

  /** Histograms of the phases of jobs by task, of every master. */
  latencies() {
    return this.#tables("LATENCY");
  }

  /** How many jobs ended in which way, by task and code, on every master. */
  ends() {
    return this.#tables("JOBS");
  }

  /** The model of every master. */
  async model() {
    const nodes = (await this.#everywhere(["FLORENCE.MODEL"])).map(asMap);
    return nodes.map((node) => ({ ...node, models: node.models.map(asMap) }));
  }

  /** @param {Image} image @param {AskOptions} [options] */
  caption(image, options) {
    return this.ask(image, tasks.caption, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  detailedCaption(image, options) {
    return this.ask(image, tasks.detailedCaption, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  moreDetailedCaption(image, options) {
    return this.ask(image, tasks.moreDetailedCaption, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  detect(image, options) {
    return this.ask(image, tasks.detect, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  denseRegionCaption(image, options) {
    return this.ask(image, tasks.denseRegionCaption, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  regionProposal(image, options) {
    return this.ask(image, tasks.regionProposal, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  ocr(image, options) {
    return this.ask(image, tasks.ocr, options);
  }

  /** @param {Image} image @param {AskOptions} [options] */
  ocrWithRegion(image, options) {
    return this.ask(image, tasks.ocrWithRegion, options);
  }

  /** @param {Image} image @param {string} phrase @param {AskOptions} [options] */
  phraseGrounding(image, phrase, options) {
    return this.ask(image, tasks.phraseGrounding(phrase), options);
  }

  /** @param {Image} image @param {string} phrase @param {AskOptions} [options] */
  openVocabularyDetection(image, phrase, options) {
    return this.ask(image, tasks.openVocabularyDetection(phrase), options);
  }

  /** @param {Image} image @param {string} phrase @param {AskOptions} [options] */
  referringExpressionSegmentation(image, phrase, options) {
    return this.ask(image, tasks.referringExpressionSegmentation(phrase), options);
  }

  /** @param {Image} image @param {Region} region @param {AskOptions} [options] */
  regionToSegmentation(image, region, options) {
    return this.ask(image, tasks.regionToSegmentation(region), options);
  }

  /** @param {Image} image @param {Region} region @param {AskOptions} [options] */
  regionToCategory(image, region, options) {
    return this.ask(image, tasks.regionToCategory(region), options);
  }

  /** @param {Image} image @param {Region} region @param {AskOptions} [options] */
  regionToDescription(image, region, options) {
    return this.ask(image, tasks.regionToDescription(region), options);
  }

  /** @param {Image} image @param {Region} region @param {AskOptions} [options] */
  regionToOcr(image, region, options) {
    return this.ask(image, tasks.regionToOcr(region), options);
  }

  /**
   * One listener for all who wait with a signal: of more than ten Node.js warns. Gives what takes
   * the caller away.
   * @param {AbortSignal} signal
   * @param {() => void} stop
   */
  #stopWith(signal, stop) {
    let known = this.#signals.get(signal);
    if (!known) {
      /** @type {Set<() => void>} */
      const stops = new Set();
      const stopAll = () => stops.forEach((stop) => stop());
      signal.addEventListener("abort", stopAll);
      const forget = () => {
        signal.removeEventListener("abort", stopAll);
        this.#signals.delete(signal);
      };
      known = { stops, forget };
      this.#signals.set(signal, known);
    }
    const { stops, forget } = known;
    stops.add(stop);
    return () => {
      stops.delete(stop);
      if (stops.size === 0) forget();
    };
  }

  /** @param {JobKey<any>} key */
  async #existing(key) {
    const job = await this.get(key);
    if (!job) throw new NoJobError(`no such job: ${key}`);
    return job;
  }

  /** @param {string} what @returns {Promise<Record<string, any>[][]>} */
  async #tables(what) {
    const replies = await this.#everywhere(["FLORENCE.STATS", what]);
    return replies.map((rows) => rows.map(asMap));
  }

  /** @param {string} command @param {readonly string[]} keys @returns {Promise<number>} */
  async #change(command, keys) {
    const groups = groupsOf(keys, this.#isCluster);
    const counts = await Promise.all(groups.map((group) => this.#send([command, ...group])));
    return counts.reduce((sum, count) => sum + count, 0);
  }

  /**
   * Adds who wants to know of a job's end; gives what takes it back.
   * @param {string} key
   * @param {Tell} tell
   */
  #want(key, tell) {
    /** @type {Wanted} */
    const wanted = { tell };
    this.#callers.add(wanted);
    this.#wanted.set(key, (this.#wanted.get(key) ?? new Set()).add(wanted));
    if (this.#isClosed) queueMicrotask(() => this.#tellClosed());
    else if (this.#waiting < this.#mostConnections) this.#wait();
    return () => this.#take(wanted);
  }

  /**
   * Takes from the callers one who is told, or wants to know no more.
   * @param {Wanted} wanted
   */
  #take(wanted) {
    const { tell } = wanted;
    wanted.tell = undefined;
    this.#callers.delete(wanted);
    return tell;
  }

  #tellClosed() {
    for (const wanted of this.#callers) this.#take(wanted)?.(new Error("the client was closed"));
  }

  /** Takes a connection, and waits for all jobs that no other waits for, as long as there are any. */
  async #wait() {
    this.#waiting += 1;
    let connection = this.#idle.pop();
    let losses = 0;
    while (this.#wanted.size > 0 && !this.#isClosed) {
      const waited = this.#wanted;
      this.#wanted = new Map();
      const isWanted = (/** @type {Set<Wanted>} */ all) => [...all].some(({ tell }) => tell);
      const keys = [...waited].flatMap(([key, all]) => (isWanted(all) ? [key] : []));
      if (keys.length === 0) continue;
      /** @type {Map<string, Job<any> | Error>} */
      let ends = new Map();
      try {
        if (!connection?.isOpen) {
          this.#connections.delete(connection);
          connection = await this.#connect();
        }
        ends = await this.#look(keys, connection);
        losses = 0;
      } catch (error) {
        losses += 1;
        if (isLost(error) && losses <= RETRIES) await pauseAfter(losses);
        else ends = new Map(keys.map((key) => [key, /** @type {Error} */ (error)]));
      }
      for (const [key, end] of ends) {
        for (const wanted of waited.get(key) ?? []) this.#take(wanted)?.(end);
        waited.delete(key);
      }
      // With those that came meanwhile.
      for (const [key, all] of waited) {
        this.#wanted.set(key, new Set([...(this.#wanted.get(key) ?? []), ...all]));
      }
    }
    this.#waiting -= 1;
    if (connection) this.#idle.push(connection);
  }

  async #connect() {
    // Of a cluster's nodes only those are connected to that have jobs to wait for.
    const connection = this.#client.duplicate(this.#isCluster ? { minimizeConnections: true } : {});
    // What goes wrong is told by the commands.
    connection.on("error", () => {});
    this.#connections.add(connection);
    try {
      return await connection.connect();
    } catch (error) {
      this.#connections.delete(connection);
      throw error;
    }
  }

  /**
   * Waits a moment for some of the jobs, and tells their ends, the first first.
   *
   * WAIT tells of the first of its keys at once, but of missing keys nothing while it has others,
   * and it takes keys of one slot only; so where it has no news, GET asks for all.
   * @param {string[]} keys
   * @param {Single | Cluster} connection
   * @returns {Promise<Map<string, Job<any> | Error>>}
   */
  async #look(keys, connection) {
    const groups = groupsOf(keys, this.#isCluster);
    // Of different length, lest all are begun together and none ends soon for who comes then. Where
    // all keys are asked for each time, about a thousand times a second at most.
    const slice = this.#slice * (0.3 + 0.7 * Math.random());
    const ms = groups.length > 1 ? Math.min(slice, 100 + keys.length) : slice;
    const first = /** @type {string[]} */ (groups[0]);
    let reply = null;
    try {
      // Of nothing but zeros the server would make a wait for ever.
      const seconds = (Math.max(ms, 1) / 1000).toFixed(3);
      const args = ["FLORENCE.WAIT", ...first, seconds];
      reply = await this.#sendBy(connection, args);
    } catch (error) {
      if (!(error instanceof FlorenceError)) throw error;
    }
    if (reply !== null && groups.length === 1) {
      const got = asMap(reply);
      return new Map([[got.id, jobOrError(got)]]);
    }
    return this.#endsOf(keys);
  }

  /**
   * Which jobs have ended, the first first.
   * @param {readonly string[]} keys
   * @returns {Promise<Map<string, Job<any> | Error>>}
   */
  async #endsOf(keys) {
    const ends = await Promise.all(keys.map((key) => this.#endOf(key)));
    const known = ends.flatMap((end, i) => (end ? [{ key: keys[i], end }] : []));
    const finish = (/** @type {Job<any> | Error} */ end) =>
      end instanceof Job ? Number(end.finishedAt) : 0;
    known.sort((one, other) => finish(one.end) - finish(other.end));
    return new Map(known.map(({ key, end }) => [/** @type {string} */ (key), end]));
  }

  /** @param {string} key @returns {Promise<Job<any> | Error | undefined>} */
  async #endOf(key) {
    try {
      const job = await this.get(key);
      if (!job) return new NoJobError(`no such job: ${key}`);
      return job.hasEnded ? job : undefined;
    } catch (error) {
      return /** @type {Error} */ (error);
    }
  }

  /**
   * The command to every master of a cluster: a reply of each.
   * @param {Arguments} args
   * @returns {Promise<any[]>}
   */
  async #everywhere(args) {
    const client = /** @type {any} */ (this.#client);
    if (!this.#isCluster) return [await this.#send(args)];
    const nodes = await Promise.all(
      client.masters.map((/** @type {any} */ node) => client.nodeClient(node)),
    );
    return Promise.all(nodes.map((node) => node.sendCommand(args)));
  }

  /**
   * Sends a command, and again if its reply is lost with its connection: it is safe to run twice.
   * @param {Arguments} args
   * @param {object} [options] node-redis' own
   * @returns {Promise<any>}
   */
  async #send(args, options) {
    for (let losses = 1; ; losses += 1) {
      try {
        return await this.#sendBy(this.#client, args, options);
      } catch (error) {
        if (!isLost(error) || losses > RETRIES) throw error;
        await pauseAfter(losses);
      }
    }
  }

  /**
   * @param {Single | Cluster} client
   * @param {Arguments} args the second is a key, in a cluster
   * @param {object} [options]
   * @returns {Promise<any>}
   */
  async #sendBy(client, args, options) {
    try {
      return await (this.#isCluster
        ? /** @type {Cluster} */ (client).sendCommand(args[1], false, args, options)
        : /** @type {Single} */ (client).sendCommand(args, options));
    } catch (error) {
      throw refusal(error);
    }
  }
}
