// One job: its picture with the answer over it, how it went, and all that is known of it.

import { get, post, url } from "./api.js";
import { duration, el, keyText, moment, put, say, state } from "./dom.js";
import { listOf, prompts } from "./jobs.js";
import { overlay } from "./overlay.js";

const ENDED = ["done", "failed", "cancelled", "expired"];
const EVERY = 1000;

export function showJob(main, app, parameters, signal) {
  const named = { server: Number(parameters.get("server")), id: parameters.get("id") ?? "" };
  const view = jobView(named, app, () => look());
  const note = el("p", { class: "quiet" }, "Looking …");
  main.append(el("h1", { class: "key" }, keyText(named.id)), note, view.element);
  let timer;
  async function look() {
    clearTimeout(timer);
    try {
      const found = await get("/api/job", named, signal);
      note.hidden = true;
      view.show(found);
      if (ENDED.includes(found.job.state)) return;
    } catch (error) {
      if (signal.aborted) return;
      note.hidden = false;
      note.textContent = error.message;
      if (error.status === 404) {
        put(view.element);
        return;
      }
    }
    timer = setTimeout(look, EVERY);
  }
  signal.addEventListener("abort", () => clearTimeout(timer));
  look();
}

/** All of a job; also what the page shows of a picture that is tried. `look` is called after a change. */
export function jobView(named, app, look) {
  const parts = {
    head: [el("div", { class: "bar" }), ({ job }) => [job.state, job.prompt], head],
    answer: [el("div", {}), ({ job, marks, options, ...found }) => [marks, job.width, found.has_thumbnail, found.has_data, options.exif, job.state === "done"], answer],
    rest: [el("div", {}), (found) => ({ ...found, ttl_ms: null }), rest],
  };
  const shown = {};
  function show(found) {
    for (const [name, [element, matter, build]] of Object.entries(parts)) {
      // What has not changed stays: somebody may be reading it, or clicking on it.
      const looks = JSON.stringify(matter(found));
      if (shown[name] !== looks) put(element, build(found, named, app, look));
      shown[name] = looks;
    }
  }
  return { element: el("div", { id: "job" }, Object.values(parts).map(([element]) => element)), show };
}

function head(found, named, app, look) {
  return [state(found.job.state), el("b", {}, [prompts(found.job.prompt), ...steps(found.job).map((step) => step.join(" "))].join(" ")), el("span", { class: "grow" }), buttons(found, named, app, look)];
}

function rest(found, named, app) {
  const { job } = found;
  return [
    job.error && job.state !== "done" ? el("p", { class: "bad", id: "error" }, `${job.error.code}: ${job.error.message}${job.error.retryable ? " (may pass)" : ""}`) : null,
    el("div", { class: "cards" }, timeline(found), facts(found), attempts(found)),
    text(job),
    el("details", { class: "card" }, el("summary", {}, "As redis-cli"), el("pre", { id: "cli" }, command(found, named, app.info.cli[named.server] ?? []))),
    el("details", { class: "card" }, el("summary", {}, "As JSON"), el("pre", { id: "json" }, JSON.stringify(job, null, 2))),
  ];
}

function buttons({ job }, named, app, look) {
  const act = (action) => async () => {
    if (action === "delete" && !confirm("Delete this job?")) return;
    try {
      const done = await post("/api/act", { action, jobs: [named] });
      say(done.refused ? done.errors.join("; ") : { retry: "Queued again", cancel: "Cancelled", delete: "Deleted" }[action], done.refused > 0);
      if (action === "delete") app.go("jobs");
      else look();
    } catch (error) {
      say(error.message, true);
    }
  };
  const button = (action, name) => el("button", { type: "button", "data-action": action, onclick: act(action), class: action === "delete" ? "bad" : null }, name);
  const canRetry = ["failed", "cancelled", "expired"].includes(job.state);
  return el("span", { class: "actions" },
    job.state === "done" ? el("a", { class: "button", href: url("/api/annotated", named), download: "florence.png" }, "Annotated PNG") : null,
    app.info.is_read_only ? null : [
      canRetry ? button("retry", "Retry") : null,
      ENDED.includes(job.state) ? null : button("cancel", "Cancel"),
      button("delete", "Delete"),
    ]);
}

