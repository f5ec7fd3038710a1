// What stands around the conversation: settings, colours, the list at the side, and whether the server is there.

function openSettings(focused) {
  const { temperature, maxTokens, imageTokens, system, key } = settings.values;
  $("temperature").value = temperature;
  $("temperature-value").value = temperature;
  $("max-tokens").value = maxTokens;
  $("system").value = system;
  $("api-key").value = key;
  const counts = model?.image_tokens;
  $("image-tokens").replaceChildren(
    element("option", { value: 0 }, counts ? `As the model likes (${counts.default})` : "As the model likes"),
    ...(counts?.trained ?? []).map((count) => element("option", { value: count }, String(count))));
  $("image-tokens").value = imageTokens;
  $("image-tokens").disabled = !counts;
  if (!$("settings").open) $("settings").showModal();
  focused?.focus?.();
}

function closeSettings() {
  settings.set("temperature", Number($("temperature").value));
  const longest = Number.parseInt($("max-tokens").value, 10);
  if (longest >= 1) settings.set("maxTokens", longest);
  if (!$("image-tokens").disabled) settings.set("imageTokens", Number($("image-tokens").value));
  settings.set("system", $("system").value);
  settings.set("key", $("api-key").value.trim());
  readAhead();
  connect();
}

function applyTheme() {
  if (settings.values.theme) document.documentElement.dataset.theme = settings.values.theme;
}

function switchTheme() {
  const now = settings.values.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  settings.set("theme", now === "dark" ? "light" : "dark");
  applyTheme();
}

function sidebar(open) {
  $("sidebar").classList.toggle("open", open);
  $("shade").hidden = !open;
  $("open-sidebar").setAttribute("aria-expanded", String(open));
  if (narrow.matches) (open ? $("new-chat") : $("open-sidebar")).focus();
}

async function connect() {
  let state = "ready";
  try {
    model = (await (await request("v1/models")).json()).data[0];
    $("status-text").textContent = model.id;
    if (!(model.image_tokens?.trained ?? [0]).includes(settings.values.imageTokens)) settings.set("imageTokens", 0);
  } catch (error) {
    state = error.status === 503 ? "" : "lost";
    $("status-text").textContent = error.status === 401 ? "key needed" : error.status === 503 ? "loading…" : "no server";
    if (error.status === 401 && !$("settings").open) openSettings($("api-key"));
    if (error.status !== 401) setTimeout(connect, error.status === 503 ? 700 : 3000);
  }
  $("status").className = `status ${state}`;
}
