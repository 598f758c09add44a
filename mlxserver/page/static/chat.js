// Conversations with one model.

import { chat, errorText } from "./api.js";
import { Answer, figureLine, showRendered } from "./answer.js";
import * as store from "./conversation.js";
import { copy, download, h, openDialog, say } from "./dom.js";
import { isTalker, live, watch } from "./live.js";

const PARAMS = [
  ["temperature", "0 to 2; 0 is greedy", 0.1], ["top_p", "above 0, up to 1", 0.05], ["top_k", "0: off", 1],
  ["max_tokens", "of the answer", 1], ["frequency_penalty", "-2 to 2", 0.1], ["seed", "for the same draws", 1],
];
const EFFORTS = ["", "none", "low", "medium", "high"];
const MAX_SIDE = 1568; // pixels; larger images are scaled down before they are sent

export function show(root, { signal, rest }) {
  let conversation;
  let running = null; // AbortController of the answer that streams
  let images = [];
  const answers = new Map(); // by node

  const names = h("ul", { class: "names" });
  const side = h("aside", { class: "side", "aria-label": "Conversations" },
    h("button", { type: "button", class: "primary", text: "New conversation", onclick: () => begin() }), names,
    h("div", { class: "row" },
      h("button", { type: "button", text: "Import", onclick: () => file.click() }),
      h("button", { type: "button", text: "Export", onclick: exportDialog })));
  const file = h("input", { type: "file", accept: ".json,.md", hidden: true, "aria-label": "File of a conversation", onchange: importFile });
  const model = h("select", { "aria-label": "Model", onchange: () => { conversation.model = model.value; keep(); } });
  const settings = settingsPanel();
  const log = h("div", { class: "log", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const scroller = h("div", { class: "scroller", tabindex: "-1" }, log);
  const thumbs = h("div", { class: "thumbs" });
  const input = h("textarea", { id: "ask", rows: "1", placeholder: "Ask something", "aria-label": "Message", onkeydown: onKey, oninput: grow, onpaste: (event) => takeImages(event.clipboardData, event) });
  const picker = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, "aria-label": "Image", onchange: () => { takeFiles(picker.files); picker.value = ""; } });
  const sendButton = h("button", { class: "primary", text: "Send" });
  const stopButton = h("button", { type: "button", class: "stop", text: "Stop", hidden: true, onclick: stop });
  const composer = h("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); ask(); } }, thumbs, input,
    h("div", { class: "row" }, h("button", { type: "button", class: "plain", text: "+ Image", onclick: () => picker.click() }), picker,
      h("span", { class: "hint", text: "Enter sends, Shift+Enter breaks the line, Esc stops" }), stopButton, sendButton));
  const sideButton = h("button", { type: "button", class: "only-narrow", text: "Conversations", "aria-expanded": "false", onclick: () => {
    const open = side.classList.toggle("open");
    sideButton.setAttribute("aria-expanded", String(open));
  } });
  const pane = h("section", { class: "pane", "aria-label": "Chat" },
    h("div", { class: "bar-top" }, sideButton, model, settings.button,
      h("button", { type: "button", text: "Code", onclick: codeDialog })),
    settings.panel, scroller, composer);
  root.append(h("h1", { class: "sr", text: "Chat" }), side, pane, file);

  // -- conversations --------------------------------------------------------------------------------------------------

  function begin(key) {
    stop();
    open(new store.Conversation({ model: key ?? conversation?.model ?? preferredModel(), params: conversation ? { ...conversation.params } : {} }));
    input.focus();
  }

  function open(next) {
    stop();
    conversation = next;
    settings.fill();
    listModels();
    listNames();
    draw();
    side.classList.remove("open");
    sideButton.setAttribute("aria-expanded", "false");
  }

  function keep() {
    if (!Object.keys(conversation.nodes).length) return;
    if (!store.save(conversation)) notify("This browser's storage is full: the conversation is not kept. Export it, or remove others.");
    listNames();
  }

  function notify(text) {
    log.append(h("p", { class: "fault", role: "alert", text }));
  }

  function listNames() {
    names.replaceChildren(...store.list().map(({ id, title }) => h("li", {},
      h("button", { type: "button", class: "name", "aria-current": id === conversation.id ? "true" : null, text: title || "Untitled", title, onclick: () => {
        const found = store.load(id);
        if (found) open(found);
      } }),
      h("button", { type: "button", class: "plain", text: "✕", "aria-label": `Remove ${title}`, onclick: () => {
        store.forget(id);
        if (id === conversation.id) begin();
        else listNames();
      } }))));
  }

  function preferredModel() {
    const talkers = [...live.models.values()].filter(isTalker);
    return (talkers.find((each) => each.status.value === "loaded") ?? talkers[0])?.id ?? null;
  }

  let shownModels = "";
  function listModels() {
    if (!conversation) return;
    conversation.model ??= preferredModel();
    const found = [...live.models.values()].filter(isTalker).map((each) => [each.id, each.status.value]);
    if (conversation.model && !found.some(([id]) => id === conversation.model)) found.push([conversation.model, "not registered"]);
    const now = JSON.stringify([found, conversation.model]);
    if (now === shownModels) return;
    shownModels = now;
    model.replaceChildren(...found.map(([id, state]) => h("option", { value: id, text: state === "loaded" ? id : `${id} (${state === "unloaded" ? "loaded on demand" : state})` })));
    model.value = conversation.model ?? "";
  }

  // -- messages -------------------------------------------------------------------------------------------------------

  async function draw() {
    answers.clear();
    const path = conversation.path;
    log.replaceChildren(...path.map(turn));
    if (!path.length) log.append(h("p", { class: "empty", text: "Conversations stay in this browser. Drop an image anywhere to ask about it." }));
    toEnd(true);
    const restored = [...answers.values()];
    await showRendered(restored, () => restored.at(-1).element.isConnected, () => toEnd(false));
  }

  function turn(node) {
    const element = h("article", { class: `turn ${node.role}`, "aria-label": node.role === "user" ? "You" : node.role === "tool" ? "Result" : node.model ?? "Answer" });
    const head = h("header", {}, h("span", { class: "who", text: node.role === "user" ? "You" : node.role === "tool" ? "Result of a call" : node.model ?? "Answer" }), branches(node));
    const actions = h("div", { class: "actions" });
    let body;
    if (node.role === "assistant") {
      const answer = new Answer().restore(node);
      answers.set(node.id, answer);
      body = answer.element;
      actions.append(action("Retry", () => retry(node)), action("Branch", () => { open(conversation.branch(node)); keep(); }),
        action("Copy", (event) => copy(node.content ?? "", event.currentTarget)));
      if (node.calls?.length) body.append(...node.calls.map((call) => resultForm(node, call)));
    } else {
      body = h("div", { class: "text plain-text", text: node.content });
      if (node.images) body.prepend(...node.images.map((url, n) => h("img", { src: url, alt: `Image ${n + 1}`, class: "sent" })));
      actions.append(action("Edit", () => edit(node, element)), action("Copy", (event) => copy(node.content ?? "", event.currentTarget)));
    }
    element.append(head, body, actions);
    return element;
  }

  const action = (text, onclick) => h("button", { type: "button", class: "plain", text, onclick });

  function branches(node) {
    const all = conversation.siblings(node);
    if (all.length < 2) return null;
    const at = all.findIndex((each) => each.id === node.id);
    const go = (step) => () => { conversation.select(all[(at + step + all.length) % all.length]); keep(); draw(); };
    return h("span", { class: "branches" }, h("button", { type: "button", class: "plain", "aria-label": "Branch before", text: "‹", onclick: go(-1) }),
      h("span", { text: `${at + 1}/${all.length}` }), h("button", { type: "button", class: "plain", "aria-label": "Branch after", text: "›", onclick: go(1) }));
  }

  function resultForm(node, call) {
    if (Object.values(conversation.nodes).some((each) => each.call === call.id && each.parent === node.id)) return null;
    const field = h("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder: `Result of ${call.name}` });
    return h("form", { class: "row result", onsubmit: (event) => {
      event.preventDefault();
      const parent = conversation.leaf === node.id ? node.id : conversation.leaf;
      conversation.add(parent, { role: "tool", content: field.value, call: call.id });
      const given = Object.values(conversation.nodes).filter((each) => each.role === "tool").map((each) => each.call);
      draw();
      if (node.calls.every((each) => given.includes(each.id))) generate();
    } }, field, h("button", { text: "Give" }));
  }

  function edit(node, element) {
    const field = h("textarea", { value: node.content, "aria-label": "Edit the message", rows: String(Math.min(12, node.content.split("\n").length + 1)) });
    const form = h("form", { class: "stack", onsubmit: (event) => {
      event.preventDefault();
      conversation.add(node.parent, { role: node.role, content: field.value, images: node.images, call: node.call });
      draw();
      generate();
    } }, field, h("div", { class: "row" }, h("button", { class: "primary", text: "Send" }), h("button", { type: "button", text: "Cancel", onclick: () => draw() })));
    element.replaceChildren(form);
    field.focus();
  }

  function retry(node) {
    conversation.leaf = node.parent;
    draw();
    generate();
  }

  function ask() {
    const content = input.value.trim();
    if (running || (!content && !images.length)) return;
    conversation.add(conversation.leaf, { role: "user", content, ...(images.length ? { images } : {}) });
    images = [];
    drawThumbs();
    input.value = "";
    grow();
    log.querySelector(".empty")?.remove();
    log.append(turn(conversation.nodes[conversation.leaf]));
    generate();
  }

  async function generate() {
    stop();
    let body;
    try {
      body = conversation.body();
    } catch (error) {
      notify(`The tools are no JSON: ${error.message}`);
      return;
    }
    const talk = conversation;
    const parent = talk.leaf;
    const controller = running = new AbortController();
    const node = talk.add(parent, { role: "assistant", content: "", model: talk.model });
    const element = turn(node);
    const answer = answers.get(node.id);
    const actions = element.querySelector(".actions");
    actions.hidden = true;
    element.setAttribute("aria-busy", "true");
    log.append(element);
    answer.onappend = () => toEnd(false);
    answer.on.wait("Waiting for the model");
    toEnd(true);
    setBusy(true);
    const saving = setInterval(() => { note(); store.save(talk); }, 10_000);
    const note = () => Object.assign(node, { content: answer.content, reasoning: answer.reasoning, calls: answer.toolCalls.filter(Boolean) });
    const began = performance.now();
    let figures = null;
    let fault = null;
    try {
      figures = await chat(body, answer.on, controller.signal);
    } catch (error) {
      if (controller.signal.aborted) figures = { stopped: true, seconds: (performance.now() - began) / 1000 };
      else fault = error;
    }
    clearInterval(saving);
    note();
    node.figures = figures ? figureLine(figures) : "";
    if (fault) node.error = errorText(fault);
    const isSeen = conversation === talk && element.isConnected;
    if (running === controller) { running = null; setBusy(false); }
    await answer.finish(figures, fault);
    element.removeAttribute("aria-busy");
    actions.hidden = false;
    if (node.calls.length && isSeen) answer.element.append(...node.calls.map((call) => resultForm(node, call)).filter(Boolean));
    say(fault ? node.error : figures.stopped ? "The answer was stopped" : `The answer is complete: ${node.figures}`);
    if (isSeen) { keep(); toEnd(false); element.querySelector("header").replaceChildren(...[element.querySelector(".who"), branches(node)].filter(Boolean)); }
    else store.save(talk);
  }

  function stop() {
    running?.abort();
    running = null;
    setBusy(false);
  }

  function setBusy(isBusy) {
    stopButton.hidden = !isBusy;
    sendButton.hidden = isBusy;
  }

  // Follows the end, whatever grows, shrinks or is laid out later, until the reader scrolls up.
  let follows = true;
  let top = 0;
  scroller.addEventListener("scroll", () => {
    const before = top;
    top = scroller.scrollTop;
    const left = scroller.scrollHeight - top - scroller.clientHeight;
    if (top < before && left > 4) follows = false;
    else if (left < 80) follows = true;
  });
  function toEnd(always) {
    if (always) follows = true;
    if (!follows) return;
    scroller.scrollTop = scroller.scrollHeight;
    top = scroller.scrollTop;
  }
  const sizes = new ResizeObserver(() => requestAnimationFrame(() => toEnd(false)));
  for (const each of [scroller, log]) sizes.observe(each);

  // -- input ----------------------------------------------------------------------------------------------------------

  function onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  }
  function grow() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight + 2, 240)}px`;
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop(); }, { signal });

  pane.addEventListener("dragover", (event) => { event.preventDefault(); pane.classList.add("dropping"); });
  pane.addEventListener("dragleave", () => pane.classList.remove("dropping"));
  pane.addEventListener("drop", (event) => { pane.classList.remove("dropping"); takeImages(event.dataTransfer, event); });

  function takeImages(transfer, event) {
    const files = [...(transfer?.files ?? [])].filter((each) => each.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    takeFiles(files);
  }
  async function takeFiles(files) {
    for (const each of files) {
      try {
        images.push(await dataUrl(each));
      } catch {
        notify(`${each.name} is no image that this browser can read.`);
      }
    }
    drawThumbs();
  }
  function drawThumbs() {
    thumbs.replaceChildren(...images.map((url, n) => h("button", { type: "button", class: "thumb", "aria-label": `Remove image ${n + 1}`, onclick: () => {
      images.splice(n, 1);
      drawThumbs();
    } }, h("img", { src: url, alt: "" }))));
  }

  // -- settings, files, code ------------------------------------------------------------------------------------------

  function settingsPanel() {
    const system = h("textarea", { id: "system", rows: "3", onchange: () => { conversation.system = system.value; keep(); } });
    const tools = h("textarea", { id: "tools", rows: "3", spellcheck: "false", placeholder: '[{"type": "function", "function": {"name": …}}]', onchange: () => { conversation.tools = tools.value; keep(); } });
    const fields = PARAMS.map(([name, hint, step]) => [name, h("input", { id: `p-${name}`, type: "number", step: String(step), placeholder: "default", title: hint, onchange: (event) => setParam(name, event.target.value === "" ? undefined : Number(event.target.value)) })]);
    const effort = h("select", { id: "p-effort", onchange: () => setParam("reasoning_effort", effort.value || undefined) },
      EFFORTS.map((each) => h("option", { value: each, text: each || "default" })));
    const setParam = (name, value) => {
      if (value === undefined) delete conversation.params[name];
      else conversation.params[name] = value;
      keep();
    };
    const panel = h("div", { class: "settings", id: "settings", hidden: true },
      h("label", { for: "system", text: "System prompt" }), system,
      h("div", { class: "grid" }, fields.map(([name, field]) => h("div", {}, h("label", { for: field.id, text: name.replaceAll("_", " ") }), field)),
        h("div", {}, h("label", { for: "p-effort", text: "thinking effort" }), effort)),
      h("details", {}, h("summary", { text: "Tools" }), h("label", { for: "tools", text: "Functions that the model may call, as JSON" }), tools));
    const button = h("button", { type: "button", text: "Settings", "aria-expanded": "false", "aria-controls": "settings", onclick: () => {
      panel.hidden = !panel.hidden;
      button.setAttribute("aria-expanded", String(!panel.hidden));
    } });
    return { panel, button, fill() {
      system.value = conversation.system;
      tools.value = conversation.tools;
      for (const [name, field] of fields) field.value = conversation.params[name] ?? "";
      effort.value = conversation.params.reasoning_effort ?? "";
    } };
  }

  async function importFile() {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      const found = store.fromFile(chosen.name, await chosen.text());
      found.model = conversation.model;
      open(found);
      keep();
    } catch (error) {
      notify(`${chosen.name}: ${error.message}`);
    }
  }

  function exportDialog() {
    const name = (conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
    openDialog("Export", h("div", { class: "stack" }, h("p", { text: "As advanced_client.py and simple_client.py read it." }), h("div", { class: "row" },
      h("button", { type: "button", text: "JSON", onclick: () => download(`${name}.json`, store.toJson(conversation), "application/json") }),
      h("button", { type: "button", text: "Markdown", onclick: () => download(`${name}.md`, store.toMarkdown(conversation), "text/markdown") }))));
  }

  function codeDialog() {
    let body;
    try {
      body = conversation.body();
    } catch { body = { model: conversation.model, messages: conversation.messages() }; }
    const forms = { curl: store.asCurl, Python: store.asPython, JavaScript: store.asJavaScript };
    openDialog("This conversation as code", h("div", { class: "stack" }, Object.entries(forms).map(([name, write]) => h("details", { open: name === "curl" }, h("summary", { text: name }),
      h("div", { class: "code" }, h("pre", { tabindex: "0", "aria-label": name }, h("code", { text: write(body) })),
        h("button", { type: "button", class: "copy", text: "Copy", onclick: (event) => copy(write(body), event.currentTarget) }))))));
  }

  signal.addEventListener("abort", () => { stop(); sizes.disconnect(); });
  watch(listModels, signal);
  const [word, key] = rest;
  const last = store.list()[0];
  if (word === "new") {
    history.replaceState(null, "", "#/chat");
    begin(key);
  } else open((last && store.load(last.id)) || new store.Conversation({ model: preferredModel() }));
}

// An image as a data URL, no larger than models use.
async function dataUrl(file) {
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(picture.width, picture.height));
  if (scale === 1 && file.size < 1_000_000 && /png|jpeg|webp|gif/.test(file.type)) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = reject;
      reader.readAsDataURL(file);
    });
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(picture.width * scale);
  canvas.height = Math.round(picture.height * scale);
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}
