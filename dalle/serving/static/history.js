// History: every picture that was kept, to find again, favour, delete, download or draw again.

import { change, get } from "./api.js";
import { announce, h, icon, rove, toast } from "./dom.js";

const PAGE = 48; // pictures asked for at a time
const TYPING_MS = 250; // a search begins when typing pauses

export class History {
  title = "History";

  constructor(page) {
    this.page = page;
    this.pictures = [];
    this.leaving = new Map(); // id -> what deletes it for good, while it can still be undone
    this.search = h("input", { type: "search", placeholder: "Search captions", "aria-label": "Search captions", maxlength: 200, oninput: () => this.#typed() });
    this.favourites = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.#toggleFavourites() }, icon("star"), "Favourites");
    this.file = h("input", { type: "file", accept: "image/png", class: "unseen", tabindex: "-1", "aria-hidden": "true", onchange: () => this.file.files[0] && page.restore(this.file.files[0]) });
    this.list = h("ul", { class: "gallery", role: "list" });
    this.status = h("p", { class: "status", role: "status" });
    this.more = h("button", { type: "button", hidden: true, text: "Show more", onclick: () => this.#load() });
    this.element = h(
      "section",
      { class: "view history", "aria-labelledby": "history-title" },
      h("h1", { id: "history-title", text: "History" }),
      h(
        "div",
        { class: "deck" },
        this.search,
        this.favourites,
        h("button", { type: "button", onclick: () => this.file.click() }, icon("upload"), "Restore from a PNG"),
        this.file,
      ),
      this.status,
      this.list,
      h("p", { class: "centre" }, this.more),
    );
    this.restoreTabStop = rove(this.list, "button.tile");
    this.list.addEventListener("keydown", (event) => this.#key(event));
    new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && !this.more.hidden && this.#load(), { rootMargin: "400px" }).observe(this.more);
    addEventListener("pagehide", () => [...this.leaving.values()].forEach((leave) => leave()));
  }

  shown() {
    return this.refresh();
  }

  /** Read the list again from its beginning. */
  async refresh() {
    this.asked?.abort();
    this.pictures = [];
    this.cursor = null;
    await this.#load(true);
  }

  async #load(isFirst = false) {
    if (this.asked && !isFirst) return;
    const asked = new AbortController();
    this.asked = asked;
    const query = new URLSearchParams({ limit: PAGE });
    if (this.search.value.trim()) query.set("query", this.search.value.trim());
    if (this.isFavourites) query.set("favourite", "true");
    if (this.cursor) query.set("before", this.cursor);
    try {
      const { pictures, next } = await get(`/api/history?${query}`, asked.signal);
      const items = pictures.filter(({ id }) => !this.leaving.has(id));
      this.cursor = next;
      this.pictures.push(...items);
      if (isFirst) this.list.replaceChildren();
      this.list.append(...items.map((picture) => this.#item(picture)));
      this.more.hidden = !next;
      this.#tell();
      this.restoreTabStop();
    } catch (error) {
      if (error.name !== "AbortError") this.page.fail(error);
    } finally {
      if (this.asked === asked) this.asked = null;
    }
  }

  #item(picture) {
    this.page.captions.set(picture.id, picture.caption);
    const image = h("img", { src: picture.url, alt: "", loading: "lazy" });
    const open = () => this.page.viewer.open(picture, this.pictures, { onDelete: (entry) => this.#remove(entry), onFavourite: (entry) => this.#mark(entry) });
    const tile = h("button", { type: "button", class: "tile", tabindex: "-1", "aria-label": labelOf(picture), onclick: open }, image, h("span", { class: "badge", hidden: !picture.favourite }, icon("star")));
    return h("li", { data: { id: picture.id } }, tile, h("p", { class: "tile-caption", text: picture.caption, "aria-hidden": "true" }));
  }

  #mark(entry) {
    const tile = this.#itemOf(entry.id)?.querySelector(".tile");
    if (!tile) return;
    tile.querySelector(".badge").hidden = !entry.favourite;
    tile.setAttribute("aria-label", labelOf(entry));
  }

  #itemOf(id) {
    return [...this.list.children].find((item) => item.dataset.id === id);
  }

  /** Take a picture off the list at once; it is deleted for good when the notice goes without "Undo". */
  #remove(entry) {
    const at = this.pictures.indexOf(entry);
    const item = this.#itemOf(entry.id);
    const after = item.nextElementSibling ?? item.previousElementSibling;
    this.pictures.splice(at, 1);
    item.remove();
    this.#tell();
    this.restoreTabStop();
    (after?.querySelector(".tile") ?? this.search).focus();
    const leave = async () => {
      if (!this.leaving.delete(entry.id)) return;
      await change("DELETE", `/api/history/${encodeURIComponent(entry.id)}`).catch((error) => this.page.fail(error));
    };
    this.leaving.set(entry.id, leave);
    toast("Picture deleted.", {
      action: "Undo",
      onClose: (isUndone) => {
        if (!isUndone) return leave();
        this.leaving.delete(entry.id);
        announce("The picture is back");
        return this.refresh();
      },
    });
  }

  #key(event) {
    const id = event.target.closest("li")?.dataset.id;
    const entry = this.pictures.find((picture) => picture.id === id);
    if (event.key !== "Delete" || !entry) return;
    event.preventDefault();
    this.#remove(entry);
  }

  #toggleFavourites() {
    this.isFavourites = !this.isFavourites;
    this.favourites.setAttribute("aria-pressed", String(this.isFavourites));
    this.refresh();
  }

  #typed() {
    clearTimeout(this.typing);
    this.typing = setTimeout(() => this.refresh(), TYPING_MS);
  }

  #tell() {
    const n = this.list.children.length;
    const isFiltered = this.search.value.trim() || this.isFavourites;
    if (!n) this.status.textContent = isFiltered ? "Nothing like that in the history." : "Nothing yet: what you draw is kept here.";
    else this.status.textContent = `${n}${this.cursor ? "+" : ""} picture${n === 1 ? "" : "s"}`;
  }
}

const labelOf = ({ caption, seed, favourite }) => `${caption}, seed ${seed}${favourite ? ", favourite" : ""}`;
