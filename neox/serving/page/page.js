// The page asks the API that serves it and shows the text as it comes. What the model writes is only
// ever the data of a text node. Controls and prompt are kept in localStorage, the API key nowhere.

const element = (id) => document.getElementById(id);
const [form, login, model, prompt] = ["form", "login", "model", "prompt"].map(element);
const [generateButton, stopButton, continueButton, copyButton] =
  ["generate", "halt", "continue", "copy"].map(element);
const [answer, measured, status, error] = ["answer", "measured", "status", "error"].map(element);
const text = answer.appendChild(new Text());

let apiKey = "";
let running = null; // the AbortController of the answer that is being written

// ---- the API

async function ask(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new Error(await explain(response));
  return response;
}

async function explain(response) {
  if (response.status === 401) {
    login.hidden = false;
    element("key").focus();
    return apiKey ? "The server does not accept this API key." : "The server wants an API key.";
  }
  let message = `${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // Something between us and the server answered: its status has to do.
  }
  if (response.status < 500 && response.status !== 429) return `The server refuses: ${message}`;
  const seconds = response.headers.get("Retry-After");
  return `The server cannot answer now: ${message}` + (seconds ? ` (try again in ${seconds} s)` : "");
}

// The objects of a stream of server-sent events, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (problem) {
      if (problem.name === "AbortError") throw problem;
      read = { done: true };
    }
    if (read.done) throw new Error("The connection broke off. The answer is incomplete.");
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(`The server gave up: ${event.error.message}`);
      yield event;
    }
  }
}

async function loadModels(signal) {
  const models = (await (await ask("v1/models", { signal })).json()).data;
  const wanted = model.value || kept().model;
  model.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === wanted)));
}

// What is switched off is left out, and so is what does nothing at temperature 0: a top_k beside
// it would mean sampling after all.
function request() {
  const number = (name) => form.elements[name].valueAsNumber;
  const body = {
    model: model.value,
    prompt: prompt.value,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (body.temperature > 0) {
    if (number("top_p") < 1) body.top_p = number("top_p");
    if (number("top_k") > 0) body.top_k = number("top_k");
    // A seed of the page's own, so that what it shows can be had again.
    const chosen = form.elements.seed.value !== "";
    body.seed = chosen ? number("seed") : Math.floor(Math.random() * 2 ** 31);
  }
  if (number("repetition_penalty") > 1) body.repetition_penalty = number("repetition_penalty");
  const meant = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  const stops = form.elements.stop_strings.value.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops.map((line) => line.replace(/\\[nt\\]/g, (pair) => meant[pair]));
  return body;
}

// ---- one answer

async function generate() {
  const controller = new AbortController();
  const run = { began: performance.now(), first: null, last: null, tokens: 0, end: "" };
  const startedFrom = document.activeElement;
  begin(controller, startedFrom);
  const clock = setInterval(() => (measured.textContent = measures(run)), 200);
  try {
    if (!model.value) await loadModels(controller.signal);
    const body = request();
    run.seed = body.seed;
    const options = { method: "POST", body: JSON.stringify(body), signal: controller.signal };
    for await (const event of events(await ask("v1/completions", options))) {
      controller.signal.throwIfAborted(); // what had come already is not shown any more
      take(event, run);
    }
  } catch (problem) {
    run.end = problem.name === "AbortError" ? "Stopped" : "Failed";
    if (run.end === "Failed") error.textContent = problem.message;
  } finally {
    clearInterval(clock);
    controller.abort(); // whatever ended the answer, its connection goes, and with it the server's work
    run.end ||= "Ended";
    measured.textContent = measures(run);
    finish(startedFrom);
  }
}

// An event has a piece of text, normally one token; the last one has counts instead.
function take(event, run) {
  if (event.usage) run.tokens = event.usage.completion_tokens;
  const [choice] = event.choices;
  if (!choice) return;
  if (choice.finish_reason) run.end = choice.finish_reason === "length" ? "Token limit reached" : "Ended";
  if (choice.text === "") return;
  run.last = performance.now();
  run.first ??= run.last;
  run.tokens += 1;
  const page = document.documentElement;
  const atEnd = page.scrollTop + page.clientHeight >= page.scrollHeight - 32;
  text.appendData(choice.text);
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function measures(run) {
  const seconds = (from, to) => `${((to - from) / 1000).toFixed(2)} s`;
  const parts = run.end ? [run.end] : [];
  if (run.first === null) {
    if (!run.end) parts.push(`Waiting, ${seconds(run.began, performance.now())}`);
  } else {
    parts.push(`first token ${seconds(run.began, run.first)}`);
    parts.push(`${run.tokens} ${run.tokens === 1 ? "token" : "tokens"}`);
    // The first token's time is the prompt's; the others come at the rate of decoding.
    const rate = ((run.tokens - 1) / (run.last - run.first)) * 1000;
    if (run.last > run.first) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
    if (run.end && run.seed !== undefined) parts.push(`seed ${run.seed}`);
  }
  return parts.join(" · ");
}

function begin(controller, startedFrom) {
  running = controller;
  text.data = error.textContent = measured.textContent = "";
  status.textContent = "Generating";
  answer.setAttribute("aria-busy", "true");
  stopButton.disabled = false;
  for (const button of [generateButton, continueButton, copyButton]) button.disabled = true;
  if (startedFrom === generateButton || startedFrom === continueButton) stopButton.focus();
}

function finish(startedFrom) {
  running = null;
  status.textContent = measured.textContent;
  answer.removeAttribute("aria-busy");
  generateButton.disabled = false;
  continueButton.disabled = copyButton.disabled = text.length === 0;
  if (document.activeElement === stopButton) {
    (startedFrom.disabled || startedFrom === stopButton ? generateButton : startedFrom).focus();
  }
  stopButton.disabled = true;
}

// ---- the controls

const controls = [...form.elements].filter((control) => control.name);

function kept() {
  try {
    return JSON.parse(localStorage.getItem("controls")) ?? {};
  } catch {
    return {}; // storage is forbidden, or not ours
  }
}

function keep() {
  const values = Object.fromEntries(controls.map((control) => [control.name, control.value]));
  values.model ||= kept().model;
  try {
    localStorage.setItem("controls", JSON.stringify(values));
  } catch {
    // Storage is forbidden or full: the page works, and forgets.
  }
}

function show() {
  for (const slider of form.querySelectorAll("[type=range]")) {
    const { value, min, max, dataset } = slider;
    slider.ariaValueText =
      (value === min && dataset.first) || (value === max && dataset.last) || value;
    slider.previousElementSibling.textContent = slider.ariaValueText;
  }
  element("random").disabled = element("temperature").valueAsNumber === 0;
}

function restore() {
  const values = kept();
  for (const control of controls) {
    if (control !== model && typeof values[control.name] === "string") {
      control.value = values[control.name];
    }
  }
}

// On the document: the model's control stands outside the form's element.
document.addEventListener("input", () => {
  show();
  keep();
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});

// A control that is wrong has to be seen; "invalid" does not bubble.
form.addEventListener("invalid", (event) => {
  if (event.target.closest("details")) element("settings").open = true;
}, true);

stopButton.addEventListener("click", () => running?.abort());

continueButton.addEventListener("click", () => {
  prompt.value += text.data;
  prompt.scrollTop = prompt.scrollHeight;
  keep();
  form.requestSubmit();
});

copyButton.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(text.data);
    status.textContent = copyButton.textContent = "Copied";
    setTimeout(() => (copyButton.textContent = "Copy"), 1500);
  } catch {
    // Only pages of https and of this machine may write to the clipboard.
    getSelection().selectAllChildren(answer);
    status.textContent = measured.textContent = "Selected: copy it with Ctrl C";
  }
});

element("defaults").addEventListener("click", () => {
  for (const control of element("settings").querySelectorAll("[name]")) {
    control.value = control.defaultValue;
  }
  show();
  keep();
});

login.addEventListener("submit", async (event) => {
  event.preventDefault();
  apiKey = element("key").value;
  if (await modelsOrError()) {
    login.hidden = true;
    prompt.focus();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});

async function modelsOrError() {
  error.textContent = "";
  try {
    await loadModels();
    return true;
  } catch (problem) {
    error.textContent = problem.message;
    return false;
  }
}

// ---- the beginning

const wide = matchMedia("(min-width: 52rem)");
wide.addEventListener("change", () => (element("settings").open = wide.matches));
element("settings").open = wide.matches;
if (navigator.platform.startsWith("Mac")) {
  generateButton.querySelector("kbd").textContent = "⌘ ⏎";
}
restore();
show();
modelsOrError();
