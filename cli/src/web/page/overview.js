// How the servers do, as it happens, and the last hour of it.

import { get, post } from "./api.js";
import { chart } from "./chart.js";
import { bytes, count, duration, el, percent, put, say } from "./dom.js";

const rate = (value) => count(Math.round(value * 100) / 100);

export async function showOverview(main, app, parameters, signal) {
  const charts = [
    chart("Pictures a second", [{ name: "answered", of: "done", hue: 1 }, { name: "failed", of: "failed", hue: 2 }], rate),
    chart("Latency of a job (last minute)", [{ name: "p50", of: "p50", hue: 1 }, { name: "p95", of: "p95", hue: 3 }, { name: "p99", of: "p99", hue: 2 }], duration),
    chart("Unfinished jobs", [{ name: "waiting", of: "waiting", hue: 1 }, { name: "at work", of: "active", hue: 3 }, { name: "delayed", of: "delayed", hue: 4 }], count),
    chart("Caches, jobs a second", [{ name: "answer known", of: "results", hue: 1 }, { name: "picture known", of: "features", hue: 3 }, { name: "nothing known", of: "misses", hue: 4 }], rate),
    chart("Redis' own PING", [{ name: "answered in", of: "ping", hue: 1 }], duration),
    chart("Memory of the process", [{ name: "resident", of: "memory", hue: 1 }], bytes),
  ];
  const facts = app.info.servers.map(() => el("div", {}));
  const pauses = pauseButtons(app);
  const servers = el("div", { class: "cards", id: "servers" }, facts.map((one, i) =>
    el("section", { class: "card server" }, one, pauses.buttons[i])));
  const numbers = el("dl", { class: "numbers", id: "numbers" });
  const latency = el("section", { class: "card", id: "latency" });
  const ends = el("section", { class: "card", id: "ends" });
  const hosts = el("section", { class: "card wide", id: "hosts" });
  main.append(
    el("h1", {}, "Overview"), servers, numbers,
    el("div", { class: "cards charts" }, charts.map((one) => one.element)),
    el("div", { class: "cards" }, latency, ends, hosts),
  );

  let hour = { names: [], points: [] };
  const draw = () => charts.forEach((one) => one.draw(hour.points, hour.names));
  const load = async () => {
    hour = await get("/api/history", { server: app.server }, signal);
    draw();
  };
  const told = (overview) => {
    overview.servers.forEach((server, i) => put(facts[i], serverFacts(server)));
    pauses.told(overview.servers);
    if (!overview.stats) return;
    put(numbers, figures(overview));
    put(latency, latencies(overview.latency));
    put(ends, endings(overview));
    put(hosts, hostRows(overview.hosts));
    const { point } = overview;
    if (point && point[0] > (hour.points.at(-1)?.[0] ?? 0) && hour.names.length) {
      hour.points = [...hour.points.slice(-719), point];
      draw();
    }
  };
  app.live.addEventListener("told", (event) => told(event.detail), { signal });
  if (app.last) told(app.last);
  load().catch((error) => signal.aborted || say(error.message, true));
}

function serverFacts(server) {
  if (!server.is_up) {
    return [el("h2", {}, server.name, el("span", { class: "tag bad" }, "away")), el("p", { class: "bad" }, server.error)];
  }
  const { model } = server;
  const rows = [
    ["Server", [server.redis, server.role].filter(Boolean).join(", ")],
    ["Module", [server.version, server.uptime_ms && `for ${duration(server.uptime_ms)}`].filter(Boolean).join(", ")],
    ["Model", `${model.name ?? "–"} (${model.state ?? "unknown"})`],
    ["Device", [model.device, model.precision, model.kernels].filter(Boolean).join(", ")],
    ["PING", duration(server.ping_ms)],
    ["Memory", `${bytes(server.memory)}, of which Redis counts ${bytes(server.memory_redis)}`],
  ];
  return [
    el("h2", {}, server.name, server.paused ? el("span", { class: "tag bad" }, "paused") : null),
    el("dl", { class: "facts" }, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value || "–")])),
    model.error ? el("p", { class: "bad" }, model.error) : null,
    model.note ? el("p", { class: "quiet" }, model.note) : null,
    server.tells_latency ? null : el("p", { class: "quiet" }, "An older module: it tells no latencies, cannot be paused, and does not list ended jobs by itself."),
  ];
}

/**
 * A button for each server, to start nothing new there, and to go on. They stay the same while all
 * around them is told anew, so that a click cannot fall between.
 */
