# SPDX-License-Identifier: Apache-2.0
"""Tasks, as the Hub names them: told by the class that saved a model, by its recipe's head, or asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import (
    ClassifierHead,
    Head,
    HiddenHead,
    LanguageHead,
    Model,
    PooledHead,
    Projection,
    SpanHead,
)
from surgery_formats.models.families.recipe_sentence import DenseStep, SentenceHead
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.text import show

__all__ = [
    "DECODER_TASKS",
    "ENCODER_TASKS",
    "FEATURES",
    "IMAGE_TASKS",
    "PAIR_TASKS",
    "SENTENCE",
    "TASKS",
    "TRAINED_HEADS",
    "asked_task",
    "check_task",
    "classifier_of",
    "decoder_head",
    "head_names",
    "labels",
    "only_tasks",
    "other_heads",
    "task_of",
]

_BOTH = ("text-classification", "token-classification", "question-answering", "feature-extraction")
DECODER_TASKS = ("text-generation", *_BOTH)
ENCODER_TASKS = ("fill-mask", "multiple-choice", *_BOTH)
IMAGE_TASKS = ("image-classification", "image-feature-extraction")
FEATURES = "feature-extraction"
SENTENCE = "sentence-similarity"
"""Task of a model with the modules of sentence-transformers, which make one embedding of each text."""
PAIR_TASKS = ("text2text-generation", "automatic-speech-recognition")
TASKS = ("text-generation", *ENCODER_TASKS, SENTENCE, *PAIR_TASKS, *IMAGE_TASKS)

_CLASSES = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMultipleChoice", "multiple-choice"),
    ("Model", "feature-extraction"),
)
"""Endings of class names; a bare model's comes last, because language models of old have it too."""

_PRETRAINED = (
    *("lm_head", "cls", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
    *("predictions", "sop_classifier", "generator_predictions", "generator_lm_head", "discriminator_predictions"),
    *("lm_predictions", "mask_predictions"),
)
TRAINED_HEADS = ("classifier", "pre_classifier", "qa_outputs", "score")


def check_task(task: str | None) -> None:
    """Refuse a task that no recipe has.

    Raises:
        FitError: an unknown one.
    """
    if task is not None and task not in TASKS:
        raise FitError(f"no task '{show(task, 40)}'", hint=f"one of {', '.join(TASKS)}")


def asked_task(settings: ModelSettings, known: Sequence[str], what: str) -> str:
    """The task that was asked for, or that of ``architectures``; empty where there are none.

    Raises:
        FitError: none of those `known` to models of this kind, which is `what`.
    """
    classes = settings.architectures()
    told = (task for name in classes for ending, task in _CLASSES if name.endswith(ending))
    task = settings.task or next(told, "")
    if task in known or not (task or classes):
        return task
    if settings.task:
        raise settings.fault(f"the task '{show(task, 40)}' is not among those of {what}: {', '.join(known)}")
    raise settings.fault(f"architectures is {show(', '.join(classes), 80)}; the tasks of {what} are {', '.join(known)}")


def only_tasks(settings: ModelSettings, *known: str) -> None:
    """Refuse a task that was asked for and is none of those `known` to an encoder-decoder."""
    if settings.task and settings.task not in known:
        raise settings.fault(
            f"the task '{show(settings.task, 40)}' is not among those of this model: {', '.join(known)}"
        )


def task_of(model: Model) -> str:
    """The task of a recipe, by its head."""
    match model.head:
        case LanguageHead() if model.encoder is not None:
            return PAIR_TASKS[model.encoder.embedding.stem is not None]
        case LanguageHead():
            return "text-generation" if model.kind == "decoder" else "fill-mask"
        case ClassifierHead() if model.embedding.patches is not None:
            return "image-classification"
        case ClassifierHead():
            if model.head.choices:
                return "multiple-choice"
            return "token-classification" if model.head.tokens == "every" else "text-classification"
        case SpanHead():
            return "question-answering"
        case SentenceHead():
            return SENTENCE
        case _:
            return "feature-extraction" if model.embedding.patches is None else "image-feature-extraction"


def labels(settings: ModelSettings) -> int:
    """The number of labels; two where config.json does not say, as in transformers."""
    named = settings.mapping("id2label")
    return len(named) if named else settings.count("num_labels", default=2)


def classifier_of(settings: ModelSettings, module: str, inputs: int, outputs: int) -> Projection:
    """The projection of a head, with the bias that the checkpoint has or has not."""
    bias = f"{module}.bias"
    return Projection(f"{module}.weight", inputs, outputs, bias if bias in settings.names else "")


def decoder_head(settings: ModelSettings, task: str, width: int, before: Projection | None) -> Head:
    """The head of a decoder that generates nothing, on states of `width`, to which `before` maps them (OPT-350m).

    transformers takes the scores of the rightmost token that is not ``pad_token_id``; a negative one is none.

    Raises:
        FitError: the states themselves are asked for, and `before` is there.
    """
    match task:
        case "text-classification":
            padding = settings.raw("pad_token_id")
            known = isinstance(padding, int) and not isinstance(padding, bool) and padding >= 0
            steps = ((before, None),) if before else ()
            score = classifier_of(settings, "score", width, labels(settings))
            return ClassifierHead("last", (*steps, (score, None)), padding if known else None)
        case "token-classification":
            module = "classifier" if "classifier.weight" in settings.names else "score"
            return ClassifierHead("every", ((classifier_of(settings, module, width, labels(settings)), None),))
        case _ if before is not None:
            raise settings.fault(f"word_embed_proj_dim narrows the states, which {task} of decoders does not support")
        case "question-answering":
            return SpanHead(classifier_of(settings, "qa_outputs", width, 2))
        case _:
            return HiddenHead()


def head_names(head: Head) -> set[str]:
    """Names of the tensors of a head."""
    match head:
        case ClassifierHead():
            projections: list[Projection | None] = [step for step, _ in head.steps]
        case SpanHead():
            projections = [head.projection, head.before[0] if head.before else None]
        case HiddenHead():
            projections = [head.pooler]
        case PooledHead():
            projections = [head.projection]
        case SentenceHead():
            projections = [step.projection for step in head.steps if isinstance(step, DenseStep)]
        case _:
            projections = [head.before, head.projection]
    names = {name for one in projections if one is not None for name in (one.weight, one.bias)}
    norm = head.norm if isinstance(head, LanguageHead | ClassifierHead | SpanHead) else None
    return (names | ({norm.weight, norm.bias} if norm else set())) - {""}


def other_heads(settings: ModelSettings, used: Collection[str], own: Sequence[str] = ()) -> dict[str, str]:
    """The tensors of heads that the task does not read, with the reason; `own` are modules of this family's heads alone.

    A model that was given a head for a task may still have the one it was pretrained with; another task's only where a
    task was asked for.
    """
    heads = (*_PRETRAINED, *own, *(TRAINED_HEADS if settings.task else ()))
    unread = (name for name in settings.names if name.partition(".")[0] in heads and name not in used)
    return dict.fromkeys(unread, "a head that the task does not read")
