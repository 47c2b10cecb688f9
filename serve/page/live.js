// The live view: polls /status and draws slots, queue, cache and the running requests. Reconnects automatically.

import { apiKey, getJson, Lost, Refused } from "/page/api.js";

const EVERY_MS = 1000;
const LONGEST_WAIT_MS = 15000;
const HISTORY = 120;
const MAX_SLOTS = 64;

const element = (id) => document.getElementById(id);

export class Live {
  // onStatus is called with every status, onKey if a key is missing or wrong.
  constructor(modelName, onStatus, onKey) {
    this.modelName = modelName;
    this.onStatus = onStatus;
    this.onKey = onKey;
    this.failures = 0;
    this.history = [];
    this.timer = null;
    document.addEventListener("visibilitychange", () => document.hidden || this.now());
    window.addEventListener("online", () => this.now());
    this.now();
  }

  // Starts to poll.
  now() {
    clearTimeout(this.timer);
    this.poll();
  }

  async poll() {
    const turn = (this.turn = Symbol("turn"));
    try {
      const status = await getJson("/status", AbortSignal.timeout(8000));
      if (turn !== this.turn) return;
      this.failures = 0;
      this.draw(status);
      this.onStatus(status);
    } catch (error) {
      if (turn !== this.turn) return;
      this.failures += 1;
      this.fail(error);
    }
    if (!document.hidden) this.timer = setTimeout(() => this.poll(), this.wait());
  }

  wait() {
    return this.failures ? Math.min(LONGEST_WAIT_MS, EVERY_MS * 2 ** (this.failures - 1)) : EVERY_MS;
  }

  fail(error) {
    if (error instanceof Refused && error.status === 401) {
      this.state("offline", apiKey.get() ? "key refused" : "needs a key");
      if (this.failures === 1) this.onKey();
    } else if (error instanceof Lost || error.name === "TimeoutError") {
      this.state("offline", `offline, trying again in ${Math.round(this.wait() / 1000)} s`);
    } else {
      this.state("offline", error.message);
    }
  }

  state(kind, text) {
    element("state").dataset.state = kind;
    element("state-text").textContent = text;
  }

  draw(status) {
    const model = status.models.find((item) => item.name === this.modelName()) ?? status.models[0];
    const isFull = model.waiting > 0;
    this.state(model.status === "ready" ? (isFull ? "busy" : "ready") : "offline", isFull ? "busy" : model.status);
    drawSlots(model);
    const share = model.kv_tokens ? model.kv_tokens_used / model.kv_tokens : 0;
    element("kv").value = share;
    element("kv-text").textContent = `${(100 * share).toFixed(share && share < 0.1 ? 1 : 0)} %`;
    element("batch-text").textContent =
      `${model.running} of ${model.slots} slots in use` + (model.waiting ? `, ${model.waiting} waiting` : "");
    this.history = [...this.history, model.running].slice(-HISTORY);
    drawHistory(this.history, Math.max(4, ...this.history));
    drawRequests(status.requests);
  }
}

function drawSlots(model) {
  const box = element("slots");
  const scale = Math.max(1, Math.ceil(model.slots / MAX_SLOTS));
  const count = Math.ceil(model.slots / scale);
  const used = Math.ceil(model.running / scale);
  const queued = Math.min(16, model.waiting);
  const cells = Array.from({ length: count + queued }, (_, index) => {
    const cell = document.createElement("span");
    cell.className = "slot" + (index >= count ? " queued" : index < used ? " used" : "");
    return cell;
  });
  box.replaceChildren(...cells);
  box.setAttribute("aria-label", `${model.running} of ${model.slots} slots in use, ${model.waiting} waiting`);
}

function drawHistory(values, highest) {
  const points = values.map((value, index) => {
    const x = 120 - (values.length - 1 - index);
    return `${x},${(26 - (24 * value) / highest).toFixed(1)}`;
  });
  const line = points.length ? `M${points.join("L")}` : "";
  element("history-line").setAttribute("d", line);
  element("history-area").setAttribute("d", line && `${line}L120,28L${120 - (values.length - 1)},28Z`);
}

function drawRequests(requests) {
  const rows = requests.slice(0, 8).map((request) => {
    const row = document.createElement("li");
    const left = document.createElement("span");
    const right = document.createElement("span");
    left.textContent = request.choices > 1 ? `${request.choices} answers` : request.request_id.slice(0, 8);
    right.textContent = `${request.prompt_tokens} \u2192 ${request.completion_tokens} tokens, ${request.seconds.toFixed(1)} s`;
    row.append(left, right);
    return row;
  });
  element("requests").replaceChildren(...rows);
}
