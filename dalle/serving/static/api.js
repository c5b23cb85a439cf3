// The server's HTTP as functions: JSON, and the stream of a drawing.

/** What the server refused, in its own words; `status` 0 when it was not reached. */
export class ServerError extends Error {
  constructor(error, status) {
    super(error?.message || `the server answered ${status} and gave no reason`);
    this.param = error?.param ?? null;
    this.code = error?.code ?? null;
    this.status = status;
  }
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError({ message: "the server cannot be reached: is `dalle serve` still running?" }, 0);
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new ServerError({ message: "this server asks for its key: open its address with ?key=… once" }, 401);
  }
  const body = await response.json().catch(() => null);
  throw new ServerError(body?.error, response.status);
}

export async function get(path, signal) {
  return (await send(path, { signal })).json();
}

export async function change(method, path, body) {
  const isJson = body !== undefined && !(body instanceof Blob);
  const response = await send(path, {
    method,
    body: isJson ? JSON.stringify(body) : body,
    headers: isJson ? { "content-type": "application/json" } : undefined,
    keepalive: method === "DELETE", // sent even while the page closes
  });
  return response.status === 204 ? null : response.json().catch(() => null);
}

/** Yield `[event, data]` of a drawing as they come. */
export async function* drawEvents(body, signal) {
  const response = await send("/api/draw", {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    signal,
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError({ message: "the connection to the server was lost" }, 0);
    });
    pending += decoder.decode(value, { stream: !done });
    const blocks = pending.replaceAll("\r\n", "\n").split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event) yield event;
    }
    if (done) return;
  }
}

function parseEvent(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? [name, JSON.parse(data.join("\n"))] : null; // comments keep the connection awake
}

export function toBlob(base64, type = "image/png") {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], { type });
}

export async function toBase64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}
