// What the page asks the server. Every refusal is a `Refusal` with the server's own words.

const KEY = "lora-rt-key";
let askForKey = async () => null;

export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered with ${status}`);
    this.status = status;
  }
}

/** `ask(problem)` is called when the server wants a key; it gives one, or null. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

async function send(method, path, body, signal) {
  for (let tries = 0; ; tries++) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
    let answer;
    try {
      answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(0, { message: "The server does not answer. Is it still running?" });
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => null);
    if (answer.status === 401) {
      const given = await askForKey(key && tries ? told?.error?.message : "");
      if (given) {
        sessionStorage.setItem(KEY, given);
        continue;
      }
    }
    throw new Refusal(answer.status, told?.error);
  }
}

const json = async (...request) => (await send(...request)).json();

export const state = () => json("GET", "ui/state");
export const scenes = (text, signal) => json("POST", "ui/scenes", { text }, signal);
export const acted = (request) => json("POST", "ui/acted", request);
export const turn = (id, request) => json("PATCH", `v1/responses-in-flight/${encodeURIComponent(id)}`, request);

/** The events of a chat answer as they come: `{id, text}`, and at the end `{id, reason, usage}`. */
export async function* speak(request, signal) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const answer = await send("POST", "v1/chat/completions", body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value.replaceAll("\r\n", "\n")).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (!data || data === "[DONE]") continue;
        const part = JSON.parse(data);
        if (part.error) throw new Refusal(200, part.error);
        const choice = part.choices?.[0];
        yield { id: part.id, text: choice?.delta?.content ?? "", reason: choice?.finish_reason ?? null, usage: part.usage ?? null };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
