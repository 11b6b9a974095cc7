// OpenAI's JavaScript SDK against modelyard's gateway: chat, streams, tools, JSON, embeddings, errors.
//
//   npm install && node openai.mjs http://127.0.0.1:7462/v1
import OpenAI from "openai";

const [baseURL = "http://127.0.0.1:7462/v1"] = process.argv.slice(2);
// The key is not looked at: there is no authentication yet.
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const model = "auto"; // leaves the choice to modelyard
const messages = [{ role: "user", content: "What is modelyard?" }];

const models = await client.models.list();
console.log("models:", models.data.map(({ id }) => id));

const { data, response } = await client.chat.completions
  .create({ model, messages, max_tokens: 40, temperature: 0 }, { headers: { "X-Modelyard-Explain": "true" } })
  .withResponse();
console.log("chat:", data.choices[0].message.content);
console.log("chosen:", response.headers.get("x-modelyard-server"), response.headers.get("x-modelyard-decision"));

let pieces = 0;
let tokens = 0;
for await (const chunk of await client.chat.completions.create({
  model,
  messages,
  temperature: 0,
  stream: true,
  stream_options: { include_usage: true },
})) {
  if (chunk.choices[0]?.delta.content) pieces += 1;
  tokens = chunk.usage?.completion_tokens ?? tokens;
}
console.log("stream:", pieces, "pieces,", tokens, "tokens");

const question = [{ role: "user", content: "What is the weather in Paris?" }];
const weather = {
  name: "get_weather",
  description: "Tells the weather of a city.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};
const tools = [{ type: "function", function: weather }];
const called = client.chat.completions.stream({
  model,
  messages: question,
  tools,
  tool_choice: "required",
  temperature: 0,
});
const { message } = (await called.finalChatCompletion()).choices[0];
const [call] = message.tool_calls;
console.log("tool:", call.function.name, JSON.parse(call.function.arguments));
const result = { role: "tool", tool_call_id: call.id, content: "sunny, 21 degrees" };
const told = await client.chat.completions.create({
  model,
  messages: [...question, { role: "assistant", tool_calls: message.tool_calls }, result],
  tools,
  max_tokens: 40,
});
console.log("after the tool:", told.choices[0].message.content);

const schema = {
  type: "object",
  properties: { name: { type: "string" } },
  required: ["name"],
  additionalProperties: false,
};
const named = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "Give me a name as JSON." }],
  temperature: 0,
  response_format: { type: "json_schema", json_schema: { name: "name", schema, strict: true } },
});
console.log("schema:", JSON.parse(named.choices[0].message.content));

const answer = await client.responses.create({ model, input: "What is a lease?", max_output_tokens: 40 });
console.log("response:", answer.output_text);
const events = client.responses.stream({ model, input: "What is a lease?", max_output_tokens: 40 });
let deltas = 0;
events.on("response.output_text.delta", () => (deltas += 1));
await events.finalResponse();
console.log("response stream:", deltas, "pieces");

const completion = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 10 });
console.log("completion:", completion.choices[0].text);

const vectors = await client.embeddings.create({ model, input: ["one", "two"] });
console.log("embeddings:", vectors.data.length, "of length", vectors.data[0].embedding.length);

for (const request of [{ model: "gpt-9", messages }, { model, messages, temperature: 9 }]) {
  try {
    await client.chat.completions.create(request);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    console.log("error:", error.status, error.code, error.param);
  }
}
console.log("done");
