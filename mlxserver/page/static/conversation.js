// Conversations: a tree of messages each, kept in this browser. An edit or a retry is a branch beside the one before.

export const INDEX = "mlx.chats";
export const keyOf = (id) => `mlx.chat.${id}`;
const ROLES = ["system", "developer", "user", "assistant", "tool"];
const HEADING = /^## (system|developer|user|assistant|tool)$/m;

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

export class Conversation {
  #children = null; // by parent, until a message is added

  constructor(data = {}) {
    this.id = data.id ?? newId();
    this.title = data.title ?? "";
    this.model = data.model ?? null;
    this.system = data.system ?? "";
    this.params = data.params ?? {};
    this.tools = data.tools ?? "";
    this.nodes = data.nodes ?? {};
    this.leaf = data.leaf ?? null;
    this.at = data.at ?? Date.now();
  }

  // The messages from the first to the one in sight.
  get path() {
    const found = [];
    for (let node = this.nodes[this.leaf]; node; node = this.nodes[node.parent]) found.push(node);
    return found.reverse();
  }

  // Adds a message behind another one, and shows it.
  add(parent, message) {
    const node = { id: newId(), parent, at: Date.now(), ...message };
    this.nodes[node.id] = node;
    this.#children = null;
    this.leaf = node.id;
    this.at = Date.now();
    if (!this.title && message.role === "user") this.title = textOf(message).slice(0, 60) || "Image";
    return node;
  }

  #childrenOf(id) {
    if (!this.#children) {
      this.#children = new Map();
      for (const node of Object.values(this.nodes)) {
        if (this.#children.has(node.parent)) this.#children.get(node.parent).push(node);
        else this.#children.set(node.parent, [node]);
      }
    }
    return this.#children.get(id) ?? [];
  }

  siblings(node) {
    return this.#childrenOf(node.parent).filter((each) => each.role === node.role);
  }

  // Shows a message, with what followed it last.
  select(node) {
    let leaf = node;
    for (;;) {
      const next = this.#childrenOf(leaf.id).at(-1);
      if (!next) break;
      leaf = next;
    }
    this.leaf = leaf.id;
  }

  // Takes over what another window has written of it, but for one message that grows here. Gives the ids of what changed.
  merge(other, own) {
    const { title, model, system, params, tools } = other;
    Object.assign(this, { title, model, system, params, tools });
    const changed = Object.values(other.nodes).filter((node) => node.id !== own && JSON.stringify(node) !== JSON.stringify(this.nodes[node.id]));
    for (const node of changed) this.nodes[node.id] = node;
    this.#children = null;
    return changed.map((node) => node.id);
  }

  // A conversation of its own, up to a message.
  branch(node) {
    const copy = new Conversation({ title: this.title, model: this.model, system: this.system, params: { ...this.params }, tools: this.tools });
    const before = this.leaf;
    this.leaf = node.id;
    for (const { id, parent, ...message } of this.path) copy.add(copy.leaf, message);
    this.leaf = before;
    return copy;
  }

  // As a request has them.
  messages(leaf = this.leaf) {
    const before = this.leaf;
    this.leaf = leaf;
    const path = this.path;
    this.leaf = before;
    const system = this.system ? [{ role: "system", content: this.system }] : [];
    return [...system, ...path.map(wireMessage)];
  }

  body() {
    const body = { model: this.model, messages: this.messages(), ...this.params };
    if (this.tools.trim()) body.tools = JSON.parse(this.tools);
    return body;
  }
}

export function wireMessage(node) {
  const message = { role: node.role, content: node.content ?? "" };
  if (node.images?.length) {
    message.content = [...node.images.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: node.content ?? "" }];
  }
  if (node.reasoning) message.reasoning_content = node.reasoning;
  if (node.calls?.length) {
    message.tool_calls = node.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    if (!node.content) message.content = null;
  }
  if (node.call) message.tool_call_id = node.call;
  return message;
}

export const textOf = (message) => (typeof message.content === "string" ? message.content
  : (message.content ?? []).map((part) => part.text ?? "").join(""));

// -- storage ----------------------------------------------------------------------------------------------------------

export function list() {
  try {
    return JSON.parse(localStorage.getItem(INDEX)) ?? [];
  } catch { return []; }
}

export function load(id) {
  try {
    const text = localStorage.getItem(keyOf(id));
    return text ? new Conversation(JSON.parse(text)) : null;
  } catch { return null; }
}

