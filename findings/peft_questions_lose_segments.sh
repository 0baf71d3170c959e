#!/usr/bin/env bash
# PEFT's question answering drops token_type_ids and position_ids, whatever the adapter: a merged model is not the attached one.
#
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
# Behaviour: BERT's tokenisers give `token_type_ids`, which tell the question from the text it is asked of. The `forward` of
#            `PeftModelForQuestionAnswering` takes them and `position_ids` by name and passes neither on, with a LoRA as with virtual
#            tokens: the base takes every token for one of the question, in training, too. Merged, or loaded by another program, the
#            model gets them, and gives other logits than those that were evaluated. PEFT's token classification passes them on.
#            There is no warning and no error.
# Seen:      nothing trained yet, logits' distance from the base's, of the same inputs:
#            question answering: LoRA 1.9 with token_type_ids, 0.83 with position_ids, 0 with neither; merged 0, 0, 0
#            token classification: LoRA 0 with token_type_ids, 0 with position_ids, 0 with neither; merged 0, 0, 0
#            question answering, token_type_ids and position_ids against neither: prefix 0, 0; prompt 0, 0; 0 warnings
# Fails if a zero is none, another is one, or PEFT warns. (The figures depend on the seed.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$folder/look.py" <<'PY'
import copy
import warnings

import peft
import torch
import transformers

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
config = transformers.BertConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.2, **sizes)
ids = torch.arange(3, 15)[None]
given = {
    "token_type_ids": {"token_type_ids": torch.tensor([[0] * 5 + [1] * 7])},
    "position_ids": {"position_ids": torch.arange(20, 32)[None]},
    "neither": {},
}
tasks = {
    "question answering": ("QUESTION_ANS", transformers.BertForQuestionAnswering),
    "token classification": ("TOKEN_CLS", transformers.BertForTokenClassification),
}


def logits(model, more):
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return result.start_logits if "start_logits" in result else result.logits


def apart(one, two):
    return float((one - two).abs().max())


warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    print("nothing trained yet, logits' distance from the base's, of the same inputs:")
    attached = {}
    for title, (task, kind) in tasks.items():
        base = kind(config).eval()
        wanted = [logits(base, more) for more in given.values()]
        lora = peft.LoraConfig(task_type=task, target_modules=["query", "value"])
        model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
        attached[title] = [apart(logits(model, more), one) for more, one in zip(given.values(), wanted, strict=True)]
        model = model.merge_and_unload()
        merged = [apart(logits(model, more), one) for more, one in zip(given.values(), wanted, strict=True)]
        with_each = ", ".join(f"{far:.2g} with {name}" for name, far in zip(given, attached[title], strict=True))
        print(f"{title}: LoRA {with_each}; merged {', '.join(f'{far:.2g}' for far in merged)}")
        assert max(merged) < 1e-5
    task, kind = tasks["question answering"]
    virtual = []
    for adapter in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        model = peft.get_peft_model(kind(config).eval(), adapter(task_type=task, num_virtual_tokens=3)).eval()
        types, positions, neither = (logits(model, more) for more in given.values())
        virtual.append([apart(types, neither), apart(positions, neither)])
told = sum("type ids" in str(one.message) or "osition ids" in str(one.message) for one in said)
prefix, prompt = (", ".join(f"{far:.2g}" for far in both) for both in virtual)
print(
    "question answering, token_type_ids and position_ids against neither: "
    f"prefix {prefix}; prompt {prompt}; {told} warnings"
)
*dropped, without = attached["question answering"]
assert min(dropped) > 0.01
assert max(without, *attached["token classification"]) < 1e-5
assert virtual == [[0.0, 0.0], [0.0, 0.0]]
assert told == 0
PY
PYTHONPATH="$folder/site" python3 "$folder/look.py"
