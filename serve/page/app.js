// The page: one conversation, one request at a time. The other files draw its parts.

import { apiKey, getJson, Lost, Refused, streamChat } from "/page/api.js";
import { Figures } from "/page/figures.js";
import { Live } from "/page/live.js";
import { clearMessages, Message } from "/page/messages.js";
import { requestFields, setUpSettings, systemMessage } from "/page/settings.js";

const MAX_WAITS = 5;
const element = (id) => document.getElementById(id);

let conversation = []; // {role, content}, without the system message
let running = null; // AbortController of the answer that comes
let models = new Map();

const live = new Live(() => element("model").value, onStatus, askForKey);
setUpSettings();
setUpTheme();
setUpButtons();
setUpKeys();

// ---- one answer

async function send(text) {
  const wanted = requestFields();
  if (!text || running || !wanted) return;
  hideNotice();
  conversation.push({ role: "user", content: text });
  const asked = new Message("user", text);
  element("question").value = "";
  const outcome = await answer(wanted);
  if (outcome === "nothing") {
    // No token came: put the question back into the input.
    conversation.pop();
    asked.remove();
    element("question").value ||= text;
    if (!conversation.length) clearMessages();
  }
  element("question").focus();
}

// Streams an answer to the conversation. Returns "whole", "part" or "nothing".
async function answer(wanted) {
  const system = systemMessage();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : [...conversation];
  const message = new Message("assistant");
  setRunning(new AbortController(), message);
  try {
    const reason = await stream({ model: element("model").value, messages, ...wanted }, message);
    if (reason === "length") message.note("Cut: the answer reached the limit of tokens in the settings.");
    conversation.push({ role: "assistant", content: message.text });
    return "whole";
  } catch (error) {
    const isStopped = error.name === "AbortError";
    if (!isStopped) showNotice(error);
    if (!message.text) {
      message.remove();
      return "nothing";
    }
    message.note(isStopped ? "Stopped." : error.message, !isStopped);
    conversation.push({ role: "assistant", content: message.text });
    return "part";
  } finally {
    setRunning(null, message);
    live.now();
  }
}

// Sends a request, again if the server is busy. Returns why the answer ended.
async function stream(body, message) {
  for (let waits = 0; ; waits += 1) {
    try {
      return await streamOnce(body, message);
    } catch (error) {
      if (!(error instanceof Refused) || !error.retryAfter || waits === MAX_WAITS || message.text) throw error;
      await pause(error.retryAfter, error.message);
    }
  }
}

async function streamOnce(body, message) {
  const figures = new Figures();
  let reason = null;
  for await (const chunk of streamChat(body, running.signal)) {
    for (const choice of chunk.choices) {
      if (choice.delta.content) {
        figures.piece();
        message.add(choice.delta.content);
      }
      reason = choice.finish_reason ?? reason;
    }
    if (chunk.usage) figures.usage(chunk.usage);
  }
  return reason;
}

function setRunning(controller, message) {
  running = controller;
  message.isRunning = controller !== null;
  element("send").hidden = controller !== null;
  element("stop").hidden = controller === null;
  element("messages").setAttribute("aria-busy", String(controller !== null));
}

// Counts down to the next try. Stop ends it.
async function pause(seconds, why) {
  const { signal } = running;
  for (let left = seconds; left > 0; left -= 1) {
    showNotice(new Error(`${why} Trying again in ${left} s.`), "wait");
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (signal.aborted) {
      hideNotice();
      throw new DOMException("stopped", "AbortError");
    }
  }
  hideNotice();
}

// ---- the controls around it

function showNotice(error, kind = "error") {
  element("notice").hidden = false;
  element("notice").dataset.kind = kind;
  element("notice-text").textContent = error.message;
  element("retry").hidden = kind === "wait" || !(error instanceof Lost || error instanceof Refused);
  if (error instanceof Refused && error.status === 401) askForKey();
}

function hideNotice() {
  element("notice").hidden = true;
}

// Sends the last question again, without the part of an answer that had come.
function retry() {
  if (conversation.at(-1)?.role === "assistant" && element("question").value === "") {
    conversation.pop();
    const { content } = conversation.pop();
    [...document.querySelectorAll(".message")].slice(-2).forEach((message) => message.remove());
    send(content);
  } else {
    send(element("question").value.trim());
  }
}

function onStatus(status) {
  const names = status.models.map((model) => model.name);
  const select = element("model");
  if (names.join("\n") !== [...select.options].map((option) => option.value).join("\n")) {
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) select.value = chosen;
  }
  const isNew = status.models.some((model) => model.status === "ready" && !models.has(model.name));
  if (isNew) loadModels();
}

async function loadModels() {
  try {
    const { data } = await getJson("/v1/models", AbortSignal.timeout(8000));
    models = new Map(data.map((model) => [model.id, model]));
    describeModel();
  } catch {
    models = new Map(); // the next status asks again
  }
}

function describeModel() {
  const model = models.get(element("model").value);
  if (!model) return;
  const receipt = model.receipt ? (model.receipt.passed ? "receipt passed" : "receipt FAILED") : "";
  const words = [model.precision, `${model.max_model_len.toLocaleString("en")} tokens of context`, receipt];
  element("welcome-model").textContent = `${model.id}: ${words.filter(Boolean).join(", ")}`;
}

function askForKey() {
  if (element("key-dialog").open) return;
  element("key-input").value = apiKey.get();
  element("key-dialog").showModal();
}

function setUpTheme() {
  const apply = (theme) => (theme ? (document.documentElement.dataset.theme = theme) : null);
  apply(localStorage.getItem("headrace-theme"));
  element("theme").addEventListener("click", () => {
    const isDark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
      (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    localStorage.setItem("headrace-theme", isDark ? "light" : "dark");
    apply(isDark ? "light" : "dark");
  });
}

function newChat() {
  running?.abort();
  conversation = [];
  hideNotice();
  clearMessages();
  element("question").focus();
}

function setUpButtons() {
  element("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(element("question").value.trim());
  });
  element("stop").addEventListener("click", () => running?.abort());
  element("retry").addEventListener("click", retry);
  element("new").addEventListener("click", newChat);
  element("key").addEventListener("click", askForKey);
  element("model").addEventListener("change", () => {
    describeModel();
    live.now();
  });
  element("panel").addEventListener("click", () => {
    const isOpen = element("side").classList.toggle("open");
    element("panel").setAttribute("aria-expanded", String(isOpen));
  });
  element("key-dialog").addEventListener("close", () => {
    if (element("key-dialog").returnValue !== "save") return;
    apiKey.set(element("key-input").value.trim());
    models = new Map();
    live.failures = 0;
    live.now();
  });
  for (const idea of document.querySelectorAll(".idea")) idea.addEventListener("click", () => send(idea.textContent));
}

function setUpKeys() {
  element("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(element("question").value.trim());
    }
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
    if (event.key === "Escape" && running) running.abort();
    else if (event.altKey && event.key.toLowerCase() === "n") newChat();
    else if (event.altKey && event.key.toLowerCase() === "t") element("theme").click();
    else if (event.key === "/" && !isTyping && !element("key-dialog").open) element("question").focus();
    else return;
    event.preventDefault();
  });
}
