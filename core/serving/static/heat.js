// Which register acted where. A register's weight alone makes its additions larger everywhere, so a word has the colour
// of the register that adds more there, against its own mean over the answer, than the others do.

import { hue } from "./mixer.js";

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function element(tag, className, text) {
  return Object.assign(document.createElement(tag), { className, textContent: text ?? "" });
}

/** `report`: {tokens, adapters, per_token (adapters x tokens), scene_type}; gives the element that shows it. */
export function draw(report) {
  const { tokens, adapters, per_token: shares } = report;
  const box = element("div", "heat");
  const text = element("div", "text");
  const detail = element("p", "token-detail", "Each word has the colour of the register that adds more there than it does elsewhere. Point at one.");
  detail.setAttribute("aria-live", "polite");
  const means = shares.map((row) => row.reduce((sum, share) => sum + share, 0) / Math.max(1, row.length) || 1);
  const beyond = shares.map((row, k) => row.map((share) => share / means[k] - 1)); // 0.2: a fifth more than its mean
  const most = Math.max(1e-9, ...beyond.flat());
  const spans = tokens.map((token, place) => {
    const span = element("span", "token", token);
    const mine = beyond.map((row) => row[place]);
    const first = mine.indexOf(Math.max(...mine));
    span.style.setProperty("--hue", hue(adapters[first]));
    span.style.setProperty("--heat", Math.max(0, mine[first]) / most);
    return span;
  });
  let chosen = -1;
  const choose = (place) => {
    spans[chosen]?.classList.remove("chosen");
    chosen = Math.min(Math.max(place, 0), spans.length - 1);
    spans[chosen]?.classList.add("chosen");
    const each = adapters.map((name, k) => `${name} ${percent(shares[k][chosen])}`).join(", ");
    detail.textContent = spans.length ? `${JSON.stringify(tokens[chosen])}: ${each} of what the base gives` : "";
  };
  text.addEventListener("pointerover", (event) => spans.includes(event.target) && choose(spans.indexOf(event.target)));
  text.addEventListener("click", (event) => spans.includes(event.target) && choose(spans.indexOf(event.target)));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      choose(chosen + step);
    }
  });
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "The answer by register; arrow keys move from word to word");
  text.append(...spans);
  const legend = element("div", "legend");
  for (const [k, name] of adapters.entries()) {
    const entry = element("b", "", `${name} ${percent(means[k])}`);
    entry.title = "On the mean, of what the base gives";
    entry.style.setProperty("--hue", hue(name));
    legend.append(entry);
  }
  if (report.scene_type) legend.append(element("span", "quiet", `scene type: ${sceneText(report.scene_type)}`));
  box.append(text, legend, detail);
  return box;
}

function sceneText(scene) {
  if (typeof scene === "string") return scene;
  return Object.entries(scene).sort((a, b) => b[1] - a[1]).map(([kind, share]) => `${kind} ${percent(share)}`).join(", ");
}
