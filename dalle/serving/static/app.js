// The page: five views behind the address's hash, one dialog for pictures, shortcuts, and PNGs dropped anywhere.

import { change, get } from "./api.js";
import { Completion } from "./completion.js";
import { announce, h, icon, toast } from "./dom.js";
import { capital } from "./easel.js";
import { Explorer } from "./explorer.js";
import { History } from "./history.js";
import { Microscope } from "./microscope.js";
import { Training } from "./training.js";
import { Viewer } from "./viewer.js";

const VIEWS = { explorer: Explorer, completion: Completion, history: History, microscope: Microscope, training: Training };
const SHORTCUTS = [
  ["1 – 5", "Explorer, Completion, History, Microscope, Training"],
  ["Enter", "draw, from a caption you type"],
  ["D", "draw"],
  ["S", "shuffle the words"],
  ["Esc", "close what is open, or cancel the drawing"],
  ["Arrow keys", "move among pictures, cells and words"],
  ["Enter, Space", "open a picture; mark a cell"],
  ["← →", "in a picture’s dialog: the one before, the one after"],
  ["F", "in a picture’s dialog: favourite"],
  ["Delete", "in the history: delete a picture"],
  ["/", "search the history"],
  ["T", "light or dark"],
  ["?", "this list"],
];

/** What the views share. */
class Page {
  constructor(info) {
    this.info = info;
    this.captions = new Map(); // id of a picture -> its caption, for views that only get the id
    this.viewer = new Viewer({
      drawAgain: (caption, settings) => this.go("explorer", null, () => this.views.explorer.restore(caption, settings, { isDrawn: true })),
      complete: (entry) => this.#follow("completion", entry),
      inspect: (entry) => this.#follow("microscope", entry),
    });
    this.help = helpDialog();
    document.body.append(this.viewer.element, this.help);
    this.views = {};
    for (const [name, View] of Object.entries(VIEWS)) this.views[name] = new View(this);
  }

  #follow(name, entry) {
    this.captions.set(entry.id, entry.caption);
    this.go(name, entry.id);
  }

  /** Go to a view; `then` runs when it is on show, in place of moving the focus to it. */
  go(name, id, then = null) {
    const hash = id ? `#/${name}/${encodeURIComponent(id)}` : `#/${name}`;
    const isThere = this.view === this.views[name] && location.hash === hash;
    if (isThere) then?.();
    else this.then = then;
    location.hash = hash;
  }

  /** Show the view of the address. */
  route() {
    const [, name, id] = location.hash.split("/");
    const chosen = Object.hasOwn(this.views, name) ? name : "explorer";
    const view = this.views[chosen];
    for (const link of document.querySelectorAll("#views a")) {
      if (link.dataset.view === chosen) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const isOther = this.view !== view;
    if (isOther) {
      this.view?.hidden?.();
      this.view = view;
      document.getElementById("main").replaceChildren(view.element);
      document.title = `${view.title} · dalle`;
      scrollTo(0, 0);
    }
    view.shown?.(id ? decodeURIComponent(id) : undefined);
    return isOther;
  }

  /** Restore caption and settings from one of our PNGs. */
  async restore(file) {
    try {
      const { caption, settings, same_model: isSame } = await change("POST", "/api/restore", file);
      this.go("explorer", null, () => this.views.explorer.restore(caption, settings ?? {}));
      toast(`Caption and settings are back.${isSame === false ? " Another model drew the picture: this one will draw it otherwise." : ""}`);
    } catch (error) {
      this.fail(error);
    }
  }

  fail(error) {
    if (error.name === "AbortError") return;
    toast(capital(error.message), { kind: "error", seconds: 12 });
  }
}

function helpDialog() {
  const dialog = h(
    "dialog",
    { class: "help", "aria-labelledby": "help-title", onclick: (event) => event.target === dialog && dialog.close() },
    h("h2", { id: "help-title", text: "Shortcuts" }),
    h("dl", {}, SHORTCUTS.map(([key, what]) => h("div", {}, h("dt", {}, h("kbd", { text: key })), h("dd", { text: what })))),
    h("button", { type: "button", text: "Close", onclick: () => dialog.close() }),
  );
  return dialog;
}

// The theme: the system's, until one is chosen.

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  const button = document.getElementById("theme");
  const label = isDark() ? "Use the light theme" : "Use the dark theme";
  button.setAttribute("aria-label", label);
  button.title = `${label} (T)`;
  button.replaceChildren(icon(isDark() ? "sun" : "moon"));
}

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("dalle.theme", theme);
  } catch {
    // Storage is refused in some private windows: the theme lives as long as the page.
  }
  showTheme();
}

// Keys and drops.

function onKey(page, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const isTyping = event.target.closest("input:not([type=range]):not([type=checkbox]), textarea, select");
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (page.view.isBusy) page.view.cancel();
    return;
  }
  if (isTyping || document.querySelector("dialog[open]")) return;
  const names = Object.keys(VIEWS);
  const actions = {
    d: () => page.view.draw?.(),
    s: () => page.view === page.views.explorer && !page.view.shuffler.hidden && page.view.sentence.shuffle(),
    t: switchTheme,
    "?": () => page.help.showModal(),
    "/": () => page.go("history", null, () => page.views.history.search.focus()),
  };
  names.forEach((name, i) => (actions[i + 1] = () => page.go(name)));
  const act = actions[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
}

function listenForDrops(page) {
  const curtain = document.getElementById("curtain");
  const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    curtain.hidden = Boolean(page.view.takesDrop?.(event.target));
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && (curtain.hidden = true));
  addEventListener("drop", (event) => {
    curtain.hidden = true;
    if (!hasFile(event)) return;
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (!file) return;
    if (page.view.takesDrop?.(event.target)) page.view.drop(file);
    else page.restore(file);
  });
}

async function begin() {
  document.getElementById("theme").addEventListener("click", switchTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  showTheme();
  const links = Object.keys(VIEWS).map((name) => h("a", { href: `#/${name}`, data: { view: name } }, icon(name), h("span", { text: capital(name) })));
  document.getElementById("views").append(...links);
  let info;
  try {
    info = await get("/api/info");
  } catch (error) {
    document.getElementById("main").append(h("p", { class: "error-line", role: "alert", text: capital(error.message) }));
    return;
  }
  document.getElementById("model").textContent = `${info.model} · ${info.image_size} px, ${info.grid}×${info.grid} tokens of ${info.n_codes.toLocaleString()} · dalle ${info.version}`;
  const page = new Page(info);
  document.getElementById("help").addEventListener("click", () => page.help.showModal());
  addEventListener("hashchange", () => {
    const isOther = page.route();
    const { then } = page;
    page.then = null;
    if (then) then();
    else if (isOther) document.getElementById("main").focus({ preventScroll: true });
    if (isOther) announce(page.view.title);
  });
  addEventListener("keydown", (event) => onKey(page, event));
  listenForDrops(page);
  page.route();
}

begin();
