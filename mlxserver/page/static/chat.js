// Conversations with one model.

import { chat, errorText } from "./api.js";
import { Answer, Backlog, figureLine, guessHeight } from "./answer.js";
import * as store from "./conversation.js";
import { codeDialog, exportDialog } from "./dialogs.js";
import { copy, h, say } from "./dom.js";
import { isTalker, live, watch } from "./live.js";
import { Pictures } from "./pictures.js";
import { Place } from "./scroll.js";
import { settingsPanel } from "./settings.js";

export function show(root, { signal, rest }) {
  let conversation;
  let running = null; // AbortController of the answer that streams, and the id of its message
  const turns = new Map(); // elements by message, also of those that another branch hides
  const answers = new Map(); // by message

  const names = h("ul", { class: "names" });
  const side = h("aside", { class: "side", "aria-label": "Conversations" },
    h("button", { type: "button", class: "primary", text: "New conversation", onclick: () => begin() }), names,
    h("div", { class: "row" },
      h("button", { type: "button", text: "Import", onclick: () => file.click() }),
      h("button", { type: "button", text: "Export", onclick: () => exportDialog(conversation) })));
  const file = h("input", { type: "file", accept: ".json,.md", hidden: true, "aria-label": "File of a conversation", onchange: importFile });
  const model = h("select", { "aria-label": "Model", onchange: () => { conversation.model = model.value; keep(); } });
  const settings = settingsPanel(() => conversation, keep);
  const log = h("div", { class: "log", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const scroller = h("div", { class: "scroller", tabindex: "-1", onclick: (event) => {
    const summary = event.target.closest("summary");
    if (summary && !running) place.put(summary, place.offset(summary)); // what unfolds is below it
  } }, log);
  const pictures = new Pictures(notify);
  const input = h("textarea", { id: "ask", rows: "1", placeholder: "Ask something", "aria-label": "Message", onkeydown: onKey, oninput: grow, onpaste: (event) => pictures.takeFrom(event.clipboardData, event) });
  const picker = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, "aria-label": "Image", onchange: () => { pictures.take([...picker.files]); picker.value = ""; } });
  const sendButton = h("button", { class: "primary", text: "Send" });
  const stopButton = h("button", { type: "button", class: "stop", text: "Stop", hidden: true, onclick: stop });
  const composer = h("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); ask(); } }, pictures.element, input,
    h("div", { class: "row" }, h("button", { type: "button", class: "plain", text: "+ Image", onclick: () => picker.click() }), picker,
      h("span", { class: "hint", text: "Enter sends, Shift+Enter breaks the line, Esc stops" }), stopButton, sendButton));
  const sideButton = h("button", { type: "button", class: "only-narrow", text: "Conversations", "aria-expanded": "false", onclick: () => {
    const open = side.classList.toggle("open");
    sideButton.setAttribute("aria-expanded", String(open));
  } });
  const pane = h("section", { class: "pane", "aria-label": "Chat" },
    h("div", { class: "bar-top" }, sideButton, model, settings.button,
      h("button", { type: "button", text: "Code", onclick: () => codeDialog(conversation) })),
    settings.panel, scroller, composer);
  root.append(h("h1", { class: "sr", text: "Chat" }), side, pane, file);
  const place = new Place(scroller, log, signal);
  const backlog = new Backlog(scroller, { mayRest: () => !running, onshow: () => place.hold() });

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
    turns.clear();
    answers.clear();
    backlog.clear();
    log.replaceChildren();
    draw();
    place.toEnd();
    side.classList.remove("open");
    sideButton.setAttribute("aria-expanded", "false");
  }

  function keep() {
    if (!Object.keys(conversation.nodes).length) return;
    if (!store.save(conversation)) notify("This browser's storage is full: the conversation is not kept. Export it, or remove others.");
    listNames();
  }

  function notify(text) {
    log.querySelector(".notified")?.remove();
    log.append(h("p", { class: "fault notified", role: "alert", text }));
    place.toEnd();
  }

  function listNames() {
    names.replaceChildren(...store.list().map(({ id, title }) => h("li", {},
      h("button", { type: "button", class: "name", "aria-current": id === conversation.id ? "true" : null, text: title || "Untitled", title, onclick: () => {
        const found = store.load(id);
        if (found) open(found);
        refocus();
      } }),
      h("button", { type: "button", class: "plain", text: "✕", "aria-label": `Remove ${title}`, onclick: () => {
        if (!confirm(`Remove the conversation “${title}”?`)) return;
        store.forget(id);
        if (id === conversation.id) begin();
        else listNames();
        refocus();
      } }))));
  }

  // Where the focus goes when what had it is gone. No keyboard unfolds on a phone for it.
  function refocus() {
    const now = document.activeElement;
    if ((!now || now === document.body || now.checkVisibility?.() === false) && matchMedia("(pointer: fine)").matches) input.focus({ preventScroll: true });
  }

  // Another window has changed this conversation: its messages are here, too.
  function merge() {
    const other = store.load(conversation.id);
    if (!other) return;
    for (const id of conversation.merge(other, running?.message)) {
      turns.delete(id);
      answers.delete(id);
    }
    if (!running && other.path.some((node) => node.id === conversation.leaf)) conversation.leaf = other.leaf;
    if (!settings.panel.contains(document.activeElement)) settings.fill();
    listModels();
    draw();
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

  // Shows the branch in sight. What it has in common with the one before stays as it is.
  function draw() {
    const path = conversation.path;
    const width = log.clientWidth;
    let same = 0;
    while (same < path.length && log.children[same] && log.children[same] === turns.get(path[same].id)) same += 1;
    while (log.children.length > same) log.lastChild.remove();
    for (const node of path.slice(same)) {
      const known = turns.get(node.id);
      const element = known ?? turn(node, width);
      known?.querySelector("header")?.replaceWith(head(node));
      log.append(element);
      backlog.add(element, answers.get(node.id));
    }
    if (!path.length) log.append(h("p", { class: "empty", text: "Conversations stay in this browser. Drop an image anywhere to ask about it." }));
    place.hold();
  }

  const who = (node) => (node.role === "user" ? "You" : node.role === "tool" ? "Result of a call" : node.model ?? "Answer");
  const head = (node) => h("header", {}, h("span", { class: "who", text: who(node) }), branches(node));

  function turn(node, width = log.clientWidth) {
    const element = h("article", { class: `turn ${node.role}`, "aria-label": node.role === "user" ? "You" : node.role === "tool" ? "Result" : node.model ?? "Answer" });
    const actions = h("div", { class: "actions" });
    let body;
    if (node.role === "assistant") {
      const answer = new Answer().restore(node, width);
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
    element.append(head(node), body, actions);
    element.style.containIntrinsicHeight = `auto ${100 + guessHeight(node.content ?? "", width)}px`;
    turns.set(node.id, element);
    return element;
  }

  const action = (text, onclick) => h("button", { type: "button", class: "plain", text, onclick });

  function branches(node) {
    const all = conversation.siblings(node);
    if (all.length < 2) return null;
    const at = all.findIndex((each) => each.id === node.id);
    const go = (step) => (event) => {
      const next = all[(at + step + all.length) % all.length];
      const offset = place.offset(turns.get(node.id));
      const label = event.currentTarget.getAttribute("aria-label");
      conversation.select(next);
      keep();
      draw();
      const element = turns.get(next.id);
      place.put(element, offset);
      element.querySelector(`[aria-label="${label}"]`)?.focus({ preventScroll: true });
    };
    return h("span", { class: "branches" }, h("button", { type: "button", class: "plain", "aria-label": "Branch before", text: "‹", onclick: go(-1) }),
      h("span", { text: `${at + 1}/${all.length}` }), h("button", { type: "button", class: "plain", "aria-label": "Branch after", text: "›", onclick: go(1) }));
  }

  function resultForm(node, call) {
    if (Object.values(conversation.nodes).some((each) => each.call === call.id && each.parent === node.id)) return null;
    const field = h("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder: `Result of ${call.name}` });
    const form = h("form", { class: "row result", onsubmit: (event) => {
      event.preventDefault();
      form.remove();
      const parent = conversation.leaf === node.id ? node.id : conversation.leaf;
      conversation.add(parent, { role: "tool", content: field.value, call: call.id });
      const given = Object.values(conversation.nodes).filter((each) => each.role === "tool").map((each) => each.call);
      draw();
      if (node.calls.every((each) => given.includes(each.id))) generate();
    } }, field, h("button", { text: "Give" }));
    return form;
  }

  function edit(node, element) {
    const field = h("textarea", { value: node.content, "aria-label": "Edit the message", rows: String(Math.min(12, node.content.split("\n").length + 1)) });
    const form = h("form", { class: "stack", onsubmit: (event) => {
      event.preventDefault();
      conversation.add(node.parent, { role: node.role, content: field.value, images: node.images, call: node.call });
      turns.delete(node.id);
      draw();
      generate();
      refocus();
    } }, field, h("div", { class: "row" }, h("button", { class: "primary", text: "Send" }), h("button", { type: "button", text: "Cancel", onclick: () => {
      turns.delete(node.id);
      element.replaceWith(turn(node));
      turns.get(node.id).querySelector(".actions button").focus({ preventScroll: true });
    } })));
    element.replaceChildren(form);
    field.focus();
  }

  function retry(node) {
    conversation.leaf = node.parent;
    draw();
    generate();
    refocus();
  }

  function ask() {
    const content = input.value.trim();
    if (running || (!content && !pictures.urls.length)) return;
    const images = pictures.handOver();
    conversation.add(conversation.leaf, { role: "user", content, ...(images.length ? { images } : {}) });
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
    keep();
    const talk = conversation;
    const parent = talk.leaf;
    const node = talk.add(parent, { role: "assistant", content: "", model: talk.model });
    const controller = running = Object.assign(new AbortController(), { message: node.id });
    const element = turn(node);
    const answer = answers.get(node.id);
    const actions = element.querySelector(".actions");
    actions.hidden = true;
    element.setAttribute("aria-busy", "true");
    log.append(element);
    backlog.add(element);
    answer.onappend = () => place.hold();
    answer.on.wait("Waiting for the model");
    place.toEnd();
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
    element.querySelector("header").replaceWith(head(node));
    if (isSeen) { keep(); place.hold(); } else store.save(talk);
    backlog.work();
  }

  function stop() {
    running?.abort();
    running = null;
    setBusy(false);
  }

  function setBusy(isBusy) {
    const gone = isBusy ? sendButton : stopButton;
    const hadFocus = document.activeElement === gone;
    stopButton.hidden = !isBusy;
    sendButton.hidden = isBusy;
    if (hadFocus) (isBusy ? stopButton : input).focus();
  }

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
  pane.addEventListener("drop", (event) => { pane.classList.remove("dropping"); pictures.takeFrom(event.dataTransfer, event); });

  // -- files ------------------------------------------------------------------------------------------

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

  signal.addEventListener("abort", () => { stop(); backlog.clear(); });
  addEventListener("storage", ({ key }) => {
    if (key === store.INDEX) listNames();
    if (key === store.keyOf(conversation.id)) merge();
  }, { signal });
  watch(listModels, signal);
  watch(() => { if (live.link === "connected") backlog.work(); }, signal);
  const [word, key] = rest;
  const last = store.list()[0];
  if (word === "new") {
    history.replaceState(null, "", "#/chat");
    begin(key);
  } else open((last && store.load(last.id)) || new store.Conversation({ model: preferredModel() }));
}
