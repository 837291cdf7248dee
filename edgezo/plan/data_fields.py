"""The settings that decide a run's model, rows and predictions: the first part of the table in fields.py.

Standard library only.
"""

from __future__ import annotations

from edgezo.plan.field import Field

LOSS = "loss"  # the objective that is the model's loss
# Rows that a fine-tune is evaluated on where --eval-limit is not given: an accuracy is then known to 3 points.
EVAL_ROWS, ALL_ROWS = 300, 10**9
OBJECTIVES = (LOSS, "accuracy", "exact-match", "token-f1", "numeric-match")

DATA = (
    Field(
        name="model",
        kind="str",
        metavar="MODEL",
        brief="A card (edgezo models), directory, .gguf file or hub id.",
        help="A card (see edgezo models), a directory, a .gguf file or a hub id.",
        example="smollm2-135m-instruct",
        required=True,
        free_on_resume=True,
    ),
    Field(
        name="data",
        kind="str",
        metavar="PATH",
        brief="Rows: .jsonl, .json, .csv, .parquet, a folder, a hub id.",
        help="Rows: a .jsonl, .json, .csv or .parquet file, a directory with train and validation files or with notes, "
        "or a hub id.",
        example="rows.jsonl",
        free_on_resume=True,
    ),
    Field(
        name="task",
        kind="str",
        metavar="NAME",
        brief="A built-in task in place of --data: example, sst2, ...",
        help="A built-in task instead of --data: sst2, trec, boolq, ..., or example.",
        example="example",
    ),
    Field(
        name="data_root",
        kind="str",
        metavar="DIR",
        help="Folder that holds the data sets of --task.",
        example="datasets",
        free_on_resume=True,
    ),
    Field(
        name="template",
        kind="str",
        metavar="TEXT",
        brief="Prompt of a labelled row: '{text} It was'.",
        help="Prompt of a labelled row; braces name fields of the row: '{text} It was'.",
        example="{text} It was",
    ),
    Field(
        name="labels",
        kind="str",
        metavar="TEXT",
        brief="Label values, each with its word: '0=bad,1=good'.",
        help="Label values, each with its word: '0=bad,1=good'.",
        example="0=bad,1=good",
    ),
    Field(
        name="label_field",
        kind="str",
        metavar="NAME",
        brief="Column that holds the label.  [default: label]",
        help="Column of a labelled row that holds the label.",
        default="label",
    ),
    Field(
        name="text_end",
        kind="choice",
        help="Whether rows with text end with the end token, which is learned too.",
        default="yes",
        choices=("yes", "no"),
    ),
    Field(
        name="speaker",
        kind="str",
        metavar="NAME",
        help="Of exported chats, learn the answers of this person only, and the others' messages as what is asked.",
        default_text="every message is learned",
        example="Ann",
    ),
    Field(
        name="skip_bad_rows",
        kind="bool",
        help="Leave out rows that cannot be used, and list them in RUN/skipped.jsonl.",
        default=False,
    ),
    Field(
        name="max_length",
        kind="int",
        metavar="N",
        help="Tokens of the longest row; longer rows are cut, and rows with text become several.",
        default=512,
        low=8,
        high=1_048_576,
    ),
    Field(
        name="held_out",
        kind="float",
        metavar="SHARE",
        help="Hold out this share of the training rows for evaluation, instead of the validation rows.",
        default_text="none where there are validation rows, else 0.1",
        example=0.1,
        low=0,
        high=0.9,
        open_low=True,
    ),
    Field(
        name="eval_limit",
        kind="int",
        everything=ALL_ROWS,
        metavar="N",
        help="Evaluate on no more than this many rows, or on all.",
        default_text="300 of finetune, fewer where --for has no time for them; all of eval",
        example=500,
        low=1,
    ),
    Field(
        name="seed",
        kind="int",
        metavar="N",
        help="Seed of the order of rows, of directions and of low-rank bases.",
        default=0,
        low=0,
        high=2**63 - 1,
    ),
)

PREDICTION = (
    Field(
        name="objective",
        kind="str",
        metavar="NAME",
        help=f"What training improves: {LOSS}, or a score of predictions: {', '.join(OBJECTIVES[1:])}, or "
        "module:function, a Python function (prediction, row) -> float.",
        default=LOSS,
    ),
    Field(
        name="max_new_tokens",
        kind="int",
        metavar="N",
        help="Tokens of the longest answer that the model writes.",
        default_text="the task's",
        example=32,
        low=1,
        high=65_536,
    ),
)
