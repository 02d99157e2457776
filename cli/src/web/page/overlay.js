// An answer over its picture: outlines by label, joined with a list of them.

import { el, put, svg } from "./dom.js";

const HUES = 10;

/**
 * `marks` as the server reads them from an answer, for a picture of `width` times `height`, and
 * `labels` with their places; `source` is the picture, if there is one to show. With `isTurned` the
 * browser turns it as its tag says.
 */
export function overlay({ marks, labels, width, height, source, isTurned, onMissing }) {
  const places = new Map(labels.map((label) => [label.mark, label]));
  const drawing = svg("svg", { class: "marks", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-label": "What was found" });
  const stage = el("div", { class: "stage" });
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.maxWidth = `min(100%, ${Math.max(width, 760)}px, ${(75 * width / height).toFixed(1)}vh)`;
  if (source) {
    const picture = el("img", { src: source, alt: "The job's picture", class: isTurned ? "turned" : null });
    picture.addEventListener("error", () => {
      picture.remove();
      onMissing?.();
    });
    stage.append(picture);
  }
  stage.append(drawing);

  const items = marks.marks.map((mark, i) => {
    const hue = `m${mark.colour % HUES}`;
    const name = mark.label || { box: "a box", quad: "a text", polygon: "an object", region: "the region asked about" }[mark.kind];
    const score = mark.score === null ? "" : mark.score.toFixed(2);
    const group = svg("g", { class: `mark ${mark.kind} ${hue}`, "data-mark": i },
      svg("title", {}, `${name} ${score}`),
      svg("path", { d: mark.outlines.map(path).join("") }),
      places.has(i) ? label(places.get(i)) : null);
    const item = el("li", { tabindex: 0, class: hue, "data-mark": i }, el("i", {}), el("span", {}, name), el("small", {}, score));
    return [group, item];
  });
  put(drawing, items.map(([group]) => group));
  const list = el("ul", { class: "found" }, items.map(([, item]) => item));
  for (const [group, item] of items) {
    const light = (isLit) => () => {
      for (const one of [group, item]) one.classList.toggle("lit", isLit);
      drawing.classList.toggle("dim", isLit);
    };
    for (const one of [group, item]) {
      one.addEventListener("pointerenter", light(true));
      one.addEventListener("pointerleave", light(false));
      one.addEventListener("focus", light(true));
      one.addEventListener("blur", light(false));
    }
  }
  const texts = marks.texts.map((text) => el("p", { class: "text" },
    marks.prompts.length > 1 ? el("b", {}, `${marks.prompts[text.prompt]} `) : null,
    text.text, text.score === null ? null : el("small", {}, ` ${text.score.toFixed(2)}`)));
  return { stage, list, texts };
}

function path(outline) {
  return `${outline.map(([x, y], i) => `${i === 0 ? "M" : "L"}${x} ${y}`).join("")}Z`;
}

/** Whatever font the browser has, the text is as wide as the rectangle behind it was measured for. */
function label({ back: [x, y, width, height], at: [left, baseline], size, text, ink }) {
  const textLength = width - 2 * (left - x);
  return svg("g", { class: "label" },
    svg("rect", { x, y, width, height }),
    svg("text", { x: left, y: baseline, "font-size": size, textLength, lengthAdjust: "spacingAndGlyphs", fill: ink }, text));
}
