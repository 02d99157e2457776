// Try it: a picture that is dropped here or has an address, and the tasks to ask about it.

import { get, submit } from "./api.js";
import { el, put, say } from "./dom.js";
import { jobView } from "./job.js";

const FIRST = ["<CAPTION>", "<OD>"];
const MOST_PROMPTS = 16;
const EVERY = 400;
const MOST_BYTES = 32 * 1024 * 1024;

export function showTry(main, app, parameters, signal) {
  if (app.info.is_read_only) {
    main.append(el("h1", {}, "Try it"), el("p", { class: "quiet" }, "This page is read-only."));
    return;
  }
  let file = null;
  let preview = null;
  const forget = () => preview && URL.revokeObjectURL(preview);
  signal.addEventListener("abort", forget);

  // The server takes paths of its own, too, which a field of the type `url` would refuse.
  const address = el("input", { type: "text", inputmode: "url", spellcheck: "false", placeholder: "or the address of one", "aria-label": "Address of a picture" });
  const chooser = el("input", { type: "file", accept: "image/*", id: "file", class: "hidden", tabindex: -1, onchange: () => take(chooser.files[0]) });
  const name = el("span", { class: "quiet" });
  const drop = el("label", { class: "drop", for: "file", tabindex: 0 }, "Drop, paste or choose a picture", chooser, name);
  drop.addEventListener("keydown", (event) => {
    if (event.target !== drop || !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    chooser.click();
  });
  for (const kind of ["dragover", "dragenter"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (pasted) take(pasted);
  }, { signal });

  function take(one) {
    if (!one) return;
    if (one.size > MOST_BYTES) {
      say(`${one.name} has more than ${MOST_BYTES / 1024 / 1024} MiB.`, true);
      return;
    }
    file = one;
    address.value = "";
    name.textContent = one.name;
    forget();
    preview = URL.createObjectURL(one);
    put(result, el("div", { class: "stage" }, el("img", { src: preview, alt: "The chosen picture" })));
  }

  const tasks = app.info.tasks.map((task) => taskRow(task));
  const free = el("input", { type: "text", placeholder: "Another prompt, for fine-tuned checkpoints", "aria-label": "Another prompt" });
  const button = el("button", { type: "submit", class: "main" }, "Ask");
  const result = el("div", { id: "result" });
  const form = el("form", { class: "card try", onsubmit: ask }, drop, address, el("fieldset", {}, el("legend", {}, "Tasks"), tasks.map((task) => task.element)), free, button);
  main.append(el("h1", {}, "Try it"), el("div", { class: "two" }, form, result));

  async function ask(event) {
    event.preventDefault();
    const prompts = [...tasks.map((task) => task.prompt()).filter(Boolean), free.value.trim()].filter(Boolean);
    const url = address.value.trim();
    if (!file && !url) return say("Choose a picture first.", true);
    if (prompts.length === 0) return say("Choose a task first.", true);
    if (prompts.length > MOST_PROMPTS) return say(`No more than ${MOST_PROMPTS} tasks at a time.`, true);
    button.disabled = true;
    try {
      const sent = url ? null : file;
      const named = await submit({ server: app.server, prompts, url: url || undefined }, sent);
      await follow({ ...named, source: sent ? preview : undefined });
    } catch (error) {
      if (!signal.aborted) say(error.message, true);
    } finally {
      button.disabled = false;
    }
  }

  async function follow(named) {
    const view = jobView(named, app, () => follow(named));
    put(result, view.element);
    for (;;) {
      const found = await get("/api/job", { server: named.server, id: named.id }, signal);
      view.show(found);
      if (["done", "failed", "cancelled", "expired"].includes(found.job.state)) return;
      await new Promise((resolve) => { setTimeout(resolve, EVERY); });
    }
  }
}

function taskRow({ token, input }) {
  const isOn = el("input", { type: "checkbox", ".checked": FIRST.includes(token), value: token });
  const hint = { text: "text", region: "left top right bottom, 0 to 999" }[input];
  const text = hint ? el("input", { type: "text", placeholder: hint, "aria-label": `${token}: ${hint}`, oninput: () => { isOn.checked = text.value.trim() !== ""; } }) : null;
  const element = el("div", { class: "task" }, el("label", {}, isOn, el("code", {}, token)), text);
  const prompt = () => {
    if (!isOn.checked) return null;
    const value = text?.value.trim() ?? "";
    if (input !== "region") return token + value;
    // The server says what is no region.
    const numbers = value.split(/[\s,;]+/).filter(Boolean);
    return token + (value.includes("<loc_") ? value : numbers.map((n) => `<loc_${n}>`).join(""));
  };
  return { element, prompt };
}
