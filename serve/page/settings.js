// The settings form: stored in this browser, turned into the fields of a request.

const KEY = "headrace-settings";
// The server's defaults. Such values are not sent.
const NEUTRAL = { top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 };
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

const element = (id) => document.getElementById(id);
const fields = () => [...document.querySelectorAll("[data-setting]")];

export function setUpSettings() {
  const defaults = Object.fromEntries(fields().map((field) => [field.id, field.value]));
  const fill = (values) => fields().forEach((field) => (field.value = values[field.id] ?? field.value));
  try {
    fill(JSON.parse(localStorage.getItem(KEY) ?? "{}"));
  } catch {
    localStorage.removeItem(KEY); // another release wrote it
  }
  element("settings").addEventListener("input", () => {
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(fields().map((field) => [field.id, field.value]))));
    checkSchema();
  });
  element("settings").addEventListener("submit", (event) => event.preventDefault());
  element("reset").addEventListener("click", () => {
    fill(defaults);
    localStorage.removeItem(KEY);
    checkSchema();
  });
  checkSchema();
}

// The schema as an object, or null. Throws SyntaxError and shows the message beside the box.
function checkSchema() {
  const text = element("schema").value.trim();
  let schema = null;
  let problem = "";
  try {
    schema = text ? JSON.parse(text) : null;
    if (schema !== null && (typeof schema !== "object" || Array.isArray(schema))) problem = "A schema is a JSON object.";
  } catch (error) {
    problem = error.message;
  }
  element("schema").setAttribute("aria-invalid", String(problem !== ""));
  element("schema-error").hidden = problem === "";
  element("schema-error").textContent = problem;
  return problem ? undefined : schema;
}

// The fields of a request, or null if one is invalid; that one then gets the focus.
export function requestFields() {
  const schema = checkSchema();
  const invalid = fields().find((field) => !field.checkValidity());
  if (invalid || schema === undefined) {
    document.getElementById("side").classList.add("open");
    (invalid ?? element("schema")).focus();
    invalid?.reportValidity();
    return null;
  }
  const wanted = {};
  for (const name of NUMBERS) {
    const text = element(name).value;
    if (text !== "" && Number(text) !== NEUTRAL[name]) wanted[name] = Number(text);
  }
  if (element("stop_text").value) wanted.stop = element("stop_text").value;
  if (schema) {
    wanted.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  return wanted;
}

export const systemMessage = () => element("system").value.trim();
