// The model in a worker of its own, so that the page answers while it runs. Everything it needs comes as messages: when it
// starts, the page has forbidden itself and its workers every connection.

import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { decode, normalize, resize, targetSize } from "./pixels.js";
import { buildPrompts } from "./prompt.js";
import { labelScores } from "./results.js";

let ort = null;
let session = null;
let tokenizer = null;
let facts = null;

/**
 * Start ONNX Runtime and open the model.
 *
 * @param {Object} asked `facts` of page_facts.json, `tokenizer` and `tokenizerConfig` as objects, `model` and `wasm` as
 *   buffers, `runtime` as one of its `runtimes`, and the number of `threads`.
 */
async function open(asked) {
  ({ facts } = asked);
  tokenizer = new Tokenizer(asked.tokenizer, asked.tokenizerConfig);
  const root = new URL("vendor/", import.meta.url).href;
  ort = await import(new URL(asked.runtime.script, root).href);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = asked.wasm;
  ort.env.wasm.wasmPaths = { mjs: new URL(asked.runtime.glue, root).href };
  ort.env.wasm.numThreads = asked.threads;
  session = await ort.InferenceSession.create(new Uint8Array(asked.model), {
    executionProviders: [asked.runtime.provider],
    graphOptimizationLevel: "all",
    // Texts differ in length, so arenas of earlier sizes would only pile up.
    enableMemPattern: false,
  });
  // The first run prepares kernels, which the first picture should not wait for.
  const [height, width] = targetSize(480, 640, facts.image.size);
  const [prompt] = buildPrompts(["cat"], tokenizer, facts.text);
  await forward(new Float32Array(3 * height * width), height, width, prompt);
  return { threads: ort.env.wasm.numThreads };
}

async function forward(values, height, width, prompt) {
  const ids = BigInt64Array.from(prompt.ids, BigInt);
  const area = height * width;
  const given = {
    pixel_values: () => new ort.Tensor("float32", values, [1, 3, height, width]),
    pixel_mask: () => new ort.Tensor("int64", new BigInt64Array(area).fill(1n), [1, height, width]),
    input_ids: () => new ort.Tensor("int64", ids, [1, ids.length]),
    attention_mask: () => new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
    token_type_ids: () => new ort.Tensor("int64", new BigInt64Array(ids.length), [1, ids.length]),
  };
  const feeds = Object.fromEntries(session.inputNames.map((name) => [name, given[name]()]));
  const { logits, pred_boxes: boxes } = await session.run(feeds);
  return { logits: await logits.getData(), columns: logits.dims.at(-1), boxes: await boxes.getData() };
}

/**
 * Run the model on one picture.
 *
 * @param {{file: Blob, labels: string[]}} asked
 * @returns {Promise<Object>} `outputs` of each prompt for `selectBoxes`, the picture's `width` and `height`, and the
 *   `milliseconds` it took.
 */
async function detect({ file, labels }) {
  const begin = performance.now();
  const prompts = buildPrompts(labels, tokenizer, facts.text);
  const bitmap = await decode(file, facts.image.most_pixels);
  const { width, height } = bitmap;
  const size = targetSize(height, width, facts.image.size);
  if (size[0] * size[1] > facts.image.most_pixels) {
    bitmap.close();
    throw new Error(`The picture is ${width} x ${height} pixels, too long and thin for the model; cut it into parts.`);
  }
  const values = normalize(resize(bitmap, size, facts.image.resample), facts.image);
  bitmap.close();
  const outputs = [];
  for (const prompt of prompts) {
    const { logits, columns, boxes } = await forward(values, ...size, prompt);
    outputs.push({ scores: labelScores(logits, columns, prompt), boxes, labels: prompt.labels });
  }
  return { outputs, width, height, milliseconds: performance.now() - begin };
}

const tasks = { open, detect };

self.addEventListener("message", async ({ data: { number, task, asked } }) => {
  try {
    self.postMessage({ number, answer: await tasks[task](asked) });
  } catch (error) {
    self.postMessage({ number, error: error instanceof Error ? error.message : String(error) });
  }
});
