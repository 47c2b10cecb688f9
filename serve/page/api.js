// Talks to the server: JSON, server-sent events, the API key. Knows nothing of the page.

const KEY = "headrace-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

// The server refused a request: its message, the status, and the seconds to wait before a retry.
export class Refused extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// The connection broke, or the server cannot be reached.
export class Lost extends Error {}

function headers(more = {}) {
  const key = apiKey.get();
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

async function open(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The server cannot be reached.");
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not JSON: a reply of a proxy or of the HTTP server
  }
  throw new Refused(message, response.status, Number(response.headers.get("Retry-After")) || null);
}

export async function getJson(path, signal) {
  return (await open(path, { headers: headers(), signal })).json();
}

// Yields the chunks of a streamed chat. Throws Refused, Lost, or AbortError when `signal` stops it.
export async function* streamChat(body, signal) {
  const response = await open("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isWhole = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") {
      isWhole = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message, 200, null);
    yield chunk;
  }
  if (!isWhole) throw new Lost("The connection broke before the answer was complete.");
}

// The data lines of an event stream.
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
    }
  } catch (error) {
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    throw new Lost("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
