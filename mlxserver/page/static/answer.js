// An answer in sight: what it waits for, thinking, text, calls, figures. While it streams, text is only ever appended;
// a part that is complete (up to a blank line outside of code) is rendered once.

import { errorText, render } from "./api.js";
import { count, h, rate, seconds, setRendered } from "./dom.js";

const WHOLE = 50_000; // characters that are rendered in one piece at most
const PART = 20_000; // characters of a part, or of several answers, that are rendered at once
const REFERENCE = /^ {0,3}\[[^\]]+\]:/m;
const OWN_BLOCK = /^(?![-+*]\s|\d{1,9}[.)]\s)\S/;
const NEAR = "150% 0px"; // of the view, above and below it
const REST = 3; // times as long as the rendering took
const BLOCK = 4000; // characters of plain text that are laid out together

// Plain text that is only appended to, and dropped at its beginning. It is cut into blocks at line ends, so that what
// is there already is not laid out again.
class Plain {
  constructor(name) {
    this.element = h("div", { class: name });
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    this.last = null;
  }

  append(text) {
    if (!this.last || (this.last.length > BLOCK && this.last.data.endsWith("\n"))) this.#begin("");
    const end = text.indexOf("\n");
    if (this.last.length > BLOCK && end >= 0) {
      this.last.appendData(text.slice(0, end + 1));
      this.#begin(text.slice(end + 1));
    } else this.last.appendData(text);
  }

  drop(length) {
    while (length > 0 && this.element.firstChild) {
      const first = this.element.firstChild.firstChild;
      if (first.length > length || first === this.last) return first.deleteData(0, Math.min(length, first.length));
      length -= first.length;
      this.element.firstChild.remove();
    }
  }

  #begin(text) {
    this.last = document.createTextNode(text);
    const block = h("div", { class: "plain-block" });
    block.append(this.last);
    this.element.append(block);
  }
}

// Places where a Markdown text may be cut, and its parts rendered by themselves: blank lines outside of code. Each line
// is looked at once, however often the text has grown.
class Cuts {
  #fence = "";
  #scanned = 0;

