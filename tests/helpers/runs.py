"""A small training by the command line: its data, its configuration, and what it logged."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


def write_folder(folder, number=40, extra=()):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        word = WORDS[index % 8]
        segments = [{"text": word}, {"shout": word.upper()}][:: 1 if index % 2 else -1]
        rows.append({"split": ("train", "train", "validation", "test")[index % 4], "segments": segments})
    lines = [json.dumps(row) for row in rows] + list(extra)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(folder, **trainer):
    tokenizers = {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}
    return {
        "seed_everything": 1,
        "model": {
            "class_path": "multidiff.training.MaskedDiffusionModule",
            "init_args": {
                "tokenizers": tokenizers,
                "transformer": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
                "tasks": [
                    {"roles": {"text": "target", "others": "given"}, "condition_dropout": 0.2},
                    {"roles": {"others": "target"}, "noise": "shared"},
                ],
                "optimizer": {"class_path": "multidiff.training.MuonAdamW", "init_args": {"lr": 0.01}},
                "warmup_steps": 2,
                "samplers": {"text": {"canvas": {"tokens": 5}}},
            },
        },
        "data": {
            "class_path": "multidiff.data.DocumentDataModule",
            "init_args": {
                "source": str(folder / "data"),
                "tokenizers": "${model.init_args.tokenizers}",
                "batch_size": 4,
                "max_eos_padding": {"text": 3},
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 8,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": "log"},
            },
            "callbacks": [
                {"class_path": "multidiff.training.Previews", "init_args": {"num_samples": 2}},
                {"class_path": "multidiff.training.SaveModel", "init_args": {"folder": str(folder / "model")}},
                {"class_path": "multidiff.training.AveragedWeights", "init_args": {"decay": 0.9}},
                {
                    "class_path": "multidiff.training.Checkpoints",
                    "init_args": {
                        "dirpath": str(folder / "checkpoints"),
                        "every_n_train_steps": 1,
                        "save_top_k": -1,
                        "filename": "{step}",
                        "auto_insert_metric_name": False,
                    },
                },
            ],
            **trainer,
        },
    }


def write_config(folder, settings):
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


def scalars(folder):
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
