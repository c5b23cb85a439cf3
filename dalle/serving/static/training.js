// Training: a run as it goes: losses, what the model makes of pictures and captions, its codebook, and what is wrong.

import { get } from "./api.js";
import { Chart } from "./chart.js";
import { h, rove } from "./dom.js";
import { capital } from "./easel.js";
import { dateOf } from "./viewer.js";

const POLL_MS = 4000;
const NOT_CURVES = new Set(["step", "seconds", "n_non_finite", "resumed", "stage", "scale", "loss_over_ln_batch"]);
const SHEETS = {
  reconstructions: "pictures above, what the dVAE makes of their tokens below",
  samples: "held-out pictures above, what their captions draw below",
  retrieval: "pictures above, those that their captions find below",
};
const NAMES = {
  loss: "loss",
  psnr: "PSNR, dB",
  codes_used: "codes used",
  n_codes: "codes",
  share_used: "share of codes used",
  pictures_per_second: "pictures per second",
  learning_rate: "learning rate",
  gradient_norm: "gradient norm",
  mse: "squared error",
  kl: "KL",
};

export class Training {
  title = "Training";

  constructor(page) {
    this.page = page;
    this.runs = h("div", { class: "picker", role: "group", "aria-label": "Runs" });
    this.restoreRuns = rove(this.runs, "button");
    this.head = h("p", { class: "run-head", "aria-live": "polite" });
    this.stages = h("div", { class: "segments", role: "group", "aria-label": "Stages" });
    this.remarks = h("ul", { class: "remarks", role: "list", "aria-label": "Remarks" });
    this.loss = new Chart("Loss");
    this.small = h("div", { class: "small-charts" });
    this.charts = new Map();
    this.codebook = h("div", { class: "codebook", hidden: true });
    this.sheet = h("img", { class: "sheet-picture", alt: "" });
    this.sheetSlider = h("input", { type: "range", min: 0, step: 1, "aria-label": "Step of the sheet", oninput: () => this.#showSheet(Number(this.sheetSlider.value)) });
    this.sheetText = h("p", { class: "soft" });
    this.sheetBox = h("section", { class: "sheet", hidden: true, "aria-label": "Sheets" }, h("h2", { class: "label", text: "What it draws" }), this.sheet, this.sheetSlider, this.sheetText);
    this.empty = h("div", { class: "lead", hidden: true }, h("p", { text: "No runs to watch." }), h("p", {}, "Start the server with ", h("code", { text: "dalle serve --runs FOLDER" }), ", the folder that holds what ", h("code", { text: "dalle train --out" }), " writes."));
    this.body = h(
      "div",
      { class: "run-body", hidden: true },
      h("div", { class: "run-line" }, this.head, this.stages),
      this.remarks,
      this.loss.element,
      h("div", { class: "two even" }, this.sheetBox, this.codebook),
      this.small,
    );
    this.element = h("section", { class: "view training", "aria-labelledby": "training-title" }, h("h1", { id: "training-title", text: "Training" }), this.empty, this.runs, this.body);
  }

  async shown(id) {
    this.isShown = true;
    this.wanted = id ?? this.wanted;
    await this.#poll();
  }

  hidden() {
    this.isShown = false;
    clearTimeout(this.timer);
  }

  async #poll() {
    clearTimeout(this.timer);
    try {
      const { runs } = await get("/api/runs");
      this.#list(runs);
      const chosen = runs.find((run) => run.id === this.wanted) ?? runs[0];
      this.empty.hidden = Boolean(chosen);
      this.body.hidden = !chosen;
      if (chosen) await this.#read(chosen);
    } catch (error) {
      this.page.fail(error);
    }
    clearTimeout(this.timer);
    if (this.isShown) this.timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  #list(runs) {
    const known = runs.map(({ id }) => id).join();
    if (known !== this.known) {
      this.known = known;
      this.runs.replaceChildren(...runs.map(({ id, name }) => h("button", { type: "button", text: name, data: { id }, onclick: () => this.page.go("training", id) })));
      this.restoreRuns();
    }
  }

  async #read(run) {
    for (const button of this.runs.children) button.setAttribute("aria-pressed", String(button.dataset.id === run.id));
    if (this.run?.id !== run.id) {
      this.rows = [];
      this.cursor = null;
      this.stage = null;
    }
    this.run = run;
    const since = this.cursor === null ? "" : `?since=${encodeURIComponent(this.cursor)}`;
    const data = await get(`/api/runs/${encodeURIComponent(run.id)}${since}`);
    if (this.run.id !== run.id) return;
    this.#take(data);
  }