  *in(text) {
    let end;
    while ((end = text.indexOf("\n", this.#scanned)) >= 0) {
      const line = text.slice(this.#scanned, end);
      const fence = /^ {0,3}(`{3,}|~{3,})/.exec(line)?.[1];
      if (fence && !this.#fence) this.#fence = fence;
      else if (fence && line.trim() === fence && fence.startsWith(this.#fence)) this.#fence = "";
      this.#scanned = end + 1;
      if (!this.#fence && (!line.trim() || fence)) yield this.#scanned;
    }
  }
}

// A Markdown text in parts that can be rendered by themselves. A list or a reference spans no parts, unless it is longer
// than what is rendered in one piece.
function parts(text) {
  if (text.length < PART || (text.length < WHOLE && REFERENCE.test(text))) return [text];
  const found = [];
  let begin = 0;
  let last = 0;
  let block = 0; // the last cut behind which a block begins that belongs to none before
  const end = (at) => {
    found.push(text.slice(begin, at));
    begin = at;
  };
  for (const cut of [...new Cuts().in(text), text.length]) {
    if (cut - begin > PART && block > begin) end(block);
    if (cut - begin > WHOLE && last > begin) end(last);
    last = cut;
    if (OWN_BLOCK.test(text.slice(cut, cut + 12))) block = cut;
  }
  return [...found, text.slice(begin)];
}

export class Answer {
  constructor() {
    this.wait = h("p", { class: "wait", hidden: true });
    this.thought = new Plain("thought");
    this.thinkingTitle = h("summary", { text: "Thinking" });
    this.thinking = h("details", { class: "thinking", hidden: true }, this.thinkingTitle, this.thought.element);
    this.done = h("div", { class: "text" });
    this.tail = new Plain("tail");
    this.tail.element.hidden = true;
    this.calls = h("div", { class: "calls" });
    this.fault = h("p", { class: "fault", role: "alert", hidden: true });
    this.figures = h("p", { class: "figures" });
    this.element = h("div", { class: "answer" }, this.wait, this.thinking, this.done, this.tail.element, this.calls, this.fault, this.figures);
    this.content = "";
    this.reasoning = "";
    this.toolCalls = [];
    this.rendered = 0; // characters of the content that are in `done`
    this.cuts = new Cuts();
    this.lastCut = 0;
    this.work = Promise.resolve();
    this.pending = { content: "", reasoning: "" };
    this.frame = 0;
  }

  // Listeners for chat().
  get on() {
    return {
      wait: (text) => { this.wait.textContent = text; this.wait.hidden = false; },
      reasoning: (text) => this.#later("reasoning", text),
      content: (text) => this.#later("content", text),
      call: (delta) => this.#call(delta),
    };
  }

  // Once per frame, however many tokens come.
  #later(name, text) {
    this[name] += text;
    this.pending[name] += text;
    if (!this.frame) this.frame = setTimeout(() => this.#flush(), 33);
  }

  #flush() {
    clearTimeout(this.frame);
    this.frame = 0;
    this.wait.hidden = true;
    const { content, reasoning } = this.pending;
    this.pending = { content: "", reasoning: "" };
    if (reasoning) {
      this.thinking.hidden = false;
      this.thinkingTitle.textContent = "Thinking …";
      this.thought.append(reasoning);
    }
    if (content) {
      if (this.reasoning) this.thinkingTitle.textContent = "Thought";
      this.tail.element.hidden = false;
      this.tail.append(content);
      this.#settle();
    }
    this.onappend?.();
  }

  // Renders what is complete.
  #settle() {
    for (const cut of this.cuts.in(this.content)) this.lastCut = cut;
    if (this.lastCut - this.rendered > 400) this.#renderUpTo(this.lastCut);
  }

  #renderUpTo(end) {
    const text = this.content.slice(this.rendered, end);
    this.rendered = end;
    const part = h("div", { class: "part" });
    this.work = this.work.then(async () => {
      const [html] = await render([text]).catch(() => [null]);
      if (html === null) part.textContent = text;
      else setRendered(part, html);
      this.done.append(part);
      this.tail.drop(text.length);
      this.onappend?.();
    });
  }

  // Once more in one piece: a list or a reference may span parts.
  async #renderWhole() {
    const [html] = await render([this.content]).catch(() => [null]);
    if (html !== null) setRendered(this.done, html);
  }

  #call(delta) {
    const known = (this.toolCalls[delta.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (delta.id) known.id = delta.id;
    if (delta.function?.name) known.name = delta.function.name;
    known.arguments += delta.function?.arguments ?? "";
    this.#showCalls();
  }

  #showCalls() {
    this.wait.hidden = true;
    this.calls.replaceChildren(...this.toolCalls.map((call) => h("div", { class: "call" },
      h("strong", { text: call.name }), h("pre", { tabindex: "0", "aria-label": `Arguments of ${call.name}` }, h("code", { text: pretty(call.arguments) })))));
  }

  // The end of a stream: the whole text as Markdown.
  async finish(figures, error) {
    this.#flush();
    this.wait.hidden = true;
    if (this.reasoning) this.thinkingTitle.textContent = "Thought";
    if (figures) this.figures.textContent = figureLine(figures);
    if (error) this.fail(error);
    if (this.rendered < this.content.length) this.#renderUpTo(this.content.length);
    await this.work;
    if (this.done.childElementCount > 1 && this.content.length < WHOLE) await this.#renderWhole();
    this.tail.element.hidden = true;
    this.tail.clear();
  }

  fail(error) {
    this.wait.hidden = true;
    this.fault.textContent = typeof error === "string" ? error : errorText(error);
    this.fault.hidden = false;
  }

  // One that was answered before: its parts as plain text, for a Backlog.
  restore(node, width) {
    this.content = node.content ?? "";
    this.rendered = this.content.length;
    this.thinking.hidden = !node.reasoning;
    this.thinkingTitle.textContent = "Thought";
    this.thought.append(node.reasoning ?? "");
    this.toolCalls = node.calls ?? [];
    this.#showCalls();
    const texts = parts(this.content);
    this.done.append(...texts.filter(Boolean).map((text) => {
      const part = h("div", { class: texts.length > 1 ? "part plain-text" : "plain-text", text });
      if (texts.length > 1) part.style.containIntrinsicHeight = `auto ${guessHeight(text, width)}px`;
      return part;
    }));
    this.figures.textContent = node.figures ?? "";
    if (node.error) this.fail(node.error);
    return this;
  }
}

// Answers of a conversation that was reopened: plain text first. Parts near the view are rendered at once; the others,
// the last first, with pauses, for rendering takes time of the server. mayRest: whether it may be asked for those now.
export class Backlog {
  #plain = new Map(); // by part: the element whose nearness counts for it
  #near = new Set();
  #isAtWork = false;
  #wake = null;

  constructor(scroller, { mayRest, onshow }) {
    this.mayRest = mayRest;
    this.onshow = onshow;
    this.sight = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        target.classList.toggle("near", isIntersecting);
        if (isIntersecting) this.#near.add(target);
        else this.#near.delete(target);
      }
      this.onshow(); // what is laid out now may have another height than the guess; WebKit may observe no resize before it paints
      this.#wake?.();
      this.work();
    }, { root: scroller, rootMargin: NEAR });
  }

  // Adds a turn, with its answer if it is one.
  add(turn, answer) {
    this.sight.observe(turn);
    const isPlain = (part) => part.classList.contains("plain-text") && part.textContent.length <= WHOLE;
    const found = [...answer?.done.children ?? []].filter(isPlain);
    for (const part of found) this.#plain.set(part, found.length > 1 ? part : turn);
    if (found.length > 1) for (const part of found) this.sight.observe(part);
  }

  clear() {
    this.sight.disconnect();
    this.#plain.clear();
    this.#near.clear();
  }

  // Goes on, if there is something to do. After a failure it does so when something else comes near.
  async work() {
    if (this.#isAtWork) return;
    this.#isAtWork = true;
    try {
      for (let batch; (batch = this.#next()).length;) {
        const began = performance.now();
        const html = await render(batch.map((part) => part.textContent));
        batch.forEach((part, n) => {
          if (!this.#plain.delete(part)) return;
          part.classList.remove("plain-text");
          setRendered(part, html[n]);
        });
        this.onshow();
        if (!this.#nearby().length) await this.#pause(REST * (performance.now() - began));
      }
    } catch { /* it stays plain text */ } finally { this.#isAtWork = false; }
  }

  #nearby() {
    return [...this.#plain].filter(([, place]) => this.#near.has(place)).map(([part]) => part);
  }

  // The parts to render together.
  #next() {
    for (const part of [...this.#plain.keys()]) if (!part.isConnected) this.#plain.delete(part);
    const near = this.#nearby();
    const left = near.length || !this.mayRest() ? near : [...this.#plain.keys()];
    const batch = left.splice(-1);
    let size = batch[0]?.textContent.length;
    while (left.length && batch.length < 20 && (size += left.at(-1).textContent.length) <= PART) batch.push(left.pop());
    return batch;
  }

  #pause(ms) {
    return new Promise((resolve) => {
      this.#wake = resolve;
      setTimeout(resolve, ms);
    });
  }
}

// Pixels that a text takes, as a guess, for what is not laid out yet.
export function guessHeight(text, width) {
  const perLine = Math.max(20, width / 7.7);
  let lines = 0;
  for (const line of text.split("\n")) lines += line ? Math.ceil(line.length / perLine) : 0.5;
  return Math.round(24 * lines);
}

export function figureLine({ usage, timings, ttft, finish, seconds: whole, stopped }) {
  const parts = [];
  if (usage) {
    const details = [];
    const reasoning = usage.completion_tokens_details?.reasoning_tokens;
    if (reasoning) details.push(`${count(reasoning)} thinking`);
    parts.push(`${count(usage.completion_tokens)} tokens${details.length ? ` (${details})` : ""}`);
  }
  if (timings?.predicted_per_second) parts.push(`${rate(timings.predicted_per_second)} tokens/s`);
  if (ttft !== null && ttft !== undefined) parts.push(`first after ${seconds(ttft)}`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`prompt ${count(usage.prompt_tokens)}${cached ? `, ${count(cached)} cached` : ""}`);
  }
  if (whole) parts.push(seconds(whole));
  if (stopped) parts.push("stopped");
  else if (finish && finish !== "stop") parts.push(finish === "length" ? "cut at the limit" : finish.replace("_", " "));
  return parts.join(" · ");
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch { return text; }
}
