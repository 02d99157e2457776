// A line chart of the last hour, or of what there is of it.

import { el, moment, put, svg } from "./dom.js";

const WIDTH = 420;
const HEIGHT = 150;
const LEFT = 54;
const BOTTOM = 18;
const TOP = 6;
const SHORTEST = 2 * 60_000;
const LONGEST = 60 * 60_000;

/** A round number that is not below `most`. */
function ceiling(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= most);
}

function minutes(ms) {
  return (ms / 60_000).toFixed(ms < 15 * 60_000 ? 1 : 0);
}

/**
 * Lines are `{ name, of, hue }`: the name of a figure in the points, and one of the colours of the
 * style sheet.
 */
export function chart(title, lines, format) {
  const legend = el("p", { class: "legend" }, lines.map((line) =>
    el("span", {}, el("i", { class: `hue${line.hue}` }), line.name)));
  const readout = el("output", { class: "readout" });
  const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "chart" });
  const element = el("figure", { class: "card" }, el("figcaption", {}, title, readout), plot, legend);
  let shown = { points: [], names: [] };

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * WIDTH;
    const at = shown.end - shown.span * (1 - (x - LEFT) / (WIDTH - LEFT));
    const near = shown.points.reduce((best, point) =>
      best && Math.abs(best[0] - at) < Math.abs(point[0] - at) ? best : point, null);
    readout.textContent = near ? `${moment(near[0])}: ${told(near)}` : "";
  });
  plot.addEventListener("pointerleave", () => { readout.textContent = ""; });

  function told(point) {
    return lines.map((line) => {
      const value = point[shown.names.indexOf(line.of)];
      return `${line.name} ${value === null ? "–" : format(value)}`;
    }).join(", ");
  }

  function draw(points, names) {
    const end = points.at(-1)?.[0] ?? Date.now();
    const span = Math.min(LONGEST, Math.max(SHORTEST, end - (points[0]?.[0] ?? end)));
    shown = { points, names, end, span };
    const columns = lines.map((line) => names.indexOf(line.of));
    const most = ceiling(Math.max(0, ...points.flatMap((point) => columns.map((i) => point[i] ?? 0))));
    const x = (at) => LEFT + (at - end + span) / span * (WIDTH - LEFT);
    const y = (value) => TOP + (1 - value / most) * (HEIGHT - BOTTOM - TOP);
    const grid = [0, 0.5, 1].flatMap((share) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(share * most), y2: y(share * most) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(share * most) + 4, "text-anchor": "end" }, format(share * most)),
    ]);
    const times = [1, 0.75, 0.5, 0.25].map((share) =>
      svg("text", { class: "tick", x: x(end - share * span), y: HEIGHT - 4, "text-anchor": share === 1 ? "start" : "middle" }, `−${minutes(share * span)} min`));
    const paths = lines.map((line, i) => {
      let path = "";
      let isDown = false;
      for (const point of points) {
        const value = point[columns[i]];
        if (point[0] < end - span || value === null || value === undefined) {
          isDown = false;
          continue;
        }
        path += `${isDown ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(value).toFixed(1)}`;
        isDown = true;
      }
      return svg("path", { class: `line hue${line.hue}`, d: path });
    });
    put(plot, grid, times, paths);
    const last = points.at(-1);
    plot.setAttribute("aria-label", `${title}. ${last ? `Now: ${told(last)}` : "Nothing yet"}`);
  }

  return { element, draw };
}
