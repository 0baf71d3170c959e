// SPDX-License-Identifier: Apache-2.0
// Run a folder in transformers.js: node peer.mjs KIND FOLDER WANTED. Prints version and result as JSON, as peer.py does.
import { readFileSync } from 'node:fs';
import { AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Tensor, env } from '@huggingface/transformers';

const [kind, folder, file] = process.argv.slice(2);
const wanted = JSON.parse(readFileSync(file));
env.allowRemoteModels = false;
env.localModelPath = '';
const row = (values) => new Tensor('int64', BigInt64Array.from(values.map(BigInt)), [1, values.length]);
const rows = (lines) => new Tensor('int64', BigInt64Array.from(lines.flat().map(BigInt)), [lines.length, lines[0].length]);
// a plain folder has its graph beside config.json
const options = wanted.layout === 'transformers.js' ? {} : { subfolder: '', dtype: 'fp32' };
let result;
try {
  if (kind === 'generate' || kind === 'batch') {
    const model = await AutoModelForCausalLM.from_pretrained(folder, options);
    const given = kind === 'batch' ? wanted.rows : [wanted.ids];
    const longest = Math.max(...given.map((one) => one.length));
    const inputs = rows(given.map((one) => [...Array(longest - one.length).fill(wanted.pad), ...one]));
    const mask = rows(given.map((one) => [...Array(longest - one.length).fill(0), ...Array(one.length).fill(1)]));
    const out = await model.generate({ inputs, attention_mask: mask, max_new_tokens: wanted.new, do_sample: false });
    const whole = out.tolist().map((line) => line.map(Number).slice(longest));
    result = kind === 'batch' ? whole : whole[0];
  } else if (kind === 'text') {
    const tokenizer = await AutoTokenizer.from_pretrained(folder);
    const model = await AutoModelForCausalLM.from_pretrained(folder, options);
    const given = tokenizer(wanted.prompt);
    const out = (await model.generate({ ...given, max_new_tokens: wanted.text_new })).tolist()[0].map(Number);
    result = tokenizer.decode(out.slice(given.input_ids.dims[1]));
  } else {
    const model = await (kind === 'classify' ? AutoModelForSequenceClassification : AutoModel).from_pretrained(folder, options);
    const ids = wanted.ids;
    const out = await model({ input_ids: row(ids), attention_mask: row(ids.map(() => 1)), token_type_ids: row(ids.map(() => 0)) });
    result = Array.from((out.logits ?? out.last_hidden_state).data);
  }
  console.log(JSON.stringify({ version: env.version, result }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error).slice(-300) }));
}
