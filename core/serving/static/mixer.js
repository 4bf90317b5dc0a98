// The sliders: one per register, their composition as text, and how tokens are chosen.

const HUES = ["#7a5af5", "#d9542b", "#12855c", "#c2458f", "#2679c4", "#96700a", "#85664f", "#4f8a18"];
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const at = (id) => document.getElementById(id);
const round = (weight) => Math.round(weight * 100) / 100;

export class Mixer {
  #known = new Map(); // name -> what the server says of it
  #sliders = new Map(); // name -> its element
  #changed;

  /** `changed()` is called whenever the composition, the scene type or the sampling is another one. */
  constructor(changed) {
    this.#changed = changed;
    at("add").addEventListener("change", (event) => {
      if (event.target.value) this.show(event.target.value, 0).querySelector("[type=range]").focus();
    });
    at("silence").addEventListener("click", () => {
      for (const name of this.#sliders.keys()) this.#put(name, 0);
      this.#tell();
    });
    at("scene").addEventListener("change", () => this.#tell());
    for (const id of SAMPLING) at(id).addEventListener("change", () => this.#tell());
  }

  /** Take what the server knows, and begin with a composition: name -> weight. */
  begin(state, weights, scene) {
    for (const adapter of state.adapters) this.#known.set(adapter.name, adapter);
    at("no-adapters").hidden = this.#known.size > 0;
    for (const [name, weight] of Object.entries(weights)) this.show(name, weight);
    const kinds = state.scene_types;
    at("scene-box").hidden = kinds.length === 0;
    const first = new Option(state.classifier ? "as the prompt is recognized" : "none", "");
    at("scene").replaceChildren(first, ...kinds.map((kind) => new Option(kind, kind)));
    if (kinds.includes(scene)) at("scene").value = scene;
    this.#list();
    this.#spell();
  }

  /** A slider for a register. */
  show(name, weight) {
    if (!this.#sliders.has(name)) {
      const slider = at("slider-template").content.firstElementChild.cloneNode(true);
      const range = slider.querySelector("[type=range]");
      range.id = `weight-${this.#sliders.size}-${name}`;
      Object.assign(slider.querySelector(".name"), { textContent: name, htmlFor: range.id });
      slider.querySelector(".about").textContent = this.#known.get(name)?.about ?? "";
      slider.style.setProperty("--hue", hue(name));
      range.addEventListener("input", () => this.#set(name, range.value));
      range.addEventListener("dblclick", () => this.#set(name, 0));
      const number = slider.querySelector("[type=number]");
      number.setAttribute("aria-label", `Weight of ${name}`);
      number.addEventListener("change", () => this.#set(name, number.value));
      const off = slider.querySelector(".off");
      off.setAttribute("aria-label", `Take ${name} off the list`);
      off.addEventListener("click", () => this.#hide(name));
      at("sliders").append(slider);
      this.#sliders.set(name, slider);
      this.#list();
    }
    this.#put(name, weight);
    this.#tell();
    return this.#sliders.get(name);
  }

  /** name -> weight of every slider, 0 too. */
  get weights() {
    return Object.fromEntries([...this.#sliders].map(([name, slider]) => [name, Number(slider.querySelector("[type=number]").value)]));
  }

  /** The composition as the command line takes it; "base" where nothing has a weight. */
  get spec() {
    const terms = Object.entries(this.weights).filter(([, weight]) => weight !== 0);
    return terms.map(([name, weight]) => `${name}:${weight}`).join(" ") || "base";
  }

  get scene() {
    return at("scene").value || null;
  }

  /** What a request says of sampling; fields that are empty are left out. */
  get sampling() {
    const filled = SAMPLING.filter((id) => at(id).value !== "" && at(id).checkValidity());
    return Object.fromEntries(filled.map((id) => [id, Number(at(id).value)]));
  }

  set sampling(values) {
    for (const id of SAMPLING) if (Number.isFinite(values[id])) at(id).value = values[id];
  }

  #set(name, value) {
    this.#put(name, Number.isFinite(Number(value)) ? Number(value) : 0);
    this.#tell();
  }

  #put(name, weight) {
    const [range, number] = this.#sliders.get(name).querySelectorAll("input");
    const value = round(weight);
    range.value = value;
    number.value = value;
    range.setAttribute("aria-valuetext", String(value));
  }

  #hide(name) {
    this.#sliders.get(name).remove();
    this.#sliders.delete(name);
    this.#list();
    this.#tell();
    at("add").focus();
  }

  #list() {
    const more = [...this.#known.values()].filter((adapter) => !this.#sliders.has(adapter.name));
    const options = more.map(({ name, about }) => new Option(about ? `${name} (${about})` : name, name));
    at("add").replaceChildren(new Option(more.length ? "Add a register ..." : "All registers are shown", ""), ...options);
    at("add").disabled = more.length === 0;
  }

  #spell() {
    at("spec").textContent = this.spec;
  }

  #tell() {
    this.#spell();
    this.#changed();
  }
}

const given = new Map();

/** A register's colour: the same wherever it appears. */
export function hue(name) {
  if (!given.has(name)) given.set(name, HUES[given.size % HUES.length]);
  return given.get(name);
}
