// The board: one tile a candidate, which fills row by row while tokens are sampled and settles in rank order.

import { toBlob } from "./api.js";
import { h, isCalm, rove } from "./dom.js";

const GAP = 10; // pixels between tiles, as in page.css

/** Tiles of one drawing. `onOpen(picture, shown)` is called with a picture of the board and those on show. */
export class Board {
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.element = h("ul", { class: "board", role: "list" });
    this.tiles = new Map(); // index of a candidate -> its tile
    this.pictures = [];
    this.kept = 0;
    this.restoreTabStop = rove(this.element, "button.tile:not([disabled])");
    new ResizeObserver(() => this.layOut()).observe(this.element);
  }

  /** Show where pictures will come, before there are any. */
  promise(n, grid) {
    this.begin(n, grid, "");
    this.element.classList.add("ghost");
    this.element.setAttribute("aria-hidden", "true");
  }

  /** Lay out `n` empty candidates of a picture of `grid` x `grid` tokens. */
  begin(n, grid, caption) {
    this.caption = caption;
    this.pictures = [];
    this.tiles.clear();
    const items = [];
    for (let index = 0; index < n; index += 1) {
      const tile = h("button", { type: "button", class: "tile", disabled: true, "aria-label": `Candidate ${index + 1}, being drawn` });
      tile.style.setProperty("--grid", grid);
      this.tiles.set(index, tile);
      items.push(h("li", {}, tile));
    }
    this.element.replaceChildren(...items);
    this.element.classList.remove("settled", "ghost");
    this.element.removeAttribute("aria-hidden");
    this.layOut();
  }

  /** Show one more row of the candidates on a sheet. */
  async addRow({ row, n_rows: nRows, first, sheet, columns, tile: side, n }) {
    const bitmap = await createImageBitmap(toBlob(sheet));
    const height = Math.round(((row + 1) / nRows) * side); // below it nothing is drawn yet
    for (let i = 0; i < n; i += 1) {
      const tile = this.tiles.get(first + i);
      if (!tile || this.pictures.length) continue;
      let canvas = tile.querySelector("canvas");
      if (!canvas) {
        canvas = h("canvas", { width: side, height: side });
        tile.append(canvas);
      }
      const x = (i % columns) * side;
      const y = Math.floor(i / columns) * side;
      canvas.getContext("2d").drawImage(bitmap, x, y, side, height, 0, 0, side, height);
      tile.style.setProperty("--drawn", (row + 1) / nRows);
      tile.classList.add("drawing");
    }
    bitmap.close();
  }

  /** Take the ranked pictures, best first, and show the best `kept` of all. */
  settle(pictures, kept) {
    this.pictures = pictures;
    this.kept = kept;
    this.element.classList.add("settled");
    return this.showBestOf(pictures.length);
  }

  /** Show the best of the first `n` candidates: what the ranking would have kept had no more been drawn. */
  showBestOf(n) {
    const shown = this.pictures.filter((picture) => picture.index < n).slice(0, this.kept);
    const before = new Map([...this.tiles].map(([index, tile]) => [index, tile.getBoundingClientRect()]));
    const wasShown = new Set([...this.element.children].map((item) => item.firstChild));
    const items = shown.map((picture, place) => {
      const tile = this.tiles.get(picture.index);
      this.#show(tile, picture, place, shown);
      return tile.parentElement;
    });
    this.element.replaceChildren(...items);
    this.layOut();
    this.restoreTabStop();
    if (!isCalm()) shown.forEach(({ index }) => this.#move(this.tiles.get(index), before.get(index), wasShown));
    return shown;
  }

  #show(tile, picture, place, shown) {
    tile.disabled = false;
    tile.classList.remove("drawing");
    const score = picture.score === null ? "" : `, score ${picture.score.toFixed(3)}`;
    tile.setAttribute("aria-label", `Picture ${place + 1} of ${shown.length}: ${this.caption}, seed ${picture.seed}${score}`);
    tile.onclick = () => this.onOpen(picture, shown);
    if (tile.querySelector("img")) return;
    const image = h("img", { src: picture.url, alt: "", draggable: "true", onload: () => tile.querySelector("canvas")?.remove() });
    tile.append(image);
  }

  #move(tile, from, wasShown) {
    const to = tile.getBoundingClientRect();
    if (!to.width) return;
    const isNew = !wasShown.has(tile) || !from.width;
    const frames = isNew
      ? [{ opacity: 0, transform: "scale(.9)" }, { opacity: 1, transform: "none" }]
      : [{ transform: `translate(${from.x - to.x}px, ${from.y - to.y}px) scale(${from.width / to.width})` }, { transform: "none" }];
    tile.animate(frames, { duration: isNew ? 220 : 520, easing: "cubic-bezier(.2, .8, .2, 1)" });
  }

  /** Choose the number of columns: as large as the count allows, the last line as full as can be. */
  layOut() {
    const n = this.element.children.length;
    const width = this.element.clientWidth;
    if (!n || !width) return;
    const side = n <= 4 ? 200 : n <= 8 ? 150 : n <= 18 ? 118 : n <= 36 ? 92 : n <= 64 ? 70 : n <= 144 ? 52 : 34;
    const most = Math.max(2, Math.min(n, Math.floor((width + GAP) / (Math.min(side, width / 2.4) + GAP))));
    let best = most;
    for (let columns = most; columns >= Math.max(2, most / 2); columns -= 1) {
      if (blanks(n, columns) < blanks(n, best)) best = columns;
    }
    this.element.style.setProperty("--columns", n === 1 ? 1 : best);
    this.element.style.setProperty("--widest", `${(n === 1 ? 1 : best) * ((n <= 4 ? 300 : 220) + GAP)}px`);
  }
}

const blanks = (n, columns) => Math.ceil(n / columns) * columns - n;
