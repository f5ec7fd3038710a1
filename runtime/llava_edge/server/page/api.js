// The server, by the same protocol that every other program speaks.

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (settings.values.key) headers.Authorization = `Bearer ${settings.values.key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `The server answers with status ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status has to do */ }
  const error = new Error(message);
  error.status = response.status;
  throw error;
}

function complete(body, signal) {
  const { imageTokens } = settings.values;
  if (imageTokens) body.image_tokens = imageTokens;
  return request("v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
}

// The server reads the pictures and answers nothing, while the question about them is typed.
async function readPictures(messages, signal) {
  await complete({ messages, max_tokens: 0 }, signal);
}

async function* streamAnswer(messages, signal) {
  const { temperature, maxTokens } = settings.values;
  const response = await complete({
    messages, temperature, max_tokens: maxTokens, stream: true, stream_options: { include_usage: true },
  }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server ended the answer before its end.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const each of events) {
      const data = each.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const message = JSON.parse(data);
      if (message.error) throw Object.assign(new Error(message.error.message), { status: 500 });
      yield message;
    }
  }
}

function asMessages(conversation, count) {
  const messages = settings.values.system.trim() ? [{ role: "system", content: settings.values.system }] : [];
  for (const message of conversation.messages.slice(0, count)) {
    if (message.role === "assistant") {
      if (message.text) messages.push({ role: "assistant", content: message.text });
    } else messages.push(asQuestion(message));
  }
  return messages;
}

function asQuestion({ pictures, text }) {
  return { role: "user", content: [
    ...pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } })),
    ...(text ? [{ type: "text", text }] : []),
  ] };
}
