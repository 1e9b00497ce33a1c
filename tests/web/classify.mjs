// Classify samples with transformers.js under Node: reads {host, cacheDir, models, dtypes, samples} as JSON from a
// file, and prints the scores of each model and dtype by class, and the features that each model gets.

import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

const { host, cacheDir, models, dtypes, samples } = JSON.parse(readFileSync(process.argv[2]));
Object.assign(env, { remoteHost: host, cacheDir, allowLocalModels: false });
const found = {};
for (const name of models) {
  found[name] = {};
  for (const dtype of dtypes) {
    const classify = await pipeline("audio-classification", name, { dtype });
    const waveform = new Float32Array(samples);
    const scores = await classify(waveform, { top_k: null });
    found[name][dtype] = Object.fromEntries(scores.map(({ label, score }) => [label, score]));
    found[name].features = [...(await classify.processor(waveform)).input_values.data];
  }
}
console.log(JSON.stringify(found));
