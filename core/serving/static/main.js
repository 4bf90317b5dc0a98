// Puts the page together.

import * as api from "./api.js";
import { Chat, refusal } from "./chat.js";
import { Mixer } from "./mixer.js";
import * as share from "./share.js";

const at = (id) => document.getElementById(id);
const later = (wait, action) => {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait);
  };
};

let state = null;
let waiting = false; // what was sent before the page was ready goes out as soon as it is
const turn = later(120, () => chat.turn());
const mixer = new Mixer(() => {
  turn();
  if (state) history.replaceState(null, "", share.link(mixer));
});
const chat = new Chat(mixer);

api.onKeyWanted(
  (problem) =>
    new Promise((resolve) => {
      const dialog = at("key-dialog");
      if (problem) at("key-problem").textContent = problem;
      dialog.addEventListener("close", () => resolve(at("key").value || null), { once: true });
      dialog.showModal();
    }),
);

function says(text) {
  at("status").textContent = text;
}

async function send(event) {
  event.preventDefault();
  const prompt = at("prompt").value.trim();
  if (!prompt || chat.speaking) return;
  if (!state) {
    waiting = true;
    return says("loading");
  }
  at("prompt").value = "";
  at("stop").hidden = false;
  at("send").disabled = true;
  says("speaking");
  await chat.say(prompt, at("beside").checked);
  says("");
  at("stop").hidden = true;
  at("send").disabled = false;
  at("prompt").focus();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    says(`${what} copied`);
    at("copied").hidden = true;
  } catch {
    // A page that is not served from this machine may not write to the clipboard.
    at("copied").hidden = false;
    at("copied").value = text;
    at("copied").select();
  }
}

function lastPrompt() {
  return at("prompt").value.trim() || chat.mix.said.findLast((message) => message.role === "user")?.content || "";
}

let looking = null;
const recognize = later(350, async () => {
  const text = at("prompt").value.trim();
  if (!state?.classifier || at("scene-box").hidden) return;
  looking?.abort();
  looking = new AbortController();
  if (!text) return at("bars").replaceChildren();
  try {
    const { scene_types: shares } = await api.scenes(text, looking.signal);
    const ordered = Object.entries(shares).sort((a, b) => b[1] - a[1]);
    at("bars").replaceChildren(...ordered.map(([kind, value]) => bar(kind, value)));
  } catch (error) {
    if (error.name !== "AbortError") at("bars").replaceChildren(refusal(error));
  }
});

function bar(kind, value) {
  const row = document.createElement("div");
  row.className = "bar";
  const [name, rail, number] = ["span", "div", "span"].map((tag) => document.createElement(tag));
  const fill = document.createElement("i");
  fill.style.setProperty("--share", value);
  rail.append(fill);
  name.textContent = kind;
  number.textContent = `${Math.round(100 * value)} %`;
  row.append(name, rail, number);
  return row;
}

async function begin() {
  at("ask").addEventListener("submit", send);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  at("prompt").addEventListener("input", recognize);
  document.addEventListener("keydown", (event) => event.key === "Escape" && chat.stop());
  at("stop").addEventListener("click", () => chat.stop());
  at("clear").addEventListener("click", () => chat.clear());
  at("copy-link").addEventListener("click", () => copy(share.link(mixer), "Link"));
  at("copy-command").addEventListener("click", () => copy(share.command(mixer, lastPrompt(), state?.base_option), "Command"));
  at("copy-curl").addEventListener("click", () => copy(share.curl(mixer, chat.messages(lastPrompt() || "...")), "Request"));
  if (matchMedia("(max-width: 720px)").matches) at("mixer-fold").open = false;
  try {
    const answer = await api.state();
    at("base").textContent = `${answer.base}, ${answer.precision}`;
    at("max_tokens").max = answer.tokens;
    const linked = share.read(location.hash);
    mixer.sampling = linked?.sampling ?? {};
    mixer.begin(answer, linked?.weights ?? answer.start, linked?.scene);
    state = answer;
    at("send").disabled = false;
    if (waiting) at("ask").requestSubmit();
  } catch (error) {
    says("");
    at("turns").append(refusal(error));
  }
}

begin();
