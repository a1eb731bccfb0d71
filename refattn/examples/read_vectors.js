// Attention in float32, on a case of `refattn vectors write FOLDER --like scaled_dot_product --format raw`:
//     node read_vectors.js FOLDER CASE
// Prints the worst error / bound; exit status 1 if an element is outside its bound. For a little-endian machine.
const fs = require("fs");

const [folder, name] = process.argv.slice(2);
const manifest = JSON.parse(fs.readFileSync(`${folder}/manifest.json`, "utf8"));
const about = manifest.cases.find((one) => one.name === name);
const typed = { float64: Float64Array, float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
const read = (array) => {
  const bytes = fs.readFileSync(`${folder}/${name}/${array}.bin`);
  return new typed[about.arrays[array].dtype](new Uint8Array(bytes).buffer); // a copy, which is aligned
};
const float = Math.fround; // of each result: float32

const [Q, D] = about.arrays["in/q"].shape.slice(-2), [K, E] = about.arrays["in/v"].shape.slice(-2);
const outer = about.arrays["in/q"].shape.slice(0, -2).reduce((a, b) => a * b, 1);
const [q, k, v, out, bound] = ["in/q", "in/k", "in/v", "out/out", "bound/float32/out"].map(read);
const mask = "option/mask" in about.arrays ? read("option/mask") : null;
const scale = float(about.options.scale ?? 1 / Math.sqrt(D));

let worst = 0;
for (let b = 0; b < outer; b++) for (let i = b * Q; i < (b + 1) * Q; i++) {
  const p = new Float32Array(K).fill(-Infinity);
  for (let j = 0; j < K; j++) {
    if ((mask && !mask[i * K + j]) || (about.options.is_causal && j > i - b * Q)) continue;
    let sum = 0;
    for (let d = 0; d < D; d++) sum = float(sum + float(q[i * D + d] * k[(b * K + j) * D + d]));
    p[j] = scale * sum;
  }
  const most = p.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = p.map((s) => (s === -Infinity ? 0 : Math.exp(float(s - most))));
  const total = weights.reduce((a, b) => float(a + b), 0);
  for (let e = 0; e < E; e++) {
    let sum = 0;
    for (let j = 0; j < K; j++) sum = float(sum + float(weights[j] * v[(b * K + j) * E + e]));
    const expected = out[i * E + e], got = total === 0 ? 0 : float(sum / total);
    let ratio = Math.abs(got - expected) / bound[i * E + e];
    if (got === expected || (isNaN(got) && isNaN(expected))) ratio = 0; // NaN is right where it is expected
    if (isNaN(ratio)) ratio = Infinity;
    if (ratio > worst) worst = ratio;
  }
}
console.log(`${name}: worst error / bound ${worst.toPrecision(3)}`);
process.exit(worst <= 1 ? 0 : 1);
