// The page: one conversation is shown, a list of all stands beside it.

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = ["Describe this picture.", "What animal is in this picture?", "What is in the background?", "Is there a person in it?"];
const AHEAD_AFTER = 250; // milliseconds after the last change, so that several pictures are sent once
const KEEP_EVERY = 500; // milliseconds between copies of an answer that is being written
let conversation;
let attached = [];
let attaching = Promise.resolve(); // until all files that were given are read
let refused = 0; // files that could not be
let editing = null; // the number of the question that is written anew, and what was in the composer before
let asking = false; // a question waits for its pictures
let answering = null; // the AbortController of the answer that is being written
let ahead = null; // pictures that are read before there is a question: a timer, and the AbortController of the request
let model = null;
let listed = ""; // what the list of conversations shows

const narrow = matchMedia("(max-width: 760px)");
const scroller = $("messages");

function warn(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

// Conversations

function begin() {
  endEdit(true);
  conversation = { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", messages: [], changed: 0 };
  show();
  readAhead();
}

function show() {
  settings.set("current", conversation.id);
  warn("");
  scroller.replaceChildren(...conversation.messages.map(messageElement));
  scroller.scrollTop = scroller.scrollHeight;
  refresh();
}

function refresh() {
  $("welcome").hidden = conversation.messages.length > 0;
  $("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} – llava-edge` : "llava-edge";
  $(answering ? "stop" : "send").hidden = false;
  hide($(answering ? "send" : "stop"), answering ? $("stop") : $("question"));
  $("attached").hidden = !attached.length;
  $("editing").hidden = !editing;
  for (const [index, node] of [...scroller.children].entries()) node.classList.toggle("replaced", Boolean(editing) && index >= editing.index);
  if (!attached.length || conversation.messages.length || $("question").value) hide($("suggestions"), answering ? $("stop") : $("question"));
  else $("suggestions").hidden = false;
  list();
}

// What is hidden can't keep the keyboard's focus.
function hide(node, next) {
  const focused = node.contains(document.activeElement);
  node.hidden = true;
  if (focused) next.focus();
}

function list() {
  const every = store.list();
  const state = JSON.stringify([conversation.id, ...every.map((each) => [each.id, each.title])]);
  if (state === listed) return;
  listed = state;
  const { id, className } = document.activeElement?.closest?.("#conversations button") ? { id: document.activeElement.dataset.id, className: document.activeElement.className } : {};
  $("conversations").replaceChildren(...every.map(listElement));
  if (id) ([...$("conversations").querySelectorAll("button")].find((button) => button.dataset.id === id && button.className === className) ?? $("new-chat")).focus();
}

function listElement(each) {
  const current = each.id === conversation.id;
  const pick = element("button", { class: "pick", type: "button", "data-id": each.id, onclick: () => select(store.memory.get(each.id)) }, each.title || "Pictures");
  if (current) pick.setAttribute("aria-current", "true");
  const drop = element("button", { class: "drop icon", type: "button", "data-id": each.id, "aria-label": `Delete “${each.title}”`, onclick: () => forget(each) }, cross());
  return element("li", { class: current ? "current" : "" }, pick, drop);
}

function cross() {
  return $("close-sidebar").querySelector("svg").cloneNode(true);
}

function select(each) {
  stop();
  endEdit(true);
  conversation = each;
  show();
  readAhead();
  sidebar(false);
}

function forget(each) {
  store.remove(each.id);
  if (each.id !== conversation.id) { refresh(); return; }
  stop();
  begin();
}

// Another tab has changed or deleted it.
function changedElsewhere(id) {
  if (id !== conversation.id || answering) { refresh(); return; }
  const each = store.memory.get(id);
  if (!each) { begin(); return; }
  conversation = each;
  if (editing?.index >= each.messages.length) endEdit(true);
  show();
}

// Messages

function messageElement(message, index) {
  return message.role === "user" ? questionElement(message, index) : answerElement(message, index);
}

function questionElement(message, index) {
  const pictures = element("div", { class: `pictures${message.pictures.length > 1 ? " many" : ""}` }, ...message.pictures.map((picture) =>
    element("button", { type: "button", "aria-label": `Show ${picture.name}`, onclick: () => view(picture) }, element("img", { src: picture.url, alt: picture.name }))));
  const edit = element("button", { type: "button", onclick: () => editQuestion(index) }, "Edit");
  return element("article", { class: "message user", "aria-label": "Your question" },
    ...(message.pictures.length ? [pictures] : []),
    ...(message.text ? [element("div", { class: "text" }, message.text)] : []),
    element("div", { class: "foot" }, edit));
}

function answerElement(message, index) {
  const text = element("div", { class: "text" }, ...rendered(message.text));
  const foot = element("div", { class: "foot" });
  if (message.error) foot.append(element("span", { class: "failed figures" }, message.error));
  if (message.figures) foot.append(element("span", { class: "figures" }, message.figures));
  if (message.text) {
    const copy = element("button", { type: "button", onclick: async () => {
      await copyText(message.text);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    } }, "Copy");
    foot.append(copy);
  }
  foot.append(element("button", { type: "button", onclick: () => again(index) }, "Ask again"));
  return element("article", { class: "message assistant", "aria-label": "Answer" }, text, foot);
}

async function copyText(text) {
  if (navigator.clipboard) { await navigator.clipboard.writeText(text); return; }
  const area = element("textarea", { class: "unseen", value: text }); // pages without https have no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function view(picture) {
  const image = $("viewer").querySelector("img");
  image.src = picture.url;
  image.alt = picture.name;
  $("viewer").showModal();
}

// What follows the question stays until the new one is asked.
function editQuestion(index) {
  stop();
  const before = editing?.before ?? { text: $("question").value, pictures: attached };
  editing = { index, before };
  compose(conversation.messages[index].text, [...conversation.messages[index].pictures]);
  $("question").focus();
}

function endEdit(restore) {
  if (!editing) return;
  const { before } = editing;
  editing = null;
  if (restore) compose(before.text, before.pictures);
}

function compose(text, pictures) {
  attached = pictures;
  $("question").value = text;
  showAttached();
  resize();
}

function again(index) {
  stop();
  endEdit(true);
  conversation.messages.length = index;
  show();
  answerQuestion();
}

// Asking

async function ask() {
  if (answering || asking) return;
  asking = true;
  const before = refused;
  await attaching;
  asking = false;
  if (refused > before) return; // a question is not asked without the picture that it is about
  const text = $("question").value.trim();
  if (answering || !(text || attached.length)) return;
  warn("");
  if (editing) conversation.messages.length = editing.index;
  endEdit(false);
  conversation.messages.push({ role: "user", text, pictures: attached });
  conversation.title ||= text.slice(0, 80) || attached[0].name;
  const reading = ahead?.control; // it goes on, and the question finds what was read
  dropAhead(false);
  compose("", []);
  show();
  await answerQuestion(reading);
}

async function answerQuestion(reading) {
  dropAhead();
  const mine = conversation; // another one may be shown before the answer ends
  const control = answering = new AbortController();
  control.signal.addEventListener("abort", () => reading?.abort());
  const message = { role: "assistant", text: "", figures: "", error: "" };
  const node = answerElement(message, mine.messages.length);
  node.classList.add("writing", "waiting");
  node.querySelector(".foot").replaceChildren();
  const question = asMessages(mine, mine.messages.length);
  const index = mine.messages.push(message) - 1;
  scroller.append(node);
  scroller.setAttribute("aria-busy", "true");
  scroller.scrollTop = scroller.scrollHeight;
  const kept = store.save(mine);
  refresh();
  await kept;
  const started = performance.now();
  const figures = { first: 0, last: 0, kept: 0, tokens: 0, server: null, reason: "" };
  try {
    for await (const chunk of streamAnswer(question, control.signal)) read(chunk, mine, message, figures, started, node);
  } catch (error) {
    if (control.signal.aborted) figures.reason = "stopped";
    else failed(error, message);
  }
  message.figures = figuresText(figures);
  if (answering === control) answering = null;
  if (mine.messages[index] === message) {
    if (!message.text && figures.reason === "stopped") mine.messages.length = index;
    await store.save(mine);
  }
  if (conversation === mine) {
    const down = atEnd();
    if (mine.messages[index] === message) node.replaceWith(answerElement(message, index));
    else node.remove();
    if (down) scroller.scrollTop = scroller.scrollHeight;
    $("spoken").textContent = message.error || message.text;
  }
  scroller.removeAttribute("aria-busy");
  refresh();
  if (!ahead) readAhead();
}

function read(chunk, mine, message, figures, started, node) {
  if (chunk.timings) figures.server = chunk.timings;
  if (chunk.usage) figures.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.finish_reason) figures.reason = choice.finish_reason;
  if (!choice.delta.content) return;
  figures.last = performance.now() - started;
  figures.first ||= figures.last;
  message.text += choice.delta.content;
  node.classList.remove("waiting");
  if (figures.last - figures.kept > KEEP_EVERY) {
    figures.kept = figures.last;
    store.save(mine);
  }
  const down = atEnd();
  node.querySelector(".text").replaceChildren(...rendered(message.text));
  if (down) scroller.scrollTop = scroller.scrollHeight;
}

function failed(error, message) {
  message.error = error.status ? error.message : `The server can't be reached: ${error.message}`;
  if (error.status === 401) openSettings($("api-key"));
  else if (!error.status) connect();
}

function figuresText(figures) {
  const parts = [];
  if (figures.first) parts.push(`first token ${(figures.first / 1000).toFixed(2)} s`);
  const speed = figures.server?.decode_tokens_per_second;
  if (speed) parts.push(`${speed.toFixed(1)} tokens/s`);
  if (figures.tokens) parts.push(`${figures.tokens} tokens`);
  if (figures.reason === "length") parts.push("cut at the longest answer");
  if (figures.reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function stop() {
  answering?.abort();
  answering = null;
}

function atEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}

// Pictures for the next question

function attachFiles(files) {
  warn("");
  const before = attaching;
  attaching = (async () => {
    await before; // in the order in which they were given
    for (const file of files) {
      try { attach(await readPicture(file)); } catch (error) { warn(error.message); refused += 1; }
    }
  })();
  $("question").focus();
}

function attach(picture) {
  attached.push(picture);
  showAttached();
}

function showAttached() {
  $("attached").replaceChildren(...attached.map((picture, index) => element("li", {},
    element("img", { src: picture.url, alt: picture.name }),
    element("button", { type: "button", "aria-label": `Remove ${picture.name}`, onclick: () => detach(index) }, cross()))));
  refresh();
  readAhead();
}

function detach(index) {
  attached.splice(index, 1);
  showAttached();
  ($("attached").querySelectorAll("button")[Math.min(index, attached.length - 1)] ?? $("question")).focus();
}

function readAhead() {
  dropAhead();
  if (!attached.length || answering) return;
  const control = new AbortController();
  const timer = setTimeout(() => {
    const messages = [...asMessages(conversation, editing?.index ?? conversation.messages.length), asQuestion({ pictures: attached, text: "" })];
    readPictures(messages, control.signal).catch(() => {}); // the question meets the same error, where it can be shown
  }, AHEAD_AFTER);
  ahead = { control, timer };
}

function dropAhead(abort = true) {
  clearTimeout(ahead?.timer);
  if (abort) ahead?.control.abort();
  ahead = null;
}

function resize() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

// Events

function listen() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("stop").addEventListener("click", () => { stop(); $("question").focus(); });
  $("cancel-edit").addEventListener("click", () => { endEdit(true); $("question").focus(); });
  $("choose").addEventListener("click", () => $("files").click());
  $("drop-zone").addEventListener("click", () => $("files").click());
  $("camera").addEventListener("click", () => camera.open());
  $("shutter").addEventListener("click", () => camera.take());
  $("camera-cancel").addEventListener("click", () => camera.close());
  $("camera-dialog").addEventListener("cancel", () => camera.close());
  for (const id of ["files", "snapshot"])
    $(id).addEventListener("change", () => { attachFiles([...$(id).files]); $(id).value = ""; });
  $("question").addEventListener("input", () => { resize(); refresh(); });
  $("question").addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // Safari ends a composition before this event
    if (event.key === "Enter" && !event.shiftKey && !composing) { event.preventDefault(); ask(); }
    const last = conversation.messages.findLastIndex((message) => message.role === "user");
    if (event.key === "ArrowUp" && !$("question").value && !attached.length && !editing && last >= 0) { event.preventDefault(); editQuestion(last); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if ($("sidebar").classList.contains("open")) sidebar(false);
    else if (editing) endEdit(true);
    else stop();
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (files.length) { event.preventDefault(); attachFiles(files); }
  });
  document.addEventListener("dragover", (event) => {
    if (event.dataTransfer.types.includes("Files")) { event.preventDefault(); $("drop-hint").hidden = false; }
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop-hint").hidden = true; });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop-hint").hidden = true;
    attachFiles([...event.dataTransfer.files]);
  });
  $("new-chat").addEventListener("click", () => { stop(); begin(); sidebar(false); $("question").focus(); });
  $("open-sidebar").addEventListener("click", () => sidebar(true));
  $("close-sidebar").addEventListener("click", () => sidebar(false));
  $("shade").addEventListener("click", () => sidebar(false));
  $("theme").addEventListener("click", switchTheme);
  $("open-settings").addEventListener("click", () => openSettings());
  $("settings").addEventListener("close", closeSettings);
  $("temperature").addEventListener("input", () => { $("temperature-value").value = $("temperature").value; });
  $("forget").addEventListener("click", () => {
    if (!confirm("Delete all conversations in this browser?")) return;
    stop();
    store.clear();
    begin();
    $("settings").close();
  });
  $("viewer").addEventListener("click", () => $("viewer").close());
  $("suggestions").append(...SUGGESTIONS.map((text) => element("li", {},
    element("button", { type: "button", onclick: () => { $("question").value = text; ask(); } }, text))));
}

async function start() {
  settings.load();
  applyTheme();
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key) {
    settings.set("key", key);
    history.replaceState(null, "", location.pathname);
  }
  listen();
  await store.open();
  store.onChange = changedElsewhere;
  const last = store.memory.get(settings.values.current);
  if (last) { conversation = last; show(); } else begin();
  connect();
  if (!narrow.matches) $("question").focus();
}

start();
