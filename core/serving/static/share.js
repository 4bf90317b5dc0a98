// The mix as a link, as a command and as a request of curl.

/** Text for a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

/** The page's address with this mix. A slider at 0 stays a slider, and they keep their order. */
export function link(mixer) {
  const terms = Object.entries(mixer.weights).map(([name, weight]) => `${name}:${weight}`);
  const parts = new URLSearchParams({ mix: terms.join(" ") || "base" });
  if (mixer.scene) parts.set("scene", mixer.scene);
  for (const [name, value] of Object.entries(mixer.sampling)) parts.set(name, value);
  return `${location.origin}${location.pathname}#${parts}`;
}

/** What a link holds: {weights, scene, sampling}, or null where it holds no mix. */
export function read(hash) {
  const parts = new URLSearchParams(hash.replace(/^#/, ""));
  if (!parts.has("mix")) return null;
  const weights = {};
  for (const term of parts.get("mix").split(/[\s+,]+/).filter((word) => word && word !== "base")) {
    const cut = term.lastIndexOf(":");
    const [name, weight] = cut < 0 ? [term, 1] : [term.slice(0, cut), Number(term.slice(cut + 1))];
    if (name && Number.isFinite(weight)) weights[name] = weight;
  }
  const sampling = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (parts.has(name)) sampling[name] = Number(parts.get(name));
  return { weights, scene: parts.get("scene"), sampling };
}

export function command(mixer, prompt, base) {
  const { temperature, top_p, max_tokens, seed } = mixer.sampling;
  const words = ["lora-rt compose", mixer.spec === "base" ? "" : mixer.spec];
  if (base) words.push("--base", quoted(base));
  if (mixer.scene) words.push("--scene", quoted(mixer.scene));
  const options = { temperature, "top-p": top_p, "max-new-tokens": max_tokens, seed };
  for (const [name, value] of Object.entries(options)) if (value !== undefined) words.push(`--${name}`, value);
  if (prompt) words.push("-p", quoted(prompt));
  return words.filter((word) => word !== "").join(" ");
}

export function curl(mixer, messages) {
  const body = { model: mixer.spec, messages, ...mixer.sampling, ...(mixer.scene && { scene: mixer.scene }) };
  const key = sessionStorage.getItem("lora-rt-key") ? ' -H "Authorization: Bearer $LORA_RT_API_KEY"' : "";
  return `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(body))}`;
}
