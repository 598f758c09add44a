// The models on this machine, and those of the Hugging Face hub.

import { errorText, get, jsonEvents, send } from "./api.js";
import { bytes, count, h, say } from "./dom.js";
import { live, watch } from "./live.js";

const FITS = { now: "fits now", after_eviction: "fits in place of others", never: "does not fit" };
const PLACES = { huggingface: "Hugging Face cache", lmstudio: "LM Studio", ollama: "Ollama", directory: "model_dirs" };

export function show(root, { signal, session }) {
  const local = h("div", { class: "models-list" });
  const found = h("div", { class: "models-list" });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const words = h("input", { id: "words", type: "search", placeholder: "qwen3 4bit, or org/name", required: true });
  const pulls = h("div", { class: "models-list" });
  root.append(h("h1", { text: "Library" }), fault,
    session.may_manage ? h("section", { class: "stack" }, h("h2", { text: "Get a model" }), h("form", { class: "row filter", onsubmit: (event) => { event.preventDefault(); search(); } },
      h("label", { class: "sr", for: "words", text: "Words to search for, or a repository" }), words, h("button", { class: "primary", text: "Search" }),
      h("button", { type: "button", text: "Pull by name", onclick: () => { if (words.reportValidity()) pull(words.value.trim()); } })), pulls, found) : null,
    h("section", { class: "stack" }, h("h2", { class: "section", text: "On this machine" }), local));

  const fail = (error) => { fault.textContent = error ? errorText(error) : ""; fault.hidden = !error; };

  let isListed = false;
  async function list() {
    isListed = true;
    try {
      const models = (await get("v1/library", { signal })).data;
      local.replaceChildren(...models.map(item));
      if (!models.length) local.append(h("p", { class: "empty", text: "No models of other programs were found here. What is pulled appears in this list." }));
      fail(null);
    } catch (error) {
      isListed = false;
      if (!signal.aborted) fail(error);
    }
  }
  watch(() => { if (live.link === "connected" && !isListed) list(); }, signal);

  function facts(model) {
    const parts = [model.architecture, model.quantization, model.parameters ? `${(model.parameters / 1e9).toFixed(1)} B parameters` : null, model.size_bytes ? `${bytes(model.size_bytes)} on disk` : null,
      model.context_length ? `${count(model.context_length)} tokens` : null, PLACES[model.place]];
    return parts.filter(Boolean).join(" · ");
  }
  const fits = (model) => (model.fits ? h("span", { class: `fits-${model.fits}`, text: `${FITS[model.fits]}${model.needed_bytes ? `, needs ${bytes(model.needed_bytes)}` : ""}` }) : null);

  function item(model) {
    const progress = h("progress", { class: "wide", "aria-label": `Load of ${model.id}`, hidden: true });
    const problem = h("p", { class: "fault wide", role: "alert", hidden: true });
    const isLoaded = model.status.value === "loaded";
    const load = h("button", { type: "button", class: "primary", text: isLoaded ? "Loaded" : "Load", disabled: isLoaded || Boolean(model.error), onclick: async () => {
      problem.hidden = true;
      progress.hidden = false;
      load.disabled = true;
      try {
        for await (const step of jsonEvents("v1/models/load", { model: model.id, key: model.id, stream: true })) {
          if (step.total) { progress.max = step.total; progress.value = step.done; } else progress.removeAttribute("value");
        }
        load.textContent = "Loaded";
        say(`${model.id} is loaded`);
      } catch (error) {
        load.disabled = false;
        problem.textContent = errorText(error);
        problem.hidden = false;
      }
      progress.hidden = true;
    } });
    const remove = h("button", { type: "button", text: "Remove", onclick: async () => {
      if (!confirm(`Remove the files of ${model.id} (${bytes(model.size_bytes)})?`)) return;
      try {
        await send("DELETE", `v1/models/${model.id.split("/").map(encodeURIComponent).join("/")}`);
        list();
      } catch (error) {
        problem.textContent = errorText(error);
        problem.hidden = false;
      }
    } });
    return h("article", { class: "panel item", "aria-label": model.id }, h("h3", { text: model.id }), session.may_manage ? h("div", { class: "row" }, load, remove) : h("span"),
      h("p", { class: "hint wide", text: facts(model) }), model.error ? h("p", { class: "fault wide", text: model.error }) : h("p", { class: "wide hint" }, fits(model)), progress, problem);
  }

  async function search() {
    fail(null);
    const query = words.value.trim();
    found.replaceChildren(h("p", { class: "hint", text: "Searching …" }));
    try {
      const models = (await get(`v1/library/search?q=${encodeURIComponent(query)}&limit=20`, { signal })).data;
      found.replaceChildren(...models.map((model) => h("article", { class: "panel item", "aria-label": model.id }, h("h3", { text: model.id }),
        h("div", { class: "row" }, model.is_local ? h("span", { class: "hint", text: "is here" }) : h("button", { type: "button", text: "Pull", onclick: () => pull(model.id) })),
        h("p", { class: "hint wide", text: [facts(model), `${count(model.downloads)} downloads`, model.gated ? "its terms have to be accepted" : null].filter(Boolean).join(" · ") }), h("p", { class: "wide hint" }, fits(model)))));
      if (!models.length) found.append(h("p", { class: "empty", text: "Nothing was found." }));
    } catch (error) {
      found.replaceChildren();
      if (!signal.aborted) fail(error);
    }
  }

  async function pull(model, force = false) {
    const stop = new AbortController();
    const bar = h("progress", { "aria-label": `Pull of ${model}` });
    const text = h("span", { class: "hint", text: "Asking the hub" });
    const problem = h("p", { class: "fault", role: "alert", hidden: true });
    const cancel = h("button", { type: "button", text: "Cancel", onclick: () => { stop.abort(); box.remove(); } });
    const box = h("article", { class: "panel stack", "aria-label": `Pull of ${model}` }, h("div", { class: "row" }, h("h3", { text: model }), cancel), bar, text, problem);
    pulls.append(box);
    try {
      for await (const step of jsonEvents("v1/models/pull", { model, force, stream: true }, { signal: stop.signal })) {
        if (step.event === "planned") text.textContent = `${bytes(step.download_bytes)} to download${step.needed_bytes ? `, needs ${bytes(step.needed_bytes)} of memory` : ""}${step.fits ? "" : ": does not fit now"}`;
        if (step.event === "progress" && step.total) {
          bar.max = step.total;
          bar.value = step.done;
          text.textContent = `${step.stage}: ${bytes(step.done)} of ${bytes(step.total)}`;
        }
      }
      box.remove();
      say(`${model} is here`);
      list();
    } catch (error) {
      if (stop.signal.aborted) return;
      bar.hidden = text.hidden = true;
      problem.textContent = errorText(error);
      problem.hidden = false;
      cancel.textContent = "Close";
      if (!force && (error.status === 507 || error.status === "model_too_large")) box.append(h("div", { class: "row" }, h("button", { type: "button", text: "Pull it anyway", onclick: () => { box.remove(); pull(model, true); } })));
    }
  }
  list();
}
