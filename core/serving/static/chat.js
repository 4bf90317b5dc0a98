// The conversation: what was said, the answers as they are spoken, and the weights that turn while they are.

import * as api from "./api.js";
import { draw } from "./heat.js";

const at = (id) => document.getElementById(id);

function element(tag, className, text) {
  return Object.assign(document.createElement(tag), { className, textContent: text ?? "" });
}

/** A server's refusal; its problems stand line by line. */
export function refusal(error) {
  const box = element("div", "wrong");
  box.setAttribute("role", "alert");
  const [first, ...more] = error.message.split("\n");
  box.append(element("div", "", first));
  for (const line of more.filter((text) => text.trim())) box.append(element("div", "", line));
  return box;
}

/** One side of the conversation: the mix, or the base beside it. */
class Voice {
  said = []; // the messages so far

  constructor(model, mixer) {
    this.model = model; // gives the composition's text
    this.mixer = mixer;
  }

  forget() {
    this.said = [];
  }
}

class Answer {
  #text = document.createTextNode("");
  #turns = Promise.resolve();

  constructor(voice, prompt) {
    this.voice = voice;
    this.messages = [...voice.said, { role: "user", content: prompt }];
    this.model = voice.model();
    this.scene = voice.mixer.scene;
    this.stopper = new AbortController();
    this.id = null;
    this.whole = "";
    this.box = element("article", "answer speaking");
    this.title = element("div", "spec", this.model);
    this.body = element("div", "text");
    this.body.append(this.#text);
    this.foot = element("div", "foot");
    this.box.append(this.title, this.body, this.foot);
  }

  /** Speak to the end, or until stopped; a refusal is shown where the answer would stand. */
  async run() {
    const started = performance.now();
    let tokens = 0;
    let reason = null;
    try {
      const extra = this.scene ? { scene: this.scene } : {};
      const request = { model: this.model, messages: this.messages, ...this.voice.mixer.sampling, ...extra };
      for await (const event of api.speak(request, this.stopper.signal)) {
        this.id = event.id;
        this.#add(event.text);
        reason = event.reason ?? reason;
        tokens = event.usage?.completion_tokens ?? tokens;
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else this.box.append(refusal(error));
    }
    this.id = null;
    this.box.classList.remove("speaking");
    if (this.whole) {
      this.voice.said = [...this.messages, { role: "assistant", content: this.whole }];
      this.#end(tokens, reason, (performance.now() - started) / 1000);
    }
  }

  /** Go on under other weights, from the next token. Calls wait for one another, so that the last one holds. */
  turn() {
    const wanted = this.voice.model();
    if (this.id === null || wanted === this.model) return;
    this.model = wanted;
    this.#turns = this.#turns.then(async () => {
      if (this.id === null || wanted !== this.model) return; // over, or another turn has come meanwhile
      try {
        await api.turn(this.id, { model: wanted });
        this.title.textContent = `${this.title.textContent.split(" → ").at(-1)} → ${wanted}`;
        const mark = element("span", "turned");
        mark.title = `from here: ${wanted}`;
        this.#text = document.createTextNode("");
        this.body.append(mark, this.#text);
      } catch (error) {
        if (error.status !== 404) this.box.append(refusal(error)); // 404: it ended a moment before
      }
    });
  }

  #add(text) {
    const turns = at("turns");
    const follow = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
    this.whole += text;
    this.#text.appendData(text);
    if (follow) turns.scrollTop = turns.scrollHeight;
  }

  #end(tokens, reason, seconds) {
    const why = { length: "cut at the limit", stopped: "stopped" }[reason];
    const told = [tokens && `${tokens} tokens`, `${seconds.toFixed(1)} s`, why].filter(Boolean).join(", ");
    this.foot.append(element("span", "quiet", told));
    if (this.model === "base") return;
    const button = element("button", "", "Which register acted where");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => this.#heat(button));
    this.foot.append(button);
  }

  async #heat(button) {
    if (this.map) {
      this.map.hidden = !this.map.hidden;
    } else {
      button.disabled = true;
      try {
        const request = { model: this.model, messages: this.messages, answer: this.whole, scene: this.scene };
        this.map = draw(await api.acted(request));
      } catch (error) {
        this.map = refusal(error);
      }
      button.disabled = false;
      this.body.after(this.map);
    }
    this.body.hidden = !this.map.hidden && this.map.classList.contains("heat");
    button.setAttribute("aria-expanded", String(!this.map.hidden));
  }
}

export class Chat {
  #running = [];

  constructor(mixer) {
    this.mixer = mixer;
    this.mix = new Voice(() => mixer.spec, mixer);
    this.base = new Voice(() => "base", mixer);
  }

  get speaking() {
    return this.#running.length > 0;
  }

  /** The messages that a request would hold now. */
  messages(prompt) {
    return [...this.mix.said, { role: "user", content: prompt }];
  }

  async say(prompt, beside) {
    const answers = [new Answer(this.mix, prompt), ...(beside ? [new Answer(this.base, prompt)] : [])];
    const row = element("div", "answers");
    row.append(...answers.map((answer) => answer.box));
    at("turns").append(element("div", "user", prompt), row);
    row.scrollIntoView({ block: "nearest" });
    this.#running = answers;
    await Promise.all(answers.map((answer) => answer.run()));
    this.#running = [];
  }

  /** The sliders moved. */
  turn() {
    for (const answer of this.#running) answer.turn();
  }

  stop() {
    for (const answer of this.#running) answer.stopper.abort();
  }

  clear() {
    this.stop();
    this.mix.forget();
    this.base.forget();
    at("turns").replaceChildren();
  }
}
