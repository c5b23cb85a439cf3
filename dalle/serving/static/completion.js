// Completion: keep a part of a picture, and let the model draw the rest.

import { get, toBase64 } from "./api.js";
import { CellEditor } from "./cells.js";
import { h, icon, rove, toast } from "./dom.js";
import { Easel } from "./easel.js";
import { Settings } from "./settings.js";

const AS_IT_IS = ["image/png", "image/jpeg", "image/webp"]; // sent untouched, unless they are large
const LARGE = 1_500_000; // bytes
const LARGE_SIDE = 1024; // pixels that a large picture is sent at
const RECENT = 12;

export class Completion {
  title = "Completion";

  constructor(page) {
    this.page = page;
    this.settings = new Settings(page.info);
    this.easel = new Easel((entry, entries) => page.viewer.open(entry, entries), { title: "Completions" });
    this.easel.onEnd = () => this.#showBusy();
    this.editor = new CellEditor(page.info.grid, () => this.#tell());
    this.file = h("input", { type: "file", accept: "image/png,image/jpeg,image/webp", class: "unseen", tabindex: "-1", "aria-hidden": "true", onchange: () => this.#choose(this.file.files[0]) });
    this.chooser = h("button", { type: "button", onclick: () => this.file.click() }, icon("upload"), "Choose a picture");
    this.recent = h("div", { class: "recent", role: "group", "aria-label": "Pictures from the history" });
    this.empty = h("div", { class: "drop-here" }, h("p", { text: "Drop a picture here" }), h("p", { class: "soft", text: "or take one of the history below" }));
    this.caption = h("textarea", { class: "caption-field", rows: 2, maxlength: 2000, "aria-label": "Caption of the whole picture", placeholder: "Caption of the whole picture …" });
    this.caption.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      this.draw();
    });
    this.examples = h("div", { class: "chips", role: "group", "aria-label": "Captions to try" });
    this.told = h("p", { class: "soft", "aria-live": "polite" });
    this.button = h("button", { type: "button", class: "primary", onclick: () => (this.easel.isBusy ? this.easel.cancel() : this.draw()) }, "Complete it");
    this.element = this.#lay();
    this.restoreRecent = rove(this.recent, "button");
    this.setMode("line");
    this.#has(false);
  }

  #lay() {
    this.modes = h(
      "div",
      { class: "segments", role: "group", "aria-label": "What stays" },
      this.#mode("line", "Keep the top"),
      this.#mode("mask", "Paint a mask"),
    );
    this.maskTools = h(
      "div",
      { class: "mask-tools" },
      h("button", { type: "button", class: "link", text: "Mark all", onclick: () => this.editor.setAll(true) }),
      h("button", { type: "button", class: "link", text: "Clear", onclick: () => this.editor.setAll(false) }),
      h("button", { type: "button", class: "link", text: "Invert", onclick: () => this.editor.invert() }),
    );
    this.stage = h("div", { class: "stage" }, this.editor.element, this.empty);
    return h(
      "section",
      { class: "view completion", "aria-labelledby": "completion-title" },
      h("h1", { id: "completion-title", text: "Completion" }),
      h("p", { class: "lead", text: "Keep a part of a picture; the model draws the rest to fit it and the caption." }),
      h(
        "div",
        { class: "two" },
        h(
          "div",
          { class: "two-left" },
          this.stage,
          h("div", { class: "stage-tools" }, this.chooser, this.file, this.modes, this.maskTools),
          this.told,
          h("h2", { class: "label", text: "From the history" }),
          this.recent,
        ),
        h(
          "div",
          { class: "two-right" },
          h("h2", { class: "label", text: "Caption" }),
          this.caption,
          this.examples,
          h("div", { class: "deck" }, this.button),
          this.settings.element,
          this.easel.element,
        ),
      ),
    );
  }

