// The last requests, and where the time of one went.

import { errorText, get } from "./api.js";
import { count, h, openDialog, rate, seconds, setText, svg } from "./dom.js";

const EVERY = 2000;
const MOST = 600;
const keyOf = (each) => `${each.id} ${each.arrived}`;
const COLUMNS = [
  ["Time", (each) => new Date(each.arrived * 1000).toLocaleTimeString()],
  ["Model", (each) => each.model],
  ["API", (each) => each.dialect],
  ["Outcome", (each) => (each.error ? `${each.status >= 400 ? each.status : each.outcome}: ${each.error}` : each.outcome)],
  ["Prompt", (each) => count(each.prompt_tokens)],
  ["Cached", (each) => count(each.cached_tokens)],
  ["Tokens", (each) => count(each.completion_tokens)],
  ["Queue", (each) => seconds(each.queue_seconds)],
  ["First token", (each) => seconds(each.ttft_seconds)],
  ["Tokens/s", (each) => rate(each.tokens_per_second)],
  ["Took", (each) => seconds(each.seconds)],
  ["Client", (each) => [program(each.client) || each.address, each.key && `key ${each.key}`].filter(Boolean).join(", ")],
];
const NAMES = { read: "Body read", prepare: "Prepared", load: "Model loaded", queue: "Waited for a place", prefill: "Prompt", decode: "Answer" };

// What a client calls itself, without what browsers add.
const program = (agent) => /^Mozilla\/.*?((?:Firefox|Edg|Chrome|Version)\/\d+)/.exec(agent)?.[1].replace("Version", "Safari") ?? agent;

export function show(root, { signal, session }) {
  const filter = h("input", { id: "filter", type: "search", placeholder: "model, outcome, client …", oninput: () => draw() });
  const errors = h("input", { id: "errors", type: "checkbox", onchange: () => draw() });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const body = h("tbody");
  const empty = h("p", { class: "empty", text: "No request has come yet." });
  root.append(h("h1", { text: "Requests" }),
    h("div", { class: "row filter" }, h("label", { for: "filter", text: "Filter" }), filter, h("label", { class: "choice" }, errors, h("span", { text: "Errors only" }))), fault, empty,
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Requests" }, h("table", { class: "requests" }, h("thead", {}, h("tr", {}, COLUMNS.map(([name]) => h("th", { scope: "col", text: name })))), body)));
  if (!session.may_manage) {
    empty.textContent = "The requests are shown to holders of an admin key.";
    return;
  }
  let found = new Map(); // by id and time: clients may give an id twice
  let cursor = "";
  const rows = new Map();

  function draw() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = [...found.values()].filter((each) => {
      const text = [each.model, each.dialect, each.outcome, each.client, each.address, each.key, each.error, each.id].join(" ").toLowerCase();
      return words.every((word) => text.includes(word)) && (!errors.checked || each.error);
    });
    empty.hidden = shown.length > 0;
    const ids = new Set(shown.map(keyOf));
    for (const [id, row] of rows) if (!ids.has(id)) { row.remove(); rows.delete(id); }
    shown.forEach((each, n) => {
      let row = rows.get(keyOf(each));
      if (!row) {
        row = h("tr", { tabindex: "0", onclick: () => trace(each.id), onkeydown: (event) => {
          if (event.key !== "Enter") return;
          event.preventDefault(); // or it would press the first button of the dialog as well
          trace(each.id);
        } }, COLUMNS.map(() => h("td")));
        rows.set(keyOf(each), row);
      }
      COLUMNS.forEach(([, value], column) => setText(row.cells[column], String(value(each) ?? "–")));
      row.dataset.outcome = each.error ? "error" : each.outcome;
      row.title = each.error ?? "";
      if (body.children[n] !== row) body.insertBefore(row, body.children[n] ?? null);
    });
  }

  async function refresh() {
    if (document.hidden) return;
    try {
      const news = await get(`v1/requests?after=${cursor}`, { signal });
      cursor = news.cursor;
      const all = new Map([...(news.is_whole ? [] : found), ...news.data.map((each) => [keyOf(each), each])]);
      found = new Map([...all].sort(([, a], [, b]) => b.arrived - a.arrived).slice(0, MOST));
      fault.hidden = true;
    } catch (error) {
      if (signal.aborted) return;
      fault.textContent = errorText(error);
      fault.hidden = false;
      return;
    }
    draw();
  }
  const timer = setInterval(refresh, EVERY);
  signal.addEventListener("abort", () => clearInterval(timer));
  refresh();
}

async function trace(id) {
  const box = h("div", { class: "stack" }, h("p", { text: "…" }));
  openDialog("Request", box);
  try {
    box.replaceChildren(...details(await get(`v1/requests/${encodeURIComponent(id)}`)));
  } catch (error) {
    box.replaceChildren(h("p", { class: "fault", role: "alert", text: errorText(error) }));
  }
}

function details(found) {
  const facts = [
    ["Id", found.id], ["Path", found.path], ["Model", found.model], ["Status", found.status], ["Outcome", found.outcome], ["Client", found.client], ["Address", found.address],
    ["Key", found.key], ["Load", found.load_seconds ? seconds(found.load_seconds) : null], ["Queue", seconds(found.queue_seconds)], ["First token", seconds(found.ttft_seconds)],
    ["Prompt", `${count(found.prompt_tokens)}, ${count(found.cached_tokens)} cached`], ["Answer", `${count(found.completion_tokens)}, ${count(found.reasoning_tokens)} thinking`],
  ];
  return [
    found.error ? h("p", { class: "fault", text: found.error }) : null, timeline(found.spans),
    h("dl", { class: "details" }, facts.filter(([, value]) => value !== null && value !== "").map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: String(value) })))),
    ...[["Prompt", found.prompt], ["Answer", found.answer]].filter(([, text]) => text).map(([name, text]) => h("details", {}, h("summary", { text: name }), h("pre", { tabindex: "0", "aria-label": name, text }))),
    found.prompt === null ? h("p", { class: "hint", text: "Texts are kept only with the setting log_contents." }) : null,
  ].filter(Boolean);
}

function timeline(spans) {
  const end = Math.max(...spans.map((span) => span.end), 1e-6);
  const named = Object.keys(NAMES).map((name) => [name, spans.filter((span) => span.name === name)]).filter(([, found]) => found.length);
  return h("div", { class: "timeline" }, named.map(([name, found]) => {
    const shape = svg("svg", { class: "lane", viewBox: "0 0 1000 16", preserveAspectRatio: "none", "aria-hidden": "true" }, found.map((span) => svg("rect", {
      class: `span-${name}`, x: ((1000 * span.start) / end).toFixed(2), y: 1, width: Math.max(1.5, (1000 * (span.end - span.start)) / end - 1).toFixed(2), height: 14,
    }, svg("title", { text: `${NAMES[name]}: ${seconds(span.end - span.start)}${span.tokens ? `, ${count(span.tokens)} tokens` : ""}` }))));
    const whole = found.reduce((sum, span) => sum + span.end - span.start, 0);
    const tokens = found.reduce((sum, span) => sum + (span.tokens ?? 0), 0);
    const text = [seconds(whole), tokens ? `${count(tokens)} tokens` : null, found.length > 1 ? `${found.length} parts` : null].filter(Boolean).join(", ");
    return h("div", { class: "lane-row" }, h("span", { text: NAMES[name] }), shape, h("span", { class: "lane-value", text }));
  }));
}
