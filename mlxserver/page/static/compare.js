// One prompt to two, three or four models at once.

import { chat, errorText } from "./api.js";
import { Answer } from "./answer.js";
import { count, h, rate, say, seconds } from "./dom.js";
import { isTalker, live, watch } from "./live.js";

const MOST = 4;
const ROWS = [
  ["First token", (each) => seconds(each.ttft)],
  ["Tokens/s", (each) => rate(each.timings?.predicted_per_second)],
  ["Tokens", (each) => count(each.usage?.completion_tokens)],
  ["of them thinking", (each) => count(each.usage?.completion_tokens_details?.reasoning_tokens)],
  ["Prompt tokens", (each) => count(each.usage?.prompt_tokens)],
  ["of them cached", (each) => count(each.usage?.prompt_tokens_details?.cached_tokens)],
  ["Whole answer", (each) => seconds(each.seconds)],
  ["Ended by", (each) => each.finish],
];

export function show(root, { signal }) {
  let running = null;
  const chosen = new Set();
  const models = h("div", { class: "choices", role: "group", "aria-label": "Models" });
  const input = h("textarea", { id: "compare-ask", rows: "3", required: true, placeholder: "One prompt for all", onkeydown: (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  } });
  const system = h("input", { id: "compare-system", placeholder: "none" });
  const temperature = h("input", { id: "compare-temperature", type: "number", min: "0", max: "2", step: "0.1", placeholder: "default" });
  const limit = h("input", { id: "compare-limit", type: "number", min: "1", placeholder: "default" });
  const start = h("button", { class: "primary", text: "Compare" });
  const halt = h("button", { type: "button", text: "Stop", hidden: true, onclick: () => running?.abort() });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const columns = h("div", { class: "columns" });
  const table = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Figures", hidden: true });
  const form = h("form", { class: "panel stack", onsubmit: (event) => { event.preventDefault(); run(); } },
    h("fieldset", {}, h("legend", { text: "Models, two to four" }), models),
    h("label", { for: "compare-ask", text: "Prompt" }), input,
    h("div", { class: "grid" }, h("div", {}, h("label", { for: "compare-system", text: "System prompt" }), system),
      h("div", {}, h("label", { for: "compare-temperature", text: "Temperature" }), temperature),
      h("div", {}, h("label", { for: "compare-limit", text: "Most tokens" }), limit)),
    fault, h("div", { class: "row" }, start, halt, h("span", { class: "hint", text: "Ctrl+Enter starts" })));
  root.append(h("h1", { text: "Compare" }), form, columns, table);

  let shown = "";
  const list = () => {
    const keys = [...live.models.values()].filter(isTalker).map((each) => each.id);
    if (JSON.stringify(keys) === shown) return;
    shown = JSON.stringify(keys);
    for (const key of [...chosen]) if (!keys.includes(key)) chosen.delete(key);
    if (!chosen.size) [...live.models.values()].filter((each) => each.status.value === "loaded" && keys.includes(each.id)).slice(0, 2).forEach((each) => chosen.add(each.id));
    models.replaceChildren(...keys.map((key) => {
      const box = h("input", { type: "checkbox", value: key, onchange: () => { if (box.checked) chosen.add(key); else chosen.delete(key); } });
      box.checked = chosen.has(key);
      return h("label", { class: "choice" }, box, h("span", { text: key }));
    }));
  };
  watch(list, signal);
  list();
  signal.addEventListener("abort", () => running?.abort());

  async function run() {
    fault.hidden = chosen.size >= 2 && chosen.size <= MOST;
    fault.textContent = fault.hidden ? "" : `Choose two to ${MOST} models; ${chosen.size} are.`;
    if (!fault.hidden) return;
    running?.abort();
    const controller = running = new AbortController();
    start.disabled = true;
    halt.hidden = false;
    const messages = [...(system.value ? [{ role: "system", content: system.value }] : []), { role: "user", content: input.value }];
    const params = { ...(temperature.value ? { temperature: Number(temperature.value) } : {}), ...(limit.value ? { max_tokens: Number(limit.value) } : {}) };
    const sides = [...chosen].map((model) => ({ model, answer: new Answer() }));
    columns.replaceChildren(...sides.map(({ model, answer }) => h("section", { class: "panel column", "aria-label": model, "aria-busy": "true" }, h("h2", { text: model }), answer.element)));
    table.hidden = true;
    const results = await Promise.all(sides.map(async ({ model, answer }, n) => {
      let figures = null;
      let error = null;
      answer.on.wait("Waiting for the model");
      try {
        figures = await chat({ model, messages, ...params }, answer.on, controller.signal);
      } catch (thrown) {
        error = controller.signal.aborted ? "stopped" : errorText(thrown);
      }
      await answer.finish(figures, error);
      columns.children[n]?.removeAttribute("aria-busy");
      return { model, figures: figures ?? {} };
    }));
    if (running === controller) running = null;
    start.disabled = false;
    halt.hidden = true;
    if (signal.aborted) return;
    table.replaceChildren(h("table", { class: "figures-table" }, h("caption", { class: "sr", text: "Figures of the answers" }),
      h("thead", {}, h("tr", {}, h("td"), results.map(({ model }) => h("th", { scope: "col", text: model })))),
      h("tbody", {}, ROWS.map(([name, value]) => h("tr", {}, h("th", { scope: "row", text: name }), results.map(({ figures }) => h("td", { text: value(figures) ?? "–" })))))));
    table.hidden = false;
    say("All answers are there");
  }
}
