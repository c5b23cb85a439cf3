// The easel: sends one request, shows it being drawn on a board, says how it goes, and re-ranks what came.

import { change, drawEvents } from "./api.js";
import { Board } from "./board.js";
import { announce, h } from "./dom.js";

/** One drawing at a time. `onOpen(entry, entries)` is called when a picture is chosen. */
export class Easel {
  constructor(onOpen, { title = "Pictures" } = {}) {
    this.board = new Board((picture, shown) => onOpen(this.#entry(picture), shown.map((each) => this.#entry(each))));
    this.status = h("p", { class: "status" });
    this.error = h("p", { class: "error-line", role: "alert", hidden: true });
    this.progress = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Rows drawn" });
    this.slider = h("input", { type: "range", min: 1, step: 1, oninput: () => this.#slid() });
    this.best = h("output", { class: "best-of-figure" });
    this.bestOf = h(
      "label",
      { class: "best-of", hidden: true },
      h("span", { class: "best-of-label", text: "Best of" }),
      this.slider,
      this.best,
    );
    this.element = h(
      "section",
      { class: "easel", "aria-label": title, "aria-busy": "false" },
      this.error,
      h("div", { class: "easel-head" }, this.status, this.bestOf),
      this.progress,
      this.board.element,
    );
  }

  get isBusy() {
    return Boolean(this.controller);
  }

  /** Draw a request of /api/draw; resolves to the settled event, or null when it failed or was cancelled. */
  async draw(request) {
    await this.cancel();
    const controller = new AbortController();
    this.controller = controller;
    this.job = null;
    this.error.hidden = true;
    this.bestOf.hidden = true;
    this.progress.hidden = false;
    this.progress.removeAttribute("value");
    this.element.setAttribute("aria-busy", "true");
    this.#say("Asking the model …");
    let settled = null;
    try {
      for await (const [name, data] of drawEvents(request, controller.signal)) {
        if (this.controller !== controller) return null;
        if (name === "error") throw new Error(data.error.message);
        if (name === "settled") settled = data;
        await this.#take(name, data);
      }
      if (!settled) throw new Error("the server ended the drawing early: draw again");
    } catch (error) {
      if (this.controller === controller) this.#fail(error);
      return null;
    } finally {
      if (this.controller === controller) this.#end();
    }
    return settled;
  }

  /** Stop the drawing under way, here and on the server. */
  async cancel() {
    if (!this.controller) return;
    const { controller, job } = this;
    this.#end();
    this.board.element.replaceChildren();
    this.#say("Cancelled.");
    announce("Cancelled");
    if (job) await change("DELETE", `/api/jobs/${encodeURIComponent(job)}`).catch(() => null); // it may have ended
    controller.abort();
  }

  /** Say that a drawing will come here. */
  wait() {
    this.#say("Waiting for its turn");
  }

  /** Show one line about what went wrong. */
  fail(text) {
    this.error.textContent = text;
    this.error.hidden = false;
  }

  #take(name, data) {
    if (name === "queued") {
      this.job = data.job;
      this.#say(data.position ? `In the queue: ${data.position} before you` : "Next in the queue");
    } else if (name === "started") {
      this.#start(data);
    } else if (name === "row") {
      return this.#addRow(data);
    } else if (name === "settled") {
      this.#settle(data);
    }
    return null;
  }

  #start({ job, caption, n_candidates: n, grid }) {
    this.job = job;
    this.caption = caption;
    this.n = n;
    this.board.begin(n, grid, caption);
    this.#say(n === 1 ? "Drawing 1 picture" : `Drawing ${n} candidates`);
    announce(`Drawing ${n} candidates`);
  }

  async #addRow(data) {
    const done = data.first + Math.min(data.n, this.n) * ((data.row + 1) / data.n_rows);
    this.progress.value = Math.min(1, done / this.n);
    const batch = data.n < this.n ? ` of candidates ${data.first + 1}–${data.first + data.n}` : "";
    this.#say(`Drawing ${this.n === 1 ? "1 picture" : `${this.n} candidates`}: row ${data.row + 1} of ${data.n_rows}${batch}`);
    if (data.row + 1 === Math.ceil(data.n_rows / 2) && data.first === 0) announce("Half drawn");
    await this.board.addRow(data);
  }

  #settle(settled) {
    this.settled = settled;
    this.entries = new Map(); // what is marked in a picture's dialog stays marked
    const n = settled.pictures.length;
    const canRerank = n > settled.kept && settled.pictures[0].score !== null;
    this.bestOf.hidden = !canRerank;
    this.slider.max = n;
    this.slider.value = n;
    this.board.settle(settled.pictures, settled.kept);
    this.#describe(n);
    announce(`Done: ${this.status.textContent}`);
    const cut = settled.truncated ? " The caption was too long: its end was not read." : "";
    this.status.append(cut);
  }

  #slid() {
    this.rerank(Number(this.slider.value));
    this.onRerank?.(Number(this.slider.value));
  }

  /** Show what would have been kept of the first `n` candidates. */
  rerank(n) {
    if (this.bestOf.hidden) return;
    this.slider.value = n;
    this.board.showBestOf(n);
    this.#describe(n);
  }

  #describe(n) {
    const shown = Math.min(n, this.settled.kept);
    const of = this.settled.pictures.length > this.settled.kept ? `The best ${shown} of ${n}` : plural(shown, "picture");
    this.#say(of);
    this.best.textContent = String(n);
    this.slider.setAttribute("aria-valuetext", `best ${shown} of the first ${n} candidates`);
  }

  #fail(error) {
    if (error.name === "AbortError") return;
    this.board.element.replaceChildren();
    this.#say("");
    this.fail(capital(error.message));
  }

  #end() {
    this.controller = null;
    this.progress.hidden = true;
    this.element.setAttribute("aria-busy", "false");
    this.onEnd?.();
  }

  #say(text) {
    this.status.textContent = text;
  }

  #entry(picture) {
    const { recipe, pictures } = this.settled;
    if (!this.entries.has(picture.id)) this.entries.set(picture.id, { ...picture, caption: this.caption, recipe, n: pictures.length });
    return this.entries.get(picture.id);
  }
}

const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

/** Servers write errors as they would stand in a log; a page begins them with a capital. */
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
