// Lists of jobs: by state, or found; some or all of them retried, cancelled, deleted.

import { get, post } from "./api.js";
import { duration, el, keyText, moment, put, repeat, say, state } from "./dom.js";
import { pauseButtons } from "./overview.js";
import { LongList, nameOf } from "./table.js";

const TABS = [
  ["Unfinished", ""], ["Queued", "queued"], ["Retrying", "retrying"], ["At work", "fetching,running"],
  ["Done", "done"], ["Failed", "failed"], ["Cancelled", "cancelled"], ["Expired", "expired"], ["All", "all"],
];
const FIELDS = [["any", "anywhere"], ["key", "key begins with"], ["prompt", "prompt"], ["host", "host"], ["error", "error"]];
/** Which states an action is for. */
const FOR = {
  retry: ["failed", "cancelled", "expired", "all"],
  cancel: ["", "queued", "retrying", "fetching,running", "all"],
};
/** Most jobs that a server lists. */
const LISTED = 1000;
const EVERY = 2000;

export function showJobs(main, app, parameters, signal) {
  const wanted = {
    state: TABS.some(([, states]) => states === parameters.get("state")) ? parameters.get("state") : "",
    q: parameters.get("q") ?? "",
    field: parameters.get("field") ?? "any",
    all: parameters.get("all") === "1" ? true : undefined,
  };
  const isSearch = wanted.q !== "" || wanted.all;
  const go = (changes) => app.go("jobs", { ...wanted, all: wanted.all ? 1 : undefined, ...changes });

  const tabs = el("div", { class: "tabs", role: "group", "aria-label": "States" }, TABS.map(([name, states]) =>
    el("button", { type: "button", "aria-pressed": String(states === wanted.state), onclick: () => go({ state: states }) }, name)));
  const search = el("input", { type: "search", ".value": wanted.q, placeholder: "Search (press /)", "aria-label": "Search" });
  const field = el("select", { "aria-label": "Where" }, FIELDS.map(([value, name]) => el("option", { value, selected: value === wanted.field }, name)));
  const form = el("form", {
    class: "search", role: "search",
    onsubmit: (event) => {
      event.preventDefault();
      // Whoever begins to look for a job need not know its state.
      go({ q: search.value, field: field.value, state: isSearch ? wanted.state : "all" });
    },
  }, search, field, el("button", { type: "submit" }, "Search"));
  const note = el("p", { class: "quiet", id: "note", role: "status" }, "Looking …");
  const selected = new Map();
  const chosen = el("span", { class: "quiet" });
  const actions = el("div", { class: "actions" });
  const pauses = pauseButtons(app);
  const address = location.hash;
  const list = new LongList({
    label: "Jobs",
    columns: [{ name: "Job" }, { name: "State" }, { name: "Asked" }, { name: "Picture", wide: true }, { name: "" }],
    cells: (row, detail) => cells(row, detail, app),
    details: (rows) => post("/api/rows", { jobs: rows.map(({ server, id }) => ({ server, id })) }, signal),
    open: (row) => app.go("job", { server: row.server, id: row.id }),
    selected,
    canSelect: !app.info.is_read_only,
    place: app.left?.address === address ? app.left.place : null,
  });
  signal.addEventListener("abort", () => { app.left = { address, place: list.place() }; });
  let found = { rows: [] };
  let isAll = false;

  const chosenText = () => {
    const n = isAll ? `all ${found.rows.length}${found.is_complete ? "" : " or more"} that match` : `${selected.size} selected`;
    chosen.textContent = selected.size || isAll ? n : "";
    for (const button of actions.querySelectorAll("button[data-action]")) button.disabled = !selected.size && !isAll;
    everything.textContent = isAll ? "Select none" : "Select all that match";
  };
  const everything = el("button", { type: "button", onclick: () => {
    isAll = !isAll;
    selected.clear();
    chosenText();
    list.draw();
  } });
  const act = (action) => async () => {
    // Of all that match, those that were counted; if there are more than are listed, the server looks for all of them.
    const { rows, is_complete: isComplete } = found;
    const n = isAll ? `all jobs that match (${rows.length}${isComplete ? "" : " or more"})` : `${selected.size} jobs`;
    const isAsked = action === "delete" || isAll;
    if (isAsked && !confirm(`${action} ${n}?`)) return;
    try {
      const orders = isAll && !isComplete ? [{ action, match: { server: app.server, ...wanted, all: true } }] : batches(action, isAll ? rows : [...selected.values()]);
      const sum = { changed: 0, unchanged: 0, refused: 0, errors: [], notes: [] };
      for (const order of orders) {
        const done = await post("/api/act", order, signal);
        for (const name of ["changed", "unchanged", "refused"]) sum[name] += done[name];
        sum.errors.push(...done.errors);
        sum.notes.push(...done.notes);
      }
      selected.clear();
      isAll = false;
      say(result(action, sum), sum.refused > 0 || sum.notes.length > 0);
      await look();
    } catch (error) {
      if (!signal.aborted) say(error.message, true);
    }
  };
  if (!app.info.is_read_only) {
    const fits = (action) => !FOR[action] || FOR[action].includes(wanted.state);
    put(actions, everything, ["retry", "cancel", "delete"].filter(fits).map((action) =>
      el("button", { type: "button", "data-action": action, class: action === "delete" ? "bad" : null, onclick: act(action) }, action[0].toUpperCase() + action.slice(1))), chosen);
  }
  list.element.addEventListener("selection", () => {
    isAll = false;
    chosenText();
  });
  main.append(el("h1", {}, "Jobs"), el("div", { class: "bar" }, tabs, el("span", { class: "pauses" }, pauses.buttons)), el("div", { class: "bar" }, form, actions), note, list.element);
  chosenText();

  async function look() {
    found = await get("/api/jobs", { ...wanted, server: app.server }, signal);
    put(note, describe(found, isSearch, () => go({ all: 1 })));
    // What is acted on is what is seen.
    const listed = new Map(found.rows.map((row) => [nameOf(row), row]));
    for (const name of [...selected.keys()]) {
      if (listed.has(name)) selected.set(name, listed.get(name));
      else selected.delete(name);
    }
    chosenText();
    await list.set(found.rows, isSearch ? "Nothing is found." : "There are none.");
  }
  const told = ({ servers }) => pauses.told(servers);
  app.live.addEventListener("told", (event) => told(event.detail), { signal });
  if (app.last) told(app.last);

  // What looks at all keys is done once, and again by who presses Search; what it found is kept up to date.
  repeat(() => (found.is_search ? list.ask() : look()), EVERY, note, signal);
}

