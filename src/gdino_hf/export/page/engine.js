// Loads the model's files, closes the page's connections, and talks to the worker that runs the model.

import { closeConnections } from "./host.js";

const MOST_THREADS = 8;
const WITHOUT_WEBGPU = "gdino-without-webgpu";

/** The model in its worker. */
export class Engine {
  #worker;
  #waiting = new Map();
  #number = 0;

  constructor(worker) {
    this.#worker = worker;
    worker.addEventListener("message", ({ data: { number, answer, error } }) => {
      const { resolve, reject } = this.#waiting.get(number);
      this.#waiting.delete(number);
      if (error === undefined) resolve(answer);
      else reject(new Error(error));
    });
    worker.addEventListener("error", (event) => {
      const error = new Error(`The model's worker stopped (${event.message ?? "no reason given"}); load the page again.`);
      for (const { reject } of this.#waiting.values()) reject(error);
      this.#waiting.clear();
    });
  }

  /** Call a function of the worker by its name; `transfer` lists buffers that move there instead of being copied. */
  call(task, asked, transfer = []) {
    this.#number += 1;
    const number = this.#number;
    return new Promise((resolve, reject) => {
      this.#waiting.set(number, { resolve, reject });
      this.#worker.postMessage({ number, task, asked }, transfer);
    });
  }

  /** Find labels in a picture; see `detect` in worker.js. */
  detect(file, labels) {
    return this.call("detect", { file, labels });
  }
}

/**
 * Load everything, then forbid all connections and start the model.
 *
 * @param {(share: number, bytes: number) => void} progress Called with the part that has come in, and the whole size.
 * @returns {Promise<{engine: Engine, facts: Object, backend: string}>} `backend` says what the model runs on.
 */
export async function loadEngine(progress) {
  const facts = await (await fetchFile("page_facts.json")).json();
  const runtime = await chooseRuntime(facts.runtimes);
  const parts = { tokenizer: facts.tokenizer, config: facts.tokenizer_config, wasm: runtime.wasm, model: facts.model };
  const whole = Object.values(parts).flat().reduce((sum, { bytes }) => sum + bytes, 0);
  let loaded = 0;
  const came = (bytes) => progress((loaded += bytes) / whole, whole);
  const data = {};
  for (const [name, files] of Object.entries(parts)) data[name] = await fetchParts(files, came);
  closeConnections();
  const engine = new Engine(startWorker());
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  const parsed = (buffer) => JSON.parse(new TextDecoder().decode(buffer));
  try {
    await engine.call(
      "open",
      {
        facts,
        tokenizer: parsed(data.tokenizer),
        tokenizerConfig: parsed(data.config),
        model: data.model,
        wasm: data.wasm,
        runtime,
        threads,
      },
      [data.model, data.wasm],
    );
  } catch (error) {
    if (runtime.provider !== "webgpu") throw error;
    // The page can load nothing more, so it starts again, without the graphics card.
    sessionStorage.setItem(WITHOUT_WEBGPU, "1");
    location.reload();
    await new Promise(() => {});
  }
  const cores = threads === 1 ? "1 thread" : `${threads} threads`;
  return { engine, facts, backend: runtime.provider === "webgpu" ? "the graphics card" : `${cores} of the processor` };
}

async function chooseRuntime(runtimes) {
  const asked = new URLSearchParams(location.search).get("backend");
  const allowed = asked === null ? sessionStorage.getItem(WITHOUT_WEBGPU) === null : asked === "webgpu";
  if (allowed && runtimes.webgpu && navigator.gpu && "Suspending" in WebAssembly) {
    const adapter = await navigator.gpu.requestAdapter().catch(() => null);
    // A fallback adapter computes on the processor, which WebAssembly does faster.
    if (adapter && (asked === "webgpu" || !adapter.info?.isFallbackAdapter)) return runtimes.webgpu;
  }
  return runtimes.wasm;
}

// A worker made from a blob inherits the page's policy; one loaded from a file would have none of its own.
function startWorker() {
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const address = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  return new Worker(address, { type: "module" });
}

async function fetchFile(path) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error(`${path} did not load; check the connection and load the page again.`);
  }
  if (!response.ok) throw new Error(`${path} did not load (${response.status}); copy the whole folder to the host.`);
  return response;
}

// Fetch the parts of one file and join them.
async function fetchParts(files, came) {
  const joined = new Uint8Array(files.reduce((sum, { bytes }) => sum + bytes, 0));
  let at = 0;
  for (const { path, bytes } of files) {
    const end = at + bytes;
    const reader = (await fetchFile(path)).body.getReader();
    // A connection that breaks off ends the stream with an error, and some servers end it without one.
    const next = () => reader.read().catch(() => ({ done: true }));
    for (let { done, value } = await next(); !done; { done, value } = await next()) {
      if (at + value.length <= end) joined.set(value, at);
      at += value.length;
      came(value.length);
    }
    if (at !== end) {
      throw new Error(
        `${path} came with ${at - end + bytes} of ${bytes} bytes; load the page again, and if that does not help, copy ` +
          "the whole folder to the host again.",
      );
    }
  }
  return joined.buffer;
}