function answer(found, named) {
  const { job, marks, labels, has_thumbnail: hasThumbnail, has_data: hasData, options } = found;
  const isTurned = hasThumbnail || options.exif === "1";
  const missing = el("p", { class: "quiet" }, "The job keeps no picture: florence.thumbnails, or THUMBNAIL of SUBMIT, keeps a small one. Pictures at addresses are not fetched from here.");
  // The thumbnail is what the model saw; a browser may turn the file that was tried, or not know its format.
  const kept = url("/api/picture", { server: named.server, id: named.id });
  const source = hasThumbnail ? kept : named.source ?? (hasData ? kept : null);
  missing.hidden = source !== null;
  if (!job.width || !job.height) {
    if (!source) return [];
    return el("div", { class: "stage" }, el("img", { src: source, alt: "The job's picture", class: isTurned ? "turned" : null }));
  }
  const shown = overlay({
    marks, labels: labels ?? [], source, isTurned, width: job.width, height: job.height,
    onMissing: () => { missing.hidden = false; },
  });
  const hasMarks = marks.marks.length > 0;
  return el("section", { class: "answer" },
    source || hasMarks ? shown.stage : null,
    el("div", { class: "said" }, shown.texts, shown.list,
      !hasMarks && shown.texts.length === 0 ? el("p", { class: "quiet" }, "Nothing was found.") : null, missing));
}

/** How long each part took, as bars on one line. */
function timeline({ job, options }) {
  const parts = [];
  const add = (name, ms, hue) => ms > 0 && parts.push({ name, ms, hue });
  if (job.queue_ms !== undefined) add("waited", job.queue_ms, 4);
  add("download and decoding", job.fetch_ms, 3);
  add("model", job.infer_ms, 1);
  const whole = (job.finished_at ?? Date.now()) - job.submitted_at;
  const known = parts.reduce((sum, part) => sum + part.ms, 0);
  if (job.finished_at && job.started_at) add("between", whole - known, 5);
  const most = Math.max(whole, known, 1);
  const moments = [["submitted", job.submitted_at], ["due", job.due_at ?? due(job, options)], ["started", job.started_at], ["next attempt", job.retry_at], ["ended", job.finished_at]];
  return el("section", { class: "card", id: "timeline" }, el("h2", {}, "Timeline"),
    el("div", { class: "timeline" }, parts.map((part) => {
      const bar = el("span", { class: `hue${part.hue}`, title: `${part.name}: ${duration(part.ms)}` });
      bar.style.flexGrow = Math.max(part.ms / most, 0.005);
      return bar;
    })),
    el("p", { class: "legend" }, parts.map((part) => el("span", {}, el("i", { class: `hue${part.hue}` }), `${part.name} ${duration(part.ms)}`))),
    el("dl", { class: "facts" }, moments.filter(([, at]) => at).flatMap(([name, at]) => [el("dt", {}, name), el("dd", {}, moment(at))]),
      el("dt", {}, "in all"), el("dd", {}, duration(whole))));
}

function due(job, options) {
  return job.state === "queued" && options.delay ? job.submitted_at + Number(options.delay) : undefined;
}

/** What was tried before, and why it was tried again. */
function attempts({ job }) {
  if (!Array.isArray(job.errors) || job.errors.length === 0) return null;
  return el("section", { class: "card", id: "attempts" }, el("h2", {}, "Failed attempts"),
    el("dl", { class: "facts" }, job.errors.flatMap(({ attempt, at, code, message }) =>
      [el("dt", {}, `${attempt}, ${moment(at)}`), el("dd", {}, `${code}: ${message}`)])));
}

function facts({ job, options, ttl_ms: ttl }) {
  const rows = [
    ["picture", job.image],
    ["size", job.width && `${job.width} × ${job.height}`],
    ["phase", job.phase],
    ["place", job.position === undefined ? undefined : job.position === 0 ? "next" : `${job.position} before it`],
    ["estimate", job.eta_ms === undefined ? undefined : duration(job.eta_ms)],
    ["attempts", `${job.attempts}${options.retries ? ` (${options.retries} retries allowed)` : ""}`],
    ["last error", job.error && job.state !== "failed" ? `${job.error.code} ${job.error.message}` : undefined],
    ["spared by caches", job.cache && { result: "everything", features: "the picture", miss: "nothing" }[job.cache]],
    ["model", job.model],
    ["tokens", job.tokens],
    ["user", options.user],
    ["priority", options.priority],
    ["beams", options.beams],
    ["best texts", options.nbest_count],
    ["text goes to", options.stream],
    ["timeout", options.timeout && duration(Number(options.timeout))],
    ["expires", options.expires && `${duration(Number(options.expires))} after it was submitted`],
    ["kept for", ttl === null ? undefined : duration(ttl)],
  ];
  return el("section", { class: "card", id: "facts" }, el("h2", {}, "About it"),
    el("dl", { class: "facts" }, rows.filter(([, value]) => value !== undefined && value !== null && value !== "")
      .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])));
}

