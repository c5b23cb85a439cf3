// Explorer: a caption whose words can be swapped, and the best of what the model draws for it.

import { Easel } from "./easel.js";
import { get } from "./api.js";
import { h, icon, rove } from "./dom.js";
import { Settings } from "./settings.js";
import { Sentence } from "./words.js";

const AT_ONCE = 3; // drawings of a comparison asked for together: browsers allow six connections to a server
const MOST_COMPARED = 6;
const FREE = "free";

export class Explorer {
  title = "Explorer";

  constructor(page) {
    this.page = page;
    this.sentence = new Sentence(() => this.#swapped());
    this.free = h("textarea", {
      class: "sentence free",
      rows: 1,
      maxlength: 2000,
      hidden: true,
      "aria-label": "Caption in your own words",
      placeholder: "Describe a picture …",
      oninput: () => this.#fit(),
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey) return;
        event.preventDefault();
        this.draw();
      },
    });
    this.settings = new Settings(page.info);
    this.picker = h("div", { class: "picker", role: "group", "aria-label": "Captions to start from" });
    this.note = h("p", { class: "note" });
    this.button = h("button", { type: "button", class: "primary", onclick: () => (this.isBusy ? this.cancel() : this.draw()) }, "Draw");
    this.shuffler = h("button", { type: "button", onclick: () => this.sentence.shuffle() }, icon("shuffle"), "Shuffle the words");
    this.comparison = h("select", { "aria-label": "Compare the words of", onchange: () => this.#compare(this.comparison.value) });
    this.compareBox = h("label", { class: "compare" }, h("span", { text: "Compare" }), this.comparison);
    this.chips = h("div", { class: "chips", role: "group", "aria-label": "Words to compare", hidden: true });
    this.results = h("div", { class: "results" });
    this.easels = [];
    this.element = h(
      "section",
      { class: "view explorer", "aria-labelledby": "explorer-title" },
      h("h1", { class: "unseen", id: "explorer-title", text: "Explorer" }),
      this.picker,
      h("div", { class: "hero" }, this.sentence.element, this.free, this.note),
      h("div", { class: "deck" }, this.button, this.shuffler, this.compareBox),
      this.chips,
      this.settings.element,
      this.results,
    );
    this.restorePicker = rove(this.picker, "button");
    this.#lay([{ label: null }]);
    this.easels[0].board.promise(4, page.info.grid);
    this.#load();
  }

  async #load() {
    try {
      this.templates = (await get("/api/templates")).templates;
    } catch (error) {
      this.templates = [];
      this.page.fail(error);
    }
    const names = [...this.templates.map(({ id, title }) => [id, title]), [FREE, "Your own words"]];
    this.picker.replaceChildren(
      ...names.map(([id, title]) => h("button", { type: "button", text: title, "aria-pressed": "false", data: { id }, onclick: () => this.choose(id) })),
    );
    if (!this.chosen) this.choose(this.templates[0]?.id ?? FREE);
    else this.choose(this.chosen);
    this.restorePicker();
  }

  /** Start from a template, or from nothing. */
  choose(id) {
    this.chosen = id;
    for (const button of this.picker.children) button.setAttribute("aria-pressed", String(button.dataset.id === id));
    const template = this.templates?.find((each) => each.id === id);
    this.free.hidden = Boolean(template);
    this.sentence.element.hidden = !template;
    this.shuffler.hidden = !template;
    this.note.textContent = template?.note ?? "";
    this.note.hidden = !template?.note;
    if (template) this.sentence.show(template);
    else this.#fit();
    this.#offerComparison(template);
  }

  /** Put a caption and settings into the page; `isDrawn`: and draw them. */
  restore(caption, settings, { isDrawn = false } = {}) {
    this.free.value = caption;
    this.choose(FREE);
    this.settings.set({ num_images: 1, num_candidates: 1, ...settings }); // the one picture, and no other chosen over it
    this.#fit();
    if (isDrawn) this.draw();
    else this.button.focus();
  }

  shown() {
    this.#fit();
  }

  get isBusy() {
    return Boolean(this.running);
  }

