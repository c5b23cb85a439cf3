// Elements, icons and notices. Text only ever becomes a text node: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: `class`, `text`, `data`, `on…` listeners, anything else an attribute (true: empty; null, false: none). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** As `h`, for SVG. */
export function s(tag, props = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(Boolean));
  return element;
}

const ICONS = {
  explorer: "M4 5h16M4 10h10M4 15h13M4 20h7",
  completion: "M4 4h16v16H4zM4 12h16M8 16h.01M12 16h.01M16 16h.01",
  history: "M12 7v5l3 2M4.5 12a7.5 7.5 0 1 0 2.2-5.3L4.5 8.8M4.5 4.5v4.3h4.3",
  microscope: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13zM15.2 15.2 20 20M10.5 8v5M8 10.5h5",
  training: "M4 4v16h16M7 8c1.5 6 4 8 13 8.5",
  star: "m12 4 2.4 5.2 5.6.7-4.1 3.9 1.1 5.6-5-2.8-5 2.8 1.1-5.6L4 9.9l5.6-.700z",
  download: "M12 4v11M7.5 11 12 15.5 16.5 11M5 20h14",
  again: "M19 12a7 7 0 1 1-2.1-5L19 9M19 4.500V9h-4.5",
  trash: "M5 7h14M10 7V4.500h4V7M7 7l.8 12.500h8.400L17 7M10.5 10.500v5.500M13.5 10.500v5.5",
  close: "M6 6l12 12M18 6 6 18",
  previous: "M14.5 6 8.5 12l6 6",
  next: "M9.5 6l6 6-6 6",
  shuffle: "M4 7h3.500L16 17h4M17.5 14.5 20 17l-2.5 2.500M4 17h3.500l2-2.400M14 9.400l2-2.400h4M17.5 4.5 20 7l-2.5 2.5",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6 7 7M17 17l1.4 1.400M18.4 5.6 17 7M7 17l-1.4 1.4",
  moon: "M19.5 14.500A8 8 0 0 1 9.5 4.500a8 8 0 1 0 10 10z",
  upload: "M12 16V5M7.5 9.5 12 5l4.5 4.500M5 20h14",
};

/** A line drawing beside a label, silent for screen readers. */
export function icon(name) {
  return s("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" }, s("path", { d: ICONS[name] }));
}

let lastId = 0;
export const newId = (prefix) => `${prefix}-${(lastId += 1)}`;

/** Say one line to screen readers. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Show a notice with an optional action; `onClose(acted)` is called once, when it goes. */
export function toast(text, { action = null, onClose = null, kind = "note", seconds = 7 } = {}) {
  let isOpen = true;
  const close = (acted) => {
    if (!isOpen) return;
    isOpen = false;
    clearTimeout(timer);
    element.remove();
    onClose?.(acted);
  };
  const element = h(
    "div",
    { class: `toast ${kind}`, role: kind === "error" ? "alert" : "status" },
    h("p", { text }),
    action && h("button", { type: "button", class: "link", text: action, onclick: () => close(true) }),
    h("button", { type: "button", class: "quiet", "aria-label": "Dismiss", onclick: () => close(false) }, icon("close")),
  );
  document.getElementById("toasts").append(element);
  const timer = setTimeout(() => close(false), seconds * 1000);
}

export const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Move focus by arrow keys among elements laid out in lines; one of them holds the tab stop. */
export function rove(container, selector, { columns = null } = {}) {
  const all = () => [...container.querySelectorAll(selector)];
  const hold = (items, item) => items.forEach((each) => (each.tabIndex = each === item ? 0 : -1));
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (item) hold(all(), item);
  });
  container.addEventListener("keydown", (event) => {
    const items = all();
    const at = items.indexOf(event.target.closest(selector));
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const n = columns ? columns() : perLine(items);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -n, ArrowDown: n, Home: -(at % n), End: n - 1 - (at % n) };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(items.length - 1, at + steps[event.key]));
    if (to !== at && at + steps[event.key] === to) items[to].focus();
  });
  return () => {
    const items = all();
    if (items.length && !items.some((item) => item.tabIndex === 0)) hold(items, items[0]);
  };
}

function perLine(items) {
  const top = items[0].offsetTop;
  const next = items.findIndex((item) => item.offsetTop > top + 2);
  return next < 0 ? items.length : next;
}