export function pauseButtons(app) {
  let servers = [];
  const change = async (i) => {
    const { name, paused } = servers[i];
    try {
      await post("/api/pause", { server: i, paused: !paused });
      say(paused ? `${name} goes on` : `${name} is paused`);
    } catch (error) {
      say(error.message, true);
    }
  };
  const buttons = app.info.servers.map((_, i) => el("button", { type: "button", class: "pause", hidden: true, onclick: () => change(i) }));
  const told = (now) => {
    servers = now;
    now.forEach((server, i) => {
      const can = server.is_up && typeof server.paused === "boolean" && server.role !== "replica" && !app.info.is_read_only;
      buttons[i].hidden = !can || (app.server !== undefined && app.server !== i);
      const of = now.length > 1 ? ` ${server.name}` : "";
      buttons[i].textContent = (server.paused ? "Go on" : "Pause") + of;
    });
  };
  return { buttons, told };
}

function figures({ stats, point }) {
  const looked = stats.cache_results + stats.cache_features + stats.cache_misses;
  const rows = [
    ["answered", count(stats.jobs_done)],
    ["failed", count(stats.jobs_failed), stats.jobs_failed > 0],
    ["cancelled", count(stats.jobs_cancelled)],
    ["expired", count(stats.jobs_expired)],
    ["waiting", count(stats.jobs_in_turn)],
    ["delayed", count(stats.jobs_delayed)],
    ["at work", count(stats.jobs_active)],
    ["a second", point ? rate(point[1]) : "–"],
    ["answer known", percent(stats.cache_results / looked)],
    ["picture known", percent(stats.cache_features / looked)],
    ["attempts retried", count(stats.attempts_retried)],
    ["refused (queue full)", count(stats.submits_refused)],
    ["weights", bytes(stats.memory_weights_mapped + stats.memory_weights_packed)],
    ["caches", bytes(stats.memory_caches)],
    ["faults caught", count(stats.panics + stats.threads_restarted), stats.panics + stats.threads_restarted > 0],
  ];
  return rows.map(([name, value, isBad]) =>
    el("div", { class: isBad ? "bad" : null }, el("dt", {}, name), el("dd", {}, value)));
}

function latencies(latency) {
  if (!latency) {
    return [el("h2", {}, "Latency"), el("p", { class: "quiet" }, "Not told by this server: FLORENCE.STATS LATENCY is of a newer module.")];
  }
  const head = ["", "jobs", "mean", "p50", "p95", "p99"];
  const table = (title, rows) => el("table", {},
    el("caption", {}, title),
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.filter((row) => row.all.count > 0).map((row) => {
      const of = row.recent?.count > 0 ? row.recent : row.all;
      return el("tr", { class: of === row.all ? "quiet" : null },
        el("th", { scope: "row" }, row.name), el("td", {}, count(of.count)),
        [of.mean, of.p50, of.p95, of.p99].map((ms) => el("td", {}, duration(ms))));
    })));
  return [
    el("h2", {}, "Latency"),
    el("p", { class: "quiet" }, "Of the last five minutes; grey rows are since the server's start, because nothing has happened since. Percentiles are estimated within buckets."),
    table("By phase", latency.phases), table("By task, whole jobs", latency.tasks),
  ];
}

function endings({ ends }) {
  const whole = ends.reduce((sum, end) => sum + end.count, 0);
  const failed = ends.filter((end) => end.state === "failed");
  const byCode = new Map();
  for (const end of failed) byCode.set(end.code, (byCode.get(end.code) ?? 0) + end.count);
  const byTask = new Map();
  for (const end of ends) {
    if (end.task) byTask.set(end.task, (byTask.get(end.task) ?? 0) + end.count);
  }
  const bars = (title, entries) => entries.length === 0 ? null : el("table", { class: "bars" },
    el("caption", {}, title),
    el("tbody", {}, entries.sort((a, b) => b[1] - a[1]).map(([name, n]) => el("tr", {},
      el("th", { scope: "row" }, name), el("td", {}, count(n)),
      el("td", {}, el("meter", { min: 0, max: whole, value: n, "aria-label": `${n} of ${whole}` }))))));
  return [
    el("h2", {}, "How jobs ended"),
    failed.length === 0 ? el("p", { class: "quiet" }, "None has failed since the server's start.") : bars("Errors by code", [...byCode]),
    bars("All jobs by task", [...byTask]),
  ];
}

function hostRows(hosts) {
  if (!hosts) return [el("h2", {}, "Downloads by host"), el("p", { class: "quiet" }, "Not told: FLORENCE.HOSTS is for operators.")];
  if (hosts.length === 0) return [el("h2", {}, "Downloads by host"), el("p", { class: "quiet" }, "Nothing has been downloaded.")];
  const head = ["host", "downloads", "failed", "bytes", "mean"];
  return [el("h2", {}, "Downloads by host"), el("table", {},
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, hosts.map((host) => el("tr", {},
      el("th", { scope: "row" }, host.name), el("td", {}, count(host.downloads)),
      el("td", { class: host.failures > 0 ? "bad" : null }, count(host.failures)),
      el("td", {}, bytes(host.bytes)), el("td", {}, duration(host.ms / Math.max(1, host.downloads)))))))];
}
