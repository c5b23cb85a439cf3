// The dialog of one picture: large, with its seed, score and recipe, and what can be done with it.

import { change } from "./api.js";
import { announce, h, icon, toast } from "./dom.js";
import { settingsOf } from "./settings.js";

/** One dialog for the page. `actions`: `drawAgain(caption, settings)`, `complete(entry)`, `inspect(entry)`. */
export class Viewer {
  constructor(actions) {
    this.actions = actions;
    this.image = h("img", { class: "viewer-picture", alt: "" });
    this.caption = h("h2", { id: "viewer-caption" });
    this.facts = h("dl", { class: "facts" });
    this.recipe = h("pre", { tabindex: "0", "aria-label": "Recipe" });
    this.favourite = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.#favour() }, icon("star"), "Favourite");
    this.download = h("a", { class: "button" }, icon("download"), "Download");
    this.delete = h("button", { type: "button", class: "danger", onclick: () => this.#remove() }, icon("trash"), "Delete");
    this.previous = this.#stepper("previous", "Previous picture", -1);
    this.next = this.#stepper("next", "Next picture", 1);
    this.place = h("span", { class: "viewer-place" });
    this.element = h(
      "dialog",
      { class: "viewer", "aria-labelledby": "viewer-caption", onkeydown: (event) => this.#key(event), onclick: (event) => event.target === this.element && this.close() },
      h("div", { class: "viewer-frame" }, this.image, h("div", { class: "viewer-steps" }, this.previous, this.place, this.next)),
      h(
        "div",
        { class: "viewer-side" },
        h("button", { type: "button", class: "quiet viewer-close", "aria-label": "Close", onclick: () => this.close() }, icon("close")),
        this.caption,
        this.facts,
        h(
          "div",
          { class: "viewer-actions" },
          this.favourite,
          this.download,
          this.#action("again", "Draw again", () => actions.drawAgain(this.entry.caption, settingsOf(this.entry.recipe, this.entry.seed))),
          this.#action("completion", "Complete it", () => actions.complete(this.entry)),
          this.#action("microscope", "Microscope", () => actions.inspect(this.entry)),
          this.delete,
        ),
        h("details", { class: "recipe" }, h("summary", { text: "Recipe" }), this.recipe),
      ),
    );
  }

  /** Show `entry`, one of `entries`; `hooks` may hold `onFavourite(entry)` and `onDelete(entry)`. */
  open(entry, entries, hooks = {}) {
    this.entries = entries;
    this.hooks = hooks;
    this.delete.hidden = !hooks.onDelete;
    this.#show(entry);
    if (!this.element.open) this.element.showModal();
  }

  close() {
    this.element.close();
  }

  #show(entry) {
    this.entry = entry;
    const at = this.entries.findIndex((each) => each.id === entry.id);
    this.image.src = entry.url;
    this.image.alt = entry.caption;
    this.caption.textContent = entry.caption;
    this.#tell();
    this.recipe.textContent = JSON.stringify(entry.recipe ?? {}, null, 2);
    this.download.href = entry.url;
    this.download.setAttribute("download", `${fileName(entry.caption)}-${entry.seed}.png`);
    this.favourite.setAttribute("aria-pressed", String(Boolean(entry.favourite)));
    this.previous.disabled = at <= 0;
    this.next.disabled = at < 0 || at === this.entries.length - 1;
    this.place.textContent = this.entries.length > 1 ? `${at + 1} of ${this.entries.length}` : "";
  }

  #tell() {
    const { seed, score, rank, n, recipe, created_at: when } = this.entry;
    const options = recipe?.options ?? recipe ?? {};
    const facts = [
      ["Seed", String(seed)],
      ["Score", typeof score === "number" ? score.toFixed(3) : "not ranked"],
      ["Rank", typeof rank === "number" && typeof score === "number" ? (n ? `${rank + 1} of ${n}` : String(rank + 1)) : "–"],
      ["Temperature", figure(options.temperature)],
      ["Guidance", figure(options.guidance)],
      ["Drawn", when ? dateOf(when) : "just now"],
    ];
    this.facts.replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))));
  }

  #stepper(name, label, step) {
    return h("button", { type: "button", class: "quiet", "aria-label": label, onclick: () => this.#step(step) }, icon(name));
  }

  #action(name, label, act) {
    const onclick = () => {
      this.close();
      act();
    };
    return h("button", { type: "button", onclick }, icon(name), label);
  }

  #step(step) {
    const at = this.entries.findIndex((each) => each.id === this.entry.id) + step;
    if (at < 0 || at >= this.entries.length) return;
    this.#show(this.entries[at]);
    announce(`${at + 1} of ${this.entries.length}: ${this.entry.caption}, seed ${this.entry.seed}`);
  }

  #key(event) {
    if (event.target.closest("pre, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") this.#step(-1);
    else if (event.key === "ArrowRight") this.#step(1);
    else if (event.key === "f") this.#favour();
    else if (event.key === "Delete" && this.hooks.onDelete) this.#remove();
    else return;
    event.preventDefault();
  }

  async #favour() {
    const { entry } = this;
    const favourite = !entry.favourite;
    try {
      await change("PATCH", `/api/history/${encodeURIComponent(entry.id)}`, { favourite });
    } catch (error) {
      toast(error.message, { kind: "error" });
      return;
    }
    entry.favourite = favourite;
    if (this.entry === entry) this.favourite.setAttribute("aria-pressed", String(favourite));
    announce(favourite ? "Kept among the favourites" : "No longer a favourite");
    this.hooks.onFavourite?.(entry);
  }

  #remove() {
    const { entry } = this;
    this.close();
    this.hooks.onDelete(entry);
  }
}

const figure = (value) => (typeof value === "number" ? String(value) : "–");

const fileName = (caption) => caption.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "picture";

/** A time of the server (ISO text or seconds since 1970) in the reader's words. */
export function dateOf(when) {
  const date = new Date(typeof when === "number" ? when * 1000 : when);
  return Number.isNaN(date.valueOf()) ? String(when) : date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
