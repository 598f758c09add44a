// Requests to the server. Paths are relative: the page works behind a proxy's prefix, too.

export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? (typeof error === "string" ? error : null) ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error.code ?? null;
    this.projection = body?.projection ?? null;
  }

  get text() {
    return typeof this.status === "number" ? `${this.status}: ${this.message}` : this.message; // a stream's has a code
  }
}

let onKeyNeeded = () => {};
export const askForKey = (ask) => { onKeyNeeded = ask; };

export const errorText = (error) => {
  if (error instanceof ApiError) return error.text;
  if (error instanceof TypeError) return "The server can't be reached.";
  return String(error?.message ?? error);
};

export async function send(method, path, body, { signal } = {}) {
  const headers = { "X-MLX-Page": "1" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method, headers, signal, credentials: "same-origin", cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.ok) return response;
  let content = null;
  try { content = await response.json(); } catch { /* no JSON: the status tells enough */ }
  if (response.status === 401 && path !== "page/session") onKeyNeeded();
  throw new ApiError(response.status, content);
}

export const get = async (path, options) => (await send("GET", path, undefined, options)).json();
export const post = async (path, body, options) => (await send("POST", path, body ?? {}, options)).json();

// Events of a stream: { data } of each event, { comment } of each comment.
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { data: data.join("\n") };
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// JSON events of a stream that is no chat: loads, pulls, benchmarks.
export async function* jsonEvents(path, body, options) {
  for await (const event of events(await send("POST", path, body, options))) {
    if (!event.data || event.data === "[DONE]") continue;
    const value = JSON.parse(event.data);
    if (value.error) throw new ApiError(value.error.code ?? "error", value);
    yield value;
  }
}

// One streamed answer. on: { wait(text), reasoning(text), content(text), call(delta) }. Gives the figures at the end.
export async function chat(body, on, signal) {
  const began = performance.now();
  const figures = { ttft: null, finish: null, usage: null, timings: null, seconds: null };
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const { data, comment } of events(await send("POST", "v1/chat/completions", request, { signal }))) {
    if (comment !== undefined) {
      const wait = waitText(comment);
      if (wait && figures.ttft === null) on.wait?.(wait);
      continue;
    }
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code ?? "error", chunk);
    if (chunk.usage) Object.assign(figures, { usage: chunk.usage, timings: chunk.timings });
    for (const choice of chunk.choices ?? []) {
      const delta = choice.delta ?? {};
      const reasoning = delta.reasoning_content ?? delta.reasoning;
      if (reasoning || delta.content || delta.tool_calls) figures.ttft ??= (performance.now() - began) / 1000;
      if (reasoning) on.reasoning?.(reasoning);
      if (delta.content) on.content?.(delta.content);
      for (const call of delta.tool_calls ?? []) on.call?.(call);
      if (choice.finish_reason) figures.finish = choice.finish_reason;
    }
  }
  if (!figures.finish && !figures.usage) throw new Error("The answer broke off: the connection was lost.");
  figures.seconds = (performance.now() - began) / 1000;
  return figures;
}

function waitText(comment) {
  const [, name, json] = /^(loading|queue|prefill) (\{.*\})$/.exec(comment) ?? [];
  if (!name) return null;
  const wait = JSON.parse(json);
  const share = wait.total ? ` ${Math.floor((100 * wait.done) / wait.total)} %` : "";
  if (name === "loading") return `The model is being loaded: ${wait.stage}${share}`;
  if (name === "queue") return wait.position ? `Waiting for a place: number ${wait.position}` : "Waiting for a place";
  return `Reading the prompt${share}`;
}

export async function render(texts) {
  return (await post("v1/render", { texts })).html;
}