// Whether there was room for it.
export function save(conversation) {
  const { id, title, at } = conversation;
  try {
    localStorage.setItem(keyOf(id), JSON.stringify(conversation));
    localStorage.setItem(INDEX, JSON.stringify([{ id, title, at }, ...list().filter((each) => each.id !== id)]));
    return true;
  } catch { return false; }
}

export function forget(id) {
  localStorage.removeItem(keyOf(id));
  localStorage.setItem(INDEX, JSON.stringify(list().filter((each) => each.id !== id)));
}

// -- files, as the command lines write and read them ----------------------------------------------------------------------

export const toJson = (conversation) => `${JSON.stringify({ messages: conversation.messages() }, null, 2)}\n`;

export const toMarkdown = (conversation) => conversation.messages().map((message) => {
  const text = textOf(message).replace(/^(?=\\*## (?:system|developer|user|assistant|tool)$)/gm, "\\");
  return `## ${message.role}\n\n${text}\n\n`;
}).join("");

export function fromFile(name, text) {
  return fromMessages(/\.json$/i.test(name) ? readJson(text) : readMarkdown(text), name.replace(/\.\w+$/, ""));
}

function readJson(text) {
  const value = JSON.parse(text);
  const messages = Array.isArray(value) ? value : value?.messages;
  const isRight = Array.isArray(messages) && messages.every((each) => ROLES.includes(each?.role) && "content" in each);
  if (!isRight) throw new Error('Expected {"messages": [...]}, each message with a "role" and a "content".');
  return messages;
}

function readMarkdown(text) {
  const [before, ...parts] = text.split(HEADING);
  if (before.trim() || !parts.length) throw new Error('Expected sections that begin with a line such as "## user".');
  const messages = [];
  for (let n = 0; n < parts.length; n += 2) {
    const content = parts[n + 1].replace(/^\n{1,2}/, "").replace(/\n{1,2}$/, "");
    messages.push({ role: parts[n], content: content.replace(/^\\(?=\\*## (?:system|developer|user|assistant|tool)$)/gm, "") });
  }
  return messages;
}

function fromMessages(messages, title) {
  const conversation = new Conversation({ title });
  for (const message of messages) {
    if (["system", "developer"].includes(message.role) && conversation.leaf === null) {
      conversation.system = [conversation.system, textOf(message)].filter(Boolean).join("\n\n");
      continue;
    }
    const images = Array.isArray(message.content) ? message.content.map((part) => part.image_url?.url).filter(Boolean) : [];
    const calls = (message.tool_calls ?? []).map((call) => ({ id: call.id, name: call.function?.name, arguments: call.function?.arguments }));
    conversation.add(conversation.leaf, {
      role: message.role, content: textOf(message), reasoning: message.reasoning_content ?? "", call: message.tool_call_id,
      ...(images.length ? { images } : {}), ...(calls.length ? { calls } : {}),
    });
  }
  return conversation;
}

// -- code -------------------------------------------------------------------------------------------------------------

export function asCurl(body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${new URL("v1/chat/completions", location.href.split("#")[0])} \\\n  -H "Content-Type: application/json" \\\n` +
    `  -H "Authorization: Bearer $OPENAI_API_KEY" \\\n  -d '${json}'\n`;
}

export function asPython(body) {
  const known = ["model", "messages", "temperature", "top_p", "max_tokens", "seed", "stop", "tools", "frequency_penalty", "presence_penalty"];
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !known.includes(name)));
  const lines = Object.entries(body).filter(([name]) => known.includes(name)).map(([name, value]) => `    ${name}=${python(value, 4)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra, 4)},`);
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${new URL("v1", location.href.split("#")[0])}", api_key="none")\n` +
    `stream = client.chat.completions.create(\n${lines.join("\n")}\n    stream=True,\n)\nfor chunk in stream:\n` +
    `    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)\n`;
}

export function asJavaScript(body) {
  const json = JSON.stringify({ ...body, stream: true }, null, 2);
  return `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${new URL("v1", location.href.split("#")[0])}", apiKey: "none" });\n` +
    `const stream = await client.chat.completions.create(${json});\nfor await (const chunk of stream) {\n` +
    `  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n}\n`;
}

function python(value, indent) {
  const pad = " ".repeat(indent + 4);
  const end = " ".repeat(indent);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return value.length ? `[\n${value.map((each) => `${pad}${python(each, indent + 4)},`).join("\n")}\n${end}]` : "[]";
  if (typeof value === "object") {
    return `{\n${Object.entries(value).map(([name, each]) => `${pad}${JSON.stringify(name)}: ${python(each, indent + 4)},`).join("\n")}\n${end}}`;
  }
  return JSON.stringify(value);
}
