// The frame of the page: which part is shown, for which server, and whether the connection stands.

import { get, post, url } from "./api.js";
import { el, put } from "./dom.js";
import { showCelery } from "./celery.js";
import { showJob } from "./job.js";
import { showJobs } from "./jobs.js";
import { showOverview } from "./overview.js";
import { showTry } from "./try.js";

const PARTS = { overview: showOverview, jobs: showJobs, job: showJob, try: showTry, celery: showCelery };

/** What all parts know. Listeners of `live` hear the overview each second. */
const app = {
  info: null,
  /** Number of the chosen server, as the address has it; none for all. */
  server: undefined,
  live: new EventTarget(),
  last: null,
  /** Where somebody was in the list that was left last. */
  left: null,
  href,
  go,
};

/** The address of a part with its parameters, for the chosen server. */
function href(part, parameters = {}) {
  return `#${url(`/${part}`, { only: app.server, ...parameters })}`;
}

function go(part, parameters) {
  const before = location.hash;
  location.hash = href(part, parameters);
  // The same address again is no change, but asks to look again.
  if (location.hash === before) arrive();
}

function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { part: path in PARTS ? path : "overview", parameters: new URLSearchParams(query ?? "") };
}

let leave = null;

/** Shows the part that the address names, and ends the one before. */
function show() {
  leave?.abort();
  leave = new AbortController();
  const { part, parameters } = address();
  choose(parameters.get("only"));
  for (const link of document.querySelectorAll("#pages a")) {
    const name = link.hash.match(/\w+/)[0];
    link.href = href(name);
    if (name === (part === "job" ? "jobs" : part)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const main = document.getElementById("main");
  put(main);
  PARTS[part](main, app, parameters, leave.signal);
}

/** Shows a part to somebody who has come from another one. */
function arrive() {
  show();
  scrollTo(0, 0);
  document.getElementById("main").focus({ preventScroll: true });
}

/** Chooses the server of this number; all, if there is none. */
function choose(number) {
  const server = Object.keys(app.info.servers).includes(number) ? Number(number) : undefined;
  document.getElementById("server").value = server ?? "";
  if (server === app.server) return;
  app.server = server;
  app.last = null;
  listen();
}

let stream = null;
let retry = null;

function lost(text) {
  const banner = document.getElementById("lost");
  banner.hidden = !text;
  banner.textContent = text ?? "";
}

/** Listens to the server of the page, and tries again for as long as it is away. */
function listen() {
  clearTimeout(retry);
  stream?.close();
  stream = new EventSource(url("/api/live", { server: app.server }));
  stream.onmessage = (event) => {
    lost(null);
    app.last = JSON.parse(event.data);
    warn(app.last.servers);
    app.live.dispatchEvent(new CustomEvent("told", { detail: app.last }));
  };
  stream.onerror = () => {
    lost("The connection to the page's server is lost; trying again …");
    if (stream.readyState === EventSource.CLOSED) {
      retry = setTimeout(() => get("/api/info").then(listen, () => listen()), 2000);
    }
  };
}

function warn(servers) {
  const away = servers.filter((server) => !server.is_up);
  if (away.length) lost(away.map((server) => `${server.name}: ${server.error}`).join(" · "));
}

/** Tabs that nobody sees do not hold a connection: a browser has few of them for a host. */
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    stream?.close();
    clearTimeout(retry);
  } else {
    listen();
  }
});

/** One key for each part, as long as nobody is writing. */
document.addEventListener("keydown", (event) => {
  const isWriting = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (isWriting || event.ctrlKey || event.metaKey || event.altKey) return;
  const part = { o: "overview", j: "jobs", t: "try", c: "celery" }[event.key];
  if (part) go(part);
  if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  }
});

function offer() {
  const { servers } = app.info;
  const select = document.getElementById("server");
  put(select, el("option", { value: "" }, "all"), servers.map((name, i) => el("option", { value: i }, name)));
  document.getElementById("picker").hidden = servers.length < 2;
  select.addEventListener("change", () => {
    const { part, parameters } = address();
    go(part, { ...Object.fromEntries(parameters), only: select.value });
  });
}

async function start() {
  try {
    app.info = await get("/api/info");
  } catch (error) {
    lost(error.message);
    setTimeout(start, 2000);
    return;
  }
  lost(null);
  offer();
  document.getElementById("read-only").hidden = !app.info.is_read_only;
  const logout = document.getElementById("logout");
  logout.hidden = !app.info.has_password;
  logout.addEventListener("click", async () => {
    await post("/api/logout", {});
    location.reload();
  });
  // The address is of a part, not of a place on the page.
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById("main").focus();
  });
  addEventListener("hashchange", arrive);
  listen();
  show();
}

start();