function text(job) {
  if (!job.text) return null;
  const scores = Array.isArray(job.scores) ? el("p", { class: "quiet" }, `Scores: ${JSON.stringify(job.scores)}`) : null;
  return el("details", { class: "card" }, el("summary", {}, `Raw text, ${job.tokens ?? "?"} tokens`), el("pre", { id: "raw" }, job.text), scores);
}

const WORDS = [["priority", "PRIORITY"], ["delay", "DELAY"], ["expires", "EXPIRES"], ["timeout", "TIMEOUT"], ["retries", "RETRIES"], ["ttl", "TTL"], ["beams", "BEAMS"], ["nbest_count", "NBEST"], ["maxtokens", "MAXTOKENS"], ["ngram", "NGRAM"], ["length_penalty", "LENGTHPENALTY"], ["temperature", "TEMPERATURE"], ["top_k", "TOPK"], ["top_p", "TOPP"], ["seed", "SEED"], ["margin", "MARGIN"], ["wants", "MODEL"], ["thumbnail_px", "THUMBNAIL"], ["stream", "TOKENS"]];

/** What is asked after the first prompt: `["EACH", prompt]`. */
function steps(job) {
  const list = Array.isArray(job.steps) ? job.steps : [];
  return list.flatMap((step) => Object.entries(step).map(([link, prompt]) => [link.toUpperCase(), String(prompt)]));
}

/** The command that asks the same, under a key of its own: under the job's, it would have to give no more options than its client did,
 * which is not known. Nor is what is secret in its address. `connect` are the options that choose the server. */
function command({ job, options }, named, connect) {
  const id = keyText(named.id);
  // Bytes that are no text, and what ends a line or a word: only redis-cli's own quotes can say them, and then all is in them.
  const isText = !/\p{Cc}/u.test(id) && (id !== named.id || !id.includes("%"));
  const isWord = (value) => /^[\w:./-]+$/.test(value);
  const inShell = (value) => (isWord(value) ? value : `'${value.replaceAll("'", "'\\''")}'`);
  const client = ["redis-cli", ...connect.map(inShell)].join(" ");
  const cli = isText ? client : `${client} --quoted-input`;
  const escaped = (value) => value.replaceAll(/["\\]/g, "\\$&");
  const quoted = (value) => inShell(isText || isWord(value) ? String(value) : `"${escaped(value)}"`);
  const several = listOf(job.prompt);
  const asked = several ? ["PROMPTS", several.length, ...several] : [job.prompt, ...steps(job).flat()];
  const image = job.image === "DATA" || job.image?.startsWith("data:") ? null : job.image;
  const source = image === null ? ["DATA", "\"$(cat picture)\""] : image?.startsWith("KEY ") ? ["KEY", quoted(image.slice(4))] : [quoted(image ?? "")];
  const words = WORDS.filter(([name]) => options[name] !== undefined).flatMap(([name, word]) => [word, options[name]]);
  if (options.exif !== undefined) words.push(options.exif === "1" ? "EXIF" : "NOEXIF");
  if (options.nocache === "1") words.push("NOCACHE");
  const key = isText ? quoted(`${id}:again`) : inShell(`"${escaped(named.id).replaceAll(/%(..)/g, "\\x$1")}:again"`);
  if (image === null) {
    // The shell cannot pass a picture's bytes as an argument.
    return `${client} -x SET florence:picture < picture\n${cli} FLORENCE.SUBMIT ${key} KEY florence:picture ${[...asked, ...words].map(quoted).join(" ")}\n${cli} FLORENCE.GET ${key}`;
  }
  return `${cli} FLORENCE.SUBMIT ${key} ${source.join(" ")} ${[...asked, ...words].map(quoted).join(" ")}\n${cli} FLORENCE.GET ${key}`;
}