function batches(action, rows) {
  const jobs = rows.map(({ server, id, state }) => ({ server, id, state }));
  const orders = [];
  for (let i = 0; i < jobs.length; i += 1000) orders.push({ action, jobs: jobs.slice(i, i + 1000) });
  return orders;
}

function result(action, { changed, unchanged, refused, errors, notes }) {
  const done = { retry: "queued again", cancel: "cancelled", delete: "deleted" }[action];
  const parts = [`${changed} ${done}`];
  if (unchanged) parts.push(`${unchanged} left as they are`);
  if (refused) parts.push(`${refused} refused: ${[...new Set(errors)].join("; ")}`);
  return [parts.join(", "), ...notes].join(" · ");
}

function describe(found, isSearch, lookAtAll) {
  const n = found.rows.length;
  const parts = [`${n.toLocaleString("en")} ${n === 1 ? "job" : "jobs"}`];
  if (isSearch) parts.push(` (of ${found.looked_at.toLocaleString("en")} keys)`);
  if (!found.is_complete && !isSearch && n >= LISTED) {
    parts.push(", and perhaps more: the server lists a thousand. ", el("button", { type: "button", onclick: lookAtAll }, "Look at all keys"));
  }
  return [...parts, ...found.notes.map((text) => ` · ${text}`)];
}

function cells(row, detail, app) {
  const key = el("a", { href: app.href("job", { server: row.server, id: row.id }), tabindex: -1 }, keyText(row.id));
  const server = app.info.servers.length > 1 && app.server === undefined ? el("small", {}, app.info.servers[row.server]) : null;
  if (detail === null) return [[key, server], state("gone"), "", "", ""];
  if (!detail) return [[key, server], state(row.state), "", "", ""];
  return [[key, server], state(detail.state), prompts(detail.prompt), detail.image ?? "", remark(detail)];
}

export function prompts(prompt) {
  return listOf(prompt)?.join(" · ") ?? prompt ?? "";
}

/** Several prompts, which are a list; one may begin like a list. */
export function listOf(prompt) {
  if (!prompt?.startsWith("[")) return null;
  try {
    const list = JSON.parse(prompt);
    return Array.isArray(list) && list.every((one) => typeof one === "string") ? list : null;
  } catch {
    return null;
  }
}

/** What matters of a job in its state. */
function remark(job) {
  if (job.error && job.state !== "done") return `${job.error.code} ${job.error.message}`;
  if (job.due_at && job.due_at > Date.now()) return `due ${moment(job.due_at)}`;
  if (job.retry_at) return `next attempt ${moment(job.retry_at)}`;
  if (job.position !== undefined) {
    const eta = job.eta_ms === undefined ? "" : `, about ${duration(job.eta_ms)}`;
    return job.position === 0 ? `next${eta}` : `${job.position} before it${eta}`;
  }
  if (job.phase) return job.tokens ? `${job.phase}, ${job.tokens} tokens` : job.phase;
  if (job.finished_at) return `${duration(job.finished_at - job.submitted_at)}, ${moment(job.finished_at)}`;
  return moment(job.submitted_at);
}
