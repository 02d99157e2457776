// A line chart of the last hour.

import { el, moment, put, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 150;
const LEFT = 52;
const BOTTOM = 18;
const TOP = 6;
const HOUR = 3_600_000;

/** A round number that is not below `most`. */
function ceiling(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= most);
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
    const at = shown.end - HOUR + (x - LEFT) / (WIDTH - LEFT) * HOUR;
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
    shown = { points, names, end };
    const columns = lines.map((line) => names.indexOf(line.of));
    const most = ceiling(Math.max(0, ...points.flatMap((point) => columns.map((i) => point[i] ?? 0))));
    const x = (at) => LEFT + (at - end + HOUR) / HOUR * (WIDTH - LEFT);
    const y = (value) => TOP + (1 - value / most) * (HEIGHT - BOTTOM - TOP);
    const grid = [0, 0.5, 1].flatMap((share) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(share * most), y2: y(share * most) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(share * most) + 4, "text-anchor": "end" }, format(share * most)),
    ]);
    const hours = [60, 45, 30, 15].map((minutes) =>
      svg("text", { class: "tick", x: x(end - minutes * 60_000), y: HEIGHT - 4, "text-anchor": minutes === 60 ? "start" : "middle" }, `−${minutes} min`));
    const paths = lines.map((line, i) => {
      let path = "";
      let isDown = false;
      for (const point of points) {
        const value = point[columns[i]];
        if (point[0] < end - HOUR || value === null || value === undefined) {
          isDown = false;
          continue;
        }
        path += `${isDown ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(value).toFixed(1)}`;
        isDown = true;
      }
      return svg("path", { class: `line hue${line.hue}`, d: path });
    });
    put(plot, grid, hours, paths);
    const last = points.at(-1);
    plot.setAttribute("aria-label", `${title}. ${last ? `Now: ${told(last)}` : "Nothing yet"}`);
  }

  return { element, draw };
}
