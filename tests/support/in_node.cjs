// SPDX-License-Identifier: Apache-2.0
// Runs a graph in onnxruntime-node: node in_node.cjs GRAPH FEEDS, from a folder with node_modules. Prints inputs and the first output.
const { createRequire } = require("module");
const fs = require("fs");
const ort = createRequire(process.cwd() + "/")("onnxruntime-node");

async function main([graph, file]) {
  const session = await ort.InferenceSession.create(graph);
  const feeds = {};
  for (const [name, one] of Object.entries(JSON.parse(fs.readFileSync(file)))) {
    feeds[name] = new ort.Tensor("float32", Float32Array.from(one.data), one.dims);
  }
  const outputs = await session.run(feeds);
  console.log(JSON.stringify({ inputs: session.inputNames, output: Array.from(outputs[session.outputNames[0]].data) }));
}

main(process.argv.slice(2));
