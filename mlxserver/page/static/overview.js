// The machine and its models.

import { errorText, jsonEvents, post } from "./api.js";
import { bar, sparkline } from "./charts.js";
import { bytes, count, h, rate, say, seconds, setText } from "./dom.js";
import { isTalker, live, speed, watch } from "./live.js";

const STATES = { unloaded: "not loaded", loading: "loading", loaded: "loaded", draining: "leaving", failed: "failed" };
const COLOURS = 6;

export function show(root, { signal, session }) {
  const figures = { models: h("strong"), requests: h("strong"), speed: h("strong"), uptime: h("strong") };
  const memory = h("div", { class: "memory" });
  const cards = h("div", { class: "cards" });
  const empty = h("p", { class: "empty", text: "No model is registered. The library has those on this machine." });
  root.append(h("h1", { class: "sr", text: "Overview" }),
    h("section", { class: "summary", "aria-label": "Server" },
      tile("Models loaded", figures.models), tile("Requests", figures.requests), tile("Tokens/s", figures.speed), tile("Up for", figures.uptime)),
    h("section", { class: "panel", "aria-labelledby": "memory" }, h("h2", { id: "memory", text: "Memory" }), memory),
    h("h2", { class: "section", text: "Models" }), empty, cards);
  const known = new Map();
  let lastMemory = "";

  const update = () => {
    const models = [...live.models.values()];
    const running = models.reduce((sum, each) => sum + each.running_requests, 0);
    const waiting = models.reduce((sum, each) => sum + each.queued_requests, 0);
    setText(figures.models, `${models.filter((each) => each.status.value === "loaded").length} of ${models.length}`);
    setText(figures.requests, waiting ? `${running} + ${waiting} waiting` : String(running));
    setText(figures.speed, rate(models.reduce((sum, each) => sum + speed(each.id), 0)));
    setText(figures.uptime, live.server ? seconds(Date.now() / 1000 - live.server.started) : "–");
    empty.hidden = models.length > 0 || !live.memory;
    const shown = JSON.stringify([live.memory, models.map((each) => [each.id, each.memory_bytes])]);
    if (live.memory && shown !== lastMemory) memory.replaceChildren(...memoryBar(live.memory, models));
    lastMemory = shown;
    for (const [key, card] of known) {
      if (!live.models.has(key)) { card.element.remove(); known.delete(key); }
    }
    for (const model of models) {
      if (!known.has(model.id)) {
        known.set(model.id, modelCard(model.id, session));
        cards.append(known.get(model.id).element);
      }
      known.get(model.id).update(model);
    }
  };
  root.addEventListener("click", (event) => {
    for (const menu of root.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
  }, { signal });
  watch(update, signal);
  const clock = setInterval(update, 1000);
  signal.addEventListener("abort", () => clearInterval(clock));
  update();
}

const tile = (label, value) => h("div", { class: "tile" }, h("span", { text: label }), value);

function memoryBar(memory, models) {
  const weights = models.filter((model) => model.memory_bytes > 0);
  const parts = weights.map((model, n) => ({ name: model.id, value: model.memory_bytes, color: `m${n % COLOURS}` }));
  parts.push({ name: "KV cache", value: memory.kv_cache, color: "kv" },
    { name: "Reserved for requests", value: memory.reserved, color: "reserved" },
    { name: "Prefix cache", value: memory.prefixes, color: "prefix" });
  if (memory.other) parts.push({ name: "Other", value: memory.other, color: "other" });
  parts.push({ name: "Free", value: memory.free, color: "free" });
  const used = memory.budget - memory.free;
  const [shape, legend] = bar(parts, memory.budget, bytes, `${bytes(used)} of ${bytes(memory.budget)} in use`);
  if (memory.disk !== null) {
    legend.append(h("li", {}, h("span", { class: "dot ring" }), h("span", { text: "Prefixes on disk" }), h("strong", { text: bytes(memory.disk) })));
  }
  return [h("p", { class: "of" }, h("strong", { text: bytes(used) }), ` of ${bytes(memory.budget)}`), shape, legend];
}

function modelCard(key, session) {
  const state = h("span", { class: "state" });
  const facts = h("p", { class: "facts" });
  const source = h("p", { class: "source" });
  const progress = h("progress", { "aria-label": `Load of ${key}` });
  const stage = h("span", { class: "stage" });
  const loading = h("div", { class: "loading", hidden: true }, progress, stage);
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const running = h("strong", { text: "0" });
  const waiting = h("strong", { text: "0" });
  const memory = h("strong", { text: "–" });
  const lines = { speed: sparkline("Tokens/s"), ttft: sparkline("First token"), gap: sparkline("Per token") };
  const load = h("button", { type: "button", class: "primary", text: "Load", onclick: () => act(async () => {
    for await (const step of jsonEvents("v1/models/load", { model: key, stream: true })) {
      if (step.event === "loaded") say(`${key} is loaded`);
    }
  }) });
  const unload = h("details", { class: "menu", onkeydown: (event) => {
    if (event.key !== "Escape" || !unload.open) return;
    unload.open = false;
    unload.firstChild.focus();
  }, onfocusout: (event) => { if (event.relatedTarget && !unload.contains(event.relatedTarget)) unload.open = false; } }, h("summary", { role: "button", text: "Unload" }),
    h("div", { class: "menu-list" },
      option("drain", "when its requests are done"), option("abort", "now, ending its requests"), option("reject", "only if it has no requests")));
  const pin = h("button", { type: "button", text: "Pin", "aria-pressed": "false", title: "Never evict it, nor unload it for being idle", onclick: () => {
    const wanted = pin.getAttribute("aria-pressed") !== "true";
    act(() => post("v1/models/pin", { key, pin: wanted }));
  } });
  const talk = h("a", { class: "button", href: `#/chat/new/${encodeURIComponent(key)}`, text: "Chat" });
  const element = h("article", { class: "card", "aria-label": key },
    h("header", {}, h("h3", { text: key }), state), facts, source, loading, fault,
    h("dl", { class: "counts" }, pair("Running", running), pair("Waiting", waiting), pair("Memory", memory)),
    h("div", { class: "metrics" }, Object.values(lines).map((line) => line.element)),
    h("footer", {}, load, unload, pin, talk));

  function option(mode, meaning) {
    return h("button", { type: "button", onclick: () => {
      unload.open = false;
      act(async () => {
        const report = await post("v1/models/unload", { key, mode });
        say(`${key} is unloaded, ${bytes(report.freed_bytes)} freed`);
      });
    } }, h("strong", { text: mode }), ` ${meaning}`);
  }

  let problem = ""; // of the last action
  let fromState = "";
  const showFault = () => {
    setText(fault, problem || fromState);
    fault.hidden = !fault.textContent;
  };

  async function act(action) {
    problem = "";
    try {
      await action();
    } catch (error) {
      problem = errorText(error);
    }
    showFault();
  }

  return {
    element,
    update(model) {
      const value = model.status.value;
      setText(state, STATES[value] ?? value);
      state.dataset.state = value;
      const kind = model.kind === "text" ? model.type ?? "text" : model.kind ?? "kind not known yet";
      const context = model.context_length ? `${count(model.context_length)} tokens` : null;
      setText(facts, [kind, context, model.pinned ? "pinned" : null].filter(Boolean).join(" · "));
      setText(source, model.source);
      source.title = model.source;
      loading.hidden = value !== "loading";
      if (model.loading) {
        const { stage: name, done, total } = model.loading;
        if (total) { progress.max = total; progress.value = done; } else progress.removeAttribute("value");
        setText(stage, total ? `${name}, ${Math.floor((100 * done) / total)} %` : name);
      }
      fromState = model.status.error ?? "";
      showFault();
      setText(running, String(model.running_requests));
      setText(waiting, String(model.queued_requests));
      const needed = model.estimate?.total ?? model.local?.needed_bytes;
      setText(memory, model.reserved_bytes ? bytes(model.reserved_bytes) : needed ? `needs ${bytes(needed)}` : "–");
      const lists = live.history.get(key) ?? { speed: [], ttft: [], gap: [] };
      lines.speed.update(lists.speed, () => rate(speed(key)));
      lines.ttft.update(lists.ttft, seconds);
      lines.gap.update(lists.gap, seconds);
      const isThere = value === "loaded" || value === "loading" || value === "draining";
      load.hidden = isThere || !session.may_manage;
      unload.hidden = !isThere || !session.may_manage;
      pin.hidden = !session.may_manage;
      pin.setAttribute("aria-pressed", String(model.pinned));
      talk.hidden = !isTalker(model);
    },
  };
}

const pair = (label, value) => h("div", {}, h("dt", { text: label }), h("dd", {}, value));
