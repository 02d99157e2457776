// Tasks of Celery's clients, as Flower shows them.

import { get, post } from "./api.js";
import { duration, el, moment, put, repeat, state } from "./dom.js";
import { LongList } from "./table.js";

const EVERY = 3000;
const PREFIX = "florence:celery:";

export function showCelery(main, app, parameters, signal) {
  const note = el("p", { class: "quiet", id: "note", role: "status" }, "Looking …");
  const search = el("input", { type: "search", ".value": parameters.get("q") ?? "", placeholder: "Id begins with (press /)", "aria-label": "Search" });
  const form = el("form", { class: "search", role: "search", onsubmit: (event) => {
    event.preventDefault();
    app.go("celery", { q: search.value.trim() });
  } }, search, el("button", { type: "submit" }, "Search"));
  const list = new LongList({
    label: "Tasks",
    columns: [{ name: "Id" }, { name: "State" }, { name: "Task" }, { name: "Arguments", wide: true }, { name: "Runtime" }],
    cells,
    details: (rows) => post("/api/tasks", { jobs: rows.map(({ server, id }) => ({ server, id })) }, signal),
    open: (row) => app.go("job", { server: row.server, id: row.id }),
    selected: new Map(),
    canSelect: false,
  });
  main.append(el("h1", {}, "Celery"), el("div", { class: "bar" }, form), note, list.element);
  const q = parameters.get("q") ?? "";
  const all = parameters.get("all") === "1" ? true : undefined;
  const wanted = { prefix: PREFIX + q, state: "all", all };
  let found = { rows: [] };
  async function look() {
    found = await get("/api/jobs", { ...wanted, server: app.server }, signal);
    const n = found.rows.length;
    put(note, `${n.toLocaleString("en")} ${n === 1 ? "task" : "tasks"}`,
      found.is_complete || all || found.notes.length ? null : [", and perhaps more: of each state the server lists a thousand jobs. ", el("button", { type: "button", onclick: () => app.go("celery", { q, all: 1 }) }, "Look at all keys")],
      found.notes.map((text) => ` · ${text}`));
    await list.set(found.rows, "No tasks of Celery's are here: docs/CELERY.md says how they come.");
  }
  // As in the list of jobs, all keys are looked at once.
  repeat(() => (found.is_search ? list.ask() : look()), EVERY, note, signal);
}

function cells(row, task) {
  const id = row.id.slice(PREFIX.length);
  if (!task) return [id, task === null ? state("gone") : "", "", "", ""];
  const when = task.eta && !task.started_at ? `eta ${task.eta}` : task.runtime_ms === null ? moment(task.submitted_at) : `${duration(task.runtime_ms)}, ${moment(task.finished_at)}`;
  const args = `(${task.args.map((arg) => JSON.stringify(arg)).join(", ")})`;
  return [
    String(task.id ?? id),
    el("span", { class: `state ${row.state}`, title: task.error ? `${task.error.code} ${task.error.message}` : null }, task.state),
    [task.name ?? "", el("small", {}, task.queue ?? "")], args, when,
  ];
}
