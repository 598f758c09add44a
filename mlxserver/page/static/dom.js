// Elements. Text goes in as text; markup only through setRendered(), from the server's renderer.

const SVG = "http://www.w3.org/2000/svg";
const TAGS = new Set(("P H1 H2 H3 H4 H5 H6 UL OL LI BLOCKQUOTE PRE CODE EM STRONG S A BR HR TABLE THEAD TBODY TR TH TD " +
  "DIV SPAN").split(" "));

export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name === "value") element.value = value;
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Shows HTML of POST /v1/render. It is safe by itself; whatever is not on the list is dropped all the same.
export function setRendered(target, html) {
  const parsed = new DOMParser().parseFromString(html, "text/html");
  for (const element of [...parsed.body.querySelectorAll("*")]) {
    if (!TAGS.has(element.tagName)) {
      element.replaceWith(...element.childNodes);
      continue;
    }
    for (const { name, value } of [...element.attributes]) {
      const safe = name === "class" || name === "start" || name === "title" || name === "rel" || name === "target" ||
        (name === "href" && /^(https?:|mailto:)/i.test(value.trim()));
      if (!safe) element.removeAttribute(name);
    }
  }
  const nodes = [...parsed.body.childNodes];
  for (const node of nodes) if (node.nodeType === 1) addTools(node);
  target.replaceChildren(...nodes);
}

function addTools(node) {
  const blocks = node.matches(".code") ? [node] : node.querySelectorAll(".code");
  for (const block of blocks) {
    const code = block.querySelector("pre");
    code.tabIndex = 0;
    block.append(h("button", { class: "copy", type: "button", text: "Copy", onclick: (event) => {
      copy(code.textContent, event.currentTarget);
    } }));
  }
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "sr", value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => { button.textContent = before; }, 1500);
}

// Tells screen readers; shows nothing.
export function say(text) {
  document.getElementById("status").textContent = text;
}

// A dialog that closes by its button, Escape, and a click beside it.
export function openDialog(title, content, { onclose } = {}) {
  const dialog = h("dialog", { "aria-label": title },
    h("header", {}, h("h2", { text: title }),
      h("button", { class: "plain", type: "button", "aria-label": "Close", text: "✕", onclick: () => dialog.close() })),
    content);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => { dialog.remove(); onclose?.(); });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// Changes a text only where it differs, so that nothing is laid out again for the same.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const bytes = (n) => {
  if (n === null || n === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < 4) { n /= 1024; unit += 1; }
  return `${unit && n < 100 ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
};

export const seconds = (s) => {
  if (s === null || s === undefined) return "–";
  if (s < 1) return `${s < 0.01 ? (s * 1000).toFixed(1) : Math.round(s * 1000)} ms`;
  if (s < 90) return `${s.toFixed(s < 10 ? 2 : 1)} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} d`;
};

export const count = (n) => (n === null || n === undefined ? "–" : n.toLocaleString("en"));
export const rate = (n) => (n === null || n === undefined ? "–" : n < 100 ? n.toFixed(1) : Math.round(n).toLocaleString("en"));