  /** Draw what the sentence says; one drawing for each word that is compared. */
  async draw() {
    const settings = this.settings.request();
    if (!settings) return;
    await this.cancel();
    const captions = this.#captions();
    if (!captions[0].caption.trim()) {
      this.#lay([{ label: null }]);
      this.easels[0].fail("Write a caption first.");
      this.free.focus();
      return;
    }
    if (captions.length > 1 && settings.seed === undefined) settings.seed = Math.floor(Math.random() * 2 ** 32); // rows differ by the word alone
    this.#lay(captions);
    this.easels.forEach((easel) => easel.wait());
    const running = {};
    this.running = running;
    this.#showBusy();
    const waiting = captions.map(({ caption }, i) => [this.easels[i], { prompt: caption, ...settings }]);
    const work = async () => {
      for (let next = waiting.shift(); next && this.running === running; next = waiting.shift()) await next[0].draw(next[1]);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    if (this.running !== running) return;
    this.running = null;
    this.#showBusy();
  }

  async cancel() {
    if (!this.running) return;
    this.running = null;
    this.#showBusy();
    await Promise.all(this.easels.map((easel) => easel.cancel()));
  }

  #captions() {
    if (this.chosen === FREE) return [{ label: null, caption: this.free.value }];
    const { compared } = this.sentence;
    if (!compared) return [{ label: null, caption: this.sentence.caption() }];
    return compared.words.map((word) => ({ label: word, caption: this.sentence.caption({ [compared.slot]: word }) }));
  }

  #lay(rows) {
    const onOpen = (entry, entries) => this.page.viewer.open(entry, entries);
    this.easels = rows.map(({ label }) => new Easel(onOpen, { title: label ? `Pictures: ${label}` : "Pictures" }));
    for (const easel of this.easels) {
      easel.onRerank = (n) => this.easels.filter((other) => other !== easel).forEach((other) => other.rerank(n));
    }
    const isCompared = rows.length > 1;
    this.results.classList.toggle("compared", isCompared);
    this.results.replaceChildren(
      ...this.easels.map((easel, i) =>
        isCompared ? h("div", { class: "row" }, h("h2", { class: "row-label", text: rows[i].label }), easel.element) : easel.element,
      ),
    );
  }

  #showBusy() {
    this.button.textContent = this.isBusy ? "Cancel" : "Draw";
    this.button.classList.toggle("primary", !this.isBusy);
  }

  #swapped() {
    const { compared } = this.sentence;
    if (compared) this.#compare(compared.slot);
  }

  #offerComparison(template) {
    const first = ([slot]) => (slot === template.rows ? 0 : 1); // the slot that its author would compare
    const slots = Object.entries(template?.slots ?? {}).filter(([, words]) => words.length > 1).sort((a, b) => first(a) - first(b));
    this.compareBox.hidden = !slots.length;
    this.comparison.replaceChildren(h("option", { value: "", text: "nothing" }), ...slots.map(([slot]) => h("option", { value: slot, text: slot })));
    this.#compare("");
  }

  #compare(slot) {
    this.comparison.value = slot;
    this.chips.hidden = !slot;
    if (!slot) {
      this.sentence.template && this.sentence.compare(null);
      return;
    }
    const own = this.sentence.values[slot];
    const words = [...new Set([own, ...this.sentence.template.slots[slot]])];
    const chosen = new Set(words.slice(0, 4));
    const tell = () => this.sentence.compare(slot, words.filter((word) => chosen.has(word)));
    this.chips.replaceChildren(
      ...words.map((word) =>
        h("button", {
          type: "button",
          class: "chip",
          text: word,
          "aria-pressed": String(chosen.has(word)),
          onclick: (event) => {
            if (chosen.has(word) && chosen.size > 1) chosen.delete(word);
            else if (chosen.size < MOST_COMPARED) chosen.add(word);
            event.target.setAttribute("aria-pressed", String(chosen.has(word)));
            tell();
          },
        }),
      ),
    );
    tell();
  }

  #fit() {
    this.free.style.height = "auto";
    this.free.style.height = `${this.free.scrollHeight}px`;
  }
}

