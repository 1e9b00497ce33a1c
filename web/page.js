// Classify a sound with models that `publish.py RUN --web` made. The scores are those of predict.py.

import { env, pipeline } from "@huggingface/transformers";

const SHOWN_CLASSES = 5;
const SHORTEST = 0.025; // seconds: one frame of the features

const [form, sound, file, record, player, status, results] = [
  "form", "#sound", "#file", "#record", "#player", "#status", "#results",
].map((selector) => document.querySelector(selector));
const query = new URLSearchParams(location.search);
const models = (query.get("models") ?? "").split(",").map((name) => name.trim()).filter(Boolean);
const dtype = query.get("dtype") === "fp32" ? "fp32" : "q8";

/** Load the models one after the other. */
async function load() {
  const loaded = [];
  for (const name of models) {
    const folder = name.startsWith("/"); // of this server
    Object.assign(env, { allowLocalModels: folder, allowRemoteModels: !folder, localModelPath: "" });
    const progress_callback = ({ status: step, file, progress }) => {
      if (step === "progress") say(`Loading ${name}: ${file}, ${Math.round(progress)} %`);
    };
    say(`Loading ${name}`);
    loaded.push({ name, classifier: await pipeline("audio-classification", name, { dtype, progress_callback }) });
  }
  return loaded;
}

/** The samples of a sound file as a Float32Array, mono, at the rate of a model. The browser resamples. */
async function decode(blob, rate, channel) {
  let decoded;
  try {
    decoded = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await blob.arrayBuffer());
  } catch {
    throw new Error("This browser cannot read the file as sound. Choose another one.");
  }
  const count = channel === "first" ? 1 : decoded.numberOfChannels;
  const samples = new Float32Array(decoded.length);
  for (let one = 0; one < count; one++) {
    decoded.getChannelData(one).forEach((value, at) => (samples[at] += value / count));
  }
  if (samples.length < SHORTEST * rate) throw new Error("The sound is too short. It must last 25 ms or more.");
  if (samples.every((value) => value === samples[0])) throw new Error("The sound is silent.");
  return samples;
}

/** The windows of a clip: all of it, or windows of equal length, of which the last one ends where the clip ends. */
function windowsOf(samples, layout) {
  const last = layout ? Math.floor((samples.length - layout.length) / layout.hop) * layout.hop : 0;
  if (last <= 0) return [samples];
  const starts = [];
  for (let start = 0; start < last; start += layout.step) starts.push(start);
  return [...starts, last].map((start) => samples.slice(start, start + layout.length));
}

/** Classify samples. Returns the score of each class, and the number of windows. */
async function classify({ name, classifier }, samples) {
  const { config } = classifier.model;
  const windows = windowsOf(samples, config.windows);
  const logits = [];
  for (const [number, window] of windows.entries()) {
    say(`${name}: window ${number + 1} of ${windows.length}`);
    await new Promise((resolve) => setTimeout(resolve)); // lets the browser show the line
    const output = await classifier.model(await classifier.processor(window));
    logits.push([...output.logits.data]);
  }
  const combine = config.window_aggregation === "max" ? (row) => Math.max(...row) : mean;
  const clip = logits[0].map((_, label) => combine(logits.map((row) => row[label])));
  const scores = config.problem_type === "multi_label_classification" ? clip.map(sigmoid) : softmax(clip);
  return { scores, windows: windows.length };
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (values) => sum(values) / values.length;
const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));

function softmax(logits) {
  const highest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - highest));
  return powers.map((power) => power / sum(powers));
}

/** Classify a sound with all models, and show their answers. */
async function hear(blob) {
  sound.disabled = true;
  results.replaceChildren();
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(blob);
  player.hidden = false;
  try {
    for (const model of await ready) {
      say("Reading the sound");
      const { config } = model.classifier.model;
      const rate = model.classifier.processor.feature_extractor.config.sampling_rate;
      const samples = await decode(blob, rate, config.channel);
      const start = performance.now();
      const { scores, windows } = await classify(model, samples);
      const seconds = (performance.now() - start) / 1000;
      const heard = `${(samples.length / rate).toFixed(2)} s of sound in ${windows === 1 ? "1 window" : `${windows} windows`}`;
      show(model.name, `${heard}, classified in ${seconds.toFixed(2)} s`, config.id2label, scores);
    }
    say("");
  } catch (error) {
    say(error.message);
  }
  sound.disabled = false;
}

/** Add the best classes of a model to the page. */
function show(name, facts, labels, scores) {
  const best = scores.map((score, label) => ({ score, label: labels[label] })).sort((a, b) => b.score - a.score);
  const rows = best.slice(0, SHOWN_CLASSES).map(({ score, label }) => {
    const bar = element("div", {}, element("div", { style: `width: ${100 * score}%` }));
    bar.className = "bar";
    return element("li", {}, element("span", {}, label), element("span", {}, score.toFixed(4)), bar);
  });
  results.append(element("article", {}, element("h2", {}, name), element("p", {}, facts), element("ol", {}, ...rows)));
}

function element(tag, fields, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

function say(text) {
  status.textContent = text;
}

let recorder = null;

/** Start to record, or stop and classify the recording. */
async function toggleRecording() {
  if (recorder) {
    recorder.stop();
    return;
  }
  try {
    if (!navigator.mediaDevices) throw new Error("the page must come from https or from localhost.");
    const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    recorder = new MediaRecorder(await navigator.mediaDevices.getUserMedia({ audio: plain }));
  } catch (error) {
    say(`The microphone cannot be used: ${error.message}`);
    return;
  }
  const parts = [];
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.onstop = () => {
    recorder.stream.getTracks().forEach((track) => track.stop());
    const type = recorder.mimeType;
    recorder = null;
    record.textContent = "Record";
    hear(new Blob(parts, { type }));
  };
  recorder.start();
  results.replaceChildren();
  record.textContent = "Stop";
  say("Recording");
}

file.onchange = () => file.files.length && hear(file.files[0]);
record.onclick = toggleRecording;
document.body.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.toggle("dropping", !sound.disabled);
};
document.body.ondragleave = () => document.body.classList.remove("dropping");
document.body.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (!sound.disabled && event.dataTransfer.files.length) hear(event.dataTransfer.files[0]);
};

form.elements.models.value = models.join(", ");
form.elements.dtype.value = dtype;
const ready = models.length ? load() : Promise.resolve([]);
if (models.length) {
  ready.then(
    () => {
      sound.disabled = false;
      say("Choose, drop or record a sound.");
    },
    (error) => say(`A model could not be loaded: ${error.message}`),
  );
} else {
  say("Enter the models that `publish.py RUN --web` has pushed, then press Load.");
}
