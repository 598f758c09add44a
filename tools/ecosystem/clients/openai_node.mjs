// The official SDK for Node, with only its base URL changed.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const model = process.env.MODEL;
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, temperature: 0, max_tokens: 40 };
const parameters = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", description: "Weather.", parameters } }];
const client = new OpenAI();
console.log("openai", JSON.parse(readFileSync(new URL("./node_modules/openai/package.json", import.meta.url))).version);

assert((await client.models.list()).data.some((each) => each.id === model));
console.log("list");

const whole = await client.chat.completions.create(options);
assert(whole.choices[0].message.content.includes("Paris"));
console.log("chat");

let text = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert(text.includes("Paris"));
console.log("stream");

const called = await client.chat.completions.create({ ...options, tools, tool_choice: "required" });
assert.equal(called.choices[0].message.tool_calls[0].function.name, "weather");
console.log("tools");

const schema = { name: "capital", strict: true, schema: parameters };
const structured = await client.chat.completions.create({
  ...options,
  response_format: { type: "json_schema", json_schema: schema },
});
assert(JSON.parse(structured.choices[0].message.content).city);
console.log("structured");

const bare = await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 8 });
assert(bare.choices[0].text);
console.log("completions");
