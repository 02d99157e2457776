// A long list of which only the rows in sight exist, and are asked about.

import { el, put } from "./dom.js";

const ROW = 44;
const MARGIN = 8;
const MOST_ASKED = 200;

/** What tells rows apart. */
export const nameOf = (row) => `${row.server} ${row.id}`;

/**
 * `columns` are `{ name, wide }`; `cells(row, detail)` gives their contents, `details(rows)` asks
 * for what is not in the rows themselves, `open(row)` shows one; `place` is where somebody was in it.
 */
export class LongList {
  constructor({ label, columns, cells, details, open, selected, canSelect, place }) {
    Object.assign(this, { cells, details, open, selected, canSelect, cameTo: place });
    this.rows = [];
    this.known = new Map();
    this.drawn = new Map();
    this.asking = null;
    const head = columns.map((column) => el("span", { role: "columnheader", class: column.wide ? "only-wide" : null }, column.name));
    this.wide = columns.map((column) => column.wide);
    this.body = el("div", { class: "long-body" });
    this.scroll = el("div", { class: "long-scroll", role: "rowgroup", tabindex: 0, onscroll: () => this.draw() }, this.body);
    this.empty = el("p", { class: "quiet empty" });
    // A table has rows and groups of rows, and nothing else.
    this.table = el("div", { role: "table", "aria-label": label },
      el("div", { class: "long-row head", role: "row" }, canSelect ? el("span", { role: "columnheader" }) : null, head),
      this.scroll);
    this.element = el("div", { class: `long${canSelect ? " selects" : ""}` }, this.table, this.empty);
    this.scroll.addEventListener("keydown", (event) => this.key(event));
    // The marked row, and its place: jobs come and go around it.
    this.at = -1;
    this.marked = null;
    new ResizeObserver(() => this.draw()).observe(this.scroll);
  }

  set(rows, emptyText) {
    if (this.cameTo) {
      Object.assign(this, { at: this.cameTo.at, marked: this.cameTo.marked });
    }
    const found = this.marked === null ? -1 : rows.findIndex((row) => nameOf(row) === this.marked);
    const moved = found < 0 ? 0 : found - this.at;
    if (found < 0) this.marked = null;
    this.at = Math.min(this.at + moved, rows.length - 1);
    this.rows = rows;
    this.empty.textContent = emptyText;
    this.empty.hidden = rows.length > 0;
    this.scroll.hidden = rows.length === 0;
    this.table.setAttribute("aria-rowcount", rows.length);
    this.body.style.height = `${rows.length * ROW}px`;
    const top = this.cameTo?.top ?? this.scroll.scrollTop;
    this.cameTo = null;
    if (top + moved * ROW !== this.scroll.scrollTop) this.scroll.scrollTop = top + moved * ROW;
    this.draw();
    return this.ask();
  }

  place() {
    return { at: this.at, marked: this.marked, top: this.scroll.scrollTop };
  }

  isMarked(i) {
    return i === this.at && this.marked !== null;
  }

  range() {
    const first = Math.max(0, Math.floor(this.scroll.scrollTop / ROW) - MARGIN);
    const seen = Math.ceil((this.scroll.clientHeight || 600) / ROW) + 2 * MARGIN;
    return [first, Math.min(this.rows.length, first + Math.min(seen, MOST_ASKED))];
  }

  draw() {
    const [first, end] = this.range();
    const made = [];
    const drawn = new Map();
    for (let i = first; i < end; i += 1) {
      const name = nameOf(this.rows[i]);
      const isChosen = this.canSelect && this.selected.has(name);
      const looks = JSON.stringify([i, this.isMarked(i), isChosen, this.rows[i], this.known.get(name)]);
      const old = this.drawn.get(looks);
      const element = old && !drawn.has(looks) ? old : this.row(this.rows[i], i);
      drawn.set(looks, element);
      made.push(element);
    }
    this.drawn = drawn;
    // What has not changed stays where it is: somebody may be clicking on it.
    const isSame = made.length === this.body.children.length && made.every((element, i) => element === this.body.children[i]);
    if (!isSame) put(this.body, made);
    if (this.rows.slice(first, end).some((row) => !this.known.has(nameOf(row)))) {
      clearTimeout(this.soon);
      this.soon = setTimeout(() => this.ask(), 80);
    }
  }

  row(row, i) {
    const name = nameOf(row);
    const cells = this.cells(row, this.known.get(name));
    const isSelected = this.canSelect && this.selected.has(name);
    const element = el("div", {
      class: `long-row${this.isMarked(i) ? " at" : ""}${isSelected ? " chosen" : ""}`, role: "row", "aria-rowindex": i + 1,
      onclick: (event) => event.target.closest("input, a") || this.open(row),
    },
    this.canSelect ? el("span", { role: "cell" }, el("input", {
      type: "checkbox", ".checked": isSelected, "aria-label": `Select ${row.id}`, tabindex: -1,
      onchange: () => this.toggle(row),
    })) : null,
    cells.map((cell, at) => el("span", { role: "cell", class: this.wide[at] ? "only-wide" : null }, cell)));
    element.style.top = `${i * ROW}px`;
    return element;
  }

  toggle(row) {
    const name = nameOf(row);
    if (!this.selected.delete(name)) this.selected.set(name, row);
    this.element.dispatchEvent(new Event("selection"));
    this.draw();
  }

  key(event) {
    const row = this.isMarked(this.at) ? this.rows[this.at] : null;
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step && this.rows.length) {
      event.preventDefault();
      this.at = Math.max(0, Math.min(this.rows.length - 1, this.at + step));
      this.marked = nameOf(this.rows[this.at]);
      const top = this.at * ROW;
      const { scrollTop, clientHeight } = this.scroll;
      if (top < scrollTop) this.scroll.scrollTop = top;
      if (top + ROW > scrollTop + clientHeight) this.scroll.scrollTop = top + ROW - clientHeight;
      this.draw();
    } else if (event.key === "Enter" && row) {
      this.open(row);
    } else if (event.key === " " && this.canSelect && row) {
      event.preventDefault();
      this.toggle(row);
    }
  }

  /** Asks about the rows in sight. */
  async ask() {
    if (this.asking) {
      this.again = true;
      return;
    }
    const [first, end] = this.range();
    const rows = this.rows.slice(first, end);
    if (rows.length === 0) return;
    this.asking = this.details(rows);
    try {
      const details = await this.asking;
      // Only what is in sight is kept, so that nothing old is shown for long.
      this.known = new Map(rows.map((row, i) => [nameOf(row), details[i]]));
      this.draw();
    } catch {
      // The banner says that the connection is lost; the next look tries again.
    } finally {
      this.asking = null;
    }
    if (this.again) {
      this.again = false;
      await this.ask();
    }
  }
}
