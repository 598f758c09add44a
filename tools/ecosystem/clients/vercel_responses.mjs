// The Vercel AI SDK with its provider for OpenAI, which speaks the responses API.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
const common = {
  model: provider(process.env.MODEL),
  prompt: "What is the capital of France?",
  temperature: 0,
  maxOutputTokens: 60,
  maxRetries: 0,
};
const city = z.object({ city: z.enum(["Paris", "London"]) });
console.log("@ai-sdk/openai", JSON.parse(readFileSync(new URL("./node_modules/@ai-sdk/openai/package.json", import.meta.url))).version);

const whole = await generateText(common);
assert(whole.text.includes("Paris"));
assert(whole.usage.outputTokens > 0);
console.log("whole");

let text = "";
for await (const piece of streamText(common).textStream) text += piece;
assert(text.includes("Paris"));
console.log("stream");

// Two steps: with the store the second one refers to the items of the first, without it sends them.
const weather = tool({ description: "Weather.", inputSchema: city, execute: async () => "Sunny." });
for (const store of [true, false]) {
  const run = streamText({
    ...common,
    tools: { weather },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
    providerOptions: { openai: { store } },
    onError: ({ error }) => { throw error; },
  });
  const steps = await run.steps;
  assert.equal(steps.length, 2);
  assert.equal(steps[0].toolCalls[0].toolName, "weather");
  assert.equal(steps[0].toolResults[0].output, "Sunny.");
  assert.notEqual(steps[1].text, "");
}
console.log("tools");

const structured = await generateText({ ...common, output: Output.object({ schema: city }) });
assert(structured.output.city);
console.log("structured");
