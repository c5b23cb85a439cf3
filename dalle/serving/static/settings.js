// The settings of a drawing: a form behind one line that says what is set.

import { h, newId } from "./dom.js";

const STORE = "dalle.settings";
// Ranges and hints are the server's, info.fields.
const FIELDS = [
  { name: "num_images", label: "Pictures", step: 1, isWhole: true },
  { name: "num_candidates", label: "Candidates", step: 1, isWhole: true },
  { name: "seed", label: "Seed", step: 1, isWhole: true },
  { name: "temperature", label: "Temperature", step: "any" },
  { name: "top_k", label: "Top-k", step: 1, isWhole: true },
  { name: "top_p", label: "Top-p", step: "any" },
  { name: "guidance", label: "Guidance", step: "any" },
];
const LEAST = { top_p: 0.01 }; // 0 itself is not allowed

/** The form. `info` is the server's /api/info. */
export class Settings {
  constructor(info) {
    this.info = info;
    this.inputs = {};
    this.digest = h("span", { class: "digest" });
    const fields = FIELDS.map((field) => this.#field(field));
    const truncateId = newId("setting");
    this.truncate = h("input", { type: "checkbox", id: truncateId, onchange: () => this.#changed() });
    this.element = h(
      "details",
      { class: "settings" },
      h("summary", {}, h("span", { class: "settings-word", text: "Settings" }), this.digest),
      h(
        "div",
        { class: "settings-fields" },
        fields,
        h("div", { class: "field check" }, this.truncate, h("label", { for: truncateId, text: "Cut captions that are too long" })),
        h("button", { type: "button", class: "link", text: "Back to the model’s own", onclick: () => this.#reset() }),
      ),
    );
    this.set(stored());
  }

  #field({ name, label, step }) {
    const id = newId("setting");
    const { help, low, high } = this.info.fields[name];
    const limit = { num_images: this.info.max_images, num_candidates: this.info.max_candidates }[name] ?? Math.min(high, Number.MAX_SAFE_INTEGER);
    const ownDefault = this.info.defaults[name];
    const input = h("input", {
      id,
      type: "number",
      inputmode: step === 1 ? "numeric" : "decimal",
      name,
      min: LEAST[name] ?? low,
      max: limit,
      step,
      placeholder: { num_images: "4", num_candidates: "as many", seed: "new" }[name] ?? ownDefault ?? "off",
      "aria-describedby": `${id}-hint`,
      disabled: name === "num_candidates" && !this.info.has_ranker,
      onchange: () => this.#changed(),
    });
    this.inputs[name] = input;
    const text = name === "num_candidates" && !this.info.has_ranker ? "this model has no CLIP to choose with" : help;
    return h("div", { class: "field" }, h("label", { for: id, text: label }), input, h("small", { id: `${id}-hint`, text }));
  }

  /** Put known settings into the fields; what is missing goes back to the default. */
  set(values) {
    for (const { name } of FIELDS) {
      const value = values[name] ?? { num_images: Math.min(4, this.info.max_images), num_candidates: this.#usualCandidates() }[name];
      this.inputs[name].value = this.inputs[name].disabled ? "" : (value ?? "");
    }
    this.truncate.checked = Boolean(values.truncate);
    this.#tell();
  }

  #reset() {
    this.set({});
    this.#changed();
  }

  #usualCandidates() {
    return this.info.has_ranker ? Math.min(this.info.defaults.candidates ?? 16, this.info.max_candidates) : null;
  }

  /** The fields of a /api/draw request, those left empty left out; null, with the field in focus, when one is not valid. */
  request() {
    const request = {};
    for (const { name } of FIELDS) {
      const input = this.inputs[name];
      if (!input.checkValidity()) {
        this.element.open = true;
        input.reportValidity();
        return null;
      }
      if (input.value !== "" && !input.disabled) request[name] = Number(input.value);
    }
    if (request.num_candidates < request.num_images) request.num_candidates = request.num_images;
    if (this.truncate.checked) request.truncate = true;
    return request;
  }

  #tell() {
    const values = this.#values();
    const [n, candidates] = [Number(values.num_images || 1), Number(values.num_candidates || 0)];
    const parts = [candidates > n ? `best ${n} of ${candidates}` : `${n} picture${n === 1 ? "" : "s"}`];
    parts.push(values.seed === "" ? "a new seed" : `seed ${values.seed}`);
    for (const name of ["temperature", "top_k", "top_p", "guidance"]) {
      if (values[name] !== "") parts.push(`${name.replace("_", "-")} ${values[name]}`);
    }
    this.digest.textContent = parts.join(" · ");
  }

  /** Remember what a person set, but not a seed, nor what a picture brought along. */
  #changed() {
    this.#tell();
    const set = Object.entries(this.#values()).filter(([name, value]) => value !== "" && name !== "seed");
    try {
      localStorage.setItem(STORE, JSON.stringify({ ...Object.fromEntries(set.map(([name, value]) => [name, Number(value)])), truncate: this.truncate.checked }));
    } catch {
      // Storage is refused in some private windows: the settings live as long as the page.
    }
  }

  #values() {
    return Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, input.value]));
  }
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

/** The settings under which a picture was drawn, from its recipe. */
export function settingsOf(recipe, seed) {
  const options = recipe?.options ?? recipe ?? {};
  const { temperature, top_k, top_p, guidance } = options;
  return { seed: seed ?? recipe?.seed, temperature, top_k, top_p, guidance };
}
