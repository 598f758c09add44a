// Throughput and latency by load, and how one model slows another down: measured by the server's own client.

import { errorText, jsonEvents } from "./api.js";
import { plot } from "./charts.js";
import { h, rate, say, seconds } from "./dom.js";
import { isTalker, live, watch } from "./live.js";

const ms = (value) => (value === null || value === undefined ? "–" : seconds(value / 1000));
const LEVEL = [
  ["Model", (f) => f.model], ["Load", (f) => f.load], ["Requests", (f) => f.requests], ["Errors", (f) => f.errors], ["Tokens/s", (f) => rate(f.tokens_per_second)],
  ["Tokens/s each", (f) => rate(f.request_tokens_per_second)], ["First token p50", (f) => ms(f.ttft_p50_ms)], ["p95", (f) => ms(f.ttft_p95_ms)], ["Per token p50", (f) => ms(f.itl_p50_ms)],
  ["p95", (f) => ms(f.itl_p95_ms)], ["Whole p50", (f) => ms(f.e2e_p50_ms)], ["p95", (f) => ms(f.e2e_p95_ms)],
];
const PHASE = [["First token p50", "ttft_p50_ms", ms], ["Between tokens p50", "gap_p50_ms", ms], ["p99", "gap_p99_ms", ms], ["Tokens/s", "tokens_per_second", rate]];
const PLOTS = [["Tokens per second, all together", "tokens_per_second", "tokens/s"], ["First token, p50", "ttft_p50_ms", "ms"], ["Time per token, p50", "itl_p50_ms", "ms"]];

export function show(root, { signal, session }) {
  let running = null;
  const kind = h("select", { id: "b-kind", onchange: () => draw() }, h("option", { value: "sweep", text: "Sweep over concurrency" }), h("option", { value: "interference", text: "Interference of two models" }));
  const models = h("div", { class: "choices", role: "group", "aria-label": "Models" });
  const measured = h("select", { id: "b-measured" });
  const other = h("select", { id: "b-other" });
  const concurrency = h("input", { id: "b-concurrency", value: "1,4,16", pattern: "[0-9, ]+", required: true });
  const requests = h("input", { id: "b-requests", type: "number", min: "1", max: "2000", value: "32", required: true });
  const tokens = h("input", { id: "b-tokens", type: "number", min: "1", max: "4096", value: "128", required: true });
  const start = h("button", { class: "primary", text: "Measure" });
  const halt = h("button", { type: "button", text: "Stop", hidden: true, onclick: () => running?.abort() });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const bar = h("progress", { "aria-label": "Progress", max: "1", value: "0" });
  const label = h("span", { class: "hint" });
  const progress = h("div", { class: "stack", hidden: true }, bar, label);
  const results = h("div", {});
  const several = h("fieldset", {}, h("legend", { text: "Models" }), models);
  const two = h("div", { class: "grid" }, field("Measured model", measured), field("Model that works beside it", other));
  root.append(h("h1", { text: "Benchmark" }), h("form", { class: "panel stack", onsubmit: (event) => { event.preventDefault(); run(); } },
    field("Kind", kind), several, two,
    h("div", { class: "grid" }, field("Concurrency", concurrency), field("Requests per load", requests), field("Most tokens", tokens)),
    session.may_manage ? null : h("p", { class: "hint", text: "Measuring takes an admin key." }), fault, h("div", { class: "row" }, start, halt), progress), results);
  start.disabled = !session.may_manage;

  function field(text, control) {
    return h("div", {}, h("label", { for: control.id, text }), control);
  }
  function draw() {
    const isSweep = kind.value === "sweep";
    several.hidden = !isSweep;
    two.hidden = isSweep;
    requests.value = isSweep ? "32" : "8";
    concurrency.value = isSweep ? "1,4,16" : "1";
  }
  let shown = "";
  const list = () => {
    const talkers = [...live.models.values()].filter(isTalker);
    const keys = talkers.map((each) => each.id);
    if (JSON.stringify(keys) === shown) return;
    shown = JSON.stringify(keys);
    models.replaceChildren(...talkers.map((each, n) => {
      const box = h("input", { type: "checkbox", value: each.id });
      box.checked = each.status.value === "loaded" && n < 2;
      return h("label", { class: "choice" }, box, h("span", { text: each.id }));
    }));
    for (const select of [measured, other]) select.replaceChildren(...keys.map((key) => h("option", { value: key, text: key })));
    other.selectedIndex = Math.min(1, keys.length - 1);
  };
  watch(list, signal);
  list();
  draw();
  signal.addEventListener("abort", () => running?.abort());

  async function run() {
    const isSweep = kind.value === "sweep";
    const chosen = isSweep ? [...models.querySelectorAll("input:checked")].map((box) => box.value) : [measured.value, other.value];
    fault.hidden = true;
    running = new AbortController();
    start.disabled = true;
    halt.hidden = progress.hidden = false;
    label.textContent = "Starting";
    const found = [];
    results.replaceChildren();
    try {
      const body = { kind: kind.value, models: chosen, concurrency: concurrency.value.split(",").map(Number), requests: Number(requests.value), max_tokens: Number(tokens.value) };
      for await (const event of jsonEvents("v1/benchmark", body, { signal: running.signal })) {
        if (event.event === "progress") {
          bar.max = event.total;
          bar.value = event.done;
          label.textContent = `${event.label}: ${event.done} of ${event.total}`;
        } else if (event.event === "level" || event.event === "phase") {
          found.push(event);
          results.replaceChildren(...(isSweep ? levels(found) : phases(found)));
        }
      }
      say("The benchmark is done");
    } catch (error) {
      if (!signal.aborted && !running?.signal.aborted) {
        fault.textContent = errorText(error);
        fault.hidden = false;
      }
    }
    running = null;
    start.disabled = false;
    halt.hidden = progress.hidden = true;
  }
}

const table = (name, head, rows) => h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, h("table", {},
  h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col", text })))), h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((text) => h("td", { text: String(text) })))))));

function levels(found) {
  const figures = found.map((each) => each.figures);
  const keys = [...new Set(figures.map((each) => each.model))];
  const plots = PLOTS.map(([title, name, unit]) => plot(title, keys.map((key, n) => ({
    name: key, color: `m${n}`, points: figures.filter((each) => each.model === key).map((each) => [each.load, each[name]]),
  })), unit));
  const errors = [...new Set(found.flatMap((each) => each.errors))];
  return [h("div", { class: "plots" }, plots), table("Figures", LEVEL.map(([name]) => name), figures.map((each) => LEVEL.map(([, value]) => value(each) ?? "–"))),
    ...errors.map((text) => h("p", { class: "fault", text }))];
}

function phases(found) {
  const rows = found.map((each) => [each.phase, ...(each.figures ? PHASE.map(([, name, format]) => {
    const ratio = each.ratios[name];
    return `${format(each.figures[name])}${ratio === null ? "" : ` (×${ratio.toFixed(2)})`}`;
  }) : [each.problem, "", "", ""])]);
  return [h("p", { class: "hint", text: "× is the ratio to the model alone." }), table("Figures", ["While", ...PHASE.map(([name]) => name)], rows)];
}
