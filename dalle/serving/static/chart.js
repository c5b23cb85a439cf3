// A line chart as SVG, read by pointer and by arrow keys, with its numbers as a table beneath.

import { h, s } from "./dom.js";

const HEIGHT = 240;
const MARGIN = { top: 12, right: 14, bottom: 26, left: 46 };
const COLOURS = 6; // in views.css
const TABLE_ROWS = 24; // steps that the table shows, evenly spread

/** A chart of series `{ name, points: [[step, value]…], isMeasured }`; measured points are few and get dots. */
export class Chart {
  constructor(title, { height = HEIGHT } = {}) {
    this.title = title;
    this.height = height;
    this.series = [];
    this.svg = s("svg", { class: "chart-drawing", role: "img", tabindex: "0", height });
    this.readout = h("p", { class: "chart-readout", "aria-live": "polite" });
    this.key = h("ul", { class: "chart-key" });
    this.table = h("table", { class: "chart-table" });
    this.details = h("details", { class: "chart-data", ontoggle: () => this.#fillTable() }, h("summary", { text: "As a table" }), h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": `${title}, as a table` }, this.table));
    this.element = h("figure", { class: "chart" }, h("figcaption", { text: title }), this.key, this.svg, this.readout, this.details);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#mark(null));
    this.svg.addEventListener("keydown", (event) => this.#keyed(event));
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  show(series) {
    this.series = series.filter(({ points }) => points.length);
    this.steps = [...new Set(this.series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    this.key.replaceChildren(...this.series.map(({ name }, i) => h("li", { class: `line-${i % COLOURS}` }, h("span", { class: "key-line", "aria-hidden": "true" }), name)));
    this.key.hidden = this.series.length < 2;
    this.svg.setAttribute("aria-label", `${this.title}: ${this.series.map((each) => summary(each)).join("; ")}. Arrow keys read it step by step.`);
    this.#draw();
    this.#fillTable();
  }

  #draw() {
    const width = this.element.clientWidth;
    if (!width || !this.steps?.length) return;
    const values = this.series.flatMap(({ points }) => points.map(([, value]) => value));
    const ys = ticks(Math.min(...values), Math.max(...values), this.height < 180 ? 3 : 5);
    const [y0, y1] = [Math.min(ys[0], ...values), Math.max(ys.at(-1), ...values)];
    const [x0, x1] = [this.steps[0], this.steps.at(-1)];
    const inner = [width - MARGIN.left - MARGIN.right, this.height - MARGIN.top - MARGIN.bottom];
    this.x = (step) => MARGIN.left + (x1 === x0 ? 0.5 : (step - x0) / (x1 - x0)) * inner[0];
    this.y = (value) => MARGIN.top + (1 - (y1 === y0 ? 0.5 : (value - y0) / (y1 - y0))) * inner[1];
    const bottom = this.height - MARGIN.bottom;
    const rules = ys.map((value) => [
      s("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.y(value), y2: this.y(value) }),
      s("text", { class: "tick", x: MARGIN.left - 8, y: this.y(value) + 4, "text-anchor": "end", text: short(value) }),
    ]);
    const xs = ticks(x0, x1, Math.max(2, Math.floor(inner[0] / 75))).filter((step) => step >= x0 && step <= x1);
    const steps = xs.map((step) => s("text", { class: "tick", x: this.x(step), y: bottom + 18, "text-anchor": "middle", text: step.toLocaleString() }));
    const lines = this.series.map((each, i) => this.#line(each, i));
    this.cursor = s("line", { class: "cursor", y1: MARGIN.top, y2: bottom, visibility: "hidden" });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("width", width);
    this.svg.replaceChildren(...rules.flat(), ...steps, ...lines.flat(), this.cursor);
  }

  #line({ points, isMeasured }, i) {
    const path = points.map(([step, value], at) => `${at ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`).join("");
    const dots = isMeasured ? points.map(([step, value]) => s("circle", { class: `dot line-${i % COLOURS}`, cx: this.x(step), cy: this.y(value), r: 3 })) : [];
    return [s("path", { class: `curve line-${i % COLOURS}`, d: path }), ...dots];
  }

  #point(event) {
    if (!this.x) return;
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    this.#mark(this.steps.reduce((best, step) => (Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x) ? step : best), this.steps[0]));
  }

  #keyed(event) {
    const at = this.marked === null || this.marked === undefined ? -1 : this.steps.indexOf(this.marked);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: this.steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#mark(this.steps[Math.max(0, Math.min(this.steps.length - 1, to))]);
  }

  #mark(step) {
    this.marked = step;
    this.cursor?.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null) {
      this.readout.textContent = "";
      return;
    }
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(step));
    const parts = this.series.map(({ name, points }) => [name, points.find(([at]) => at === step)?.[1]]).filter(([, value]) => value !== undefined);
    this.readout.textContent = `Step ${step.toLocaleString()}: ${parts.map(([name, value]) => `${name} ${exact(value)}`).join(" · ")}`;
  }

  #fillTable() {
    if (!this.details.open) return;
    const every = Math.max(1, Math.ceil(this.steps.length / TABLE_ROWS));
    const measured = new Set(this.series.filter((each) => each.isMeasured).flatMap(({ points }) => points.map(([step]) => step)));
    const steps = this.steps.filter((step, i) => i % every === 0 || i === this.steps.length - 1 || (measured.size <= TABLE_ROWS && measured.has(step)));
    const maps = this.series.map(({ points }) => new Map(points));
    const head = h("tr", {}, h("th", { scope: "col", text: "Step" }), ...this.series.map(({ name }) => h("th", { scope: "col", text: name })));
    const row = (step) => h("tr", {}, h("th", { scope: "row", text: step.toLocaleString() }), ...maps.map((map) => h("td", { text: map.has(step) ? exact(map.get(step)) : "" })));
    this.table.replaceChildren(h("thead", {}, head), h("tbody", {}, steps.map(row)));
  }
}

function summary({ name, points }) {
  return `${name} from ${exact(points[0][1])} at step ${points[0][0]} to ${exact(points.at(-1)[1])} at step ${points.at(-1)[0]}`;
}

/** Round values that span a range. */
function ticks(low, high, n) {
  if (low === high) return [low];
  const rough = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((each) => each >= rough);
  const first = Math.floor(low / step) * step;
  return Array.from({ length: Math.round((Math.ceil(high / step) * step - first) / step) + 1 }, (_, i) => Number((first + i * step).toPrecision(12)));
}

const exact = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString() : Number(value.toPrecision(4)).toString());
const short = (value) => (Math.abs(value) >= 10000 ? `${value / 1000}k` : Math.abs(value) > 0 && Math.abs(value) < 0.001 ? value.toExponential(0) : String(value));
