// The Vercel AI SDK with its provider for OpenAI-compatible servers.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "local",
  baseURL: process.env.OPENAI_BASE_URL,
  supportsStructuredOutputs: true,
});
const common = {
  model: provider(process.env.MODEL),
  prompt: "What is the capital of France?",
  temperature: 0,
  maxOutputTokens: 60,
};
const city = z.object({ city: z.enum(["Paris", "London"]) });
console.log("ai", JSON.parse(readFileSync(new URL("./node_modules/ai/package.json", import.meta.url))).version);

assert((await generateText(common)).text.includes("Paris"));
console.log("chat");

let text = "";
for await (const piece of streamText(common).textStream) text += piece;
assert(text.includes("Paris"));
console.log("stream");

const tools = { weather: tool({ description: "Weather.", inputSchema: city }) };
const called = await generateText({ ...common, tools, toolChoice: "required" });
assert.equal(called.toolCalls[0].toolName, "weather");
console.log("tools");

const structured = await generateText({ ...common, output: Output.object({ schema: city }) });
assert(structured.output.city);
console.log("structured");
