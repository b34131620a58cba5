// The chat page: asks /v1/chat/completions, and shows reasoning and text as they come.
"use strict";

const byId = (id) => document.getElementById(id);
// Without a user and password that the page's own address may hold: fetch refuses those.
const address = (path) => new URL(path, location.origin + location.pathname);
const messages = [];
let model = null;
let asking = null; // the AbortController of the request in flight

class ApiProblem extends Error {}

async function problem(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch (error) {
    // Not from the server itself: its status has to do.
  }
  if (response.status === 401) message += " (reload the page and give the key as the password)";
  return new ApiProblem(message);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiProblem("the connection ended before the answer did");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      const data = JSON.parse(part.slice(6));
      if (data.error) throw new ApiProblem(data.error.message);
      yield data;
    }
  }
}

function body() {
  const asked = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if (byId(name).value !== "") asked[name] = Number(byId(name).value);
  }
  asked.chat_template_kwargs = { enable_thinking: byId("thinking").checked };
  return JSON.stringify(asked);
}

function answerNodes() {
  const reasoning = element("div", "text");
  const title = element("summary", "", "Thinking");
  const details = element("details", "reasoning working", title, reasoning);
  details.hidden = true;
  const text = element("div", "text");
  const turn = element("article", "turn assistant", details, text);
  byId("turns").append(turn);
  return { turn, details, title, reasoning, text };
}

async function ask(prompt) {
  const begun = performance.now();
  const seconds = () => `${((performance.now() - begun) / 1000).toFixed(1)} s`;
  messages.push({ role: "user", content: prompt });
  byId("welcome").hidden = true;
  byId("fresh").hidden = false;
  const question = element("div", "text");
  byId("turns").append(element("article", "turn user", question));
  question.append(...blocks(prompt).map(block));
  const nodes = answerNodes();
  const reasoning = new Text(nodes.reasoning, () => nodes.details.open);
  const text = new Text(nodes.text);
  nodes.details.addEventListener("toggle", () => reasoning.show());
  scrollTo({ top: document.body.scrollHeight });

  const thought = () => {
    nodes.details.classList.remove("working");
    nodes.title.textContent = `Thought for ${seconds()}`;
  };
  asking = new AbortController();
  byId("send").textContent = "Stop";
  byId("status").textContent = "Waiting for the model";
  let finish = null;
  let usage = null;
  try {
    const response = await fetch(address("v1/chat/completions"), {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: body(),
      signal: asking.signal,
    });
    if (!response.ok) throw await problem(response);
    for await (const chunk of events(response)) {
      usage = chunk.usage || usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      const follows = innerHeight + scrollY >= document.body.scrollHeight - 80;
      if (choice.delta.reasoning_content) {
        nodes.details.hidden = false;
        reasoning.add(choice.delta.reasoning_content);
        byId("status").textContent = `Thinking, ${seconds()}`;
      }
      if (choice.delta.content) {
        if (!text.text && reasoning.text) thought();
        text.add(text.text ? choice.delta.content : choice.delta.content.trimStart());
        byId("status").textContent = `Writing, ${seconds()}`;
      }
      finish = choice.finish_reason || finish;
      if (follows) scrollTo({ top: document.body.scrollHeight });
    }
    if (finish === "length") byId("status").textContent = "Cut at the most tokens";
    else byId("status").textContent = "";
  } catch (error) {
    byId("status").textContent = error.name === "AbortError" ? "Stopped" : "";
    if (error.name !== "AbortError") nodes.turn.append(element("p", "error", `Error: ${error.message}`));
  }
  if (!text.text && reasoning.text) thought();
  nodes.details.classList.remove("working");
  if (usage) {
    const count = usage.completion_tokens;
    const cut = finish === "length" ? ", cut at the most tokens" : "";
    nodes.turn.append(element("p", "soft count", `${count} tokens in ${seconds()}${cut}`));
  }
  if (text.text) messages.push({ role: "assistant", content: text.text });
  else messages.pop(); // a question without an answer is not asked along with the next one
  asking = null;
  byId("send").textContent = "Prove";
}

function submit() {
  if (asking) {
    asking.abort();
    return;
  }
  const prompt = byId("prompt").value.trim();
  if (!prompt) return;
  byId("prompt").value = "";
  ask(prompt);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !asking) {
    event.preventDefault();
    submit();
  }
});
byId("fresh").addEventListener("click", () => {
  if (asking) asking.abort();
  location.reload();
});
for (const button of byId("examples").querySelectorAll("button")) {
  const source = button.textContent;
  button.replaceChildren(...inline(source));
  button.addEventListener("click", () => {
    byId("prompt").value = source;
    byId("prompt").focus();
  });
}

(async () => {
  try {
    const response = await fetch(address("v1/models"));
    if (!response.ok) throw await problem(response);
    model = (await response.json()).data[0].id;
    byId("model").textContent = model;
    document.title = `${model} - qed_jax`;
  } catch (error) {
    byId("turns").prepend(element("p", "error", `Error: ${error.message}`));
  }
})();
