// One scale of colours for amounts, told apart by people who do not see red and green: cividis, after Nuñez et al. 2018.

import { h } from "./dom.js";

// Nine samples of cividis, dark blue to yellow, lightness rising evenly.
const CIVIDIS = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 121], [165, 156, 116], [195, 180, 105], [254, 232, 56],
];

/** The colour of an amount 0..1. */
export function ramp(amount) {
  const at = Math.max(0, Math.min(1, amount)) * (CIVIDIS.length - 1);
  const low = Math.min(CIVIDIS.length - 2, Math.floor(at));
  const part = at - low;
  const mixed = CIVIDIS[low].map((channel, i) => Math.round(channel + (CIVIDIS[low + 1][i] - channel) * part));
  return `rgb(${mixed.join(" ")})`;
}

/** What the ends of the scale mean. */
export function rampLegend(low, high) {
  const bar = h("span", { class: "legend-bar", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${CIVIDIS.map((colour) => `rgb(${colour.join(" ")})`).join(", ")})`;
  return h("div", { class: "legend-scale" }, h("span", { text: low }), bar, h("span", { text: high }));
}