  #take(data) {
    if (data.reset) this.rows = [];
    this.rows.push(...data.metrics);
    this.cursor = data.next ?? null;
    if (this.cursor === null) this.rows = data.metrics;
    this.data = data;
    const names = data.stages.map((stage) => stage.stage ?? stage).filter((name) => this.rows.some((row) => row.stage === name));
    this.stage = names.includes(this.stage) ? this.stage : names.at(-1);
    this.stages.hidden = names.length < 2;
    if (this.stages.dataset.names !== names.join()) {
      this.stages.dataset.names = names.join();
      this.stages.replaceChildren(...names.map((name) => h("button", { type: "button", text: name, data: { name }, onclick: () => this.#choose(name) })));
    }
    this.#render();
  }

  #choose(stage) {
    this.stage = stage;
    this.#render();
  }

  #render() {
    for (const button of this.stages.children) button.setAttribute("aria-pressed", String(button.dataset.name === this.stage));
    this.#tell();
    this.#remark();
    const drawn = `${this.run.id} ${this.stage} ${this.rows.length}`;
    if (this.drawn !== drawn) this.#curves(); // polled every few seconds, most often for nothing new
    this.drawn = drawn;
    this.#sheets();
    this.#codes();
  }

  #tell() {
    const rows = this.rows.filter((row) => row.stage === this.stage);
    const stage = this.data.stages.find((each) => each.stage === this.stage) ?? {};
    const last = rows.at(-1);
    const rate = rows.findLast((row) => typeof row.pictures_per_second === "number")?.pictures_per_second;
    const parts = [this.stage ?? "nothing logged yet"];
    if (last) parts.push(`update ${last.step.toLocaleString()}${stage.steps ? ` of ${stage.steps.toLocaleString()}` : ""}`);
    if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} pictures a second`);
    if (stage.status) parts.push(stage.status);
    parts.push(`last line ${dateOf(this.run.updated_at)}`);
    const text = parts.join(" · ");
    if (this.head.textContent !== text) this.head.textContent = text;
  }

  #remark() {
    const remarks = this.data.remarks;
    const text = JSON.stringify(remarks);
    if (this.remarks.dataset.text === text) return;
    this.remarks.dataset.text = text;
    this.remarks.replaceChildren(
      ...remarks.map(({ severity, text: words, stage, why }) =>
        h("li", { class: `remark ${severity}` }, h("p", {}, h("b", { text: stage ? `${stage}: ` : "" }), words), why && h("details", {}, h("summary", { text: "Why this is said" }), h("p", { text: why }))),
      ),
    );
    this.remarks.hidden = !remarks.length;
  }

  #curves() {
    const rows = this.rows.filter((row) => row.stage === this.stage);
    const names = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((name) => !NOT_CURVES.has(name) && rows.some((row) => row[name])); // a curve that is 0 throughout says nothing
    const curve = (name) => ({
      name: label(name),
      isMeasured: name.startsWith("validation_"),
      points: rows.filter((row) => typeof row[name] === "number").map((row) => [row.step, row[name]]),
    });
    const isLoss = (name) => /loss|nats/.test(name) || name === "reconstruction";
    this.loss.show(names.filter(isLoss).map(curve));
    this.loss.element.hidden = !names.some(isLoss);
    const others = names.filter((name) => !isLoss(name));
    for (const name of others) {
      if (!this.charts.has(name)) this.charts.set(name, new Chart(label(name), { height: 150 }));
    }
    const charts = others.map((name) => this.charts.get(name).element);
    if (charts.some((chart, i) => this.small.children[i] !== chart) || this.small.children.length !== charts.length) this.small.replaceChildren(...charts);
    for (const name of others) this.charts.get(name).show([curve(name)]);
  }

  #sheets() {
    this.shownSheets = this.data.sheets.filter(({ stage }) => stage === this.stage).sort((a, b) => a.step - b.step);
    const n = this.shownSheets.length;
    this.sheetBox.hidden = !n;
    if (!n) return;
    const wasLast = Number(this.sheetSlider.value) >= Number(this.sheetSlider.max) || this.sheetStage !== this.stage;
    this.sheetStage = this.stage;
    this.sheetSlider.max = n - 1;
    this.sheetSlider.hidden = n < 2;
    if (wasLast) this.sheetSlider.value = n - 1;
    this.#showSheet(Number(this.sheetSlider.value));
  }

  #showSheet(at) {
    const { url, step, kind } = this.shownSheets[at];
    if (this.sheet.getAttribute("src") !== url) this.sheet.src = url;
    const text = `${kind} after ${step.toLocaleString()} updates`;
    this.sheet.alt = text;
    this.sheetSlider.setAttribute("aria-valuetext", text);
    this.sheetText.textContent = `${capital(text)}${SHEETS[kind] ? `: ${SHEETS[kind]}` : ""}.`;
  }

  #codes() {
    const facts = Object.entries(this.data.codebook ?? {}).filter(([, value]) => typeof value === "number");
    this.codebook.hidden = !facts.length;
    this.codebook.replaceChildren(
      h("h2", { class: "label", text: "Codebook" }),
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", { text: label(name) }), h("dd", { text: value > 0 && value <= 1 ? `${(value * 100).toFixed(1)} %` : Math.round(value).toLocaleString() })))),
    );
  }
}

function label(name) {
  const bare = name.replace(/^validation_/, "");
  const words = NAMES[bare] ?? bare.replaceAll("_", " ");
  return name.startsWith("validation_") ? `${words}, held out` : words;
}
