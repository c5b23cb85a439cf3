// Which token cells of a picture stay: the rows above a line that is dragged, or what a painted mask leaves.

import { h, rove } from "./dom.js";

/** A picture under a grid of cells. `onChange()` after every change. */
export class CellEditor {
  constructor(grid, onChange) {
    this.grid = grid;
    this.onChange = onChange;
    this.rows = grid / 2;
    this.redrawn = new Set();
    this.mode = "line";
    this.canvas = h("canvas", { width: 512, height: 512, role: "img", "aria-label": "The picture to complete" });
    this.cells = h("div", { class: "cells", role: "grid", "aria-label": "Cells to draw anew" });
    this.line = h(
      "div",
      { class: "line", role: "slider", tabindex: "0", "aria-orientation": "vertical", "aria-label": "Rows to keep", "aria-valuemin": 1, "aria-valuemax": grid - 1, onkeydown: (event) => this.#lineKey(event) },
      h("span", { class: "line-grip" }),
    );
    this.veil = h("div", { class: "veil" });
    this.element = h("div", { class: "cell-editor" }, this.canvas, this.veil, this.cells, this.line);
    this.element.style.setProperty("--grid", grid);
    this.#fill();
    this.#listen();
    this.setMode("line");
  }

  /** Show a bitmap's central square. */
  show(bitmap) {
    const side = Math.min(bitmap.width, bitmap.height);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = side > 256; // small pictures keep their pixels
    context.fillStyle = "#fff";
    context.fillRect(0, 0, 512, 512);
    context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, 512, 512);
  }

  setMode(mode) {
    this.mode = mode;
    this.cells.hidden = mode !== "mask";
    this.line.hidden = this.veil.hidden = mode !== "line";
    this.#render();
  }

  /** Draw every cell anew, or none. */
  setAll(isRedrawn) {
    this.redrawn = new Set(isRedrawn ? Array.from({ length: this.grid ** 2 }, (_, cell) => cell) : []);
    this.#render();
  }

  invert() {
    const all = Array.from({ length: this.grid ** 2 }, (_, cell) => cell);
    this.redrawn = new Set(all.filter((cell) => !this.redrawn.has(cell)));
    this.#render();
  }

  /** What a /api/draw request says of it: `keep_rows`, or `mask` as a blob, clear where drawn anew. */
  async request() {
    if (this.mode === "line") return { keep_rows: this.rows };
    const side = this.grid * 8;
    const canvas = h("canvas", { width: side, height: side });
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, side, side);
    for (const cell of this.redrawn) context.clearRect((cell % this.grid) * 8, Math.floor(cell / this.grid) * 8, 8, 8);
    return { mask: await new Promise((resolve) => canvas.toBlob(resolve, "image/png")) };
  }

  #fill() {
    const cell = (at) =>
      h("button", { type: "button", role: "gridcell", class: "cell", tabindex: "-1", data: { cell: at }, "aria-selected": "false", "aria-label": `Row ${Math.floor(at / this.grid) + 1}, column ${(at % this.grid) + 1}` });
    for (let row = 0; row < this.grid; row += 1) {
      const cells = Array.from({ length: this.grid }, (_, column) => cell(row * this.grid + column));
      this.cells.append(h("div", { role: "row", class: "cell-row" }, cells));
    }
    rove(this.cells, ".cell", { columns: () => this.grid })();
  }

  #listen() {
    let paints = null; // true: marks, false: clears
    const cellAt = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest(".cell");
    this.cells.addEventListener("pointerdown", (event) => {
      const cell = cellAt(event);
      if (!cell) return;
      event.preventDefault();
      cell.focus();
      paints = !this.redrawn.has(Number(cell.dataset.cell));
      this.#paint(cell, paints);
    });
    this.cells.addEventListener("pointermove", (event) => {
      if (paints !== null && cellAt(event)) this.#paint(cellAt(event), paints);
    });
    addEventListener("pointerup", () => (paints = null));
    this.cells.addEventListener("keydown", (event) => {
      const cell = event.target.closest(".cell");
      if (!cell || (event.key !== " " && event.key !== "Enter")) return;
      event.preventDefault();
      this.#paint(cell, !this.redrawn.has(Number(cell.dataset.cell)));
    });
    const drag = (event) => this.#keepTo(Math.round(((event.clientY - this.canvas.getBoundingClientRect().top) / this.canvas.clientHeight) * this.grid));
    for (const part of [this.line, this.veil, this.canvas]) {
      part.addEventListener("pointerdown", (event) => {
        if (this.mode !== "line") return;
        event.preventDefault();
        this.line.focus();
        part.setPointerCapture(event.pointerId);
        drag(event);
      });
      part.addEventListener("pointermove", (event) => part.hasPointerCapture(event.pointerId) && drag(event));
    }
  }

  #paint(cell, isRedrawn) {
    const at = Number(cell.dataset.cell);
    if (isRedrawn) this.redrawn.add(at);
    else this.redrawn.delete(at);
    this.#render();
  }

  #lineKey(event) {
    const steps = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -4, PageDown: 4, Home: -this.grid, End: this.grid };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.#keepTo(this.rows + steps[event.key]);
  }

  #keepTo(rows) {
    this.rows = Math.max(1, Math.min(this.grid - 1, rows));
    this.#render();
  }

  #render() {
    this.element.style.setProperty("--kept", this.rows / this.grid);
    this.line.setAttribute("aria-valuenow", this.rows);
    this.line.setAttribute("aria-valuetext", `the top ${this.rows} of ${this.grid} rows stay`);
    for (const cell of this.cells.querySelectorAll(".cell")) {
      cell.setAttribute("aria-selected", String(this.redrawn.has(Number(cell.dataset.cell))));
    }
    this.onChange();
  }
}