  #mode(mode, text) {
    return h("button", { type: "button", text, data: { mode }, "aria-pressed": "false", onclick: () => this.setMode(mode) });
  }

  setMode(mode) {
    for (const button of this.modes.children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    this.maskTools.hidden = mode !== "mask";
    this.editor.setMode(mode);
  }

  /** Show the view; `id` is a picture of the history to begin with. */
  async shown(id) {
    try {
      const { pictures } = await get(`/api/history?limit=${RECENT}`);
      this.recent.replaceChildren(
        ...pictures.map((picture) =>
          h("button", { type: "button", class: "thumb", "aria-label": `Complete: ${picture.caption}`, onclick: () => this.#take(picture.url, picture.caption) }, h("img", { src: picture.url, alt: "", loading: "lazy" })),
        ),
      );
      this.recent.previousElementSibling.hidden = !pictures.length;
      this.restoreRecent();
      const known = pictures.find((picture) => picture.id === id);
      if (id && this.taken !== id) await this.#take(known?.url ?? `/api/pictures/${encodeURIComponent(id)}.png`, known?.caption ?? this.page.captions.get(id) ?? "");
      this.taken = id;
    } catch (error) {
      this.page.fail(error);
    }
  }

  async #take(url, caption) {
    const response = await fetch(url);
    if (!response.ok) {
      toast("This picture is no longer in the history.", { kind: "error" });
      return;
    }
    await this.#choose(await response.blob(), caption);
  }

  /** Take a picture file that was dropped or chosen. */
  async #choose(file, caption = null) {
    if (!file) return;
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      this.easel.fail("This file is not a picture that the page can read: use PNG, JPEG or WebP.");
      return;
    }
    this.easel.error.hidden = true;
    const isSent = AS_IT_IS.includes(file.type) && file.size <= LARGE;
    this.picture = isSent ? file : await smaller(bitmap);
    this.editor.show(bitmap);
    this.#has(true);
    if (caption !== null) this.caption.value = caption;
    this.#suggest(caption ?? this.caption.value);
  }

  /** A file dropped on the stage is a picture to complete, not a recipe to restore. */
  takesDrop(target) {
    return this.stage.contains(target);
  }

  drop(file) {
    this.#choose(file);
  }

  async draw() {
    if (!this.picture) {
      this.easel.fail("Choose a picture first.");
      this.chooser.focus();
      return;
    }
    const settings = this.settings.request();
    if (!settings) return;
    if (this.editor.mode === "mask" && !this.editor.redrawn.size) {
      this.easel.fail("Mark the cells to draw anew first: click them, or move with the arrow keys and press Space.");
      return;
    }
    const kept = await this.editor.request();
    if (kept.mask) kept.mask = await toBase64(kept.mask);
    const drawing = this.easel.draw({ prompt: this.caption.value, ...settings, ...kept, image: await toBase64(this.picture) });
    this.#showBusy();
    await drawing;
    this.#showBusy();
  }

  cancel() {
    return this.easel.cancel();
  }

  get isBusy() {
    return this.easel.isBusy;
  }

  #showBusy() {
    this.button.textContent = this.easel.isBusy ? "Cancel" : "Complete it";
    this.button.classList.toggle("primary", !this.easel.isBusy);
  }

  #has(isThere) {
    this.empty.hidden = isThere;
    this.editor.element.hidden = !isThere;
    this.modes.hidden = !isThere;
    this.told.hidden = !isThere;
    this.maskTools.hidden = !isThere || this.editor.mode !== "mask";
    if (!isThere) this.#suggest("");
  }

  /** Captions to try: the picture's own, and the two that DALL·E's page made known. */
  #suggest(caption) {
    const thing = caption.replace(/^(an? emoji of )?(an?|the)\s+/i, "").replace(/(,| in \S+( \S+)? style).*$/, "") || "cat";
    const texts = [caption, `the exact same ${thing} on the top as a sketch on the bottom`, `the exact same ${thing} on the top colored blue on the bottom`];
    this.examples.replaceChildren(
      ...[...new Set(texts)].filter(Boolean).map((text) => h("button", { type: "button", class: "chip", text, onclick: () => (this.caption.value = text) })),
    );
  }

  #tell() {
    if (!this.told) return; // the editor tells of itself while it is made
    const n = this.editor.redrawn.size;
    this.told.textContent =
      this.editor.mode === "line"
        ? `The top ${this.editor.rows} of ${this.editor.grid} rows stay. Drag the line, or use the arrow keys.`
        : `${n} of ${this.editor.grid ** 2} cells are drawn anew. Paint over the picture, or use the arrow keys and Space.`;
  }
}

/** A bitmap's central square as a PNG that no upload limit minds. */
async function smaller(bitmap) {
  const side = Math.min(bitmap.width, bitmap.height);
  const to = Math.min(side, LARGE_SIDE);
  const canvas = h("canvas", { width: to, height: to });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, to, to);
  context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, to, to);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
