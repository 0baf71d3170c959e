// SPDX-License-Identifier: Apache-2.0
// Run a folder in transformers.js: node peer.mjs KIND FOLDER WANTED. Prints version and result as JSON, as peer.py does.
import { readFileSync } from 'node:fs';
import { AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer, Tensor, env } from '@huggingface/transformers';

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
  } else if (kind === 'text' || kind === 'coded') {
    const tokenizer = await AutoTokenizer.from_pretrained(folder);
    const model = await AutoModelForCausalLM.from_pretrained(folder, options);
    const given = tokenizer(wanted.prompt);
    const out = (await model.generate({ ...given, max_new_tokens: wanted.text_new })).tolist()[0].map(Number);
    result = tokenizer.decode(out.slice(given.input_ids.dims[1]));
  } else if (kind === 'seq2seq') {
    const model = await AutoModelForSeq2SeqLM.from_pretrained(folder, options);
    const inputs = row(wanted.ids);
    const mask = row(wanted.ids.map(() => 1));
    const out = await model.generate({ inputs, attention_mask: mask, max_new_tokens: wanted.new, do_sample: false });
    result = out.tolist()[0].map(Number).slice(1);
  } else {
    const model = await (kind === 'classify' ? AutoModelForSequenceClassification : AutoModel).from_pretrained(folder, options);
    result = [];
    for (const given of [[wanted.ids], wanted.rows]) { // alone, then in a batch
      const longest = Math.max(...given.map((one) => one.length));
      const filled = (value) => rows(given.map((one) => [...one.map(value), ...Array(longest - one.length).fill(0)]));
      const out = await model({ input_ids: filled((id) => id), attention_mask: filled(() => 1), token_type_ids: filled(() => 0) });
      const state = (out.logits ?? out.last_hidden_state).tolist();
      // what it says of padding is not asked
      state.forEach((one, n) => result.push(...(kind === 'embed' ? one.slice(0, given[n].length) : one).flat()));
    }
  }
  console.log(JSON.stringify({ version: env.version, result }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error).slice(-300) }));
}
