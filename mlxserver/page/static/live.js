// The server's state, kept up to date by GET /v1/events. Reconnects by itself, and tells.

import { ApiError, events, send } from "./api.js";

const HISTORY = 180; // states, one a second
const SILENCE = 20_000; // ms without a byte after which the connection counts as lost
const REST = 5000; // ms out of sight after which the page reads nothing: browsers share six connections among all pages

export const live = {
  link: "connecting", // connected, lost, stopping, refused, resting
  server: null,
  memory: null,
  models: new Map(),
  history: new Map(), // by model: lists of tokens_per_second, ttft_seconds, inter_token_seconds
};

// Tokens per second of a model, over the last three seconds: at one per second a slow model jumps.
export const speed = (key) => {
  const last = (live.history.get(key)?.speed ?? []).slice(-3);
  return last.length ? last.reduce((sum, each) => sum + each, 0) / last.length : live.models.get(key)?.tokens_per_second ?? 0;
};

// Whether one can talk to a model. The kind of one that was never read is null.
export const isTalker = (model) => model.kind === null || model.kind === "text" || model.kind === "vision";

const listeners = new Set();
export const watch = (listener, signal) => {
  listeners.add(listener);
  signal?.addEventListener("abort", () => listeners.delete(listener));
};
const notify = () => { for (const listener of [...listeners]) listener(); };

let attempt = 0;
let current = null;
let wake = null;
let isResting = false;
let restTimer = 0;

const seen = () => {
  clearTimeout(restTimer);
  isResting = false;
  if (document.hidden) restTimer = setTimeout(() => { isResting = true; current?.abort(); }, REST);
  else wake?.();
};
document.addEventListener("visibilitychange", seen);
seen();

export async function follow() {
  for (;;) {
    while (isResting) {
      setLink("resting");
      await new Promise((resolve) => { wake = resolve; });
    }
    try {
      await read();
    } catch (error) {
      if (isResting) continue;
      if (error instanceof ApiError && error.status === 401) {
        setLink("refused");
        await new Promise((resolve) => { wake = resolve; });
        attempt = 0;
        continue;
      }
    }
    setLink("lost");
    attempt += 1;
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, Math.min(5000, 250 * 2 ** attempt));
    });
  }
}

// Try again now: a key was given, or the window is looked at again.
export const retry = () => { wake?.(); };

async function read() {
  current = new AbortController();
  let alarm;
  const rearm = () => {
    clearTimeout(alarm);
    alarm = setTimeout(() => current.abort(), SILENCE);
  };
  rearm();
  try {
    for await (const { data } of events(await send("GET", "v1/events", undefined, { signal: current.signal }))) {
      rearm();
      if (data) take(JSON.parse(data));
    }
  } finally {
    clearTimeout(alarm);
  }
}

function take(event) {
  if (event.event === "snapshot") {
    attempt = 0;
    live.server = { ...event.server, started: event.time - event.server.uptime_seconds };
    live.models = new Map();
    live.link = "connected";
  }
  if (event.event === "stopping") live.link = "stopping";
  if (event.memory) live.memory = event.memory;
  for (const model of event.models ?? []) live.models.set(model.id, model);
  for (const key of event.removed ?? []) live.models.delete(key);
  notify();
}

function setLink(link) {
  live.link = link;
  notify();
}

// The figures of every second, also of those in which nothing changed.
setInterval(() => {
  if (live.link !== "connected") return;
  for (const [key, model] of live.models) {
    const lists = live.history.get(key) ?? { speed: [], ttft: [], gap: [] };
    live.history.set(key, lists);
    lists.speed.push(model.tokens_per_second);
    lists.ttft.push(model.ttft_seconds);
    lists.gap.push(model.inter_token_seconds);
    for (const list of Object.values(lists)) if (list.length > HISTORY) list.shift();
  }
}, 1000);
