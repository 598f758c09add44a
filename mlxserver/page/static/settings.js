// What a conversation asks of its model beside its messages: system prompt, parameters, tools.

import { h } from "./dom.js";

const PARAMS = [
  ["temperature", "0 to 2; 0 is greedy", 0.1], ["top_p", "above 0, up to 1", 0.05], ["top_k", "0: off", 1],
  ["max_tokens", "of the answer", 1], ["frequency_penalty", "-2 to 2", 0.1], ["seed", "for the same draws", 1],
];
const EFFORTS = ["", "none", "low", "medium", "high"];

// current: gives the conversation; keep: stores what was changed of it.
export function settingsPanel(current, keep) {
  const system = h("textarea", { id: "system", rows: "3", onchange: () => { current().system = system.value; keep(); } });
  const tools = h("textarea", { id: "tools", rows: "3", spellcheck: "false", placeholder: '[{"type": "function", "function": {"name": …}}]', onchange: () => { current().tools = tools.value; keep(); } });
  const fields = PARAMS.map(([name, hint, step]) => [name, h("input", { id: `p-${name}`, type: "number", step: String(step), placeholder: "default", title: hint, onchange: (event) => setParam(name, event.target.value === "" ? undefined : Number(event.target.value)) })]);
  const effort = h("select", { id: "p-effort", onchange: () => setParam("reasoning_effort", effort.value || undefined) },
    EFFORTS.map((each) => h("option", { value: each, text: each || "default" })));
  const setParam = (name, value) => {
    if (value === undefined) delete current().params[name];
    else current().params[name] = value;
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
    system.value = current().system;
    tools.value = current().tools;
    for (const [name, field] of fields) field.value = current().params[name] ?? "";
    effort.value = current().params.reasoning_effort ?? "";
  } };
}
