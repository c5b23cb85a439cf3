// A caption as a sentence whose words can be swapped: each word is a button with a list to choose from or to type into.

import { h, newId } from "./dom.js";

/** Split "a {object}, {style} style" into strings and {slot} parts. */
export function parseTemplate(text) {
  return text.split(/(\{\w+\})/).filter(Boolean).map((part) => {
    const slot = /^\{(\w+)\}$/.exec(part);
    return slot ? { slot: slot[1] } : part;
  });
}

/** The sentence of one template; `onChange()` after every swap. A slot used twice changes in both places. */
export class Sentence {
  constructor(onChange) {
    this.onChange = onChange;
    this.element = h("div", { class: "sentence", role: "group", "aria-label": "Caption: choose its words" });
    this.element.addEventListener("focusout", (event) => {
      if (this.menu && !this.element.contains(event.relatedTarget)) this.#close(false);
    });
  }

  show(template) {
    this.template = template;
    this.values = {};
    for (const [slot, words] of Object.entries(template.slots)) {
      const used = Object.values(this.values); // two slots with the same words begin with different ones
      this.values[slot] = words.find((word) => !used.includes(word)) ?? words[0];
    }
    this.compared = null;
    this.#render();
  }

  /** Compare the words of one slot: the sentence shows it as varying. */
  compare(slot, words) {
    this.compared = slot ? { slot, words } : null;
    this.#render();
  }

  shuffle() {
    for (const [slot, words] of Object.entries(this.template.slots)) {
      this.values[slot] = words[Math.floor(Math.random() * words.length)];
    }
    this.#render();
    this.onChange();
  }

  /** The caption, with some words replaced. */
  caption(changes = {}) {
    const values = { ...this.values, ...changes };
    return parseTemplate(this.template.text).map((part) => (part.slot ? values[part.slot] : part)).join("");
  }

  #render() {
    const focused = document.activeElement?.dataset?.place;
    const parts = parseTemplate(this.template.text).map((part, place) => (part.slot ? this.#word(part.slot, place) : part));
    this.menu = null;
    this.element.replaceChildren(...parts);
    if (focused !== undefined) this.element.querySelector(`[data-place="${focused}"]`)?.focus();
  }

  #word(slot, place) {
    const isCompared = this.compared?.slot === slot;
    const [first, ...rest] = isCompared ? this.compared.words : [this.values[slot]];
    const text = rest.length ? `${first} +${rest.length}` : first;
    // Not a <button>, which breaks out of the line: a long word wraps as the sentence does.
    const button = h("span", {
      role: "button",
      tabindex: "0",
      class: isCompared ? "word compared" : "word",
      text,
      data: { place },
      "aria-haspopup": "listbox",
      "aria-expanded": "false",
      "aria-label": `${slot}: ${text}`,
      onclick: () => (this.menu ? this.#close(true) : this.#open(button, slot)),
      onkeydown: (event) => {
        if (!["Enter", " ", "ArrowDown", "ArrowUp"].includes(event.key)) return;
        event.preventDefault();
        this.#open(button, slot);
      },
    });
    return button;
  }

  #open(button, slot) {
    if (this.menu) this.#close(false);
    button.setAttribute("aria-expanded", "true");
    this.menu = new WordMenu(slot, this.template.slots[slot], this.values[slot], (word) => {
      this.#close(true);
      if (word === null || word === this.values[slot]) return;
      this.values[slot] = word;
      this.#render();
      this.onChange();
    });
    this.opener = button;
    this.element.append(this.menu.element);
    this.menu.place(button, this.element);
    this.menu.focus();
  }

  #close(refocus) {
    const { menu, opener } = this;
    this.menu = null;
    opener.setAttribute("aria-expanded", "false");
    if (refocus) opener.focus();
    menu.element.remove();
  }
}

/** The open list of one slot: a combobox; `onChoose(word)`, null when left as it was. */
class WordMenu {
  constructor(slot, words, value, onChoose) {
    this.words = words;
    this.value = value;
    this.onChoose = onChoose;
    const listId = newId("words");
    this.list = h("ul", { id: listId, role: "listbox", "aria-label": slot });
    this.input = h("input", {
      type: "text",
      role: "combobox",
      maxlength: 200,
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "choose, or type your own",
      "aria-label": `${slot}: choose, or type your own`,
      "aria-autocomplete": "list",
      "aria-expanded": "true",
      "aria-controls": listId,
      oninput: () => this.#filter(),
      onkeydown: (event) => this.#key(event),
    });
    this.own = h("p", { class: "own-words", hidden: true });
    this.element = h("div", { class: "menu" }, this.input, this.list, this.own);
    this.#filter();
    this.#activate(Math.max(0, words.indexOf(value)));
  }

  focus() {
    this.input.focus({ preventScroll: true });
    this.element.scrollIntoView({ block: "nearest" });
    this.active?.scrollIntoView({ block: "nearest" });
  }

  /** Stand under its word, inside the sentence's width. */
  place(button, sentence) {
    const word = [...button.getClientRects()].at(-1); // its last line
    const frame = sentence.getBoundingClientRect();
    const left = Math.max(0, Math.min(word.left - frame.left, frame.width - this.element.offsetWidth));
    this.element.style.left = `${left}px`;
    this.element.style.top = `${word.bottom - frame.top + 6}px`;
  }

  #filter() {
    const typed = this.input.value.trim().toLowerCase();
    const found = this.words.filter((word) => word.toLowerCase().includes(typed));
    this.list.replaceChildren(
      ...found.map((word) =>
        h("li", {
          role: "option",
          id: newId("word"),
          text: word,
          "aria-selected": String(word === this.value),
          onpointerdown: (event) => event.preventDefault(), // the focus stays in the field
          onclick: () => this.onChoose(word),
        }),
      ),
    );
    this.list.hidden = !found.length;
    const isOwn = typed && !this.words.some((word) => word.toLowerCase() === typed);
    this.own.hidden = !isOwn;
    this.own.textContent = isOwn ? (found.length ? "Shift+Enter takes your own words" : "Enter takes your own words") : "";
    this.#activate(0);
  }

  #activate(at) {
    const options = [...this.list.children];
    this.active?.classList.remove("active");
    this.active = options[at] ?? null;
    this.active?.classList.add("active");
    if (this.active) this.input.setAttribute("aria-activedescendant", this.active.id);
    else this.input.removeAttribute("aria-activedescendant");
    this.active?.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    const options = [...this.list.children];
    const at = options.indexOf(this.active);
    const typed = this.input.value.trim();
    if (event.key === "ArrowDown") this.#activate((at + 1) % options.length);
    else if (event.key === "ArrowUp") this.#activate((at - 1 + options.length) % options.length);
    else if (event.key === "Enter" && typed && (event.shiftKey || !this.active)) this.onChoose(typed);
    else if (event.key === "Enter") this.onChoose(this.active?.textContent ?? null);
    else if (event.key === "Escape") this.onChoose(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
