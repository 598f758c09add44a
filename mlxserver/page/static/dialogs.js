// A conversation as a file, and as code.

import * as store from "./conversation.js";
import { copy, download, h, openDialog } from "./dom.js";

export function exportDialog(conversation) {
  const name = (conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  openDialog("Export", h("div", { class: "stack" }, h("p", { text: "As advanced_client.py and simple_client.py read it." }), h("div", { class: "row" },
    h("button", { type: "button", text: "JSON", onclick: () => download(`${name}.json`, store.toJson(conversation), "application/json") }),
    h("button", { type: "button", text: "Markdown", onclick: () => download(`${name}.md`, store.toMarkdown(conversation), "text/markdown") }))));
}

export function codeDialog(conversation) {
  let body;
  try {
    body = conversation.body();
  } catch { body = { model: conversation.model, messages: conversation.messages() }; }
  const forms = { curl: store.asCurl, Python: store.asPython, JavaScript: store.asJavaScript };
  openDialog("This conversation as code", h("div", { class: "stack" }, Object.entries(forms).map(([name, write]) => h("details", { open: name === "curl" }, h("summary", { text: name }),
    h("div", { class: "code" }, h("pre", { tabindex: "0", "aria-label": name }, h("code", { text: write(body) })),
      h("button", { type: "button", class: "copy", text: "Copy", onclick: (event) => copy(write(body), event.currentTarget) }))))));
}
