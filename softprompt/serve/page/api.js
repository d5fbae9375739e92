// What the page asks the server: the public API, at addresses relative to the page, so that any path in front works.

/** What the server said instead of an answer, with the HTTP status (0: none, the connection or the stream failed). */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The JSON at `path`. Throws ServerError. */
export async function get(path, key) {
  const response = await reach(path, { headers: headers(key), cache: "no-store" });
  return response.json();
}

/** The path below v1/prompts of a name, which may hold "/" and ":". */
export function promptPath(name, rest) {
  return `v1/prompts/${name.split("/").map(encodeURIComponent).join("/")}/${rest}`;
}

/**
 * One answer as it comes: `{text, finish, usage}`, each empty or null where a piece does not have it.
 *
 * `settings` go into the request as they are. Throws ServerError, and AbortError once `signal` is aborted.
 */
export async function* answer({ model, text, chat, settings, key, signal }) {
  const asked = chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const body = { model, ...asked, ...settings, stream: true, stream_options: { include_usage: true } };
  const response = await reach(chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new ServerError(piece.error.message ?? data);
    const choice = piece.choices?.[0];
    const found = chat ? choice?.delta?.content : choice?.text;
    yield { text: found ?? "", finish: choice?.finish_reason ?? null, usage: piece.usage ?? null };
  }
  throw new ServerError("The stream ended before the answer did.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server did not answer: ${error.message}.`);
  }
  if (!response.ok) throw new ServerError(await reason(response), response.status);
  return response;
}

/** The server's own words: status line, the error's message (else the whole body), and when to come back. */
async function reason(response) {
  const body = await response.text();
  const wait = response.headers.get("Retry-After");
  const status = `${response.status} ${response.statusText}`.trim();
  return `${status}: ${messageOf(body)}${wait ? ` (Retry-After: ${wait})` : ""}`;
}

function messageOf(body) {
  try {
    const message = JSON.parse(body)?.error?.message;
    return typeof message === "string" ? message : body;
  } catch {
    return body; // not JSON: a proxy in front, or a crash
  }
}

/** The data of each server-sent event; every event of this API is one line. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
