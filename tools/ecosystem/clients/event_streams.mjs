// eventsource-parser, a strict reader of event streams.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createParser } from "eventsource-parser";

const manifest = new URL("./node_modules/eventsource-parser/package.json", import.meta.url);
console.log("eventsource-parser", JSON.parse(readFileSync(manifest)).version);
const events = [];
const parser = createParser({
  onEvent: (event) => events.push(event.data),
  onError: (error) => {
    throw error;
  },
});
const response = await fetch(`${process.env.OPENAI_BASE_URL}/chat/completions`, {
  method: "POST",
  body: JSON.stringify({
    model: process.env.MODEL,
    messages: [{ role: "user", content: "Repeat after me: 👨‍👩‍👧 é 🇫🇷 日本語" }],
    stream: true,
    temperature: 0,
    max_tokens: 40,
    stop: "\n",
  }),
});
const decoder = new TextDecoder("utf-8", { fatal: true });
for await (const bytes of response.body) parser.feed(decoder.decode(bytes, { stream: true }));
assert.equal(events.pop(), "[DONE]");
const pieces = events.map((event) => JSON.parse(event).choices[0].delta.content ?? "");
assert(pieces.join("").length > 0 && !pieces.some((piece) => piece.includes("\ufffd")));
console.log("stream");
