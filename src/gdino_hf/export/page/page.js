// The page: takes pictures and words, asks the engine, and shows what it found.

import { labelColor } from "./colors.js";
import { drawBoxes, pictureFile, save, showBoxes, showPresence } from "./drawing.js";
import { loadEngine } from "./engine.js";
import { prepareHost } from "./host.js";
import { splitLabels } from "./prompt.js";
import { presence, selectBoxes } from "./results.js";

const part = (name) => document.getElementById(`gd-${name}`);
const photograph = part("photograph");

let engine = null;
let backend = "";
let picture = null; // the file that is shown
let result = null; // the outputs that boxes are selected from
let running = false;
let remark = "";

function say(text) {
  part("status").textContent = text;
  part("error").textContent = "";
}

// "loading", "ready", "running" or "failed", for style sheets and tests.
function enter(state) {
  document.documentElement.dataset.state = state;
}

function complain(error) {
  part("error").textContent = error instanceof Error ? error.message : String(error);
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(1)} s`;

async function load() {
  const begin = performance.now();
  enter("loading");
  remark = await prepareHost();
  const progress = part("progress");
  const loaded = await loadEngine((share, bytes) => {
    progress.value = share;
    part("status").textContent =
      share < 1 ? `Loading the model: ${Math.round(share * 100)} % of ${Math.round(bytes / 1e6)} MB.` : "Starting the model.";
  });
  ({ engine, backend } = loaded);
  const { facts } = loaded;
  part("model").textContent = facts.name;
  part("threshold").value = facts.post.threshold;
  part("overlap").value = facts.post.overlap;
  showNumbers();
  if (part("labels").value === "") part("labels").value = facts.labels;
  progress.hidden = true;
  say(`Ready after ${seconds(performance.now() - begin)}, on ${backend}. ${remark}`);
  offer();
  enter("ready");
  if (picture) await detect();
}

// The button works when there is something to do.
function offer() {
  part("detect").disabled = engine === null || picture === null || running;
}

function take(file) {
  if (!file) return;
  picture = file;
  result = null;
  if (photograph.src) URL.revokeObjectURL(photograph.src);
  photograph.src = URL.createObjectURL(file);
  photograph.alt = `The picture ${file.name}`;
  part("figure").hidden = false;
  forget();
  offer();
  detect();
}

// Take away what belongs to an earlier picture.
function forget() {
  part("boxes").replaceChildren();
  part("presence").hidden = true;
  part("downloads").hidden = true;
}

let again = false; // whether a picture or words came while the model was running

async function detect() {
  if (running) again = true;
  if (engine === null || picture === null || running) return;
  running = true;
  enter("running");
  offer();
  const labels = splitLabels(part("labels").value);
  const file = picture;
  say("Looking at the picture.");
  try {
    const found = await engine.detect(file, labels);
    const colors = await Promise.all(labels.map(labelColor));
    if (file === picture) {
      result = { ...found, labels, colors };
      show();
    }
  } catch (error) {
    say("");
    complain(error);
  }
  running = false;
  enter("ready");
  offer();
  if (again) {
    again = false;
    await detect();
  }
}

// The boxes that the settings let through.
function selected() {
  const overlap = Number(part("overlap").value);
  return selectBoxes(result.outputs, { ...result, threshold: Number(part("threshold").value), overlap });
}

function show() {
  if (result === null) return;
  const found = selected();
  const best = presence(result.outputs, result.labels.length);
  const threshold = Number(part("threshold").value);
  showBoxes(part("boxes"), found, result);
  showPresence(part("presence"), found, best, threshold, result);
  part("downloads").hidden = false;
  const count = `${found.length} ${found.length === 1 ? "box" : "boxes"} in ${seconds(result.milliseconds)} on ${backend}.`;
  const advice = found.length === 0 ? " Lower the threshold to see what comes closest." : "";
  say(`${count}${advice} ${remark}`);
}

function showNumbers() {
  for (const name of ["threshold", "overlap"]) part(`${name}-shown`).textContent = Number(part(name).value).toFixed(2);
}

for (const name of ["threshold", "overlap"]) {
  part(name).addEventListener("input", () => {
    showNumbers();
    show();
  });
}

photograph.addEventListener("error", () => {
  part("figure").hidden = true;
});

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  detect();
});

part("labels").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    detect();
  }
});

part("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});

// The whole window takes pictures, so that a near miss does not leave the page.
for (const kind of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    part("drop").classList.toggle("gd-over", kind === "dragover");
    if (kind === "drop") take([...event.dataTransfer.files][0]);
  });
}

window.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) take(file);
});

part("png").addEventListener("click", async () => {
  const canvas = await drawBoxes(picture, selected(), result);
  save(await canvas.convertToBlob({ type: "image/png" }), pictureFile(picture.name, "png"));
});

part("json").addEventListener("click", () => {
  const detections = selected().map(({ label, score, box }) => ({ label: result.labels[label], score, box }));
  const { width, height } = result;
  const settings = { threshold: Number(part("threshold").value), overlap: Number(part("overlap").value) };
  const text = JSON.stringify({ image: picture.name, width, height, ...settings, detections }, null, 2);
  save(new Blob([text], { type: "application/json" }), pictureFile(picture.name, "json"));
});

load().catch((error) => {
  part("progress").hidden = true;
  say("The model did not start.");
  enter("failed");
  complain(error);
});
