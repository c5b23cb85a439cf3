// Microscope: what each cell of a picture is, how sure the model was of it, and what it could see.

import { get } from "./api.js";
import { ramp, rampLegend } from "./colours.js";
import { announce, h, rove } from "./dom.js";

const RECENT = 12;
const OVERLAYS = [
  ["none", "Picture"],
  ["entropy", "Entropy"],
  ["surprise", "Surprise"],
];

export class Microscope {
  title = "Microscope";

  constructor(page) {
    this.page = page;
    this.overlay = "entropy";
    this.cell = 0;
    this.layer = null;
    this.image = h("img", { class: "slide-picture", alt: "" });
    this.cells = h("div", { class: "cells", role: "grid", "aria-label": "Cells of the picture" });
    this.slide = h("div", { class: "slide" }, this.image, this.cells);
    this.legend = h("div", { class: "legend" });
    this.overlays = h(
      "div",
      { class: "segments", role: "group", "aria-label": "Shown over the picture" },
      ...OVERLAYS.map(([id, text]) => h("button", { type: "button", text, data: { id }, "aria-pressed": "false", onclick: () => this.#cover(id) })),
    );
    this.caption = h("p", { class: "slide-caption" });
    this.swatch = h("img", { class: "swatch", alt: "" });
    this.facts = h("dl", { class: "facts" });
    this.place = h("h2", { class: "label" });
    this.layers = h("div", { class: "layers", role: "group", "aria-label": "Layers" });
    this.sees = h("p", { class: "soft sees", "aria-live": "polite" });
    this.recent = h("div", { class: "recent", role: "group", "aria-label": "Pictures of the history" });
    this.empty = h("p", { class: "lead", hidden: true, text: "Nothing to look at yet: draw a picture in the Explorer, then come back." });
    this.error = h("p", { class: "error-line", role: "alert", hidden: true });
    this.body = h(
      "div",
      { class: "two microscope-body", hidden: true },
      h("div", { class: "two-left" }, this.slide, h("div", { class: "stage-tools" }, this.overlays, this.legend), this.caption),
      h(
        "div",
        { class: "two-right" },
        this.place,
        h("div", { class: "token" }, this.swatch, this.facts),
        h("h2", { class: "label", text: "What a layer lets this cell see" }),
        this.layers,
        this.sees,
      ),
    );
    this.element = h(
      "section",
      { class: "view microscope", "aria-labelledby": "microscope-title" },
      h("h1", { id: "microscope-title", text: "Microscope" }),
      h("p", { class: "lead", text: "A picture is a grid of tokens, drawn one after another. Choose a cell." }),
      this.error,
      this.empty,
      this.body,
      h("h2", { class: "label", text: "From the history" }),
      this.recent,
    );
    rove(this.cells, ".cell", { columns: () => this.data.grid });
    this.cells.addEventListener("focusin", (event) => event.target.closest(".cell") && this.#look(Number(event.target.dataset.cell)));
    this.restoreRecent = rove(this.recent, "button");
  }

  /** Show the view; `id` is the picture to look at, the last drawn without one. */
  async shown(id) {
    try {
      const { pictures } = await get(`/api/history?limit=${RECENT}`);
      this.#offer(pictures);
      const chosen = id ?? this.id ?? pictures[0]?.id;
      this.empty.hidden = Boolean(chosen);
      if (!chosen) return;
      const known = pictures.find((picture) => picture.id === chosen);
      await this.#open(chosen, known?.caption ?? this.page.captions.get(chosen) ?? "");
    } catch (error) {
      this.page.fail(error);
    }
  }

  #offer(pictures) {
    this.recent.previousElementSibling.hidden = !pictures.length;
    this.recent.replaceChildren(
      ...pictures.map(({ id, url, caption }) => {
        this.page.captions.set(id, caption);
        const look = () => this.page.go("microscope", id);
        return h("button", { type: "button", class: "thumb", data: { id }, "aria-label": `Look at: ${caption}`, onclick: look }, h("img", { src: url, alt: "", loading: "lazy" }));
      }),
    );
    this.restoreRecent();
  }

  async #open(id, caption) {
    for (const thumb of this.recent.children) thumb.setAttribute("aria-pressed", String(thumb.dataset.id === id));
    if (this.id === id && this.data) return;
    this.error.hidden = true;
    this.element.setAttribute("aria-busy", "true");
    try {
      this.data = await get(`/api/pictures/${encodeURIComponent(id)}/microscope`);
    } catch (error) {
      this.id = null;
      this.body.hidden = true;
      this.error.textContent = error.message;
      this.error.hidden = false;
      return;
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
    this.id = id;
    this.image.src = `/api/pictures/${encodeURIComponent(id)}.png`;
    this.image.alt = caption;
    this.caption.textContent = caption;
    this.slide.style.setProperty("--grid", this.data.grid);
    this.body.hidden = false;
    this.#fill();
    this.#offerLayers();
    this.#cover(this.overlay);
    this.#look(Math.min(this.cell, this.data.grid ** 2 - 1));
  }

  #fill() {
    const { grid } = this.data;
    const cell = (at) =>
      h("button", { type: "button", role: "gridcell", class: "cell", data: { cell: at }, tabindex: at === 0 ? "0" : "-1", "aria-selected": "false", "aria-label": this.#words(at), onclick: () => this.#look(at) });
    this.cells.replaceChildren(
      ...Array.from({ length: grid }, (_, row) => h("div", { role: "row", class: "cell-row" }, Array.from({ length: grid }, (_, column) => cell(row * grid + column)))),
    );
  }

  #at(at) {
    const { grid } = this.data;
    const [row, column] = [Math.floor(at / grid), at % grid];
    const read = (name) => this.data[name]?.[row]?.[column] ?? null;
    return { row, column, token: read("tokens"), p: read("probability"), drawnP: read("drawn_probability"), rank: read("rank"), entropy: read("entropy_bits"), isGiven: Boolean(read("given")) };
  }

  #words(at) {
    const { row, column, token, p, entropy } = this.#at(at);
    return `Row ${row + 1}, column ${column + 1}: token ${token}, probability ${percent(p)}, entropy ${bits(entropy)}`;
  }

  #look(at) {
    this.cell = at;
    const { row, column, token, p, drawnP, rank, entropy, isGiven } = this.#at(at);
    for (const cell of this.cells.querySelectorAll(".cell")) {
      const isChosen = Number(cell.dataset.cell) === at;
      cell.setAttribute("aria-selected", String(isChosen));
      cell.tabIndex = isChosen ? 0 : -1;
    }
    this.place.textContent = `Row ${row + 1}, column ${column + 1}`;
    this.swatch.src = `/api/codebook/${token}.png`;
    this.swatch.alt = `The codebook's picture of token ${token}`;
    const facts = [
      ["Token", String(token)],
      ["Probability", percent(p)],
      ["Rank", rank === null ? "–" : `${rank.toLocaleString()} of ${this.data.vocabulary.toLocaleString()}`],
      ["Entropy", bits(entropy)],
    ];
    if (isGiven) facts.push(["Origin", "given, not drawn"]);
    else if (drawnP !== null) facts.splice(2, 0, ["As it was drawn", percent(drawnP)]); // under its guidance and temperature
    this.facts.replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))));
    this.#showMask();
  }

  #offerLayers() {
    const choices = [{ layer: null, mask: "none" }, ...this.data.layers];
    this.layers.replaceChildren(
      ...choices.map(({ layer, mask }) =>
        h(
          "button",
          { type: "button", "aria-pressed": String(layer === this.layer), data: { layer: layer ?? "" }, onclick: () => this.#chooseLayer(layer) },
          layer === null ? "Off" : h("span", {}, h("b", { text: String(layer + 1) }), ` ${mask}`),
        ),
      ),
    );
  }

  #chooseLayer(layer) {
    this.layer = layer;
    for (const button of this.layers.children) button.setAttribute("aria-pressed", String(button.dataset.layer === String(layer ?? "")));
    this.#showMask();
  }

  async #showMask() {
    const cells = [...this.cells.querySelectorAll(".cell")];
    this.slide.classList.toggle("masked", this.layer !== null);
    if (this.layer === null) {
      this.sees.textContent = "Choose a layer to see which cells it may look at.";
      cells.forEach((cell) => cell.classList.remove("seen"));
      return;
    }
    const [layer, at, id] = [this.layer, this.cell, this.id];
    let seen;
    try {
      seen = await get(`/api/masks/${layer}/${at}`);
    } catch (error) {
      this.page.fail(error);
      return;
    }
    if (layer !== this.layer || at !== this.cell || id !== this.id) return;
    const visible = new Set(seen.cells);
    cells.forEach((cell) => cell.classList.toggle("seen", visible.has(Number(cell.dataset.cell))));
    const { mask } = this.data.layers.find((each) => each.layer === layer);
    const text = seen.text ? "the whole caption and " : "";
    this.sees.textContent = `Layer ${layer + 1}, a ${mask} mask, sees ${text}${visible.size} earlier cell${visible.size === 1 ? "" : "s"}. It looks from the cell before, from which this one is drawn.`;
  }

  #cover(overlay) {
    this.overlay = overlay;
    for (const button of this.overlays.children) button.setAttribute("aria-pressed", String(button.dataset.id === overlay));
    const most = overlay === "entropy" ? (this.data?.max_entropy_bits ?? Math.log2(this.data?.vocabulary ?? 2)) : 16;
    const value = ({ entropy, p }) => (overlay === "entropy" ? entropy : p === null ? null : -Math.log2(p));
    for (const cell of this.cells.querySelectorAll(".cell")) {
      const of = overlay === "none" ? null : value(this.#at(Number(cell.dataset.cell)));
      cell.style.backgroundColor = of === null ? "transparent" : ramp(of / most);
    }
    this.slide.classList.toggle("covered", overlay !== "none");
    this.legend.hidden = overlay === "none";
    const name = overlay === "entropy" ? ["0 bits: certain", `${most.toFixed(0)} bits: anything goes`] : ["0 bits: expected", "16 bits or more: a surprise"];
    this.legend.replaceChildren(rampLegend(...name));
    if (overlay !== "none") announce(overlay === "entropy" ? "Entropy of each cell is shown" : "Surprise of each cell is shown");
  }
}

const percent = (p) => {
  if (p === null) return "–";
  if (p > 0 && p < 0.001) return "under 0.1 %";
  return `${(p * 100).toFixed(p < 0.1 ? 1 : 0)} %`;
};

const bits = (entropy) => (entropy === null ? "–" : `${entropy.toFixed(1)} bits`);
